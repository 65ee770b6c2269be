/* gguf_walk.h: touches everything that a parsed file hands out, through every reading function, so
 * that an address checker sees a pointer or a length that should not have been let through. */
#ifndef AMBER_GGUF_WALK_H
#define AMBER_GGUF_WALK_H

#include "dequant.h"
#include "gguf.h"

#include <stdlib.h>
#include <string.h>

static inline uint64_t walk_bytes(const void *data, uint64_t n) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n; i++) sum = sum * 31 + ((const uint8_t *)data)[i];
    return sum;
}

static inline uint64_t walk_value(const struct gguf_file *file, const struct gguf_kv *kv) {
    char text[48];
    uint64_t sum = walk_bytes(kv->data, kv->size);
    sum += (uint64_t)gguf_format_value(kv, text, sizeof text) + strlen(text);
    sum += (uint64_t)gguf_format_value(kv, NULL, 0);
    if (kv->elem_type == GGUF_STRING) {
        const uint8_t *cursor = kv->data;
        for (uint64_t i = 0; i < kv->count; i++) {
            struct gguf_string s = gguf_next_string(&cursor);
            sum += walk_bytes(s.data, s.len);
        }
        if (cursor != kv->data + kv->size) abort();
    } else {
        for (uint64_t i = 0; i < kv->count; i++) {
            double d = gguf_array_f64(kv, i);
            sum += (uint64_t)gguf_array_i64(kv, i) + (d > 0);
        }
    }
    /* The look-ups take NUL-terminated keys, and file keys hold no NUL. */
    char *key = malloc((size_t)kv->key.len + 1);
    if (!key) return sum;
    memcpy(key, kv->key.data, (size_t)kv->key.len);
    key[kv->key.len] = '\0';
    if (gguf_find(file, key) != kv) abort();
    amber_error err;
    struct gguf_string s;
    int64_t integer;
    double number;
    bool flag;
    sum += (uint64_t)gguf_get_i64(file, key, -5, 100000, &integer, &err);
    sum += (uint64_t)gguf_get_f64(file, key, &number, &err);
    sum += (uint64_t)gguf_get_bool(file, key, &flag, &err);
    if (gguf_get_string(file, key, &s, &err) == 1) sum += walk_bytes(s.data, s.len);
    free(key);
    return sum;
}

static inline uint64_t walk_tensor(const struct gguf_file *file, const struct gguf_tensor *t) {
    uint64_t sum = walk_bytes(t->data, t->size) + walk_bytes(t->name.data, t->name.len);
    const struct type_info *info = type_info(t->type);
    if (!info || t->size % info->block_bytes) abort();
    if (t->data < file->map || t->size > (uint64_t)(file->map + file->size - t->data)) abort();
    if (type_row_bytes(t->type, t->ne[0]) * t->ne[1] * t->ne[2] * t->ne[3] != t->size) abort();
    if (info->to_float) {
        uint64_t blocks = t->size / info->block_bytes, n = blocks < 64 ? blocks : 64;
        float *values = malloc((size_t)n * info->block_values * sizeof *values);
        if (!values) return sum;
        info->to_float(t->data, values, (int64_t)(n * info->block_values));
        info->to_float(t->data + (blocks - n) * info->block_bytes, values,
                       (int64_t)(n * info->block_values));
        sum += walk_bytes(values, n * info->block_values * sizeof *values);
        free(values);
    }
    gguf_drop_pages(file, t);
    return sum;
}

static inline uint64_t walk_file(const struct gguf_file *file) {
    uint64_t sum = strlen(file->label);
    for (uint64_t i = 0; i < file->n_kv; i++) sum += walk_value(file, &file->kv[i]);
    for (uint64_t i = 0; i < file->n_tensors; i++) sum += walk_tensor(file, &file->tensors[i]);
    if (gguf_find(file, "no.such.key") || gguf_find_tensor(file, "no.such.tensor")) sum++;
    return sum;
}

#endif
