/* common.c: errors, aligned memory, the clock and a hash. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* madvise and MAP_ANONYMOUS under -std=c11 */
#endif
#ifndef _DARWIN_C_SOURCE
#define _DARWIN_C_SOURCE 1
#endif

#include "common.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define ALIGNMENT  64u
#define HUGE_PAGE  ((size_t)2 << 20)
#define HUGE_BLOCK ((size_t)8 << 20) /* from here on a block gets its own mapping */

/* Address checkers see the bounds of malloc blocks, not those of mappings. */
#if defined(__SANITIZE_ADDRESS__)
#define CHECKED_HEAP 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CHECKED_HEAP 1
#endif
#endif
#ifndef CHECKED_HEAP
#define CHECKED_HEAP 0
#endif

/* Stands in the ALIGNMENT bytes before every block. */
struct block_head {
    void *base;
    size_t mapped; /* bytes of a mapping, or 0 where base came from malloc */
};

/* Cutting a message to its buffer may split a UTF-8 sequence; drops such a rest. */
static void trim_utf8(char *s) {
    size_t n = strlen(s), back = 0;
    while (back < 3 && back < n && ((unsigned char)s[n - 1 - back] & 0xC0) == 0x80) back++;
    if (back == n) return;
    unsigned char lead = (unsigned char)s[n - 1 - back];
    size_t need = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : lead >= 0xC0 ? 1 : 0;
    if (need > back) s[n - 1 - back] = '\0';
}

amber_status amber_fail(amber_error *err, amber_status code, const char *format, ...) {
    if (err) {
        err->code = (int32_t)code;
        va_list args;
        va_start(args, format);
        int n = vsnprintf(err->msg, sizeof err->msg, format, args);
        va_end(args);
        if (n < 0) err->msg[0] = '\0';
        if (n >= (int)sizeof err->msg) trim_utf8(err->msg);
    }
    return code;
}

const char *amber_basename(const char *path) {
    const char *last = path;
    for (const char *p = path; *p; p++) {
        if (*p == '/' && p[1] != '/' && p[1] != '\0') last = p + 1;
    }
    return last;
}

static void *alloc_mapped(size_t bytes) {
    /* Room for the head and for moving up to a huge-page boundary. */
    size_t length = bytes + 2 * HUGE_PAGE;
    char *base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return NULL;
    size_t skip = HUGE_PAGE - ((uintptr_t)base & (HUGE_PAGE - 1));
    char *p = base + skip; /* skip is a multiple of the page size and so at least ALIGNMENT */
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE); /* a wish: failing costs only speed */
#endif
    struct block_head *head = (struct block_head *)(void *)(p - ALIGNMENT);
    head->base = base;
    head->mapped = length;
    return p;
}

void *amber_alloc(size_t bytes) {
    if (bytes > PTRDIFF_MAX - 4 * HUGE_PAGE) return NULL;
    if (bytes >= HUGE_BLOCK && !CHECKED_HEAP) return alloc_mapped(bytes);
    void *base = NULL;
    if (posix_memalign(&base, ALIGNMENT, ALIGNMENT + bytes)) return NULL;
    memset(base, 0, ALIGNMENT + bytes);
    ((struct block_head *)base)->base = base;
    return (char *)base + ALIGNMENT;
}

void amber_free(void *p) {
    if (!p) return;
    struct block_head head = *(struct block_head *)(void *)((char *)p - ALIGNMENT);
    if (head.mapped) {
        munmap(head.base, head.mapped);
    } else {
        free(head.base);
    }
}

double amber_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

uint64_t amber_hash(uint64_t hash, const void *data, size_t bytes) {
    const uint8_t *at = data;
    for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
        uint64_t word = 0;
        memcpy(&word, at + i, bytes - i < sizeof word ? bytes - i : sizeof word);
        hash = (hash ^ word) * 0x100000001b3u;
    }
    return hash;
}
