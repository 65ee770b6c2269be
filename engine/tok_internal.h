/* tok_internal.h: what the tokenizer's files share. */
#ifndef AMBER_TOK_INTERNAL_H
#define AMBER_TOK_INTERNAL_H

#include "common.h"

/* tokenizer.ggml.token_type (GGUF specification). */
enum tok_type {
    TOK_UNDEFINED = 0,
    TOK_NORMAL = 1,
    TOK_UNKNOWN = 2,
    TOK_CONTROL = 3,
    TOK_USER = 4,
    TOK_UNUSED = 5,
    TOK_BYTE = 6,
};

#define TOK_SPACE     "\xE2\x96\x81" /* U+2581, SentencePiece's visible space */
#define TOK_SPACE_LEN 3

struct tok_slot {
    uint32_t hash;
    int32_t id; /* -1: free */
};

struct tok_pair {
    int32_t left, right; /* left -1: free */
    int32_t id;          /* of the merged token */
    uint32_t rank;       /* lower merges first */
};

/* A token that is matched whole before the text is tokenized. */
struct tok_special {
    const char *text;
    uint32_t len;
    int32_t id;
};

struct tok_special_list {
    struct tok_special *items; /* sorted bytewise */
    uint32_t n;
    uint32_t first[257]; /* items whose text begins with byte b: first[b]..first[b + 1] */
};

struct tok_pretokenizer;

struct amber_tokenizer {
    int32_t n;
    char *text;             /* all spellings */
    uint32_t *offset;       /* [n + 1] */
    uint8_t *type;          /* [n] tok_type */
    uint8_t *flags;         /* [n] AMBER_TOKEN_* */
    struct tok_slot *slots; /* spelling -> id */
    uint32_t slot_mask;

    bool bpe; /* byte-level BPE with merges; else SentencePiece */
    int32_t bos, eos, unk;
    bool add_bos, add_eos;
    int32_t byte_id[256]; /* token of a raw byte, or -1 */

    char *special_text;
    struct tok_special_list special; /* control, unknown and user-defined tokens */
    struct tok_special_list user;    /* user-defined ones only */
    bool special_eats_space;         /* white space behind a special token belongs to it (Phi-3) */

    /* SentencePiece */
    bool space_prefix, collapse_spaces;
    uint32_t *rank;     /* [n] from the scores: lower merges first; equal scores, equal ranks */
    uint32_t max_piece; /* bytes of the longest mergeable piece */
    uint64_t *adjacent; /* bit set of hashed code point pairs; see tok_spm.c */
    uint32_t adjacent_mask;

    /* byte-level BPE */
    struct tok_pair *pairs;
    uint32_t pair_mask;
    const struct tok_pretokenizer *pre;
};

static inline const char *tok_text(const amber_tokenizer *t, int32_t id, uint32_t *len) {
    *len = t->offset[id + 1] - t->offset[id];
    return t->text + t->offset[id];
}

uint32_t tok_hash(const char *text, size_t len);
int32_t tok_find(const amber_tokenizer *t, const char *text, size_t len);
/* The value of a byte token's spelling "<0xAB>", or -1. */
int tok_byte_value(const char *s, uint32_t len);

/* ---- output and working memory of one call ---- */

struct tok_sym {
    uint32_t start, len; /* bytes of the text under work */
    int32_t id;          /* -1: not known yet */
    int32_t prev, next;  /* used by the heap only */
};

struct tok_heap_entry {
    uint64_t key; /* rank << 32 | left symbol: least first, so ties go to the left */
    uint32_t len; /* of the merged text: tells whether the entry is stale */
    int32_t id;
};

struct tok_work {
    int32_t *out;
    int64_t cap, n; /* n counts beyond cap */
    struct tok_sym *syms;
    size_t syms_cap;
    struct tok_heap_entry *heap;
    size_t heap_cap;
    char *buffer; /* text rewritten for the model */
    size_t buffer_cap;
    uint32_t *left_len; /* [tokenizer's n] of unused SentencePiece pieces; NULL until one occurs */
    bool failed;        /* an allocation failed; the call ends with AMBER_ERR_MEMORY */
};

static inline void tok_push(struct tok_work *w, int32_t id) {
    if (w->n < w->cap) w->out[w->n] = id;
    w->n++;
}

/* Makes *array hold `need` elements; on failure sets w->failed and returns false. */
bool tok_reserve(struct tok_work *w, void *array, size_t *cap, size_t need, size_t elem);

/* Merges neighbouring symbols of w->syms[0..n), always the pair of lowest rank first, the left one
 * among equals, until none is left. `pair` tells whether two neighbours merge. Returns the number
 * of symbols left, again dense in w->syms. */
typedef bool (*tok_pair_fn)(const amber_tokenizer *t, struct tok_work *w, const char *text,
                            const struct tok_sym *left, const struct tok_sym *right, uint32_t *rank,
                            int32_t *id);
size_t tok_merge(const amber_tokenizer *t, struct tok_work *w, tok_pair_fn pair, const char *text,
                 size_t n);

/* ---- models ---- */

/* Text given to these is valid UTF-8 and not empty. */
void tok_spm_encode(const amber_tokenizer *t, struct tok_work *w, const char *text, size_t n,
                    bool prefix);
void tok_bpe_encode(const amber_tokenizer *t, struct tok_work *w, const char *text, size_t n);

struct gguf_file;
amber_status tok_spm_load(amber_tokenizer *t, const struct gguf_file *file, amber_error *err);
amber_status tok_bpe_load(amber_tokenizer *t, const struct gguf_file *file, amber_error *err);

/* ---- pre-tokenizers ---- */

/* By the name in tokenizer.ggml.pre; NULL where unknown. */
const struct tok_pretokenizer *tok_pre_find(const char *name, size_t len);
/* One name of each kind, separated by spaces, as many as fit. */
void tok_pre_names(char *buf, size_t cap);
bool tok_pre_adds_bos(const struct tok_pretokenizer *pre);
/* Whether a piece that is a vocabulary entry is taken whole without merging. */
bool tok_pre_takes_whole(const struct tok_pretokenizer *pre);
typedef void (*tok_piece_fn)(void *user, const char *text, size_t n);
void tok_pre_split(const struct tok_pretokenizer *pre, const char *text, size_t n,
                   tok_piece_fn piece, void *user);

/* ---- bytes as characters (byte-level BPE) ---- */

/* Code point that stands for a byte in the vocabulary's spellings, and back (-1: none). */
uint32_t tok_byte_to_char(uint8_t byte);
int tok_char_to_byte(uint32_t cp);

/* ---- decoding ---- */

struct tok_decoder {
    bool keep_special;
    bool strip; /* a leading space of the next piece was put there by the tokenizer */
};
/* Writes the bytes of a token, at most tok_piece_bound of them, and returns how many. */
size_t tok_decode_piece(const amber_tokenizer *t, struct tok_decoder *d, int32_t id, char *out);
size_t tok_piece_bound(const amber_tokenizer *t, int32_t id);

#endif
