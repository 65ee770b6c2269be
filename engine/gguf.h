/* gguf.h: a reader of GGUF v2 and v3 files over a read-only mapping.
 *
 * Nothing in the file is believed: every count, length, offset and product is proven against the
 * file's size before it is used, so all that a struct gguf_file hands out lies inside the mapping.
 * Strings are not NUL-terminated. Big-endian files are refused by name. */
#ifndef AMBER_GGUF_H
#define AMBER_GGUF_H

#include "common.h"

/* clang-format off */
enum gguf_value_type {
    GGUF_U8 = 0, GGUF_I8 = 1, GGUF_U16 = 2, GGUF_I16 = 3, GGUF_U32 = 4, GGUF_I32 = 5,
    GGUF_F32 = 6, GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9, GGUF_U64 = 10, GGUF_I64 = 11,
    GGUF_F64 = 12,
};
/* clang-format on */

struct gguf_string {
    const char *data;
    uint64_t len;
};

struct gguf_kv {
    struct gguf_string key;
    uint32_t type;       /* gguf_value_type */
    uint32_t elem_type;  /* of an array; else equal to type */
    uint64_t count;      /* elements of an array; else 1 */
    const uint8_t *data; /* first element, unaligned; strings: their u64 length comes first */
    uint64_t size;       /* bytes from data on */
};

struct gguf_tensor {
    struct gguf_string name;
    uint32_t n_dims;
    uint32_t type;  /* a tensor type number; see dequant.h */
    uint64_t ne[4]; /* fastest-varying first; 1 beyond n_dims */
    const uint8_t *data;
    uint64_t size; /* bytes */
};

struct gguf_file {
    const uint8_t *map;
    size_t size;
    uint32_t version;
    uint32_t alignment;
    uint64_t n_kv, n_tensors;
    struct gguf_kv *kv;
    struct gguf_tensor *tensors;
    char label[96]; /* the file's base name, for messages */
    bool owns_map;
    void *index; /* private: name look-up */
};

/* Maps and parses a file. Wrong kinds of files are named (git-lfs pointer, HTML, safetensors, zip,
 * truncated, byte-swapped, newer version); so are unknown tensor types. */
amber_status gguf_open(const char *path, struct gguf_file **out, amber_error *err);
/* The same over memory that the caller keeps alive: the fuzz target's entry. */
amber_status gguf_parse(const uint8_t *data, size_t size, const char *label, struct gguf_file **out,
                        amber_error *err);
void gguf_close(struct gguf_file *file);

const struct gguf_kv *gguf_find(const struct gguf_file *file, const char *key); /* or NULL */
const struct gguf_tensor *gguf_find_tensor(const struct gguf_file *file, const char *name);

/* Typed look-ups. They return 1 and set *out where the key is there, 0 (and leave *out alone) where
 * it is absent, and -1 with err filled where it has a type or a value that does not fit: any
 * integer type that holds the value serves an integer look-up, F32 and F64 serve a float. */
int gguf_get_i64(const struct gguf_file *file, const char *key, int64_t min, int64_t max,
                 int64_t *out, amber_error *err);
int gguf_get_f64(const struct gguf_file *file, const char *key, double *out, amber_error *err);
int gguf_get_bool(const struct gguf_file *file, const char *key, bool *out, amber_error *err);
int gguf_get_string(const struct gguf_file *file, const char *key, struct gguf_string *out,
                    amber_error *err);

/* Element i of an array (or of a scalar with i = 0) as a number; i < kv->count is the caller's
 * duty. */
int64_t gguf_array_i64(const struct gguf_kv *kv, uint64_t i);
double gguf_array_f64(const struct gguf_kv *kv, uint64_t i);

/* Walks a string array: start with cursor = kv->data; each call returns the next string. */
struct gguf_string gguf_next_string(const uint8_t **cursor);

/* A value as text for display; arrays as "[type x count]". Returns the full length, cuts to cap
 * - 1. */
int gguf_format_value(const struct gguf_kv *kv, char *buf, size_t cap);

/* Tells the system that a tensor's pages are no longer needed (they can be read again). */
void gguf_drop_pages(const struct gguf_file *file, const struct gguf_tensor *tensor);

#endif
