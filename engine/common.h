/* common.h: what every file of the engine uses: errors, rounding, aligned memory. */
#ifndef AMBER_COMMON_H
#define AMBER_COMMON_H

#include "amber.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define AMBER_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define AMBER_PRINTF(fmt, args)
#endif

/* Fills err (which may be NULL) and returns code, so that `return amber_fail(...)` reads well.
 * Messages have the form "where: expected, found (what to do)". */
amber_status amber_fail(amber_error *err, amber_status code, const char *format, ...)
    AMBER_PRINTF(3, 4);

/* The last path component, for messages. */
const char *amber_basename(const char *path);

/* 64-byte aligned, zeroed; NULL when out of memory or when bytes is absurd. Large blocks ask for
 * huge pages. Freed with amber_free. */
void *amber_alloc(size_t bytes);
void amber_free(void *p);

double amber_seconds(void); /* monotonic clock */

/* FNV-1a over 8-byte words, the last one filled up with zeros. Goes on from `hash`; the first one is
 * AMBER_HASH_START. */
#define AMBER_HASH_START 0xcbf29ce484222325u
uint64_t amber_hash(uint64_t hash, const void *data, size_t bytes);

static inline int64_t amber_round_up(int64_t x, int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}
static inline int amber_min(int a, int b) {
    return a < b ? a : b;
}
static inline int amber_max(int a, int b) {
    return a > b ? a : b;
}

#endif
