/* tok_merge.c: the merging loop that SentencePiece BPE and byte-level BPE share. */
#include "tok_internal.h"

#include <stdlib.h>
#include <string.h>

/* Up to this many symbols, scanning an array for its minimum beats a heap. */
#define SMALL 40

bool tok_reserve(struct tok_work *w, void *array, size_t *cap, size_t need, size_t elem) {
    if (need <= *cap) return true;
    size_t grown = *cap + *cap / 2;
    if (grown < need) grown = need;
    if (grown < 256) grown = 256;
    void *p = NULL;
    memcpy(&p, array, sizeof p);
    p = grown > SIZE_MAX / elem ? NULL : realloc(p, grown * elem);
    if (!p) {
        w->failed = true;
        return false;
    }
    memcpy(array, &p, sizeof p);
    *cap = grown;
    return true;
}

static size_t merge_small(const amber_tokenizer *t, struct tok_work *w, tok_pair_fn pair,
                          const char *text, size_t n) {
    struct tok_sym *sym = w->syms;
    uint64_t rank[SMALL]; /* of the pair (i, i + 1); no rank: above all 32-bit ones */
    int32_t id[SMALL];
    for (size_t i = 0; i + 1 < n; i++) {
        uint32_t r;
        rank[i] = pair(t, w, text, &sym[i], &sym[i + 1], &r, &id[i]) ? r : UINT64_MAX;
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++) {
            if (rank[i] < rank[best]) best = i;
        }
        if (rank[best] == UINT64_MAX) break;
        sym[best].len += sym[best + 1].len;
        sym[best].id = id[best];
        size_t tail = n - best - 2; /* symbols behind the pair */
        memmove(&sym[best + 1], &sym[best + 2], tail * sizeof *sym);
        n--;
        if (tail > 0) {
            memmove(&rank[best + 1], &rank[best + 2], (tail - 1) * sizeof *rank);
            memmove(&id[best + 1], &id[best + 2], (tail - 1) * sizeof *id);
            uint32_t r;
            rank[best] =
                pair(t, w, text, &sym[best], &sym[best + 1], &r, &id[best]) ? r : UINT64_MAX;
        }
        if (best > 0) {
            uint32_t r;
            rank[best - 1] =
                pair(t, w, text, &sym[best - 1], &sym[best], &r, &id[best - 1]) ? r : UINT64_MAX;
        }
    }
    return n;
}

/* Four children a node: half the levels of a binary heap, and a node's children share a cache
 * line, which is what counts when a pre-token has millions of symbols. */
static bool heap_push(struct tok_work *w, size_t *count, struct tok_heap_entry e) {
    if (!tok_reserve(w, &w->heap, &w->heap_cap, *count + 1, sizeof *w->heap)) return false;
    struct tok_heap_entry *h = w->heap;
    size_t i = (*count)++;
    while (i > 0) {
        size_t up = (i - 1) / 4;
        if (h[up].key <= e.key) break;
        h[i] = h[up];
        i = up;
    }
    h[i] = e;
    return true;
}

static struct tok_heap_entry heap_pop(struct tok_heap_entry *h, size_t *count) {
    struct tok_heap_entry top = h[0], last = h[--*count];
    size_t n = *count, i = 0;
    for (;;) {
        size_t child = 4 * i + 1, least = child;
        if (child >= n) break;
        size_t end = child + 4 < n ? child + 4 : n;
        for (size_t c = child + 1; c < end; c++) {
            if (h[c].key < h[least].key) least = c;
        }
        if (h[least].key >= last.key) break;
        h[i] = h[least];
        i = least;
    }
    if (n > 0) h[i] = last;
    return top;
}

static bool try_pair(const amber_tokenizer *t, struct tok_work *w, tok_pair_fn pair,
                     const char *text, int32_t left, size_t *count) {
    int32_t right = w->syms[left].next;
    uint32_t rank;
    int32_t id;
    if (!pair(t, w, text, &w->syms[left], &w->syms[right], &rank, &id)) return true;
    struct tok_heap_entry e = {(uint64_t)rank << 32 | (uint32_t)left,
                               w->syms[left].len + w->syms[right].len, id};
    return heap_push(w, count, e);
}

static size_t merge_heap(const amber_tokenizer *t, struct tok_work *w, tok_pair_fn pair,
                         const char *text, size_t n) {
    struct tok_sym *sym = w->syms;
    for (size_t i = 0; i < n; i++) {
        sym[i].prev = (int32_t)i - 1;
        sym[i].next = i + 1 < n ? (int32_t)i + 1 : -1;
    }
    size_t count = 0;
    for (size_t i = 0; i + 1 < n; i++) {
        if (!try_pair(t, w, pair, text, (int32_t)i, &count)) return 0;
    }
    while (count > 0) {
        struct tok_heap_entry e = heap_pop(w->heap, &count);
        struct tok_sym *left = &sym[(uint32_t)e.key];
        /* A symbol only ever grows to its right, so equal length means the same two parts. */
        if (left->len == 0 || left->next < 0 || left->len + sym[left->next].len != e.len) continue;
        struct tok_sym *right = &sym[left->next];
        left->len = e.len;
        left->id = e.id;
        left->next = right->next;
        right->len = 0;
        if (left->next >= 0) {
            sym[left->next].prev = (int32_t)(left - sym);
            if (!try_pair(t, w, pair, text, (int32_t)(left - sym), &count)) return 0;
        }
        if (left->prev >= 0 && !try_pair(t, w, pair, text, left->prev, &count)) return 0;
    }
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        if (sym[i].len > 0) sym[kept++] = sym[i];
    }
    return kept;
}

size_t tok_merge(const amber_tokenizer *t, struct tok_work *w, tok_pair_fn pair, const char *text,
                 size_t n) {
    return n <= SMALL ? merge_small(t, w, pair, text, n) : merge_heap(t, w, pair, text, n);
}
