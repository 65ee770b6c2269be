/* sparse_pattern.c: patterns as text. */
#include "sparse.h"

#include <stdio.h>
#include <string.h>

enum { MAX_GROUP = 64, FOUND = 24 };

struct reader {
    const char *at, *end;
};

static bool take(struct reader *r, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(r->end - r->at) < length || memcmp(r->at, word, length) != 0) return false;
    r->at += length;
    return true;
}

/* A decimal number without sign or leading zero, at most three digits; -1 where there is none. */
static int take_number(struct reader *r) {
    const char *start = r->at;
    int value = 0;
    while (r->at < r->end && r->at - start < 3 && *r->at >= '0' && *r->at <= '9')
        value = 10 * value + (*r->at++ - '0');
    bool more = r->at < r->end && *r->at >= '0' && *r->at <= '9';
    bool padded = r->at - start > 1 && *start == '0';
    return r->at == start || more || padded ? -1 : value;
}

/* The text between quotes, clipped, with what cannot be printed as '?'. */
static void quote(const char *text, size_t length, char out[FOUND + 8]) {
    size_t shown = length < FOUND ? length : FOUND;
    char *p = out;
    *p++ = '"';
    for (size_t i = 0; i < shown; i++) {
        unsigned char c = (unsigned char)text[i];
        *p++ = c < 0x20 || c >= 0x7f ? '?' : (char)c;
    }
    strcpy(p, length > FOUND ? "...\"" : "\"");
}

/* What follows "N:M". The reason for a refusal is NULL where any other pattern would do as well. */
static bool read_suffix(struct reader *r, struct amber_pattern *p, const char **expected) {
    if (take(r, "+r")) {
        *expected = "2:4+r16 or 2:4+r32";
        p->kind = AMBER_PATTERN_RELIEF;
        p->relief = take_number(r);
        return p->n == 2 && p->m == 4 && (p->relief == 16 || p->relief == 32);
    }
    if (take(r, "x4")) {
        p->block = 4;
        if (take(r, "t")) {
            *expected = "t2 after x4 (pairs of tokens, the only sharing there is)";
            p->tokens = take_number(r);
            return p->tokens == 2;
        }
        return true;
    }
    if (take(r, "x")) {
        if (r->at < r->end) {
            *expected = "x4 after N:M (blocks of 4 channels, the only size there is)";
            return false;
        }
        *expected = "8:16x (relief windows hold every 8:16 mask, and no other ratio)";
        p->relief = 16;
        return p->n == 8 && p->m == 16;
    }
    if (r->at < r->end && *r->at == 't') {
        *expected = "a block size before t2 (N:Mx4t2)";
        return false;
    }
    return true;
}

static bool read_pattern(struct reader *r, struct amber_pattern *p, const char **expected) {
    if (take(r, "dense")) {
        *p = (struct amber_pattern){.kind = AMBER_PATTERN_DENSE};
        return true;
    }
    if (take(r, "top")) {
        *expected = "topP% with 1 <= P <= 100";
        p->kind = AMBER_PATTERN_TOPK;
        p->m = 100;
        p->n = take_number(r);
        return p->n >= 1 && p->n <= 100 && take(r, "%");
    }
    p->kind = AMBER_PATTERN_GROUP;
    p->n = take_number(r);
    if (p->n < 0 || !take(r, ":")) return false;
    p->m = take_number(r);
    if (p->n < 1 || p->m < p->n || p->m > MAX_GROUP) {
        *expected = "N:M with 1 <= N <= M <= 64";
        return false;
    }
    return read_suffix(r, p, expected);
}

bool amber_pattern_parse(const char *text, size_t length, struct amber_pattern *out, char *why,
                         size_t why_size) {
    struct reader r = {text, text + length};
    const char *expected = NULL;
    *out = (struct amber_pattern){.block = 1, .tokens = 1};
    if (read_pattern(&r, out, &expected) && r.at == r.end) return true;
    if (!expected)
        expected = "N:M (8:16), N:Mx4, N:Mx4t2, 8:16x, 2:4+r16, 2:4+r32, top50% or dense";
    char found[FOUND + 8];
    quote(text, length, found);
    snprintf(why, why_size, "expected %s, found %s", expected, found);
    return false;
}

void amber_pattern_format(const struct amber_pattern *p, char out[AMBER_PATTERN_TEXT]) {
    switch (p->kind) {
    case AMBER_PATTERN_GROUP:
        snprintf(out, AMBER_PATTERN_TEXT, "%d:%d%s%s", p->n, p->m,
                 p->block == 4 ? "x4"
                 : p->relief   ? "x"
                               : "",
                 p->tokens == 2 ? "t2" : "");
        break;
    case AMBER_PATTERN_TOPK:
        snprintf(out, AMBER_PATTERN_TEXT, "top%d%%", p->n);
        break;
    case AMBER_PATTERN_RELIEF:
        snprintf(out, AMBER_PATTERN_TEXT, "2:4+r%d", p->relief);
        break;
    default:
        snprintf(out, AMBER_PATTERN_TEXT, "dense");
    }
}

double amber_pattern_kept(const struct amber_pattern *p) {
    if (p->kind == AMBER_PATTERN_DENSE) return 1;
    if (p->kind == AMBER_PATTERN_RELIEF) return 0.5 + 2.0 / p->relief;
    return (double)p->n / p->m;
}
