/* check.h: the whole C test framework. A test file calls CHECK... and ends main with
 * `return check_summary();`. */
#ifndef AMBER_CHECK_H
#define AMBER_CHECK_H

#include <stdio.h>
#include <string.h>

static int check_passed, check_failed;

static inline int check_record(int ok, const char *file, int line, const char *what) {
    if (ok) {
        check_passed++;
    } else if (check_failed++ < 50) {
        fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    }
    return ok;
}

#define CHECK(cond) check_record(!!(cond), __FILE__, __LINE__, #cond)

#define CHECK_EQ(a, b)                                                                             \
    do {                                                                                           \
        long long check_a = (long long)(a), check_b = (long long)(b);                              \
        if (!check_record(check_a == check_b, __FILE__, __LINE__, #a " == " #b))                   \
            fprintf(stderr, "    %lld != %lld\n", check_a, check_b);                               \
    } while (0)

#define CHECK_STR(text, part)                                                                      \
    do {                                                                                           \
        if (!check_record(strstr((text), (part)) != NULL, __FILE__, __LINE__,                      \
                          #text " has " #part))                                                    \
            fprintf(stderr, "    \"%s\" lacks \"%s\"\n", (text), (part));                          \
    } while (0)

static inline int check_summary(void) {
    printf("%d passed, %d failed\n", check_passed, check_failed);
    return check_failed != 0;
}

#endif
