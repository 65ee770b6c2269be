/* gguf.c: the GGUF reader. Format facts: the GGUF specification (ggml, docs/gguf.md).
 *
 * Layout: magic, u32 version, u64 tensor count, u64 key count; the keys; the tensor descriptions;
 * padding to general.alignment; the tensors' data, each at an aligned offset.
 *
 * Stricter than the specification's words, so that nothing behind has to wonder: keys and tensor
 * names are valid UTF-8 without control characters and occur once; booleans are 0 or 1; the
 * alignment is a power of two from 8 on; dimensions are at least 1; tensors do not overlap. String
 * values may hold any bytes, NUL too: vocabularies have such tokens. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* madvise under -std=c11 */
#endif
#ifndef _DARWIN_C_SOURCE
#define _DARWIN_C_SOURCE 1
#endif

#include "gguf.h"
#include "dequant.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEADER_BYTES 24u
/* The least a key and a tensor description can take; they bound the header's promises. */
#define MIN_KEY_BYTES    14u /* u64 length, one letter, u32 type, one byte */
#define MIN_TENSOR_BYTES 33u /* u64 length, one letter, u32 dims, u64 dim, u32 type, u64 offset */
#define MAX_NAME         65535u
#define MAX_ENTRIES      (1u << 20) /* real files have hundreds; keeps the index 32-bit and quick */

struct cursor {
    const uint8_t *at, *end;
};

/* Where a tensor lies, until the start of the data section is known. */
struct extent {
    uint64_t offset, size, tensor;
};

struct name_index {
    uint32_t *keys, *tensors; /* [mask + 1] each, open addressing: 1 + entry number, or 0 */
    uint32_t key_mask, tensor_mask;
};

struct parser {
    struct gguf_file *file;
    struct cursor in;
    amber_error *err;
    struct extent *extents; /* [n_tensors], grows along with the tensors */
};

/* Bytes of one element; 0 for strings and arrays. */
static const uint8_t value_bytes[13] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
static const char *const value_names[13] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                            "bool", "string", "array", "u64", "i64", "f64"};

static uint32_t load_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static uint64_t load_u64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

/* ---- text ---- */

/* A name for a message: at most 40 bytes, what is not printable ASCII as '?'. */
struct shown {
    char text[44];
};

static struct shown show(struct gguf_string s) {
    struct shown out;
    size_t n = s.len > 40 ? 37 : (size_t)s.len;
    for (size_t i = 0; i < n; i++) {
        out.text[i] = s.data[i] >= 0x20 && s.data[i] < 0x7F ? s.data[i] : '?';
    }
    strcpy(out.text + n, s.len > 40 ? "..." : "");
    return out;
}

/* Valid UTF-8 (Unicode standard, table 3-7) without control characters. */
static bool is_clean_text(const char *text, uint64_t len) {
    const uint8_t *s = (const uint8_t *)text, *end = s + len;
    while (s < end) {
        uint8_t lead = *s++;
        if (lead < 0x20 || lead == 0x7F) return false;
        if (lead < 0x80) continue;
        int rest = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
        if (lead < 0xC2 || lead > 0xF4 || end - s < rest) return false;
        uint8_t least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        uint8_t most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (*s < least || *s > most) return false;
        for (int i = 1; i < rest; i++) {
            if ((s[i] & 0xC0) != 0x80) return false;
        }
        s += rest;
    }
    return true;
}

/* Names keep both ends where they are too long: the quantization is named at the end. */
static void set_label(struct gguf_file *file, const char *name) {
    const size_t cap = 64; /* leaves the larger part of a message to the message */
    size_t n = strlen(name);
    if (n < cap) {
        memcpy(file->label, name, n + 1);
        return;
    }
    size_t head = cap / 2 - 2, tail = cap / 2 - 2;
    while (head > 0 && ((uint8_t)name[head] & 0xC0) == 0x80) head--;
    while (tail > 0 && ((uint8_t)name[n - tail] & 0xC0) == 0x80) tail--;
    memcpy(file->label, name, head);
    memcpy(file->label + head, "...", 3);
    memcpy(file->label + head + 3, name + n - tail, tail + 1);
}

/* ---- files of other kinds ---- */

static bool starts_with(const uint8_t *data, size_t size, const char *magic, size_t n) {
    return size >= n && memcmp(data, magic, n) == 0;
}

static bool starts_with_ignoring_case(const uint8_t *data, size_t size, const char *lower) {
    size_t n = strlen(lower);
    if (size < n) return false;
    for (size_t i = 0; i < n; i++) {
        uint8_t c = data[i] >= 'A' && data[i] <= 'Z' ? (uint8_t)(data[i] + 32) : data[i];
        if (c != (uint8_t)lower[i]) return false;
    }
    return true;
}

static bool is_safetensors(const uint8_t *data, size_t size) {
    /* u64 length of a JSON header, then the header. */
    if (size < 10 || data[8] != '{') return false;
    uint64_t header = load_u64(data);
    return header >= 2 && header <= 100000000;
}

static bool is_zeros(const uint8_t *data, size_t size) {
    for (size_t i = 0; i < size && i < 4096; i++) {
        if (data[i]) return false;
    }
    return size > 0;
}

/* What a file is that does not begin with the magic, and what to do; NULL where unknown. */
static const char *name_kind(const uint8_t *data, size_t size) {
    static const struct {
        uint8_t length;
        const char *magic, *found;
    } kinds[] = {
        {4, "PK\3\4", "a zip archive, as PyTorch writes (unpack it, or convert the model to GGUF)"},
        {2, "\x1f\x8b", "gzip-compressed data (unpack it first)"},
        {4, "\x28\xb5\x2f\xfd", "zstd-compressed data (unpack it first)"},
        {6, "\3757zXZ", "xz-compressed data (unpack it first)"},
        {3, "BZh", "bzip2-compressed data (unpack it first)"},
        {6, "7z\xbc\xaf\x27\x1c", "a 7z archive (unpack it first)"},
        {2, "\x80\2", "a Python pickle, as old PyTorch writes (convert the model to GGUF)"},
        {4, "lmgg", "the old ggml format (get a GGUF file of this model)"},
        {4, "fmgg", "the old ggmf format (get a GGUF file of this model)"},
        {4, "tjgg", "the old ggjt format (get a GGUF file of this model)"},
        {4, "algg", "an old ggla adapter (get it as GGUF)"},
        {4, "FUGG", "a byte-swapped GGUF file (get the little-endian file)"},
        {5, "\x89HDF\r", "an HDF5 file (convert the model to GGUF)"},
        {4, "\177ELF", "a program (give the path of a model)"},
        {23, "version https://git-lfs",
         "a Git LFS pointer (run \"git lfs pull\", or download the file itself)"},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (starts_with(data, size, kinds[i].magic, kinds[i].length)) return kinds[i].found;
    }
    if (is_safetensors(data, size)) return "a safetensors file (convert the model to GGUF)";
    if (size >= 262 && !memcmp(data + 257, "ustar", 5)) return "a tar archive (unpack it first)";
    if (is_zeros(data, size)) {
        return "zero bytes (the download was not finished; download it again)";
    }
    /* Texts may begin with a byte order mark and white space. */
    size_t i = starts_with(data, size, "\xef\xbb\xbf", 3) ? 3 : 0;
    while (i < size && memchr(" \t\r\n", data[i], 4)) i++;
    const uint8_t *text = data + i;
    size_t left = size - i;
    if (starts_with_ignoring_case(text, left, "<!doctype html") ||
        starts_with_ignoring_case(text, left, "<html")) {
        return "an HTML page (the link led to a web page; download the file itself)";
    }
    if (starts_with_ignoring_case(text, left, "<?xml")) {
        return "an XML text, often a server's error (download the file itself)";
    }
    if (left > 0 && (*text == '{' || *text == '[')) {
        return "a JSON text (give the path of the .gguf file)";
    }
    return NULL;
}

static amber_status fail_wrong_kind(const struct gguf_file *file, amber_error *err) {
    const uint8_t *data = file->map;
    if (file->size < 4) {
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: expected a GGUF model, found %zu bytes (truncated; download it "
                          "again)",
                          file->label, file->size);
    }
    const char *found = name_kind(data, file->size);
    if (found) {
        return amber_fail(err, AMBER_ERR_FORMAT, "%s: expected a GGUF model, found %s", file->label,
                          found);
    }
    return amber_fail(err, AMBER_ERR_FORMAT,
                      "%s: expected a GGUF model with magic 47 47 55 46, found %02x %02x %02x "
                      "%02x (not a model file, or damaged)",
                      file->label, data[0], data[1], data[2], data[3]);
}

/* ---- reading with proof ---- */

static uint64_t left_of(const struct cursor *in) {
    return (uint64_t)(in->end - in->at);
}

/* The next n bytes, or NULL where the file ends before. */
static const uint8_t *take(struct cursor *in, uint64_t n) {
    if (n > left_of(in)) return NULL;
    const uint8_t *p = in->at;
    in->at += n;
    return p;
}

static bool read_u32(struct cursor *in, uint32_t *out) {
    const uint8_t *p = take(in, 4);
    if (p) *out = load_u32(p);
    return p != NULL;
}

static bool read_u64(struct cursor *in, uint64_t *out) {
    const uint8_t *p = take(in, 8);
    if (p) *out = load_u64(p);
    return p != NULL;
}

static bool read_string(struct cursor *in, struct gguf_string *out) {
    uint64_t len;
    struct cursor try = *in;
    if (!read_u64(&try, &len)) return false;
    const uint8_t *p = take(&try, len);
    if (!p) return false;
    *in = try;
    out->data = (const char *)p;
    out->len = len;
    return true;
}

/* The file ends inside entry i of n ("key" or "tensor"). */
static amber_status fail_short(const struct parser *p, const char *kind, uint64_t i, uint64_t n) {
    return amber_fail(p->err, AMBER_ERR_FORMAT,
                      "%s: %s %" PRIu64 " of %" PRIu64 ", near byte %" PRIu64
                      ": expected more data, found the file's end at %zu (truncated or damaged; "
                      "download it again)",
                      p->file->label, kind, i + 1, n, (uint64_t)(p->in.at - p->file->map),
                      p->file->size);
}

static amber_status fail_name(const struct parser *p, const char *kind, uint64_t i,
                              struct gguf_string name) {
    return amber_fail(p->err, AMBER_ERR_FORMAT,
                      "%s: %s %" PRIu64 ": expected a name of 1 to %u bytes of clean UTF-8, found "
                      "%" PRIu64 " bytes \"%s\" (damaged file)",
                      p->file->label, kind, i + 1, MAX_NAME, name.len, show(name).text);
}

static bool is_name(struct gguf_string s) {
    return s.len >= 1 && s.len <= MAX_NAME && is_clean_text(s.data, s.len);
}

/* The arrays of entries grow with what was really read, whatever the header promised. */
static uint64_t more_room(uint64_t room) {
    return room ? 2 * room : 32;
}

static amber_status fail_memory(const struct parser *p) {
    return amber_fail(p->err, AMBER_ERR_MEMORY,
                      "%s: expected memory for the header, found none (close other programs)",
                      p->file->label);
}

/* ---- name look-up ---- */

static uint32_t hash_name(const char *s, uint64_t n) {
    uint64_t h = UINT64_C(0xCBF29CE484222325); /* FNV-1a */
    for (uint64_t i = 0; i < n; i++) h = (h ^ (uint8_t)s[i]) * UINT64_C(0x100000001B3);
    return (uint32_t)(h ^ h >> 32);
}

static bool same_name(struct gguf_string a, const char *s, uint64_t n) {
    return a.len == n && memcmp(a.data, s, (size_t)n) == 0;
}

static struct gguf_string name_of(const struct gguf_file *file, bool tensor, uint64_t i) {
    return tensor ? file->tensors[i].name : file->kv[i].key;
}

/* The slot that holds the name, or the empty one where it belongs. */
static uint32_t *find_slot(const struct gguf_file *file, bool tensor, uint32_t *slots,
                           uint32_t mask, const char *s, uint64_t n) {
    uint32_t at = hash_name(s, n) & mask;
    while (slots[at] && !same_name(name_of(file, tensor, slots[at] - 1), s, n)) {
        at = (at + 1) & mask;
    }
    return &slots[at];
}

/* Fails on a name that occurs twice. */
static amber_status build_index(struct parser *p, bool tensor) {
    struct gguf_file *file = p->file;
    struct name_index *index = file->index;
    uint64_t n = tensor ? file->n_tensors : file->n_kv;
    uint32_t capacity = 16;
    while (capacity < 2 * n) capacity *= 2;
    uint32_t *slots = calloc(capacity, sizeof *slots);
    if (!slots) return fail_memory(p);
    if (tensor) {
        index->tensors = slots, index->tensor_mask = capacity - 1;
    } else {
        index->keys = slots, index->key_mask = capacity - 1;
    }
    for (uint64_t i = 0; i < n; i++) {
        struct gguf_string name = name_of(file, tensor, i);
        uint32_t *slot = find_slot(file, tensor, slots, capacity - 1, name.data, name.len);
        if (*slot) {
            return amber_fail(p->err, AMBER_ERR_FORMAT,
                              "%s: expected every %s once, found \"%s\" again (damaged file)",
                              file->label, tensor ? "tensor" : "key", show(name).text);
        }
        *slot = (uint32_t)i + 1;
    }
    return AMBER_OK;
}

const struct gguf_kv *gguf_find(const struct gguf_file *file, const char *key) {
    const struct name_index *index = file->index;
    uint32_t found = *find_slot(file, false, index->keys, index->key_mask, key, strlen(key));
    return found ? &file->kv[found - 1] : NULL;
}

const struct gguf_tensor *gguf_find_tensor(const struct gguf_file *file, const char *name) {
    const struct name_index *index = file->index;
    uint32_t found = *find_slot(file, true, index->tensors, index->tensor_mask, name, strlen(name));
    return found ? &file->tensors[found - 1] : NULL;
}

/* ---- keys ---- */

/* Moves over kv->count elements of kv->elem_type. */
static amber_status parse_elements(struct parser *p, uint64_t i, struct gguf_kv *kv) {
    const char *label = p->file->label;
    kv->data = p->in.at;
    uint64_t least = kv->elem_type == GGUF_STRING ? 8 : value_bytes[kv->elem_type];
    if (kv->count > left_of(&p->in) / least) {
        if (kv->type != GGUF_ARRAY) return fail_short(p, "key", i, p->file->n_kv);
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: key \"%s\": expected an array of %" PRIu64 " %s, found %" PRIu64
                          " bytes left (truncated or damaged; download it again)",
                          label, show(kv->key).text, kv->count, value_names[kv->elem_type],
                          left_of(&p->in));
    }
    if (kv->elem_type == GGUF_STRING) {
        struct gguf_string s;
        for (uint64_t k = 0; k < kv->count; k++) {
            if (read_string(&p->in, &s)) continue;
            return amber_fail(p->err, AMBER_ERR_FORMAT,
                              "%s: key \"%s\", string %" PRIu64 " of %" PRIu64
                              ": found the file's end inside it (truncated or damaged; download "
                              "it again)",
                              label, show(kv->key).text, k + 1, kv->count);
        }
    } else {
        take(&p->in, kv->count * least);
    }
    kv->size = (uint64_t)(p->in.at - kv->data);
    if (kv->elem_type == GGUF_BOOL) {
        for (uint64_t k = 0; k < kv->count; k++) {
            if (kv->data[k] <= 1) continue;
            return amber_fail(p->err, AMBER_ERR_FORMAT,
                              "%s: key \"%s\": expected a bool of 0 or 1, found %u (damaged file)",
                              label, show(kv->key).text, kv->data[k]);
        }
    }
    return AMBER_OK;
}

static amber_status parse_kv(struct parser *p, uint64_t i, struct gguf_kv *kv) {
    struct gguf_file *file = p->file;
    memset(kv, 0, sizeof *kv);
    if (!read_string(&p->in, &kv->key)) return fail_short(p, "key", i, file->n_kv);
    if (!is_name(kv->key)) return fail_name(p, "key", i, kv->key);
    if (!read_u32(&p->in, &kv->type)) return fail_short(p, "key", i, file->n_kv);
    kv->elem_type = kv->type;
    kv->count = 1;
    if (kv->type == GGUF_ARRAY &&
        (!read_u32(&p->in, &kv->elem_type) || !read_u64(&p->in, &kv->count))) {
        return fail_short(p, "key", i, file->n_kv);
    }
    if (kv->type > GGUF_F64 || kv->elem_type > GGUF_F64) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: key \"%s\": expected a value type of 0 to 12, found %u (damaged, or "
                          "made for a newer reader)",
                          file->label, show(kv->key).text,
                          kv->type > GGUF_F64 ? kv->type : kv->elem_type);
    }
    if (kv->elem_type == GGUF_ARRAY) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: key \"%s\": expected an array of plain values, found an array of "
                          "arrays (damaged, or not a model)",
                          file->label, show(kv->key).text);
    }
    return parse_elements(p, i, kv);
}

static amber_status parse_keys(struct parser *p, uint64_t n) {
    struct gguf_file *file = p->file;
    amber_status status = AMBER_OK;
    file->n_kv = n;
    uint64_t room = 0;
    for (uint64_t i = 0; i < n && !status; i++) {
        if (i == room) {
            room = more_room(room);
            struct gguf_kv *kv = realloc(file->kv, (size_t)room * sizeof *kv);
            if (!kv) return fail_memory(p);
            file->kv = kv;
        }
        status = parse_kv(p, i, &file->kv[i]);
    }
    return status ? status : build_index(p, false);
}

static amber_status parse_alignment(struct parser *p) {
    int64_t alignment = 32; /* the specification's default */
    if (gguf_get_i64(p->file, "general.alignment", 0, UINT32_MAX, &alignment, p->err) < 0) {
        return AMBER_ERR_FORMAT;
    }
    if (alignment < 8 || (alignment & (alignment - 1)) != 0) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: general.alignment: expected a power of two from 8 on, found %" PRId64
                          " (damaged file)",
                          p->file->label, alignment);
    }
    p->file->alignment = (uint32_t)alignment;
    return AMBER_OK;
}

/* ---- tensors ---- */

/* Bytes of the tensor, with proof of its type, shape and size. */
static amber_status measure_tensor(struct parser *p, struct gguf_tensor *t) {
    const char *label = p->file->label;
    struct shown name = show(t->name);
    const struct type_info *info = type_info(t->type);
    if (!info) {
        return amber_fail(p->err, AMBER_ERR_UNSUPPORTED,
                          "%s: tensor \"%s\": expected a known tensor type, found number %" PRIu32
                          " (made for a newer reader, or damaged)",
                          label, name.text, t->type);
    }
    if (!info->block_bytes) {
        return amber_fail(p->err, AMBER_ERR_UNSUPPORTED,
                          "%s: tensor \"%s\": expected a type still in use, found %s (get the "
                          "model in another quantization)",
                          label, name.text, info->name);
    }
    if (t->ne[0] % info->block_values) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: tensor \"%s\": expected rows of a multiple of %u values for %s, "
                          "found %" PRIu64 " (damaged file)",
                          label, name.text, info->block_values, info->name, t->ne[0]);
    }
    uint64_t values = t->ne[0], size = type_row_bytes(t->type, t->ne[0]);
    bool fits = size > 0;
    for (int d = 1; d < 4 && fits; d++) {
        fits = t->ne[d] <= (uint64_t)INT64_MAX / values && t->ne[d] <= (uint64_t)INT64_MAX / size;
        if (fits) values *= t->ne[d], size *= t->ne[d];
    }
    if (!fits || values > INT64_MAX || size > INT64_MAX) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: tensor \"%s\": expected a size below 2^63, found %" PRIu64
                          " x %" PRIu64 " x %" PRIu64 " x %" PRIu64 " (damaged file)",
                          label, name.text, t->ne[0], t->ne[1], t->ne[2], t->ne[3]);
    }
    t->size = size;
    return AMBER_OK;
}

static amber_status parse_tensor(struct parser *p, uint64_t i, struct gguf_tensor *t,
                                 struct extent *extent) {
    struct gguf_file *file = p->file;
    memset(t, 0, sizeof *t);
    if (!read_string(&p->in, &t->name)) return fail_short(p, "tensor", i, file->n_tensors);
    if (!is_name(t->name)) return fail_name(p, "tensor", i, t->name);
    if (!read_u32(&p->in, &t->n_dims)) return fail_short(p, "tensor", i, file->n_tensors);
    if (t->n_dims < 1 || t->n_dims > 4) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: tensor \"%s\": expected 1 to 4 dimensions, found %" PRIu32
                          " (damaged file)",
                          file->label, show(t->name).text, t->n_dims);
    }
    for (uint32_t d = 0; d < 4; d++) {
        t->ne[d] = 1;
        if (d < t->n_dims && !read_u64(&p->in, &t->ne[d])) {
            return fail_short(p, "tensor", i, file->n_tensors);
        }
        if (t->ne[d] == 0) {
            return amber_fail(p->err, AMBER_ERR_FORMAT,
                              "%s: tensor \"%s\": expected dimensions from 1 on, found 0 (damaged "
                              "file)",
                              file->label, show(t->name).text);
        }
    }
    uint64_t offset;
    if (!read_u32(&p->in, &t->type) || !read_u64(&p->in, &offset)) {
        return fail_short(p, "tensor", i, file->n_tensors);
    }
    amber_status status = measure_tensor(p, t);
    if (status) return status;
    if (offset % file->alignment) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: tensor \"%s\": expected an offset that is a multiple of %" PRIu32
                          ", found %" PRIu64 " (damaged file)",
                          file->label, show(t->name).text, file->alignment, offset);
    }
    if (offset > (uint64_t)INT64_MAX - t->size) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: tensor \"%s\": expected an offset below 2^63, found %" PRIu64
                          " (damaged file)",
                          file->label, show(t->name).text, offset);
    }
    *extent = (struct extent){offset, t->size, i};
    return AMBER_OK;
}

static int by_offset(const void *a, const void *b) {
    const struct extent *x = a, *y = b;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Gives every tensor its data, once the data section is known to hold all of them. */
static amber_status place_tensors(struct parser *p) {
    struct gguf_file *file = p->file;
    uint64_t n = file->n_tensors;
    if (n == 0) return AMBER_OK; /* a vocabulary: the data section may be missing altogether */
    uint64_t header = (uint64_t)(p->in.at - file->map), align = file->alignment;
    uint64_t start = (header + align - 1) / align * align; /* below 2^63 + 2^32 */
    uint64_t need = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t end = p->extents[i].offset + p->extents[i].size;
        if (end > need) need = end;
    }
    if (start > file->size || need > file->size - start) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: expected %" PRIu64 " bytes by its header, found %zu (incomplete "
                          "download or copy; download it again)",
                          file->label, start + need, file->size);
    }
    for (uint64_t i = 0; i < n; i++) {
        file->tensors[i].data = file->map + start + p->extents[i].offset;
    }
    qsort(p->extents, (size_t)n, sizeof *p->extents, by_offset);
    for (uint64_t i = 1; i < n; i++) {
        const struct extent *a = &p->extents[i - 1], *b = &p->extents[i];
        if (b->offset - a->offset >= a->size) continue;
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: expected tensors side by side, found \"%s\" inside \"%s\" (damaged "
                          "file)",
                          file->label, show(file->tensors[b->tensor].name).text,
                          show(file->tensors[a->tensor].name).text);
    }
    return AMBER_OK;
}

static amber_status parse_tensors(struct parser *p, uint64_t n) {
    struct gguf_file *file = p->file;
    if (n > left_of(&p->in) / MIN_TENSOR_BYTES) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: expected %" PRIu64 " tensors by its header, found %" PRIu64
                          " bytes left (truncated or damaged; download it again)",
                          file->label, n, left_of(&p->in));
    }
    amber_status status = AMBER_OK;
    file->n_tensors = n;
    uint64_t room = 0;
    for (uint64_t i = 0; i < n && !status; i++) {
        if (i == room) {
            room = more_room(room);
            struct gguf_tensor *tensors = realloc(file->tensors, (size_t)room * sizeof *tensors);
            if (tensors) file->tensors = tensors;
            struct extent *extents = realloc(p->extents, (size_t)room * sizeof *extents);
            if (extents) p->extents = extents;
            if (!tensors || !extents) return fail_memory(p);
        }
        status = parse_tensor(p, i, &file->tensors[i], &p->extents[i]);
    }
    if (!status) status = build_index(p, true);
    return status ? status : place_tensors(p);
}

/* ---- the header ---- */

static amber_status parse_file(struct parser *p) {
    struct gguf_file *file = p->file;
    const char *label = file->label;
    if (file->size == 0) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: expected a GGUF model, found an empty file (download it again)",
                          label);
    }
    if (!starts_with(file->map, file->size, "GGUF", 4)) {
        return fail_wrong_kind(file, p->err);
    }
    if (file->size < HEADER_BYTES) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: expected a header of %u bytes, found %zu bytes (truncated; download "
                          "it again)",
                          label, HEADER_BYTES, file->size);
    }
    uint32_t version = file->version = load_u32(file->map + 4);
    uint64_t n_tensors = load_u64(file->map + 8), n_kv = load_u64(file->map + 16);
    take(&p->in, HEADER_BYTES);
    if (version == 1) {
        return amber_fail(p->err, AMBER_ERR_UNSUPPORTED,
                          "%s: expected GGUF version 2 or 3, found version 1 (convert the model "
                          "again, or get a newer file)",
                          label);
    }
    /* A small number in the high half is a version that was written most significant byte first. */
    if (version != 0 && (version & 0xFFFF) == 0) {
        return amber_fail(p->err, AMBER_ERR_UNSUPPORTED,
                          "%s: expected a little-endian GGUF file, found a byte-swapped "
                          "(big-endian) one (get the little-endian file)",
                          label);
    }
    if (version == 0 || version > 0xFFFF) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: expected GGUF version 2 or 3, found %" PRIu32 " (damaged file)",
                          label, version);
    }
    if (version > 3) {
        return amber_fail(p->err, AMBER_ERR_UNSUPPORTED,
                          "%s: expected GGUF version 2 or 3, found the newer version %" PRIu32
                          " (update Amber, or get an older file)",
                          label, version);
    }
    if (n_kv > left_of(&p->in) / MIN_KEY_BYTES || n_tensors > left_of(&p->in) / MIN_TENSOR_BYTES ||
        n_kv > MAX_ENTRIES || n_tensors > MAX_ENTRIES) {
        return amber_fail(p->err, AMBER_ERR_FORMAT,
                          "%s: expected at most %u keys and tensors that fit %zu bytes, found "
                          "%" PRIu64 " keys, %" PRIu64 " tensors (truncated or damaged; download "
                          "it again)",
                          label, MAX_ENTRIES, file->size, n_kv, n_tensors);
    }
    amber_status status = parse_keys(p, n_kv);
    if (!status) status = parse_alignment(p);
    return status ? status : parse_tensors(p, n_tensors);
}

/* Takes over the mapping where owns_map is set, also when it fails. */
static amber_status parse(const uint8_t *data, size_t size, const char *label, bool owns_map,
                          struct gguf_file **out, amber_error *err) {
    static const uint8_t nothing[1];
    struct gguf_file *file = calloc(1, sizeof *file);
    struct name_index *index = calloc(1, sizeof *index);
    *out = NULL;
    if (!file || !index) {
        free(file);
        free(index);
        if (owns_map && size) munmap((void *)(uintptr_t)data, size);
        return amber_fail(err, AMBER_ERR_MEMORY,
                          "%.64s: expected memory for the header, found none (close other "
                          "programs)",
                          label);
    }
    file->map = data ? data : nothing;
    file->size = data ? size : 0;
    file->owns_map = owns_map;
    file->index = index;
    set_label(file, label);
    struct parser p = {.file = file, .in = {file->map, file->map + file->size}, .err = err};
    amber_status status = parse_file(&p);
    free(p.extents);
    if (status) {
        gguf_close(file);
        return status;
    }
    *out = file;
    return AMBER_OK;
}

amber_status gguf_parse(const uint8_t *data, size_t size, const char *label, struct gguf_file **out,
                        amber_error *err) {
    return parse(data, size, label, false, out, err);
}

/* The end of a path, which has the name, where all of it would fill the message. */
static const char *end_of_path(const char *path) {
    size_t n = strlen(path);
    const char *end = n > 140 ? path + n - 140 : path;
    while (((uint8_t)*end & 0xC0) == 0x80) end++;
    return end;
}

amber_status gguf_open(const char *path, struct gguf_file **out, amber_error *err) {
    struct stat info;
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not hang the caller */
    if (fd < 0 || fstat(fd, &info) != 0) {
        int code = errno;
        if (fd >= 0) close(fd);
        return amber_fail(err, AMBER_ERR_IO,
                          "%s: expected a readable file, found: %s (check the path)",
                          end_of_path(path), strerror(code));
    }
    if (!S_ISREG(info.st_mode)) {
        close(fd);
        return amber_fail(
            err, AMBER_ERR_IO, "%s: expected a GGUF file, found %s", end_of_path(path),
            S_ISDIR(info.st_mode) ? "a directory (give the path of a .gguf file in it)"
                                  : "a device or pipe (save it to a file first)");
    }
    if ((uintmax_t)info.st_size > PTRDIFF_MAX) {
        close(fd);
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: expected a file below %td bytes, found %jd (use a 64-bit "
                          "system)",
                          end_of_path(path), PTRDIFF_MAX, (intmax_t)info.st_size);
    }
    size_t size = (size_t)info.st_size;
    void *map = size ? mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    int code = errno;
    close(fd);
    if (map == MAP_FAILED) {
        return amber_fail(err, AMBER_ERR_IO,
                          "%s: expected to map %zu bytes, found: %s (copy the file to a local "
                          "disk)",
                          end_of_path(path), size, strerror(code));
    }
    return parse(map, size, amber_basename(path), size > 0, out, err);
}

void gguf_close(struct gguf_file *file) {
    if (!file) return;
    struct name_index *index = file->index;
    if (index) {
        free(index->keys);
        free(index->tensors);
        free(index);
    }
    if (file->owns_map) munmap((void *)(uintptr_t)file->map, file->size);
    free(file->kv);
    free(file->tensors);
    free(file);
}

void gguf_drop_pages(const struct gguf_file *file, const struct gguf_tensor *tensor) {
    /* Dropping pages of memory that is not a mapped file would lose its content. */
    if (!file->owns_map) return;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)tensor->data + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)tensor->data + tensor->size) / page * page;
    if (begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

/* ---- values ---- */

/* False for an unsigned value beyond int64 and for types that are not integers. */
static bool integer_at(const struct gguf_kv *kv, uint64_t i, int64_t *out) {
    if (kv->elem_type > GGUF_F64) return false;
    const uint8_t *p = kv->data + i * value_bytes[kv->elem_type];
    uint64_t u = 0;
    switch (kv->elem_type) {
    case GGUF_BOOL:
    case GGUF_U8:
        *out = *p;
        return true;
    case GGUF_I8:
        *out = (int8_t)*p;
        return true;
    case GGUF_U16:
        memcpy(&u, p, 2);
        *out = (int64_t)u;
        return true;
    case GGUF_I16:
        memcpy(&u, p, 2);
        *out = (int16_t)u;
        return true;
    case GGUF_U32:
        *out = load_u32(p);
        return true;
    case GGUF_I32:
        *out = (int32_t)load_u32(p);
        return true;
    case GGUF_U64:
        u = load_u64(p);
        *out = (int64_t)u;
        return u <= INT64_MAX;
    case GGUF_I64:
        *out = (int64_t)load_u64(p);
        return true;
    default:
        return false;
    }
}

static double double_at(const struct gguf_kv *kv, uint64_t i) {
    float f;
    double d;
    int64_t v;
    if (kv->elem_type == GGUF_F32) {
        memcpy(&f, kv->data + 4 * i, 4);
        return f;
    }
    if (kv->elem_type == GGUF_F64) {
        memcpy(&d, kv->data + 8 * i, 8);
        return d;
    }
    if (kv->elem_type == GGUF_U64) return (double)load_u64(kv->data + 8 * i);
    return integer_at(kv, i, &v) ? (double)v : 0.0;
}

double gguf_array_f64(const struct gguf_kv *kv, uint64_t i) {
    return double_at(kv, i);
}

int64_t gguf_array_i64(const struct gguf_kv *kv, uint64_t i) {
    int64_t v;
    if (integer_at(kv, i, &v)) return v;
    if (kv->elem_type == GGUF_U64) return INT64_MAX;
    double d = double_at(kv, i);
    if (!(d > -0x1p63)) return isnan(d) ? 0 : INT64_MIN;
    return d < 0x1p63 ? (int64_t)d : INT64_MAX;
}

struct gguf_string gguf_next_string(const uint8_t **cursor) {
    struct gguf_string s = {(const char *)*cursor + 8, load_u64(*cursor)};
    *cursor += 8 + s.len;
    return s;
}

int gguf_format_value(const struct gguf_kv *kv, char *buf, size_t cap) {
    char text[64];
    struct gguf_string s = {text, 0};
    int64_t v;
    if (kv->type == GGUF_ARRAY) {
        s.len = (uint64_t)snprintf(text, sizeof text, "[%s x %" PRIu64 "]",
                                   value_names[kv->elem_type], kv->count);
    } else if (kv->type == GGUF_STRING) {
        const uint8_t *cursor = kv->data;
        s = gguf_next_string(&cursor);
    } else if (kv->type == GGUF_BOOL) {
        s.len = (uint64_t)snprintf(text, sizeof text, "%s", kv->data[0] ? "true" : "false");
    } else if (kv->type == GGUF_F32 || kv->type == GGUF_F64) {
        /* The fewest digits that give the value back. */
        for (int digits = kv->type == GGUF_F32 ? 6 : 15; digits <= 17; digits++) {
            double d = double_at(kv, 0);
            s.len = (uint64_t)snprintf(text, sizeof text, "%.*g", digits, d);
            double back = strtod(text, NULL);
            if (kv->type == GGUF_F32 ? (float)back == (float)d : back == d) break;
            if (isnan(d)) break;
        }
    } else if (integer_at(kv, 0, &v)) {
        s.len = (uint64_t)snprintf(text, sizeof text, "%" PRId64, v);
    } else {
        s.len = (uint64_t)snprintf(text, sizeof text, "%" PRIu64, load_u64(kv->data));
    }
    if (cap > 0) {
        size_t n = s.len < cap - 1 ? (size_t)s.len : cap - 1;
        memcpy(buf, s.data, n);
        buf[n] = '\0';
    }
    return s.len > INT32_MAX ? INT32_MAX : (int)s.len;
}

static int fail_value(const struct gguf_file *file, const struct gguf_kv *kv, const char *expected,
                      amber_error *err) {
    char found[32];
    gguf_format_value(kv, found, sizeof found);
    struct shown text = show((struct gguf_string){found, strlen(found)});
    amber_fail(err, AMBER_ERR_FORMAT, "%s: key \"%s\": expected %s, found %s %s (damaged file)",
               file->label, show(kv->key).text, expected, value_names[kv->type], text.text);
    return -1;
}

int gguf_get_i64(const struct gguf_file *file, const char *key, int64_t min, int64_t max,
                 int64_t *out, amber_error *err) {
    const struct gguf_kv *kv = gguf_find(file, key);
    int64_t v;
    if (!kv) return 0;
    bool integer = kv->type != GGUF_ARRAY && kv->type != GGUF_BOOL && integer_at(kv, 0, &v);
    if (!integer || v < min || v > max) {
        char expected[72];
        snprintf(expected, sizeof expected, "an integer from %" PRId64 " to %" PRId64, min, max);
        return fail_value(file, kv, expected, err);
    }
    *out = v;
    return 1;
}

int gguf_get_f64(const struct gguf_file *file, const char *key, double *out, amber_error *err) {
    const struct gguf_kv *kv = gguf_find(file, key);
    if (!kv) return 0;
    bool number = kv->type == GGUF_F32 || kv->type == GGUF_F64;
    if (!number || !isfinite(double_at(kv, 0))) {
        return fail_value(file, kv, "a finite f32 or f64", err);
    }
    *out = double_at(kv, 0);
    return 1;
}

int gguf_get_bool(const struct gguf_file *file, const char *key, bool *out, amber_error *err) {
    const struct gguf_kv *kv = gguf_find(file, key);
    if (!kv) return 0;
    if (kv->type != GGUF_BOOL) return fail_value(file, kv, "a bool", err);
    *out = kv->data[0] != 0;
    return 1;
}

int gguf_get_string(const struct gguf_file *file, const char *key, struct gguf_string *out,
                    amber_error *err) {
    const struct gguf_kv *kv = gguf_find(file, key);
    if (!kv) return 0;
    if (kv->type != GGUF_STRING) return fail_value(file, kv, "a string", err);
    const uint8_t *cursor = kv->data;
    *out = gguf_next_string(&cursor);
    return 1;
}
