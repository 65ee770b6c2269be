/* tok_spm.c: SentencePiece BPE ("llama" in GGUF).
 *
 * The text is cut into characters; of all neighbours whose joint text is a piece, the pair of the
 * highest score is merged, the left one among equals, until no two neighbours form a piece
 * (SentencePiece, model type BPE). Characters that end up as no piece become byte tokens. */
#include "tok_internal.h"

#include "gguf.h"
#include "unicode.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* SentencePiece never merges into control, unknown or byte pieces. */
static bool mergeable(const amber_tokenizer *t, int32_t id) {
    return t->type[id] == TOK_NORMAL || t->type[id] == TOK_USER || t->type[id] == TOK_UNUSED;
}

/* ---- where no merge can happen ----
 *
 * If no piece has the character a directly before b, nothing ever merges across a-b, so the text
 * can be cut there and its parts merged on their own. This turns a book into words without assuming
 * anything about spaces. The set holds hashes: a false positive only leaves a part longer. */

static inline uint32_t adjacent_hash(uint32_t a, uint32_t b) {
    uint64_t h = ((uint64_t)a << 32 | b) * 0x9E3779B97F4A7C15u;
    return (uint32_t)(h >> 40);
}

static inline bool can_merge_across(const amber_tokenizer *t, uint32_t a, uint32_t b) {
    uint32_t h = adjacent_hash(a, b) & t->adjacent_mask;
    return t->adjacent[h >> 6] >> (h & 63) & 1;
}

static amber_status build_adjacent(amber_tokenizer *t, amber_error *err) {
    uint64_t pairs = 0;
    for (int32_t id = 0; id < t->n; id++) pairs += t->offset[id + 1] - t->offset[id];
    /* About one bit in sixteen set at worst; the hash has 24 bits. */
    uint32_t bits = 1 << 12;
    while (bits < pairs * 4 && bits < 1u << 24) bits *= 2;
    t->adjacent_mask = bits - 1;
    t->adjacent = calloc(bits / 64, sizeof *t->adjacent);
    if (!t->adjacent) return amber_fail(err, AMBER_ERR_MEMORY, "tokenizer: out of memory");
    for (int32_t id = 0; id < t->n; id++) {
        if (!mergeable(t, id)) continue;
        uint32_t len, a, b;
        const char *s = tok_text(t, id, &len);
        if (len == 0 || uni_valid_prefix(s, len) != len) continue; /* no text can match it */
        if (len > t->max_piece) t->max_piece = len;
        for (uint32_t i = (uint32_t)uni_next(s, &a); i < len; a = b) {
            i += (uint32_t)uni_next(s + i, &b);
            uint32_t h = adjacent_hash(a, b) & t->adjacent_mask;
            t->adjacent[h >> 6] |= (uint64_t)1 << (h & 63);
        }
    }
    return AMBER_OK;
}

amber_status tok_spm_load(amber_tokenizer *t, const struct gguf_file *file, amber_error *err) {
    const struct gguf_kv *scores = gguf_find(file, "tokenizer.ggml.scores");
    if (!scores) {
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tokenizer.ggml.scores: missing, a SentencePiece vocabulary has one "
                          "per token",
                          file->label);
    }
    if (scores->type != GGUF_ARRAY || scores->elem_type != GGUF_F32 ||
        scores->count != (uint64_t)t->n) {
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tokenizer.ggml.scores: expected %d float32 values, found %llu of "
                          "type %u",
                          file->label, t->n, (unsigned long long)scores->count,
                          (unsigned)scores->elem_type);
    }
    t->rank = malloc((size_t)t->n * sizeof *t->rank);
    if (!t->rank) return amber_fail(err, AMBER_ERR_MEMORY, "tokenizer: out of memory");
    for (int32_t id = 0; id < t->n; id++) {
        /* Bits of a float, made to sort as unsigned numbers do, highest score first. Adding zero
         * turns -0 into +0; a NaN, which no sound file has, comes last. */
        float score = (float)gguf_array_f64(scores, (uint64_t)id) + 0.0f;
        uint32_t bits;
        memcpy(&bits, &score, sizeof bits);
        bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
        t->rank[id] = isnan(score) ? UINT32_MAX : ~bits;
    }
    return build_adjacent(t, err);
}

/* ---- encoding ---- */

static bool pair_rank(const amber_tokenizer *t, struct tok_work *w, const char *text,
                      const struct tok_sym *left, const struct tok_sym *right, uint32_t *rank,
                      int32_t *id) {
    uint32_t len = left->len + right->len;
    if (len > t->max_piece) return false;
    int32_t found = tok_find(t, text + left->start, len);
    if (found < 0 || !mergeable(t, found)) return false;
    if (t->type[found] == TOK_UNUSED) {
        /* Merges may go through an unused piece, but the result may not keep it: remember its
         * parts. The last pair seen counts, as in SentencePiece. */
        if (!w->left_len) w->left_len = calloc((size_t)t->n, sizeof *w->left_len);
        if (!w->left_len) {
            w->failed = true;
            return false;
        }
        w->left_len[found] = left->len;
    }
    *rank = t->rank[found];
    *id = found;
    return true;
}

/* A character that is no piece: its bytes where the vocabulary has all of them, else one <unk>. */
static void push_bytes(const amber_tokenizer *t, struct tok_work *w, const char *text, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t len = (size_t)uni_length(text[i]);
        bool known = true;
        for (size_t k = 0; k < len; k++) known &= t->byte_id[(uint8_t)text[i + k]] >= 0;
        for (size_t k = 0; known && k < len; k++) tok_push(w, t->byte_id[(uint8_t)text[i + k]]);
        if (!known && t->unk >= 0) tok_push(w, t->unk);
        i += len;
    }
}

/* Unused pieces inside unused pieces: no sound vocabulary nests this deep, and the stack has an
 * end. */
#define MAX_DEPTH 500

static void push_piece(const amber_tokenizer *t, struct tok_work *w, const char *text, uint32_t len,
                       int depth) {
    for (;;) {
        int32_t id = len > t->max_piece ? -1 : tok_find(t, text, len);
        if (id < 0 || !mergeable(t, id)) {
            push_bytes(t, w, text, len);
            return;
        }
        uint32_t left = t->type[id] == TOK_UNUSED && w->left_len ? w->left_len[id] : 0;
        if (left == 0 || depth == MAX_DEPTH) {
            tok_push(w, id);
            return;
        }
        push_piece(t, w, text, left, depth + 1);
        text += left;
        len -= left;
    }
}

static void encode_part(const amber_tokenizer *t, struct tok_work *w, const char *text, size_t n) {
    size_t left = n;
    if (n > 1) left = tok_merge(t, w, pair_rank, text, n);
    for (size_t i = 0; i < left && !w->failed; i++) {
        const struct tok_sym *s = &w->syms[i];
        if (s->id >= 0 && t->type[s->id] != TOK_UNUSED) {
            tok_push(w, s->id);
        } else {
            push_piece(t, w, text + s->start, s->len, 0);
        }
    }
}

void tok_spm_encode(const amber_tokenizer *t, struct tok_work *w, const char *text, size_t n,
                    bool prefix) {
    size_t spaces = 1;
    for (size_t i = 0; i < n; i++) spaces += text[i] == ' ';
    if (!tok_reserve(w, &w->buffer, &w->buffer_cap, n + spaces * (TOK_SPACE_LEN - 1) + 1, 1)) {
        return;
    }
    char *s = w->buffer;
    size_t len = 0;
    if (t->collapse_spaces) {
        while (n > 0 && text[0] == ' ') text++, n--;
        while (n > 0 && text[n - 1] == ' ') n--;
        if (n == 0) return;
    }
    if (prefix) {
        memcpy(s, TOK_SPACE, TOK_SPACE_LEN);
        len = TOK_SPACE_LEN;
    }
    for (size_t i = 0; i < n; i++) {
        if (text[i] != ' ') {
            s[len++] = text[i];
        } else if (!t->collapse_spaces || text[i - 1] != ' ') {
            memcpy(s + len, TOK_SPACE, TOK_SPACE_LEN);
            len += TOK_SPACE_LEN;
        }
    }

    size_t begin = 0, n_syms = 0;
    uint32_t before = 0;
    for (size_t i = 0; i < len && !w->failed;) {
        uint32_t cp;
        uint32_t width = (uint32_t)uni_next(s + i, &cp);
        if (n_syms > 0 && !can_merge_across(t, before, cp)) {
            encode_part(t, w, s + begin, n_syms);
            begin = i;
            n_syms = 0;
        }
        if (!tok_reserve(w, &w->syms, &w->syms_cap, n_syms + 1, sizeof *w->syms)) return;
        w->syms[n_syms++] = (struct tok_sym){(uint32_t)(i - begin), width, -1, 0, 0};
        before = cp;
        i += width;
    }
    if (n_syms > 0) encode_part(t, w, s + begin, n_syms);
}
