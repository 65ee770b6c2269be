/* tok_bpe.c: byte-level BPE with a list of merges ("gpt2" in GGUF).
 *
 * A pre-tokenizer cuts the text into pieces; each piece starts as its bytes, and neighbours are
 * merged in the order of the merge list (Sennrich et al. 2016, with bytes as in GPT-2). The
 * vocabulary spells every byte as a printable character. */
#include "tok_internal.h"

#include "gguf.h"
#include "unicode.h"

#include <stdlib.h>
#include <string.h>

/* GPT-2's table: printable Latin-1 bytes stand for themselves, the other 68 are given U+0100 on in
 * the order of their values. */
static bool stands_for_itself(uint32_t c) {
    return (c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xAC) || (c >= 0xAE && c <= 0xFF);
}

uint32_t tok_byte_to_char(uint8_t byte) {
    if (stands_for_itself(byte)) return byte;
    if (byte <= 0x20) return 0x100u + byte;                /* 00..20: 33 of them */
    if (byte <= 0xA0) return 0x100u + 33 + (byte - 0x7Fu); /* 7F..A0: 34 */
    return 0x100u + 67;                                    /* AD */
}

int tok_char_to_byte(uint32_t cp) {
    if (cp < 0x100) return stands_for_itself(cp) ? (int)cp : -1;
    if (cp <= 0x120) return (int)(cp - 0x100);
    if (cp <= 0x142) return (int)(cp - 0x121 + 0x7F);
    return cp == 0x143 ? 0xAD : -1;
}

/* ---- merges ---- */

static inline uint32_t pair_hash(int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15u;
    return (uint32_t)(h >> 32);
}

static const struct tok_pair *find_pair(const amber_tokenizer *t, int32_t left, int32_t right) {
    for (uint32_t i = pair_hash(left, right) & t->pair_mask; t->pairs[i].left >= 0;
         i = (i + 1) & t->pair_mask) {
        if (t->pairs[i].left == left && t->pairs[i].right == right) return &t->pairs[i];
    }
    return NULL;
}

amber_status tok_bpe_load(amber_tokenizer *t, const struct gguf_file *file, amber_error *err) {
    for (int b = 0; b < 256; b++) {
        char spelling[4];
        int len = uni_encode(tok_byte_to_char((uint8_t)b), spelling);
        t->byte_id[b] = tok_find(t, spelling, (size_t)len);
    }
    const struct gguf_kv *kv = gguf_find(file, "tokenizer.ggml.merges");
    if (!kv || kv->type != GGUF_ARRAY || kv->elem_type != GGUF_STRING || kv->count > 1u << 26) {
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tokenizer.ggml.merges: expected an array of strings, found %s",
                          file->label, !kv ? "nothing" : "another type or too many");
    }
    uint32_t slots = 16;
    while (slots < 2 * kv->count) slots *= 2;
    t->pair_mask = slots - 1;
    t->pairs = malloc(slots * sizeof *t->pairs);
    char *joined = NULL;
    size_t joined_cap = 0;
    if (!t->pairs) return amber_fail(err, AMBER_ERR_MEMORY, "tokenizer: out of memory");
    for (uint32_t i = 0; i < slots; i++) t->pairs[i].left = -1;
    const uint8_t *cursor = kv->data;
    for (uint64_t rank = 0; rank < kv->count; rank++) {
        struct gguf_string s = gguf_next_string(&cursor);
        /* "left right"; the first character belongs to left whatever it is. */
        const char *gap = s.len > 1 ? memchr(s.data + 1, ' ', (size_t)s.len - 1) : NULL;
        if (!gap || s.len > UINT32_MAX) {
            free(joined);
            return amber_fail(err, AMBER_ERR_FORMAT,
                              "%s: tokenizer.ggml.merges: expected two parts and a space, found "
                              "\"%.*s\" at %llu",
                              file->label, s.len < 40 ? (int)s.len : 40, s.data,
                              (unsigned long long)rank);
        }
        size_t left_len = (size_t)(gap - s.data), right_len = (size_t)s.len - left_len - 1;
        if (s.len > joined_cap) {
            char *grown = realloc(joined, (size_t)s.len + 64);
            if (!grown) {
                free(joined);
                return amber_fail(err, AMBER_ERR_MEMORY, "tokenizer: out of memory");
            }
            joined = grown;
            joined_cap = (size_t)s.len + 64;
        }
        memcpy(joined, s.data, left_len);
        memcpy(joined + left_len, gap + 1, right_len);
        int32_t left = tok_find(t, s.data, left_len), right = tok_find(t, gap + 1, right_len);
        int32_t id = tok_find(t, joined, left_len + right_len);
        /* A merge whose parts or result are not in the vocabulary could give no token. */
        if (left < 0 || right < 0 || id < 0) continue;
        uint32_t i = pair_hash(left, right) & t->pair_mask;
        while (t->pairs[i].left >= 0 && (t->pairs[i].left != left || t->pairs[i].right != right)) {
            i = (i + 1) & t->pair_mask;
        }
        if (t->pairs[i].left < 0) t->pairs[i] = (struct tok_pair){left, right, id, (uint32_t)rank};
    }
    free(joined);
    return AMBER_OK;
}

/* ---- encoding ---- */

static bool pair_rank(const amber_tokenizer *t, struct tok_work *w, const char *text,
                      const struct tok_sym *left, const struct tok_sym *right, uint32_t *rank,
                      int32_t *id) {
    (void)w;
    (void)text;
    if (left->id < 0 || right->id < 0) return false;
    const struct tok_pair *p = find_pair(t, left->id, right->id);
    if (!p) return false;
    *rank = p->rank;
    *id = p->id;
    return true;
}

struct piece_context {
    const amber_tokenizer *t;
    struct tok_work *w;
};

/* The token that spells a whole piece, or -1. */
static int32_t whole_piece(const amber_tokenizer *t, const char *text, size_t n) {
    char spelling[256]; /* no vocabulary entry of use is longer; two bytes a character at most */
    size_t len = 0;
    if (n > sizeof spelling / 2) return -1;
    for (size_t i = 0; i < n; i++) {
        len += (size_t)uni_encode(tok_byte_to_char((uint8_t)text[i]), spelling + len);
    }
    int32_t id = tok_find(t, spelling, len);
    return id >= 0 && t->type[id] != TOK_CONTROL && t->type[id] != TOK_UNKNOWN ? id : -1;
}

static void encode_piece(void *user, const char *text, size_t n) {
    const amber_tokenizer *t = ((struct piece_context *)user)->t;
    struct tok_work *w = ((struct piece_context *)user)->w;
    if (w->failed) return;
    if (tok_pre_takes_whole(t->pre)) {
        int32_t id = whole_piece(t, text, n);
        if (id >= 0) {
            tok_push(w, id);
            return;
        }
    }
    if (!tok_reserve(w, &w->syms, &w->syms_cap, n, sizeof *w->syms)) return;
    for (size_t i = 0; i < n; i++) {
        w->syms[i] = (struct tok_sym){(uint32_t)i, 1, t->byte_id[(uint8_t)text[i]], 0, 0};
    }
    size_t left = n > 1 ? tok_merge(t, w, pair_rank, text, n) : n;
    bool after_unknown = false;
    for (size_t i = 0; i < left && !w->failed; i++) {
        int32_t id = w->syms[i].id;
        if (id >= 0) {
            tok_push(w, id);
            after_unknown = false;
        } else {
            /* A vocabulary without this byte: one <unk> a character, where there is an <unk>. */
            bool inside = after_unknown && ((uint8_t)text[w->syms[i].start] & 0xC0) == 0x80;
            if (!inside && t->unk >= 0) tok_push(w, t->unk);
            after_unknown = true;
        }
    }
}

void tok_bpe_encode(const amber_tokenizer *t, struct tok_work *w, const char *text, size_t n) {
    struct piece_context context = {t, w};
    tok_pre_split(t->pre, text, n, encode_piece, &context);
}
