/* test_common.c: aligned memory, error messages, path names. */
#include "check.h"
#include "common.h"

#include <stdlib.h>

static void test_alloc(void) {
    static const size_t sizes[] = {
        0, 1, 63, 64, 65, 4096, (8 << 20) - 1, 8 << 20, (8 << 20) + 5, 33 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (int round = 0; round < 2; round++) { /* the second may get the first's memory again */
            uint8_t *p = amber_alloc(sizes[i]);
            if (!CHECK(p != NULL)) continue;
            CHECK_EQ((uintptr_t)p % 64, 0);
            size_t set = 0;
            for (size_t k = 0; k < sizes[i]; k++) set += p[k] != 0;
            CHECK_EQ(set, 0);
            memset(p, 0xA5, sizes[i]);
            amber_free(p);
        }
    }
    CHECK(amber_alloc(SIZE_MAX) == NULL);
    CHECK(amber_alloc(SIZE_MAX - 64) == NULL);
    CHECK(amber_alloc((size_t)PTRDIFF_MAX + 1) == NULL);
    CHECK(amber_alloc(PTRDIFF_MAX - 64) == NULL);
    amber_free(NULL);
}

static void test_fail(void) {
    amber_error err;
    memset(&err, 'x', sizeof err);
    CHECK_EQ(amber_fail(&err, AMBER_ERR_FORMAT, "%s: %d", "a", 5), AMBER_ERR_FORMAT);
    CHECK_EQ(err.code, AMBER_ERR_FORMAT);
    CHECK(!strcmp(err.msg, "a: 5"));
    CHECK_EQ(amber_fail(NULL, AMBER_ERR_IO, "%s", "a"), AMBER_ERR_IO);
    /* A message that is too long ends between characters: 1023 bytes, or up to three less. */
    for (int shift = 0; shift < 4; shift++) {
        for (int width = 1; width <= 4; width++) {
            static const char *const letters[] = {"a", "\xc3\xa4", "\xe2\x82\xac",
                                                  "\xf0\x9f\x8d\xaf"};
            char text[1600];
            size_t n = (size_t)shift;
            memset(text, 'x', n);
            while (n < 1500) {
                memcpy(text + n, letters[width - 1], (size_t)width);
                n += (size_t)width;
            }
            text[n] = '\0';
            amber_fail(&err, AMBER_ERR_IO, "%s", text);
            CHECK_EQ(strlen(err.msg), 1023 - (1023 - shift) % width);
            CHECK(!strncmp(err.msg, text, strlen(err.msg)));
        }
    }
}

static void test_basename(void) {
    CHECK(!strcmp(amber_basename("a.gguf"), "a.gguf"));
    CHECK(!strcmp(amber_basename("/a/b/c.gguf"), "c.gguf"));
    CHECK(!strcmp(amber_basename("a//c.gguf"), "c.gguf"));
    CHECK(!strcmp(amber_basename("models/dir/"), "dir/"));
    CHECK(!strcmp(amber_basename("/"), "/"));
    CHECK(!strcmp(amber_basename(""), ""));
}

int main(void) {
    test_alloc();
    test_fail();
    test_basename();
    double a = amber_seconds(), b = amber_seconds();
    CHECK(b >= a);
    return check_summary();
}
