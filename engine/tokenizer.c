/* tokenizer.c: loading a vocabulary from GGUF, and the public encoding interface. */
#include "tokenizer.h"

#include "tok_internal.h"
#include "unicode.h"

#include <stdlib.h>
#include <string.h>

/* More than fifty times the largest vocabulary in use; keeps all sizes below within 32 bits. */
#define MAX_TOKENS (1 << 24)

/* ---- spelling -> id ---- */

uint32_t tok_hash(const char *text, size_t len) {
    uint64_t h = 0x9E3779B97F4A7C15u ^ len;
    while (len > 0) {
        uint64_t word = 0;
        size_t take = len < 8 ? len : 8;
        memcpy(&word, text, take);
        h = (h ^ word) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
        text += take;
        len -= take;
    }
    h *= 0xD6E8FEB86659FD93u;
    return (uint32_t)(h >> 32);
}

int32_t tok_find(const amber_tokenizer *t, const char *text, size_t len) {
    uint32_t hash = tok_hash(text, len);
    for (uint32_t i = hash & t->slot_mask; t->slots[i].id >= 0; i = (i + 1) & t->slot_mask) {
        if (t->slots[i].hash != hash) continue;
        uint32_t have;
        const char *s = tok_text(t, t->slots[i].id, &have);
        if (have == len && memcmp(s, text, len) == 0) return t->slots[i].id;
    }
    return -1;
}

static amber_status no_memory(amber_error *err) {
    return amber_fail(err, AMBER_ERR_MEMORY, "tokenizer: out of memory");
}

static amber_status load_tokens(amber_tokenizer *t, const struct gguf_file *file,
                                amber_error *err) {
    const struct gguf_kv *kv = gguf_find(file, "tokenizer.ggml.tokens");
    if (!kv || kv->type != GGUF_ARRAY || kv->elem_type != GGUF_STRING) {
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tokenizer.ggml.tokens: expected an array of strings, found %s",
                          file->label, kv ? "another type" : "nothing (no vocabulary inside)");
    }
    if (kv->count == 0 || kv->count > MAX_TOKENS) {
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tokenizer.ggml.tokens: expected 1 to %d entries, found %llu",
                          file->label, MAX_TOKENS, (unsigned long long)kv->count);
    }
    uint64_t bytes = kv->size - kv->count * 8; /* each string carries its 8-byte length */
    if (bytes >= UINT32_MAX) {
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tokenizer.ggml.tokens: expected less than 4 GiB of text, found %llu "
                          "bytes",
                          file->label, (unsigned long long)bytes);
    }
    t->n = (int32_t)kv->count;
    size_t n = (size_t)t->n;
    t->text = malloc((size_t)bytes + 1);
    t->offset = malloc((n + 1) * sizeof *t->offset);
    t->type = malloc(n);
    t->flags = calloc(n, 1);
    uint32_t slots = 16;
    while (slots < 2 * n) slots *= 2;
    t->slot_mask = slots - 1;
    t->slots = malloc(slots * sizeof *t->slots);
    if (!t->text || !t->offset || !t->type || !t->flags || !t->slots) return no_memory(err);

    const uint8_t *cursor = kv->data;
    uint32_t end = 0;
    for (size_t id = 0; id < n; id++) {
        struct gguf_string s = gguf_next_string(&cursor);
        t->offset[id] = end;
        if (s.len > 0) memcpy(t->text + end, s.data, s.len);
        end += (uint32_t)s.len;
    }
    t->offset[n] = end;

    for (uint32_t i = 0; i < slots; i++) t->slots[i].id = -1;
    for (int32_t id = 0; id < t->n; id++) {
        uint32_t len;
        const char *s = tok_text(t, id, &len);
        uint32_t hash = tok_hash(s, len), i = hash & t->slot_mask;
        while (t->slots[i].id >= 0) {
            uint32_t have;
            const char *other = tok_text(t, t->slots[i].id, &have);
            if (t->slots[i].hash == hash && have == len && memcmp(s, other, len) == 0) break;
            i = (i + 1) & t->slot_mask;
        }
        /* Of two tokens of one spelling the later one is found, as in llama.cpp. */
        t->slots[i] = (struct tok_slot){hash, id};
    }
    return AMBER_OK;
}

/* ---- kinds of tokens ---- */

int tok_byte_value(const char *s, uint32_t len) {
    if (len != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>') return -1;
    int value = 0;
    for (int i = 3; i < 5; i++) {
        int c = s[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                           : -1;
        if (digit < 0) return -1;
        value = value * 16 + digit;
    }
    return value;
}

static amber_status load_types(amber_tokenizer *t, const struct gguf_file *file, amber_error *err) {
    const struct gguf_kv *kv = gguf_find(file, "tokenizer.ggml.token_type");
    if (!kv) {
        for (int32_t id = 0; id < t->n; id++) {
            uint32_t len;
            const char *s = tok_text(t, id, &len);
            t->type[id] = !t->bpe && tok_byte_value(s, len) >= 0 ? TOK_BYTE : TOK_NORMAL;
        }
        return AMBER_OK;
    }
    bool integers =
        kv->elem_type <= GGUF_I32 || kv->elem_type == GGUF_U64 || kv->elem_type == GGUF_I64;
    if (kv->type != GGUF_ARRAY || !integers || kv->count != (uint64_t)t->n) {
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tokenizer.ggml.token_type: expected %d integers, found %llu of type "
                          "%u",
                          file->label, t->n, (unsigned long long)kv->count,
                          (unsigned)kv->elem_type);
    }
    for (int32_t id = 0; id < t->n; id++) {
        int64_t type = gguf_array_i64(kv, (uint64_t)id);
        if (type < TOK_UNDEFINED || type > TOK_BYTE) {
            return amber_fail(err, AMBER_ERR_FORMAT,
                              "%s: tokenizer.ggml.token_type: expected 0 to 6, found %lld for "
                              "token %d",
                              file->label, (long long)type, id);
        }
        t->type[id] = type == TOK_UNDEFINED ? TOK_NORMAL : (uint8_t)type;
    }
    return AMBER_OK;
}

static bool is_special(const amber_tokenizer *t, int32_t id) {
    return t->type[id] == TOK_CONTROL || t->type[id] == TOK_UNKNOWN || t->type[id] == TOK_USER;
}

/* An id from the file's keys. *present tells whether the key is there; -1 (also as an unsigned
 * number) is a way in which files say that there is none. */
static amber_status get_id(const amber_tokenizer *t, const struct gguf_file *file, const char *key,
                           int32_t *id, bool *present, amber_error *err) {
    int64_t value;
    int got = gguf_get_i64(file, key, INT64_MIN, INT64_MAX, &value, err);
    if (got < 0) return AMBER_ERR_FORMAT;
    *present = got > 0;
    *id = -1;
    if (got == 0 || value == -1 || value == UINT32_MAX) return AMBER_OK;
    if (value < 0 || value >= t->n) {
        return amber_fail(err, AMBER_ERR_FORMAT, "%s: %s: expected an id below %d, found %lld",
                          file->label, key, t->n, (long long)value);
    }
    *id = (int32_t)value;
    return AMBER_OK;
}

/* Spellings by which models mark the end of a turn or a text. Chat models' files often name only
 * one of theirs in eos_token_id, so these count too. The first group is made control whatever its
 * type: some converters call them plain text or user-defined, and then a user's text could end the
 * turn. The second could well be plain text and must be special by type. */
static const char *const end_marks[] = {
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|EOT|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "[|endofturn|]",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
    "<|call|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<turn|>",
    "<\xEF\xBD\x9C"
    "end" TOK_SPACE "of" TOK_SPACE "sentence\xEF\xBD\x9C>",
    "<|end" TOK_SPACE "of" TOK_SPACE "sentence|>",
};
static const char *const end_marks_if_special[] = {
    "</s>", "<eos>", "<eot>", "<EOT>", "_<EOT>", "<EOD>", "<eod>", "[EOT]", "[EOS]", "<|eos|>",
};

static int32_t find_text(const amber_tokenizer *t, const char *text) {
    return tok_find(t, text, strlen(text));
}

static void mark_end(amber_tokenizer *t, int32_t id) {
    if (id >= 0) t->flags[id] |= AMBER_TOKEN_EOG;
}

static void mark_end_spellings(amber_tokenizer *t) {
    for (size_t i = 0; i < sizeof end_marks / sizeof *end_marks; i++) {
        int32_t id = find_text(t, end_marks[i]);
        if (id < 0) continue;
        t->type[id] = TOK_CONTROL;
        mark_end(t, id);
    }
    for (size_t i = 0; i < sizeof end_marks_if_special / sizeof *end_marks_if_special; i++) {
        int32_t id = find_text(t, end_marks_if_special[i]);
        if (id >= 0 && is_special(t, id)) mark_end(t, id);
    }
    /* In the Harmony format <|end|> closes one message of an answer, not the answer. */
    int32_t end = find_text(t, "<|end|>");
    if (end >= 0 && find_text(t, "<|return|>") >= 0 && find_text(t, "<|call|>") >= 0) {
        t->flags[end] &= (uint8_t)~AMBER_TOKEN_EOG;
    }
}

static int32_t find_special(const amber_tokenizer *t, const char *text) {
    int32_t id = find_text(t, text);
    return id >= 0 && (is_special(t, id) || t->type[id] == TOK_UNUSED) ? id : -1;
}

static amber_status load_specials(amber_tokenizer *t, const struct gguf_file *file,
                                  amber_error *err) {
    int32_t eot, eom;
    bool has_bos, has_eos, has_unk, present;
    amber_status st;
    if ((st = get_id(t, file, "tokenizer.ggml.bos_token_id", &t->bos, &has_bos, err)) ||
        (st = get_id(t, file, "tokenizer.ggml.eos_token_id", &t->eos, &has_eos, err)) ||
        (st = get_id(t, file, "tokenizer.ggml.unknown_token_id", &t->unk, &has_unk, err)) ||
        (st = get_id(t, file, "tokenizer.ggml.eot_token_id", &eot, &present, err)) ||
        (st = get_id(t, file, "tokenizer.ggml.eom_token_id", &eom, &present, err))) {
        return st;
    }
    if (!gguf_find(file, "tokenizer.ggml.token_type")) {
        /* Without types the ids of the keys are all that is known to be special. */
        if (t->bos >= 0) t->type[t->bos] = TOK_CONTROL;
        if (t->eos >= 0) t->type[t->eos] = TOK_CONTROL;
        if (t->unk >= 0) t->type[t->unk] = TOK_UNKNOWN;
    }
    if (!t->bpe) {
        if (!has_bos) t->bos = find_special(t, "<s>");
        if (!has_eos) t->eos = find_special(t, "</s>");
        for (int32_t id = 0; !has_unk && t->unk < 0 && id < t->n; id++) {
            if (t->type[id] == TOK_UNKNOWN) t->unk = id;
        }
    }
    mark_end_spellings(t);
    if (!has_eos && t->eos < 0) {
        for (int32_t id = 0; t->eos < 0 && id < t->n; id++) {
            if (t->flags[id] & AMBER_TOKEN_EOG) t->eos = id;
        }
    }
    mark_end(t, t->eos);
    mark_end(t, eot);
    mark_end(t, eom);
    for (int32_t id = 0; id < t->n; id++) {
        /* Some converters call every added token "unknown"; there is one true one. */
        if (t->type[id] == TOK_UNKNOWN && t->unk >= 0 && id != t->unk) t->type[id] = TOK_CONTROL;
        t->flags[id] |= t->type[id] == TOK_CONTROL   ? AMBER_TOKEN_CONTROL
                        : t->type[id] == TOK_UNKNOWN ? AMBER_TOKEN_UNKNOWN
                        : t->type[id] == TOK_USER    ? AMBER_TOKEN_USER
                        : t->type[id] == TOK_BYTE    ? AMBER_TOKEN_BYTE
                                                     : 0;
    }
    /* A model that writes its begin-of-text mark has ended one text and begins another: whatever
     * the caller asked for is over. Small models trained on texts joined by BOS never write an EOS
     * at all. Where the key names a plain token (files with a wrong default exist), it means
     * nothing. */
    if (t->bos >= 0 && t->type[t->bos] == TOK_CONTROL) mark_end(t, t->bos);

    bool add;
    int got = gguf_get_bool(file, "tokenizer.ggml.add_bos_token", &add, err);
    if (got < 0) return AMBER_ERR_FORMAT;
    t->add_bos = t->bos >= 0 && (got > 0 ? add : !t->bpe || tok_pre_adds_bos(t->pre));
    got = gguf_get_bool(file, "tokenizer.ggml.add_eos_token", &add, err);
    if (got < 0) return AMBER_ERR_FORMAT;
    t->add_eos = t->eos >= 0 && got > 0 && add;
    return AMBER_OK;
}

/* ---- special tokens inside a text ---- */

/* Longer spellings are not looked for: no model has them, and they would make the search slow. */
#define MAX_SPECIAL 1024

static bool is_matched(const amber_tokenizer *t, int32_t id, uint32_t len) {
    return is_special(t, id) && len > 0 && len <= MAX_SPECIAL;
}

static int compare_specials(const void *a, const void *b) {
    const struct tok_special *x = a, *y = b;
    int c = memcmp(x->text, y->text, x->len < y->len ? x->len : y->len);
    if (c) return c;
    if (x->len != y->len) return x->len < y->len ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

static void index_specials(struct tok_special_list *list) {
    qsort(list->items, list->n, sizeof *list->items, compare_specials);
    uint32_t i = 0;
    for (unsigned b = 0; b < 256; b++) {
        list->first[b] = i;
        while (i < list->n && (uint8_t)list->items[i].text[0] == b) i++;
    }
    list->first[256] = list->n;
}

static amber_status build_special_lists(amber_tokenizer *t, amber_error *err) {
    size_t count = 0, bytes = 0;
    for (int32_t id = 0; id < t->n; id++) {
        uint32_t len;
        tok_text(t, id, &len);
        if (!is_matched(t, id, len)) continue;
        count++;
        bytes += len;
    }
    t->special_text = malloc(bytes + 1);
    t->special.items = malloc((count + 1) * sizeof *t->special.items);
    t->user.items = malloc((count + 1) * sizeof *t->user.items);
    if (!t->special_text || !t->special.items || !t->user.items) return no_memory(err);
    char *write = t->special_text;
    for (int32_t id = 0; id < t->n; id++) {
        uint32_t len;
        const char *s = tok_text(t, id, &len);
        if (!is_matched(t, id, len)) continue;
        struct tok_special item = {write, 0, id};
        /* SentencePiece matches its user-defined symbols in text whose spaces are already
         * U+2581; here the text has plain spaces. */
        bool spaced = !t->bpe && t->type[id] == TOK_USER;
        for (uint32_t i = 0; i < len;) {
            if (spaced && len - i >= TOK_SPACE_LEN &&
                memcmp(s + i, TOK_SPACE, TOK_SPACE_LEN) == 0) {
                *write++ = ' ';
                i += TOK_SPACE_LEN;
            } else {
                *write++ = s[i++];
            }
        }
        item.len = (uint32_t)(write - item.text);
        t->special.items[t->special.n++] = item;
        if (t->type[id] == TOK_USER) t->user.items[t->user.n++] = item;
    }
    index_specials(&t->special);
    index_specials(&t->user);
    return AMBER_OK;
}

/* The longest item that text begins with, or NULL. Narrows the sorted list byte by byte. */
static const struct tok_special *match_special(const struct tok_special_list *list,
                                               const char *text, size_t n) {
    uint32_t lo = list->first[(uint8_t)text[0]], hi = list->first[(uint8_t)text[0] + 1];
    const struct tok_special *found = NULL;
    for (size_t depth = 1; lo < hi; depth++) {
        /* Items lo..hi-1 agree with the text in their first `depth` bytes. Of several of one
         * spelling the last is taken, as in tok_find. */
        while (lo < hi && list->items[lo].len == depth) found = &list->items[lo++];
        if (depth == n) break;
        uint8_t c = (uint8_t)text[depth];
        uint32_t a = lo, b = hi;
        while (a < b) { /* first item whose next byte is c or above */
            uint32_t mid = a + (b - a) / 2;
            if ((uint8_t)list->items[mid].text[depth] < c)
                a = mid + 1;
            else
                b = mid;
        }
        lo = a;
        b = hi;
        while (a < b) { /* first item whose next byte is above c */
            uint32_t mid = a + (b - a) / 2;
            if ((uint8_t)list->items[mid].text[depth] <= c)
                a = mid + 1;
            else
                b = mid;
        }
        hi = a;
    }
    return found;
}

/* ---- loading ---- */

/* Phi-3's own tokenizer lets most of its special tokens swallow white space behind them; GGUF has
 * no key for that, so the model's name has to tell, as in llama.cpp. */
static bool named_phi3(const struct gguf_file *file) {
    struct gguf_string name;
    if (gguf_get_string(file, "general.name", &name, NULL) <= 0) return false;
    for (uint64_t i = 0; i + 4 <= name.len; i++) {
        if ((name.data[i] | 0x20) != 'p' || (name.data[i + 1] | 0x20) != 'h' ||
            (name.data[i + 2] | 0x20) != 'i') {
            continue;
        }
        if (name.data[i + 3] == '3') return true;
        if (i + 5 <= name.len && name.data[i + 3] == '-' && name.data[i + 4] == '3') return true;
    }
    return false;
}

static bool string_is(struct gguf_string s, const char *text) {
    return s.len == strlen(text) && memcmp(s.data, text, (size_t)s.len) == 0;
}

static int shown(struct gguf_string s) {
    return s.len < 40 ? (int)s.len : 40;
}

static amber_status choose_model(amber_tokenizer *t, const struct gguf_file *file,
                                 amber_error *err) {
    struct gguf_string model;
    int got = gguf_get_string(file, "tokenizer.ggml.model", &model, err);
    if (got < 0) return AMBER_ERR_FORMAT;
    if (got == 0) {
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tokenizer.ggml.model: missing (the file has no tokenizer)",
                          file->label);
    }
    t->bpe = string_is(model, "gpt2");
    if (!t->bpe && !string_is(model, "llama")) {
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: tokenizer.ggml.model: expected llama (SentencePiece BPE) or gpt2 "
                          "(byte-level BPE), found %.*s",
                          file->label, shown(model), model.data);
    }
    if (!t->bpe) return AMBER_OK;

    struct gguf_string pre = {"default", 7};
    if (gguf_get_string(file, "tokenizer.ggml.pre", &pre, err) < 0) return AMBER_ERR_FORMAT;
    t->pre = tok_pre_find(pre.data, (size_t)pre.len);
    if (!t->pre) {
        char names[140]; /* cut: the message has 256 bytes */
        tok_pre_names(names, sizeof names);
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: tokenizer.ggml.pre: unknown pre-tokenizer \"%.*s\", known are %s",
                          file->label, shown(pre), pre.data, names);
    }
    return AMBER_OK;
}

static amber_status load(amber_tokenizer *t, const struct gguf_file *file, amber_error *err) {
    amber_status st;
    if ((st = choose_model(t, file, err)) || (st = load_tokens(t, file, err)) ||
        (st = load_types(t, file, err)) || (st = load_specials(t, file, err)) ||
        (st = build_special_lists(t, err))) {
        return st;
    }
    t->space_prefix = !t->bpe;
    bool flag;
    int got = gguf_get_bool(file, "tokenizer.ggml.add_space_prefix", &flag, err);
    if (got < 0) return AMBER_ERR_FORMAT;
    if (got > 0 && !t->bpe) t->space_prefix = flag;
    got = gguf_get_bool(file, "tokenizer.ggml.remove_extra_whitespaces", &flag, err);
    if (got < 0) return AMBER_ERR_FORMAT;
    t->collapse_spaces = got > 0 && !t->bpe && flag;
    t->special_eats_space = !t->bpe && named_phi3(file);

    for (int b = 0; b < 256; b++) t->byte_id[b] = -1;
    if (t->bpe) return tok_bpe_load(t, file, err);
    for (int32_t id = 0; id < t->n; id++) {
        if (t->type[id] != TOK_BYTE) continue;
        uint32_t len;
        const char *s = tok_text(t, id, &len);
        int value = tok_byte_value(s, len);
        if (value < 0) {
            return amber_fail(err, AMBER_ERR_FORMAT,
                              "%s: tokenizer.ggml.tokens: expected byte token %d to read <0x00> to "
                              "<0xFF>, found \"%.*s\"",
                              file->label, id, len < 40 ? (int)len : 40, s);
        }
        t->byte_id[value] = id;
    }
    return tok_spm_load(t, file, err);
}

amber_status tok_new(const struct gguf_file *file, amber_tokenizer **out, amber_error *err) {
    *out = NULL;
    amber_tokenizer *t = calloc(1, sizeof *t);
    if (!t) return no_memory(err);
    amber_status st = load(t, file, err);
    if (st) {
        amber_tokenizer_close(t);
        return st;
    }
    *out = t;
    return AMBER_OK;
}

amber_status amber_tokenizer_open(const char *path, amber_tokenizer **out, amber_error *err) {
    if (!out || !path) return amber_fail(err, AMBER_ERR_ARGUMENT, "tokenizer: path and out: NULL");
    *out = NULL;
    struct gguf_file *file;
    amber_status st = gguf_open(path, &file, err);
    if (st) return st;
    st = tok_new(file, out, err);
    gguf_close(file);
    return st;
}

void amber_tokenizer_close(amber_tokenizer *t) {
    if (!t) return;
    free(t->text);
    free(t->offset);
    free(t->type);
    free(t->flags);
    free(t->slots);
    free(t->special_text);
    free(t->special.items);
    free(t->user.items);
    free(t->rank);
    free(t->adjacent);
    free(t->pairs);
    free(t);
}

/* ---- looking tokens up ---- */

int32_t amber_tokenizer_size(const amber_tokenizer *t) {
    return t->n;
}
int32_t amber_tokenizer_bos(const amber_tokenizer *t) {
    return t->bos;
}
int32_t amber_tokenizer_eos(const amber_tokenizer *t) {
    return t->eos;
}
int32_t amber_tokenizer_adds_bos(const amber_tokenizer *t) {
    return t->add_bos;
}

int32_t amber_token_flags(const amber_tokenizer *t, int32_t token) {
    return token >= 0 && token < t->n ? t->flags[token] : 0;
}

const char *amber_token_text(const amber_tokenizer *t, int32_t token, int32_t *length) {
    if (length) *length = 0;
    if (token < 0 || token >= t->n) return NULL;
    uint32_t len;
    const char *s = tok_text(t, token, &len);
    if (len > INT32_MAX) return NULL;
    if (length) *length = (int32_t)len;
    return s;
}

int32_t amber_token_find(const amber_tokenizer *t, const char *text, int32_t length) {
    return text && length >= 0 ? tok_find(t, text, (size_t)length) : -1;
}

/* ---- encoding ---- */

static void encode_segment(const amber_tokenizer *t, struct tok_work *w, const char *text, size_t n,
                           bool after_special) {
    if (n == 0 || w->failed) return;
    if (t->bpe) {
        tok_bpe_encode(t, w, text, n);
    } else {
        /* The prefix comes at the beginning and again behind every special token (llama.cpp). */
        tok_spm_encode(t, w, text, n, t->space_prefix && after_special);
    }
}

static void encode_text(const amber_tokenizer *t, struct tok_work *w, const char *text, size_t n,
                        bool parse_special) {
    const struct tok_special_list *list = parse_special ? &t->special : &t->user;
    bool after_special = true;
    size_t begin = 0;
    for (size_t i = 0; list->n > 0 && i < n && !w->failed;) {
        const struct tok_special *s = match_special(list, text + i, n - i);
        if (!s) {
            i++;
            continue;
        }
        encode_segment(t, w, text + begin, i - begin, after_special);
        tok_push(w, s->id);
        after_special = true;
        i += s->len;
        if (t->special_eats_space && s->id != t->unk && s->id != t->bos &&
            !(s->len == 13 && memcmp(s->text, "<|endoftext|>", 13) == 0)) {
            while (i < n && (text[i] == ' ' || (text[i] >= '\t' && text[i] <= '\r'))) i++;
        }
        begin = i;
    }
    encode_segment(t, w, text + begin, n - begin, after_special);
}

int32_t amber_tokenize(const amber_tokenizer *t, const char *text, int32_t length,
                       int32_t add_special, int32_t parse_special, int32_t *out, int32_t cap,
                       amber_error *err) {
    if (!t || length < 0 || (length > 0 && !text) || cap < 0 || (cap > 0 && !out)) {
        return -(int32_t)amber_fail(err, AMBER_ERR_ARGUMENT,
                                    "tokenize: expected a text and an array, found NULL or a "
                                    "negative length");
    }
    struct tok_work w = {.out = out, .cap = cap};
    size_t n = (size_t)length;
    char *repaired = NULL;
    if (n > 0 && uni_valid_prefix(text, n) < n) {
        repaired = malloc(3 * n);
        if (!repaired) return -(int32_t)no_memory(err);
        n = uni_sanitize(text, n, repaired);
        text = repaired;
    }
    if (add_special && t->add_bos) tok_push(&w, t->bos);
    if (n > 0) encode_text(t, &w, text, n, parse_special != 0);
    if (add_special && t->add_eos) tok_push(&w, t->eos);
    free(repaired);
    free(w.syms);
    free(w.heap);
    free(w.buffer);
    free(w.left_len);
    if (w.failed) return -(int32_t)no_memory(err);
    if (w.n > INT32_MAX) {
        return -(int32_t)amber_fail(err, AMBER_ERR_ARGUMENT,
                                    "tokenize: more than %d tokens (split the text)", INT32_MAX);
    }
    return (int32_t)w.n;
}
