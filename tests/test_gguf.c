/* test_gguf.c: the GGUF reader on a sound image, on that image damaged in every place, and on files
 * of other kinds. Every image lies in a block of exactly its size, so that an address checker sees
 * any read beyond it. */
#include "check.h"
#include "gguf_walk.h"

#include <stdio.h>
#include <unistd.h>

#define LABEL "tiny.gguf"

/* ---- an image with named places ---- */

struct image {
    uint8_t data[8192];
    size_t size, data_start;
    struct {
        char name[40];
        size_t at;
    } marks[256];
    int n_marks;
};

static void mark(struct image *m, const char *name, const char *part) {
    snprintf(m->marks[m->n_marks].name, sizeof m->marks[0].name, "%s%s", name, part);
    m->marks[m->n_marks++].at = m->size;
}

static size_t place(const struct image *m, const char *name) {
    for (int i = 0; i < m->n_marks; i++) {
        if (!strcmp(m->marks[i].name, name)) return m->marks[i].at;
    }
    fprintf(stderr, "no place %s\n", name);
    abort();
}

static void put(struct image *m, const void *data, size_t n) {
    memcpy(m->data + m->size, data, n);
    m->size += n;
}

static void put_uint(struct image *m, uint64_t v, size_t bytes) {
    put(m, &v, bytes);
}

static void put_string(struct image *m, const char *s) {
    put_uint(m, strlen(s), 8);
    put(m, s, strlen(s));
}

static void put_key(struct image *m, const char *key, uint32_t type) {
    mark(m, key, ":len");
    put_uint(m, strlen(key), 8);
    mark(m, key, ":name");
    put(m, key, strlen(key));
    mark(m, key, ":type");
    put_uint(m, type, 4);
    mark(m, key, ":value");
}

static void put_array(struct image *m, const char *key, uint32_t elem_type, uint64_t count) {
    put_key(m, key, GGUF_ARRAY);
    mark(m, key, ":elem");
    put_uint(m, elem_type, 4);
    mark(m, key, ":count");
    put_uint(m, count, 8);
    mark(m, key, ":first");
}

static void put_tensor(struct image *m, const char *name, uint32_t type, uint32_t n_dims,
                       const uint64_t *ne, uint64_t *offset) {
    uint64_t rows = 1;
    mark(m, name, ":len");
    put_uint(m, strlen(name), 8);
    mark(m, name, ":name");
    put(m, name, strlen(name));
    mark(m, name, ":dims");
    put_uint(m, n_dims, 4);
    mark(m, name, ":ne0");
    put(m, ne, 8 * n_dims);
    mark(m, name, ":type");
    put_uint(m, type, 4);
    mark(m, name, ":offset");
    put_uint(m, *offset, 8);
    for (uint32_t d = 1; d < n_dims; d++) rows *= ne[d];
    *offset += (type_row_bytes(type, ne[0]) * rows + 31) / 32 * 32;
}

static const char *const numeric_keys[] = {"t.u8",  "t.i8",   "t.u16", "t.i16", "t.u32", "t.i32",
                                           "t.f32", "t.bool", "t.u64", "t.i64", "t.f64"};

/* Keys of every type, arrays of every type, tensors of several; the last byte of the file belongs
 * to a tensor. */
static void build(struct image *m, uint32_t version) {
    memset(m, 0, sizeof *m);
    put(m, "GGUF", 4);
    mark(m, "version", "");
    put_uint(m, version, 4);
    mark(m, "n_tensors", "");
    put_uint(m, 4, 8);
    mark(m, "n_kv", "");
    put_uint(m, 11 + 11 + 6, 8);

    float f32 = -1.5f;
    double f64 = 0.1;
    put_key(m, "t.u8", GGUF_U8), put_uint(m, 200, 1);
    put_key(m, "t.i8", GGUF_I8), put_uint(m, (uint8_t)-2, 1);
    put_key(m, "t.u16", GGUF_U16), put_uint(m, 65535, 2);
    put_key(m, "t.i16", GGUF_I16), put_uint(m, (uint16_t)-300, 2);
    put_key(m, "t.u32", GGUF_U32), put_uint(m, 4000000000u, 4);
    put_key(m, "t.i32", GGUF_I32), put_uint(m, (uint32_t)-70000, 4);
    put_key(m, "t.f32", GGUF_F32), put(m, &f32, 4);
    put_key(m, "t.bool", GGUF_BOOL), put_uint(m, 1, 1);
    put_key(m, "t.u64", GGUF_U64), put_uint(m, UINT64_MAX, 8);
    put_key(m, "t.i64", GGUF_I64), put_uint(m, (uint64_t)INT64_MIN, 8);
    put_key(m, "t.f64", GGUF_F64), put(m, &f64, 8);

    static const uint8_t bytes[11] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 8, 8};
    static const uint8_t types[11] = {0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12};
    for (int i = 0; i < 11; i++) {
        char key[40];
        snprintf(key, sizeof key, "a%s", numeric_keys[i] + 1);
        put_array(m, key, types[i], 3);
        for (int k = 0; k < 3; k++) put_uint(m, (uint64_t)(k & 1), bytes[i]);
    }
    put_key(m, "general.architecture", GGUF_STRING), put_string(m, "llama");
    put_key(m, "general.alignment", GGUF_U32), put_uint(m, 32, 4);
    put_array(m, "a.str", GGUF_STRING, 4);
    put_string(m, "one"), put_string(m, ""), put_string(m, "tr\xc3\xa4s"), put_string(m, "four");
    put_array(m, "a.empty", GGUF_STRING, 0);
    put_array(m, "a.none", GGUF_F64, 0);
    put_key(m, "t.nul", GGUF_STRING);
    put_uint(m, 3, 8), put(m, "a\0b", 3);

    uint64_t offset = 0;
    put_tensor(m, "w.f32", TYPE_F32, 2, (const uint64_t[]){4, 3}, &offset);
    put_tensor(m, "w.f16", TYPE_F16, 4, (const uint64_t[]){2, 2, 2, 2}, &offset);
    put_tensor(m, "w.q80", TYPE_Q8_0, 3, (const uint64_t[]){64, 2, 1}, &offset);
    put_tensor(m, "w.q4k", TYPE_Q4_K, 1, (const uint64_t[]){256}, &offset);
    mark(m, "header_end", "");
    m->size = (m->size + 31) / 32 * 32;
    m->data_start = m->size;
    offset -= 160 - 144; /* the last tensor's padding is not there */
    for (uint64_t i = 0; i < offset; i++) m->data[m->size++] = (uint8_t)(i * 37 + 11);
}

/* ---- running the reader ---- */

/* Parses a copy that lies in a block of just this size; walks what is accepted. */
static amber_status try_bytes(const uint8_t *data, size_t size, const char *label,
                              amber_error *err) {
    uint8_t *copy = malloc(size ? size : 1);
    struct gguf_file *file = (struct gguf_file *)1;
    if (!copy) abort();
    if (size) memcpy(copy, data, size);
    memset(err, 'x', sizeof *err);
    amber_status status = gguf_parse(copy, size, label, &file, err);
    if (status == AMBER_OK) {
        walk_file(file);
        gguf_close(file);
    } else {
        size_t n = strnlen(err->msg, sizeof err->msg);
        /* Whole: it ends in what to do. */
        CHECK(n < sizeof err->msg - 1 && n > 0 && err->msg[n - 1] == ')');
        CHECK(err->code == (int32_t)status);
        CHECK(file == NULL);
        CHECK(status == AMBER_ERR_FORMAT || status == AMBER_ERR_UNSUPPORTED);
        CHECK(strstr(err->msg, label) == err->msg);
        CHECK(strstr(err->msg, "expected") || strstr(err->msg, "found"));
    }
    free(copy);
    return status;
}

static void test_sound_file(uint32_t version) {
    static struct image m;
    build(&m, version);
    struct gguf_file *file;
    amber_error err = {0, ""};
    CHECK_EQ(gguf_parse(m.data, m.size, LABEL, &file, &err), AMBER_OK);
    if (err.code) fprintf(stderr, "%s\n", err.msg);
    CHECK_EQ(file->version, version);
    CHECK_EQ(file->alignment, 32);
    CHECK_EQ(file->n_kv, 28);
    CHECK_EQ(file->n_tensors, 4);
    CHECK(!strcmp(file->label, LABEL));

    int64_t v = 0;
    double d = 0;
    bool b = false;
    struct gguf_string s;
    static const int64_t integers[] = {200, -2, 65535, -300, 4000000000, -70000};
    for (int i = 0; i < 6; i++) {
        CHECK_EQ(gguf_get_i64(file, numeric_keys[i], INT64_MIN, INT64_MAX, &v, &err), 1);
        CHECK_EQ(v, integers[i]);
    }
    CHECK_EQ(gguf_get_i64(file, "t.i64", INT64_MIN, INT64_MAX, &v, &err), 1);
    CHECK(v == INT64_MIN);
    CHECK_EQ(gguf_get_i64(file, "t.u64", INT64_MIN, INT64_MAX, &v, &err), -1);
    CHECK_STR(err.msg, "18446744073709551615");
    v = 7;
    CHECK_EQ(gguf_get_i64(file, "t.u8", 0, 199, &v, &err), -1);
    CHECK_STR(err.msg, LABEL);
    CHECK_STR(err.msg, "t.u8");
    CHECK_STR(err.msg, "0 to 199");
    CHECK_STR(err.msg, "200");
    CHECK_EQ(err.code, AMBER_ERR_FORMAT);
    CHECK_EQ(gguf_get_i64(file, "t.i8", -1, 5, &v, &err), -1);
    CHECK_EQ(gguf_get_i64(file, "t.f32", -9, 9, &v, &err), -1);
    CHECK_EQ(gguf_get_i64(file, "t.bool", 0, 1, &v, &err), -1);
    CHECK_EQ(gguf_get_i64(file, "a.u8", 0, 9, &v, &err), -1);
    CHECK_EQ(gguf_get_i64(file, "absent", 0, 9, &v, NULL), 0);
    CHECK_EQ(v, 7);
    CHECK_EQ(gguf_get_f64(file, "t.f32", &d, &err), 1);
    CHECK(d == -1.5);
    CHECK_EQ(gguf_get_f64(file, "t.f64", &d, &err), 1);
    CHECK(d == 0.1);
    CHECK_EQ(gguf_get_f64(file, "t.u8", &d, &err), -1);
    CHECK_EQ(gguf_get_f64(file, "absent", &d, &err), 0);
    CHECK_EQ(gguf_get_bool(file, "t.bool", &b, &err), 1);
    CHECK(b);
    CHECK_EQ(gguf_get_bool(file, "t.u8", &b, &err), -1);
    CHECK_EQ(gguf_get_string(file, "general.architecture", &s, &err), 1);
    CHECK(s.len == 5 && !memcmp(s.data, "llama", 5));
    CHECK_EQ(gguf_get_string(file, "a.str", &s, &err), -1);
    CHECK_EQ(gguf_get_string(file, "t.nul", &s, &err), 1);
    CHECK(s.len == 3 && !memcmp(s.data, "a\0b", 3));

    for (int i = 0; i < 11; i++) {
        char key[40];
        snprintf(key, sizeof key, "a%s", numeric_keys[i] + 1);
        const struct gguf_kv *kv = gguf_find(file, key);
        CHECK(kv && kv->type == GGUF_ARRAY && kv->count == 3);
        if (kv && kv->elem_type != GGUF_F32 && kv->elem_type != GGUF_F64) {
            CHECK_EQ(gguf_array_i64(kv, 1), 1);
            CHECK(gguf_array_f64(kv, 1) == 1.0 && gguf_array_f64(kv, 2) == 0.0);
        }
    }
    const struct gguf_kv *kv = gguf_find(file, "a.str");
    const uint8_t *cursor = kv->data;
    static const char *const words[] = {"one", "", "tr\xc3\xa4s", "four"};
    CHECK_EQ(kv->count, 4);
    for (int i = 0; i < 4; i++) {
        s = gguf_next_string(&cursor);
        CHECK(s.len == strlen(words[i]) && !memcmp(s.data, words[i], s.len));
    }
    CHECK(cursor == kv->data + kv->size);

    static const char *const texts[][2] = {{"t.u8", "200"},
                                           {"t.i16", "-300"},
                                           {"t.f32", "-1.5"},
                                           {"t.f64", "0.1"},
                                           {"t.bool", "true"},
                                           {"t.u64", "18446744073709551615"},
                                           {"a.u8", "[u8 x 3]"},
                                           {"a.str", "[string x 4]"},
                                           {"t.i64", "-9223372036854775808"},
                                           {"general.architecture", "llama"}};
    for (int i = 0; i < 10; i++) {
        char text[32];
        CHECK_EQ(gguf_format_value(gguf_find(file, texts[i][0]), text, sizeof text),
                 strlen(texts[i][1]));
        CHECK(!strcmp(text, texts[i][1]));
        CHECK_EQ(gguf_format_value(gguf_find(file, texts[i][0]), text, 3), strlen(texts[i][1]));
        CHECK(strlen(text) == 2 && !strncmp(text, texts[i][1], 2));
    }

    const struct gguf_tensor *t = gguf_find_tensor(file, "w.q80");
    CHECK(t && t->type == TYPE_Q8_0 && t->n_dims == 3 && t->size == 4 * 34);
    CHECK(t && t->ne[0] == 64 && t->ne[1] == 2 && t->ne[2] == 1 && t->ne[3] == 1);
    CHECK(t && t->data == m.data + m.data_start + 64 + 32);
    CHECK(gguf_find_tensor(file, "w.f") == NULL && gguf_find_tensor(file, "w.f321") == NULL);
    gguf_close(file);
    gguf_close(NULL);
    try_bytes(m.data, m.size, LABEL, &err);
}

/* ---- single damages with their message ---- */

struct damage {
    const char *at; /* a place, and bytes from it on */
    int skip, width;
    uint64_t value;
    amber_status status;
    const char *words; /* in the message */
};

#define FORMAT      AMBER_ERR_FORMAT
#define UNSUPPORTED AMBER_ERR_UNSUPPORTED

static const struct damage damages[] = {
    {"version", 0, 4, 0, FORMAT, "version 2 or 3, found 0"},
    {"version", 0, 4, 1, UNSUPPORTED, "version 1"},
    {"version", 0, 4, 4, UNSUPPORTED, "newer version 4"},
    {"version", 0, 4, 0x03000000, UNSUPPORTED, "byte-swapped"},
    {"version", 0, 4, 0x02000000, UNSUPPORTED, "big-endian"},
    {"version", 0, 4, 0x12345678, FORMAT, "damaged"},
    {"n_tensors", 0, 8, UINT64_MAX, FORMAT, "18446744073709551615 tensors"},
    {"n_tensors", 0, 8, UINT64_C(1) << 60, FORMAT, "tensors"},
    {"n_tensors", 0, 8, 5, FORMAT, "tensor 5"},
    {"n_tensors", 0, 8, 60, FORMAT, "tensors"},
    {"n_kv", 0, 8, UINT64_MAX, FORMAT, "18446744073709551615 keys"},
    {"n_kv", 0, 8, UINT64_C(1) << 60, FORMAT, "keys"},
    {"n_kv", 0, 8, 27, FORMAT, "tensor"},
    {"n_kv", 0, 8, 29, FORMAT, "tensor 1 of 4"},
    {"t.u8:len", 0, 8, 0, FORMAT, "name of 1 to"},
    {"t.u8:len", 0, 8, UINT64_MAX, FORMAT, "key 1 of 28"},
    {"t.u8:len", 0, 8, UINT64_C(1) << 63, FORMAT, "key 1 of 28"},
    {"t.u8:len", 0, 8, 65536, FORMAT, "key 1 of 28"},
    {"t.u8:name", 0, 1, 0, FORMAT, "clean UTF-8"},
    {"t.u8:name", 1, 1, 10, FORMAT, "clean UTF-8"},
    {"t.u8:name", 3, 1, 0xFF, FORMAT, "clean UTF-8"},
    {"t.u8:name", 3, 1, 0xC3, FORMAT, "clean UTF-8"},
    {"t.i8:name", 2, 1, 'u', FORMAT, "\"t.u8\" again"},
    {"a.u16:name", 0, 1, 't', FORMAT, "\"t.u16\" again"},
    {"t.u8:type", 0, 4, 13, FORMAT, "value type of 0 to 12, found 13"},
    {"t.u8:type", 0, 4, UINT32_MAX, FORMAT, "found 4294967295"},
    {"t.u8:type", 0, 4, GGUF_ARRAY, FORMAT, "t.u8"},
    {"t.u8:type", 0, 4, GGUF_U64, FORMAT, "key"},
    {"t.u8:type", 0, 4, GGUF_STRING, FORMAT, "key"},
    {"t.bool:value", 0, 1, 2, FORMAT, "bool of 0 or 1, found 2"},
    {"a.bool:first", 2, 1, 255, FORMAT, "bool of 0 or 1, found 255"},
    {"a.u8:elem", 0, 4, 13, FORMAT, "value type"},
    {"a.u8:elem", 0, 4, GGUF_ARRAY, FORMAT, "array of arrays"},
    {"a.u8:count", 0, 8, UINT64_MAX, FORMAT, "18446744073709551615 u8"},
    {"a.u16:count", 0, 8, UINT64_C(1) << 63, FORMAT, "u16"},
    {"a.f64:count", 0, 8, (UINT64_C(1) << 61) + 1, FORMAT, "f64"}, /* times 8 wraps to 8 */
    {"a.u32:count", 0, 8, UINT64_C(1) << 62, FORMAT, "u32"},
    {"a.str:count", 0, 8, UINT64_MAX, FORMAT, "a.str"},
    {"a.str:count", 0, 8, 5, FORMAT, "key"},
    {"a.str:first", 0, 8, UINT64_MAX, FORMAT, "string 1 of 4"},
    {"a.str:first", 0, 8, 100000, FORMAT, "string 1 of 4"},
    {"a.str:first", 11, 8, UINT64_MAX - 7, FORMAT, "string 2 of 4"},
    {"general.architecture:value", 0, 8, UINT64_MAX, FORMAT, "general.architecture"},
    {"general.architecture:value", 0, 8, 1000000, FORMAT, "general.architecture"},
    {"general.alignment:value", 0, 4, 0, FORMAT, "power of two from 8 on, found 0"},
    {"general.alignment:value", 0, 4, 4, FORMAT, "power of two"},
    {"general.alignment:value", 0, 4, 24, FORMAT, "power of two"},
    {"general.alignment:value", 0, 4, 33, FORMAT, "power of two"},
    {"general.alignment:value", 0, 4, UINT32_MAX, FORMAT, "power of two"},
    {"general.alignment:value", 0, 4, 64, FORMAT, "multiple of 64"},
    {"general.alignment:value", 0, 4, 0x80000000, FORMAT, "multiple of 2147483648"},
    {"general.alignment:type", 0, 4, GGUF_F32, FORMAT, "general.alignment"},
    {"w.f32:len", 0, 8, 0, FORMAT, "tensor 1"},
    {"w.f32:len", 0, 8, UINT64_MAX, FORMAT, "tensor 1 of 4"},
    {"w.f32:len", 0, 8, 5000, FORMAT, "tensor 1 of 4"},
    {"w.f32:name", 0, 1, 0, FORMAT, "clean UTF-8"},
    {"w.f16:name", 0, 5, UINT64_C(0x3233662E77), FORMAT, "\"w.f32\" again"},
    {"w.f32:dims", 0, 4, 0, FORMAT, "1 to 4 dimensions, found 0"},
    {"w.f32:dims", 0, 4, 5, FORMAT, "1 to 4 dimensions, found 5"},
    {"w.f32:dims", 0, 4, UINT32_MAX, FORMAT, "found 4294967295"},
    {"w.f32:dims", 0, 4, 1, FORMAT, "w."},
    {"w.f32:ne0", 0, 8, 0, FORMAT, "from 1 on, found 0"},
    {"w.f16:ne0", 16, 8, 0, FORMAT, "from 1 on, found 0"},
    {"w.f32:ne0", 0, 8, UINT64_MAX, FORMAT, "below 2^63"},
    {"w.f32:ne0", 0, 8, UINT64_C(1) << 62, FORMAT, "below 2^63"}, /* times 4 bytes wraps to 0 */
    {"w.f32:ne0", 8, 8, UINT64_C(1) << 62, FORMAT, "below 2^63"},
    {"w.f32:ne0", 8, 8, UINT64_C(1) << 60, FORMAT, "below 2^63"}, /* the bytes alone wrap */
    {"w.f16:ne0", 24, 8, UINT64_C(1) << 60, FORMAT, "below 2^63"},
    {"w.f32:ne0", 8, 8, 5, FORMAT, "\"w.f16\" inside \"w.f32\""},
    {"w.f32:ne0", 8, 8, UINT64_C(1) << 40, FORMAT, "incomplete download"},
    {"w.q80:ne0", 0, 8, 63, FORMAT, "multiple of 32 values for Q8_0, found 63"},
    {"w.q4k:ne0", 0, 8, 128, FORMAT, "multiple of 256 values for Q4_K"},
    {"w.q4k:ne0", 0, 8, 512, FORMAT, "incomplete download"},
    {"w.f32:type", 0, 4, 1000, UNSUPPORTED, "found number 1000"},
    {"w.f32:type", 0, 4, 42, UNSUPPORTED, "found number 42"},
    {"w.f32:type", 0, 4, 4, UNSUPPORTED, "Q4_2"},
    {"w.f32:type", 0, 4, 31, UNSUPPORTED, "Q4_0_4_4"},
    {"w.f32:type", 0, 4, 9, UNSUPPORTED, "Q8_1"},
    {"w.f32:type", 0, 4, TYPE_Q4_0, FORMAT, "multiple of 32 values for Q4_0"},
    {"w.f32:type", 0, 4, 27, FORMAT, "inside"}, /* I64: twice the bytes */
    {"w.f32:offset", 0, 8, 1, FORMAT, "multiple of 32, found 1"},
    {"w.f32:offset", 0, 8, 32, FORMAT, "inside"},
    {"w.f16:offset", 0, 8, 0, FORMAT, "inside"},
    {"w.f16:offset", 0, 8, 16, FORMAT, "multiple of 32"},
    {"w.f32:offset", 0, 8, UINT64_MAX - 31, FORMAT, "below 2^63"},
    {"w.f32:offset", 0, 8, UINT64_C(1) << 62, FORMAT, "incomplete download"},
    {"w.q4k:offset", 0, 8, 4096, FORMAT, "incomplete download"},
};

static void test_damages(void) {
    static struct image m;
    amber_error err;
    for (size_t i = 0; i < sizeof damages / sizeof damages[0]; i++) {
        const struct damage *d = &damages[i];
        build(&m, 3);
        memcpy(m.data + place(&m, d->at) + d->skip, &d->value, (size_t)d->width);
        amber_status status = try_bytes(m.data, m.size, LABEL, &err);
        if (!CHECK(status == d->status) || !CHECK(strstr(err.msg, d->words))) {
            fprintf(stderr, "    damage %zu (%s): status %d, \"%s\" should have \"%s\"\n", i, d->at,
                    status, status ? err.msg : "", d->words);
        }
    }
    printf("%zu damages with their messages\n", sizeof damages / sizeof damages[0]);
}

/* ---- damage everywhere ---- */

static void test_truncations(void) {
    static struct image m;
    amber_error err;
    build(&m, 3);
    for (size_t n = 0; n < m.size; n++) {
        if (!CHECK(try_bytes(m.data, n, LABEL, &err) == FORMAT)) fprintf(stderr, "    at %zu\n", n);
        if (n >= place(&m, "header_end")) {
            char promise[64];
            snprintf(promise, sizeof promise, "expected %zu bytes by its header, found %zu", m.size,
                     n);
            CHECK_STR(err.msg, promise);
        }
    }
}

static void test_every_byte_value(void) {
    static struct image m;
    amber_error err;
    int accepted = 0, refused = 0;
    build(&m, 3);
    for (size_t at = 0; at < m.data_start; at++) {
        uint8_t was = m.data[at];
        for (int v = 0; v < 256; v++) {
            m.data[at] = (uint8_t)v;
            if (try_bytes(m.data, m.size, LABEL, &err)) {
                refused++;
            } else {
                accepted++;
            }
        }
        m.data[at] = was;
    }
    printf("every value of every header byte: %d refused, %d accepted\n", refused, accepted);
    CHECK(refused > 100000);
}

static void test_every_word(void) {
    static struct image m;
    amber_error err;
    build(&m, 2);
    static const uint64_t values[] = {0,
                                      1,
                                      2,
                                      7,
                                      12,
                                      13,
                                      0x7FFFFFFF,
                                      0x80000000,
                                      0xFFFFFFFF,
                                      UINT64_C(1) << 32,
                                      UINT64_C(1) << 59,
                                      UINT64_C(1) << 60,
                                      UINT64_C(1) << 61,
                                      UINT64_C(1) << 62,
                                      INT64_MAX,
                                      UINT64_C(1) << 63,
                                      UINT64_MAX - 31,
                                      UINT64_MAX - 7,
                                      UINT64_MAX};
    for (size_t at = 4; at + 8 <= m.data_start; at++) {
        uint8_t was[8];
        memcpy(was, m.data + at, 8);
        for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
            for (size_t width = 4; width <= 8; width += 4) {
                memcpy(m.data + at, &values[i], width);
                try_bytes(m.data, m.size, LABEL, &err);
                memcpy(m.data + at, was, 8);
            }
        }
        uint64_t rest = m.size - at; /* lengths around what is left */
        for (uint64_t v = rest - 16; v < rest + 8; v++) {
            memcpy(m.data + at, &v, 8);
            try_bytes(m.data, m.size, LABEL, &err);
        }
        memcpy(m.data + at, was, 8);
    }
}

/* Several random changes at once, and a random cut. */
static void test_random_damage(void) {
    static struct image sound, m;
    amber_error err;
    uint64_t state = 88172645463325252u;
    build(&sound, 3);
    for (int round = 0; round < 30000; round++) {
        memcpy(&m, &sound, sizeof m);
        for (int i = 0; i < 4; i++) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            size_t at = state % m.data_start;
            m.data[at] = (state >> 40 & 3) ? (uint8_t)(state >> 48) : m.data[at] ^ 1;
        }
        size_t size = state >> 60 ? m.size : state >> 20 & 0xFFF;
        try_bytes(m.data, size < m.size ? size : m.size, LABEL, &err);
    }
}

/* ---- files of other kinds ---- */

static void test_wrong_kinds(void) {
    static const struct {
        const char *data;
        size_t size; /* 0: up to the NUL */
        const char *words;
    } kinds[] = {
        {"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n", 0, "Git LFS"},
        {"<!DOCTYPE html>\n<html><body>404</body></html>", 0, "HTML"},
        {"\xef\xbb\xbf\n  <HTML lang=en>", 0, "HTML"},
        {"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", 0, "XML"},
        {"\x20\0\0\0\0\0\0\0{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}    ", 40, "safetensors"},
        {"PK\3\4\x14\0\0\0\0\0archive/data.pkl", 26, "zip"},
        {"\x80\2\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.", 15, "pickle"},
        {"\x1f\x8b\x08\0\0\0\0\0\0\3", 10, "gzip"},
        {"\x28\xb5\x2f\xfd\x24\0", 6, "zstd"},
        {"\3757zXZ\0\0", 7, "xz"},
        {"BZh91AY&SY", 0, "bzip2"},
        {"7z\xbc\xaf\x27\x1c\0\4", 8, "7z"},
        {"lmgg\0\0\0\0", 8, "ggml"},
        {"fmgg\1\0\0\0", 8, "ggmf"},
        {"tjgg\3\0\0\0", 8, "ggjt"},
        {"algg\1\0\0\0", 8, "ggla"},
        {"FUGG\0\0\0\3", 8, "byte-swapped"},
        {"\x89HDF\r\n\x1a\n", 0, "HDF5"},
        {"\177ELF\2\1\1", 0, "program"},
        {"{\"error\": \"not found\"}", 0, "JSON"},
        {"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 16, "zero bytes"},
        {"Once upon a time", 0, "4f 6e 63 65"},
        {"G", 0, "truncated"},
        {"GGU", 0, "truncated"},
        {"GGUF", 0, "truncated"},
        {"GGUF\3\0\0\0", 8, "truncated"},
        {"gguf\3\0\0\0", 8, "magic"},
    };
    amber_error err;
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        size_t size = kinds[i].size ? kinds[i].size : strlen(kinds[i].data);
        CHECK_EQ(try_bytes((const uint8_t *)kinds[i].data, size, LABEL, &err), FORMAT);
        CHECK_STR(err.msg, kinds[i].words);
        for (size_t n = 0; n < size; n++) {
            CHECK_EQ(try_bytes((const uint8_t *)kinds[i].data, n, LABEL, &err), FORMAT);
        }
    }
    uint8_t tar[512] = "model/config.json";
    memcpy(tar + 257, "ustar", 5);
    CHECK_EQ(try_bytes(tar, sizeof tar, LABEL, &err), FORMAT);
    CHECK_STR(err.msg, "tar");
    CHECK_EQ(try_bytes(NULL, 0, LABEL, &err), FORMAT);
    CHECK_STR(err.msg, "empty");
}

/* A long name is shortened in its middle, at character bounds, and no message is cut. */
static void test_long_labels(void) {
    static struct image m;
    char label[400];
    amber_error err;
    struct gguf_file *file;
    for (int shift = 0; shift < 3; shift++) {
        size_t n = 0;
        while (n < 300)
            n += (size_t)snprintf(label + n, 8, n < (size_t)shift ? "x" : "\xe2\x82\xac");
        strcpy(label + n, "-Q4_K_M.gguf");
        build(&m, 3);
        CHECK_EQ(gguf_parse(m.data, m.size, label, &file, &err), AMBER_OK);
        CHECK(strlen(file->label) < 64);
        CHECK_STR(file->label, "...");
        CHECK_STR(file->label, "-Q4_K_M.gguf");
        for (const char *s = file->label; *s;) {
            size_t step = (uint8_t)*s == 0xE2 ? 3 : 1;
            CHECK(((uint8_t)*s & 0xC0) != 0x80);
            s += step;
        }
        gguf_close(file);
        for (size_t i = 0; i < sizeof damages / sizeof damages[0]; i++) {
            build(&m, 3);
            memcpy(m.data + place(&m, damages[i].at) + damages[i].skip, &damages[i].value,
                   (size_t)damages[i].width);
            CHECK(gguf_parse(m.data, m.size, label, &file, &err) != AMBER_OK);
            CHECK(strlen(err.msg) < sizeof err.msg - 1 && err.msg[strlen(err.msg) - 1] == ')');
        }
    }
}

/* A name of 64 Ki bytes is the most; its message still fits. */
static void test_long_names(void) {
    size_t size = 24 + 8 + 70000 + 4 + 1;
    uint8_t *data = calloc(1, size);
    amber_error err;
    uint64_t n_kv = 1, len;
    uint32_t version = 3;
    memcpy(data, "GGUF", 4), memcpy(data + 4, &version, 4), memcpy(data + 16, &n_kv, 8);
    memset(data + 32, 'k', 70000);
    for (len = 65534; len <= 65537; len++) {
        memcpy(data + 24, &len, 8);
        memset(data + 32, 'k', 70000);
        memset(data + 32 + len, 0, 5); /* type u8, value 0 */
        amber_status status = try_bytes(data, 32 + (size_t)len + 5, LABEL, &err);
        CHECK_EQ(status, len <= 65535 ? AMBER_OK : FORMAT);
        if (status) CHECK_STR(err.msg, "bytes \"kkkkkkkk");
    }
    free(data);
}

/* However much the file could hold, and before anything is allocated for them. */
static void test_too_many_entries(void) {
    const size_t size = (size_t)40 << 20;
    const uint64_t too_many = (1 << 20) + 1;
    uint8_t *data = calloc(1, size);
    amber_error err;
    if (!CHECK(data != NULL)) return;
    memcpy(data, "GGUF\3", 5);
    for (int at = 8; at <= 16; at += 8) {
        memset(data + 8, 0, 16);
        memcpy(data + at, &too_many, 8);
        CHECK_EQ(try_bytes(data, size, LABEL, &err), FORMAT);
        CHECK_STR(err.msg, "at most 1048576 keys and tensors");
    }
    free(data);
}

/* Dropping pages of a caller's memory would turn them into zeros. */
static void test_drop_pages(void) {
    static struct image m;
    const uint64_t n = 64 << 10;
    uint64_t offset = 0;
    memset(&m, 0, sizeof m);
    put(&m, "GGUF\3\0\0\0", 8), put_uint(&m, 1, 8), put_uint(&m, 0, 8);
    put_tensor(&m, "w", TYPE_I8, 1, &n, &offset);
    m.size = (m.size + 31) / 32 * 32;
    uint8_t *data = amber_alloc(m.size + n);
    struct gguf_file *file;
    if (!CHECK(data != NULL)) return;
    memcpy(data, m.data, m.size);
    memset(data + m.size, 7, n);
    if (CHECK(gguf_parse(data, m.size + n, LABEL, &file, NULL) == AMBER_OK)) {
        gguf_drop_pages(file, file->tensors);
        for (uint64_t i = 0; i < n; i += 512) CHECK_EQ(file->tensors[0].data[i], 7);
        gguf_close(file);
    }
    amber_free(data);
}

/* ---- real files ---- */

static void test_open(void) {
    static struct image m;
    char path[] = "/tmp/amber-gguf-XXXXXX";
    struct gguf_file *file;
    amber_error err;
    int fd = mkstemp(path);
    if (!CHECK(fd >= 0)) return;
    CHECK_EQ(gguf_open(path, &file, &err), FORMAT);
    CHECK_STR(err.msg, "empty file");
    CHECK_STR(err.msg, "amber-gguf-");
    build(&m, 3);
    CHECK(write(fd, m.data, m.size) == (ssize_t)m.size);
    close(fd);
    CHECK_EQ(gguf_open(path, &file, &err), AMBER_OK);
    if (file) {
        CHECK(file->owns_map && file->size == m.size);
        uint64_t before = walk_file(file); /* also drops pages; they come back */
        CHECK(before == walk_file(file));
        gguf_close(file);
    }
    CHECK_EQ(truncate(path, (off_t)m.size - 1), 0);
    CHECK_EQ(gguf_open(path, &file, &err), FORMAT);
    CHECK_STR(err.msg, "download it again");
    CHECK(file == NULL);
    unlink(path);
    CHECK_EQ(gguf_open(path, &file, &err), AMBER_ERR_IO);
    CHECK_STR(err.msg, path);
    CHECK_EQ(gguf_open(path, &file, NULL), AMBER_ERR_IO);
    CHECK_EQ(gguf_open("/tmp/", &file, &err), AMBER_ERR_IO);
    CHECK_STR(err.msg, "directory");
    CHECK_EQ(gguf_open("/dev/zero", &file, &err), AMBER_ERR_IO);
    CHECK_STR(err.msg, "device or pipe");
    char far[600];
    memset(far, 'd', sizeof far);
    strcpy(far + 500, "/model-Q4_K_M.gguf");
    CHECK_EQ(gguf_open(far, &file, &err), AMBER_ERR_IO);
    CHECK_STR(err.msg, "model-Q4_K_M.gguf");
    CHECK_STR(err.msg, "(check the path)");
}

int main(void) {
    test_sound_file(2);
    test_sound_file(3);
    test_damages();
    test_truncations();
    test_every_byte_value();
    test_every_word();
    test_random_damage();
    test_wrong_kinds();
    test_long_labels();
    test_long_names();
    test_too_many_entries();
    test_drop_pages();
    test_open();
    return check_summary();
}
