/* tok_decode.c: token ids back to text, all at once or as a stream. */
#include "tok_internal.h"
#include "unicode.h"

#include <stdlib.h>
#include <string.h>

size_t tok_piece_bound(const amber_tokenizer *t, int32_t id) {
    uint32_t len;
    tok_text(t, id, &len);
    return len > 0 ? len : 1;
}

static size_t decode_spaces(const char *s, uint32_t len, char *out) {
    size_t n = 0;
    for (uint32_t i = 0; i < len;) {
        if (len - i >= TOK_SPACE_LEN && memcmp(s + i, TOK_SPACE, TOK_SPACE_LEN) == 0) {
            out[n++] = ' ';
            i += TOK_SPACE_LEN;
        } else {
            out[n++] = s[i++];
        }
    }
    return n;
}

static size_t decode_byte_chars(const char *s, uint32_t len, char *out) {
    size_t n = 0;
    for (uint32_t i = 0; i < len;) {
        uint32_t cp;
        int width = uni_decode(s + i, len - i, &cp);
        int byte = width > 0 ? tok_char_to_byte(cp) : -1;
        if (width <= 0) width = 1;
        if (byte >= 0) {
            out[n++] = (char)byte;
        } else { /* not a byte's character: the spelling is the text */
            memcpy(out + n, s + i, (size_t)width);
            n += (size_t)width;
        }
        i += (uint32_t)width;
    }
    return n;
}

size_t tok_decode_piece(const amber_tokenizer *t, struct tok_decoder *d, int32_t id, char *out) {
    uint32_t len;
    const char *s = tok_text(t, id, &len);
    bool strip = d->strip;
    switch (t->type[id]) {
    case TOK_CONTROL:
    case TOK_UNKNOWN:
        if (!d->keep_special) return 0;
        /* Encoding this text again puts a space behind the token; see encode_segment. */
        d->strip = t->space_prefix;
        memcpy(out, s, len);
        return len;
    case TOK_BYTE:
        d->strip = false;
        if (t->bpe) break;
        out[0] = (char)tok_byte_value(s, len);
        return 1;
    case TOK_USER:
        d->strip = t->space_prefix;
        if (!t->bpe) return decode_spaces(s, len, out);
        memcpy(out, s, len);
        return len;
    default:
        d->strip = false;
    }
    if (t->bpe) return decode_byte_chars(s, len, out);
    if (strip && len >= TOK_SPACE_LEN && memcmp(s, TOK_SPACE, TOK_SPACE_LEN) == 0) {
        s += TOK_SPACE_LEN;
        len -= TOK_SPACE_LEN;
    }
    return decode_spaces(s, len, out);
}

int32_t amber_detokenize(const amber_tokenizer *t, const int32_t *tokens, int32_t n,
                         int32_t keep_special, char *out, int32_t cap, amber_error *err) {
    if (!t || n < 0 || (n > 0 && !tokens) || cap < 0 || (cap > 0 && !out)) {
        return -(int32_t)amber_fail(err, AMBER_ERR_ARGUMENT,
                                    "detokenize: expected tokens and a buffer, found NULL or a "
                                    "negative length");
    }
    struct tok_decoder d = {keep_special != 0, t->space_prefix};
    char *piece = NULL; /* for pieces that may not fit */
    size_t piece_cap = 0;
    int64_t total = 0;
    for (int32_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= t->n) {
            free(piece);
            return -(int32_t)amber_fail(err, AMBER_ERR_ARGUMENT,
                                        "detokenize: token %d: expected an id below %d, found %d",
                                        i, t->n, tokens[i]);
        }
        size_t bound = tok_piece_bound(t, tokens[i]);
        if (total + (int64_t)bound <= cap) {
            total += (int64_t)tok_decode_piece(t, &d, tokens[i], out + total);
            continue;
        }
        if (bound > piece_cap) {
            char *grown = realloc(piece, bound);
            if (!grown) {
                free(piece);
                return -(int32_t)amber_fail(err, AMBER_ERR_MEMORY, "detokenize: out of memory");
            }
            piece = grown;
            piece_cap = bound;
        }
        size_t len = tok_decode_piece(t, &d, tokens[i], piece);
        if (total < cap) {
            size_t room = (size_t)(cap - total);
            memcpy(out + total, piece, len < room ? len : room);
        }
        total += (int64_t)len;
    }
    free(piece);
    if (total > INT32_MAX) {
        return -(int32_t)amber_fail(err, AMBER_ERR_ARGUMENT,
                                    "detokenize: more than %d bytes (split the tokens)", INT32_MAX);
    }
    return (int32_t)total;
}

/* ---- stream ---- */

struct amber_text_stream {
    const amber_tokenizer *tokenizer;
    struct tok_decoder decoder;
    char held[4]; /* beginning of a sequence that is not complete yet */
    size_t n_held;
    char *raw; /* held bytes and the new token's */
    size_t raw_cap;
    char *text; /* what the caller gets */
    size_t text_cap;
};

amber_text_stream *amber_text_stream_new(const amber_tokenizer *t, int32_t keep_special,
                                         int32_t continues) {
    if (!t) return NULL;
    amber_text_stream *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->tokenizer = t;
    s->decoder.keep_special = keep_special != 0;
    s->decoder.strip = t->space_prefix && !continues;
    return s;
}

void amber_text_stream_free(amber_text_stream *s) {
    if (!s) return;
    free(s->raw);
    free(s->text);
    free(s);
}

static bool grow(char **buffer, size_t *cap, size_t need) {
    if (need <= *cap) return true;
    char *p = realloc(*buffer, need + 64);
    if (!p) return false;
    *buffer = p;
    *cap = need + 64;
    return true;
}

const char *amber_text_stream_push(amber_text_stream *s, int32_t token, int32_t *length) {
    if (length) *length = 0;
    const amber_tokenizer *t = s->tokenizer;
    if (token < 0 || token >= t->n) return ""; /* a model's padding beyond its vocabulary */
    size_t need = s->n_held + tok_piece_bound(t, token);
    if (need > INT32_MAX / 3 || !grow(&s->raw, &s->raw_cap, need) ||
        !grow(&s->text, &s->text_cap, 3 * need + 1)) {
        return NULL;
    }
    memcpy(s->raw, s->held, s->n_held);
    size_t n = s->n_held + tok_decode_piece(t, &s->decoder, token, s->raw + s->n_held);
    size_t written = 0;
    s->n_held = 0;
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        int width = uni_decode(s->raw + i, n - i, &cp);
        if (width == 0) {
            s->n_held = n - i;
            memcpy(s->held, s->raw + i, s->n_held);
            break;
        }
        if (width < 0) cp = UNI_REPLACEMENT;
        written += (size_t)uni_encode(cp, s->text + written);
        i += (size_t)(width < 0 ? -width : width);
    }
    s->text[written] = 0;
    if (length) *length = (int32_t)written;
    return s->text;
}

const char *amber_text_stream_finish(amber_text_stream *s, int32_t *length) {
    bool broken = s->n_held > 0;
    s->n_held = 0;
    if (length) *length = broken ? 3 : 0;
    return broken ? "\xEF\xBF\xBD" : "";
}
