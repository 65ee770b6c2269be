/* tok_pretok.c: pre-tokenizers of byte-level BPE models.
 *
 * A model's pre-tokenizer is a list of regular expressions. The first splits the text into its
 * matches and the gaps between them, the next splits each of those, and so on. Here every
 * expression is a function that tells where a match beginning at a given place ends; its comment
 * quotes the expression, and it gives what a backtracking engine gives for that expression. Facts
 * about which model uses which: the models' tokenizer.json files and llama.cpp's table of
 * pre-tokenizer names. */
#include "tok_internal.h"

#include "unicode.h"

#include <string.h>

/* Beyond the text's end there is a character that has no property but this one. */
#define END (1u << 15)

struct span {
    const char *s;
    size_t n;
    size_t tail; /* where the white space at the end begins; computed when first needed */
};

/* Returns the end of the match that begins at i, or i where none does (no expression here matches
 * the empty string). */
typedef size_t (*match_fn)(struct span *t, size_t i);

/* ---- characters ---- */

static inline unsigned flags_at(const struct span *t, size_t i, size_t *next) {
    if (i >= t->n) {
        *next = i;
        return END;
    }
    unsigned char c = (unsigned char)t->s[i];
    if (c < 0x80) {
        *next = i + 1;
        return uni_class_flags[uni_blocks[0][c] - 'A']; /* block 0 is ASCII */
    }
    uint32_t cp;
    *next = i + (size_t)uni_next(t->s + i, &cp);
    return uni_flags(cp);
}

static inline uint32_t char_at(const struct span *t, size_t i, size_t *next) {
    uint32_t cp = UINT32_MAX;
    *next = i < t->n ? i + (size_t)uni_next(t->s + i, &cp) : i;
    return cp;
}

static inline bool is_at(const struct span *t, size_t i, char c) {
    return i < t->n && t->s[i] == c;
}

static inline bool newline_at(const struct span *t, size_t i) {
    return is_at(t, i, '\n') || is_at(t, i, '\r');
}

/* End of the run of characters that have one of the properties. */
static size_t run(const struct span *t, size_t i, unsigned any) {
    size_t next;
    while (flags_at(t, i, &next) & any) i = next;
    return i;
}

/* End of the run of characters that have none of them. */
static size_t run_without(const struct span *t, size_t i, unsigned none) {
    size_t next;
    while (!(flags_at(t, i, &next) & (none | END))) i = next;
    return i;
}

struct range {
    uint32_t first, last;
};

static bool in_ranges(uint32_t cp, const struct range *r, size_t n) {
    size_t a = 0, b = n;
    while (a < b) {
        size_t mid = (a + b) / 2;
        if (cp > r[mid].last)
            a = mid + 1;
        else
            b = mid;
    }
    return a < n && cp >= r[a].first;
}

static size_t run_in(const struct span *t, size_t i, const struct range *r, size_t n) {
    size_t next;
    while (in_ranges(char_at(t, i, &next), r, n)) i = next;
    return i;
}

#define RUN_IN(t, i, table) run_in(t, i, table, sizeof table / sizeof *table)

/* ---- parts that several expressions share ---- */

/* 's|'t|'re|'ve|'m|'ll|'d, in either case where asked for. Case folding makes U+017F, the long s,
 * an s too (Unicode CaseFolding.txt). */
static size_t contraction(const struct span *t, size_t i, bool any_case) {
    if (!is_at(t, i, '\'') || i + 1 >= t->n) return i;
    unsigned char fold = any_case ? 0x20 : 0;
    unsigned char a = (unsigned char)t->s[i + 1] | (t->s[i + 1] & 0x40 ? fold : 0);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
    if (i + 2 >= t->n) return i;
    if (any_case && memcmp(t->s + i + 1, "\xC5\xBF", 2) == 0) return i + 3;
    unsigned char b = (unsigned char)t->s[i + 2] | (t->s[i + 2] & 0x40 ? fold : 0);
    bool pair = (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l');
    return pair ? i + 3 : i;
}

/* \s+(?!\S)|\s+: a run of white space, less its last character where text follows; one character
 * alone is taken in any case. */
static size_t spaces(const struct span *t, size_t i) {
    size_t last = i, end = i, next;
    while (flags_at(t, end, &next) & UNI_SPACE) {
        last = end;
        end = next;
    }
    return end == t->n || last == i ? end : last;
}

/* \s*[\r\n]+ and \s*[\r\n] alike: white space up to the last line end in the run. */
static size_t spaces_to_newline(const struct span *t, size_t i) {
    size_t end = i, next;
    for (size_t k = i; flags_at(t, k, &next) & UNI_SPACE; k = next) {
        if (newline_at(t, k)) end = next;
    }
    return end;
}

/* [^\r\n\p{L}\p{N}]?LETTERS+, where LETTERS contain \p{L} and nothing of \p{N}. A mark that is both
 * the optional character and a letter makes no difference: the match ends at the same place. */
static size_t letters_after_any(const struct span *t, size_t i, unsigned letters) {
    size_t next, after;
    unsigned f = flags_at(t, i, &next);
    if (f & letters) return run(t, i, letters);
    if ((f & (UNI_L | UNI_N | END)) || newline_at(t, i)) return i;
    return flags_at(t, next, &after) & letters ? run(t, next, letters) : i;
}

/* \p{N}{1,most} */
static size_t digits(const struct span *t, size_t i, int most) {
    size_t next;
    while (most-- > 0 && (flags_at(t, i, &next) & UNI_N)) i = next;
    return i;
}

/* " ?[^none]+TAIL*": TAIL is line ends, and '/' too where asked for. */
static size_t symbols(const struct span *t, size_t i, unsigned none, bool newlines, bool slash) {
    size_t begin = i + is_at(t, i, ' ');
    size_t end = run_without(t, begin, none);
    if (end == begin) return i;
    while (newlines && (newline_at(t, end) || (slash && is_at(t, end, '/')))) end++;
    return end;
}

/* ---- GPT-2 ---- */

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t gpt2(struct span *t, size_t i) {
    size_t next, end = contraction(t, i, false);
    if (end > i) return end;
    size_t begin = i + is_at(t, i, ' ');
    unsigned f = flags_at(t, begin, &next);
    if (f & UNI_L) return run(t, next, UNI_L);
    if (f & UNI_N) return run(t, next, UNI_N);
    if (!(f & (UNI_SPACE | END))) return run_without(t, next, UNI_SPACE | UNI_L | UNI_N);
    return spaces(t, i);
}

/* \p{N} */
static size_t one_number(struct span *t, size_t i) {
    return digits(t, i, 1);
}

/* \p{N}+ */
static size_t numbers(struct span *t, size_t i) {
    return run(t, i, UNI_N);
}

/* \p{N}{1,3} */
static size_t three_numbers(struct span *t, size_t i) {
    return digits(t, i, 3);
}

/* [0-9][0-9][0-9] */
static size_t three_ascii_digits(struct span *t, size_t i) {
    for (size_t k = i; k < i + 3; k++) {
        if (k >= t->n || t->s[k] < '0' || t->s[k] > '9') return i;
    }
    return i + 3;
}

static size_t punctuation_and(struct span *t, size_t i, const char *more) {
    for (size_t next;; i = next) {
        bool in = flags_at(t, i, &next) & UNI_P;
        if (!in && (i >= t->n || t->s[i] == 0 || !strchr(more, t->s[i]))) return i;
    }
}

/* [\p{P}\$\+<=>\^~\|]+ */
static size_t default_punctuation(struct span *t, size_t i) {
    return punctuation_and(t, i, "$+<=>^~|");
}

/* [\p{P}\$\+<=>\^~\|`]+ */
static size_t falcon_punctuation(struct span *t, size_t i) {
    return punctuation_and(t, i, "$+<=>^~|`");
}

/* ---- Llama 3, Qwen2 and kin ---- */

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?LETTERS+|\p{N}{1,most}
 * | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
 * where marks, if they count as letters, are no symbols either. */
static size_t llama3_kin(const struct span *t, size_t i, unsigned letters, int most) {
    size_t end = contraction(t, i, true);
    if (end > i) return end;
    if ((end = letters_after_any(t, i, letters)) > i) return end;
    if ((end = digits(t, i, most)) > i) return end;
    if ((end = symbols(t, i, UNI_SPACE | UNI_N | letters, true, false)) > i) return end;
    if ((end = spaces_to_newline(t, i)) > i) return end;
    return spaces(t, i);
}

static size_t llama3(struct span *t, size_t i) {
    return llama3_kin(t, i, UNI_L, 3);
}
static size_t qwen2(struct span *t, size_t i) {
    return llama3_kin(t, i, UNI_L, 1);
}
static size_t qwen35(struct span *t, size_t i) {
    return llama3_kin(t, i, UNI_L | UNI_M, 1);
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+
 * |\s+(?!\S)|\s+ */
static size_t seed_coder(struct span *t, size_t i) {
    size_t end = contraction(t, i, true);
    if (end > i) return end;
    if ((end = letters_after_any(t, i, UNI_L)) > i) return end;
    if ((end = digits(t, i, 1)) > i) return end;
    if ((end = symbols(t, i, UNI_SPACE | UNI_L | UNI_N, false, false)) > i) return end;
    if ((end = spaces_to_newline(t, i)) > i) return end;
    return spaces(t, i);
}

/* As Llama 3, but for white space \s{512}(?!\S)|\s{256}(?!\S)|...|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}
 */
static size_t jais2(struct span *t, size_t i) {
    size_t end = contraction(t, i, true);
    if (end > i) return end;
    if ((end = letters_after_any(t, i, UNI_L)) > i) return end;
    if ((end = digits(t, i, 3)) > i) return end;
    if ((end = symbols(t, i, UNI_SPACE | UNI_L | UNI_N, true, false)) > i) return end;
    if ((end = spaces_to_newline(t, i)) > i) return end;
    size_t ends[514], count = 0, next; /* ends[k]: behind k white space characters */
    ends[0] = i;
    while (count < 513 && (flags_at(t, ends[count], &next) & UNI_SPACE)) ends[++count] = next;
    for (size_t k = 512; k >= 1; k = k > 4 ? k / 2 : k == 4 ? 2 : k - 1) {
        if (count > k || (count == k && ends[k] == t->n)) return ends[k];
    }
    return count > 0 ? ends[1] : i;
}

/* ---- Tekken, GPT-4o, Kimi: words that begin with capitals ---- */

#define UPPER (UNI_LU | UNI_LT | UNI_LM | UNI_LO | UNI_M)
#define LOWER (UNI_LL | UNI_LM | UNI_LO | UNI_M)

static inline unsigned cased_at(const struct span *t, size_t i, bool no_han, size_t *next) {
    unsigned f = flags_at(t, i, next);
    return no_han && (f & UNI_HAN) ? 0 : f;
}

/* [UPPER]*[LOWER]+ */
static size_t word_with_lower(const struct span *t, size_t i, bool no_han) {
    size_t end = i, shared_end = i, next;
    unsigned f;
    while ((f = cased_at(t, end, no_han, &next)) & UPPER) {
        end = next;
        if (f & LOWER) shared_end = end;
    }
    /* Where no lower-case letter follows the run, the engine gives characters of the run back until
     * one is in both classes. */
    if (!(f & LOWER)) return shared_end;
    while (cased_at(t, end, no_han, &next) & LOWER) end = next;
    return end;
}

/* [UPPER]+[LOWER]*, tried only where word_with_lower failed: no lower-case letter can follow. */
static size_t word_of_upper(const struct span *t, size_t i, bool no_han) {
    size_t next;
    while (cased_at(t, i, no_han, &next) & UPPER) i = next;
    return i;
}

/* [^\r\n\p{L}\p{N}]?[UPPER]*[LOWER]+|[^\r\n\p{L}\p{N}]?[UPPER]+[LOWER]* */
static size_t cased_word(const struct span *t, size_t i, bool no_han) {
    size_t next, end;
    unsigned f = flags_at(t, i, &next);
    bool skip = !(f & (UNI_L | UNI_N | END)) && !newline_at(t, i);
    if (skip && (end = word_with_lower(t, next, no_han)) > next) return end;
    if ((end = word_with_lower(t, i, no_han)) > i) return end;
    if (skip && (end = word_of_upper(t, next, no_han)) > next) return end;
    return word_of_upper(t, i, no_han);
}

/* WORD|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
static size_t tekken(struct span *t, size_t i) {
    size_t end = cased_word(t, i, false);
    if (end > i) return end;
    if ((end = digits(t, i, 1)) > i) return end;
    if ((end = symbols(t, i, UNI_SPACE | UNI_L | UNI_N, true, true)) > i) return end;
    if ((end = spaces_to_newline(t, i)) > i) return end;
    return spaces(t, i);
}

/* WORD(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
 */
static size_t gpt4o(struct span *t, size_t i) {
    size_t end = cased_word(t, i, false);
    if (end > i) return contraction(t, end, true);
    if ((end = digits(t, i, 3)) > i) return end;
    if ((end = symbols(t, i, UNI_SPACE | UNI_L | UNI_N, true, true)) > i) return end;
    if ((end = spaces_to_newline(t, i)) > i) return end;
    return spaces(t, i);
}

/* [\p{Han}]+|WORD(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+
 * |\s+(?!\S)|\s+ where the letters of WORD are those that are not Han. */
static size_t kimi(struct span *t, size_t i) {
    size_t end = run(t, i, UNI_HAN);
    if (end > i) return end;
    if ((end = cased_word(t, i, true)) > i) return contraction(t, end, true);
    if ((end = digits(t, i, 3)) > i) return end;
    if ((end = symbols(t, i, UNI_SPACE | UNI_L | UNI_N, true, false)) > i) return end;
    if ((end = spaces_to_newline(t, i)) > i) return end;
    return spaces(t, i);
}

/* ---- DeepSeek ---- */

/* [\r\n] */
static size_t one_newline(struct span *t, size_t i) {
    return i + newline_at(t, i);
}

/* \s?CLASS+ */
static size_t space_and_run(const struct span *t, size_t i, unsigned any) {
    size_t next, after;
    unsigned f = flags_at(t, i, &next);
    if (f & any) return run(t, next, any);
    return (f & UNI_SPACE) && (flags_at(t, next, &after) & any) ? run(t, after, any) : i;
}

/* \s?\p{L}+ */
static size_t space_letters(struct span *t, size_t i) {
    return space_and_run(t, i, UNI_L);
}

/* \s?\p{P}+ */
static size_t space_punctuation(struct span *t, size_t i) {
    return space_and_run(t, i, UNI_P);
}

static const struct range cjk[] = {{0x800, 0x9FA5}, {0xAC00, 0xD7FF}};

/* [一-龥ࠀ-一가-퟿]+ */
static size_t cjk_run(struct span *t, size_t i) {
    return RUN_IN(t, i, cjk);
}

static const struct range cjk_kana[] = {{0x3040, 0x30FF}, {0x4E00, 0x9FA5}};

/* [一-龥぀-ゟ゠-ヿ]+ */
static size_t cjk_kana_run(struct span *t, size_t i) {
    return RUN_IN(t, i, cjk_kana);
}

static size_t space_and_ranges(const struct span *t, size_t i, const struct range *r, size_t n) {
    size_t end = run_in(t, i, r, n), next;
    if (end > i || !(flags_at(t, i, &next) & UNI_SPACE)) return end;
    end = run_in(t, next, r, n);
    return end > next ? end : i;
}

/* The letters that DeepSeek LLM's expression lists one by one: cased ones of an older Unicode. */
static const struct range deepseek_letters[] = {
    /* clang-format off */
    {0x41, 0x5A}, {0x61, 0x7A}, {0xB5, 0xB5}, {0xC0, 0xD6}, {0xD8, 0xF6}, {0xF8, 0x1BA},
    {0x1BC, 0x1BF}, {0x1C4, 0x293}, {0x295, 0x2AF}, {0x370, 0x373}, {0x376, 0x376}, {0x377, 0x377},
    {0x37B, 0x37D}, {0x37F, 0x37F}, {0x386, 0x386}, {0x388, 0x38A}, {0x38C, 0x38C}, {0x38E, 0x3A1},
    {0x3A3, 0x3F5}, {0x3F7, 0x481}, {0x48A, 0x52F}, {0x531, 0x556}, {0x10A0, 0x10C5},
    {0x13A0, 0x13F5}, {0x13F8, 0x13FD}, {0x1C90, 0x1CBA}, {0x1CBD, 0x1CBF}, {0x1D00, 0x1D2B},
    {0x1D6B, 0x1D77}, {0x1D79, 0x1D9A}, {0x1E00, 0x1F15}, {0x1F18, 0x1F1D}, {0x1F20, 0x1F45},
    {0x1F48, 0x1F4D}, {0x1F50, 0x1F57}, {0x1F59, 0x1F59}, {0x1F5B, 0x1F5B}, {0x1F5D, 0x1F5D},
    {0x1F5F, 0x1F7D}, {0x1F80, 0x1FB4}, {0x1FB6, 0x1FBC}, {0x1FBE, 0x1FBE}, {0x1FC2, 0x1FC4},
    {0x1FC6, 0x1FCC}, {0x1FD0, 0x1FD3}, {0x1FD6, 0x1FDB}, {0x1FE0, 0x1FEC}, {0x1FF2, 0x1FF4},
    {0x1FF6, 0x1FFC}, {0x2102, 0x2102}, {0x2107, 0x2107}, {0x210A, 0x2113}, {0x2115, 0x2115},
    {0x2119, 0x211D}, {0x2124, 0x2124}, {0x2126, 0x2126}, {0x2128, 0x2128}, {0x212A, 0x212D},
    {0x212F, 0x2134}, {0x2139, 0x2139}, {0x213C, 0x213F}, {0x2145, 0x2149}, {0x214E, 0x214E},
    {0x2183, 0x2183}, {0x2184, 0x2184}, {0x2C00, 0x2C7B}, {0x2C7E, 0x2CE4}, {0x2CEB, 0x2CEE},
    {0x2CF2, 0x2CF2}, {0x2CF3, 0x2CF3}, {0xA640, 0xA66D}, {0xA680, 0xA69B}, {0xA722, 0xA76F},
    {0xA771, 0xA787}, {0xA78B, 0xA78E}, {0xAB70, 0xABBF}, {0xFB00, 0xFB06}, {0xFB13, 0xFB17},
    {0xFF21, 0xFF3A}, {0xFF41, 0xFF5A}, {0x10400, 0x1044F}, {0x104B0, 0x104D3}, {0x104D8, 0x104FB},
    {0x10C80, 0x10CB2}, {0x10CC0, 0x10CF2}, {0x118A0, 0x118DF}, {0x1E900, 0x1E943},
    /* clang-format on */
};

/* \s?[A-Za-zµÀ-ÖØ-öø-ƺ...]+ */
static size_t deepseek_llm_letters(struct span *t, size_t i) {
    return space_and_ranges(t, i, deepseek_letters,
                            sizeof deepseek_letters / sizeof *deepseek_letters);
}

static const struct range deepseek_symbols[] = {
    {0x21, 0x2F},     {0x3A, 0x7E},     {0x2018, 0x201F},
    {0x3000, 0x3002}, {0xFF01, 0xFF0F}, {0xFF1A, 0xFF5E},
};

/* \s?[!-/:-~！-／：-～‘-‟　-。]+ */
static size_t deepseek_llm_symbols(struct span *t, size_t i) {
    return space_and_ranges(t, i, deepseek_symbols,
                            sizeof deepseek_symbols / sizeof *deepseek_symbols);
}

/* \s+$ ; looked for from the end, so that long runs elsewhere cost nothing */
static size_t spaces_at_end(struct span *t, size_t i) {
    if (t->tail > t->n) {
        size_t next;
        for (t->tail = t->n; t->tail > 0;) {
            size_t before = t->tail - 1;
            while (((unsigned char)t->s[before] & 0xC0) == 0x80) before--;
            if (!(flags_at(t, before, &next) & UNI_SPACE)) break;
            t->tail = before;
        }
    }
    return i >= t->tail ? t->n : i;
}

static bool ascii_symbol(char c) { /* the 32 printable ones: !"#$%&'()*+,-./:;<=>?@[\]^_`{|}~ */
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
           (c >= '{' && c <= '~');
}

static bool ascii_letter(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/* [ASCII symbols][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+
 * |\s+(?!\S)|\s+ */
static size_t deepseek_v3(struct span *t, size_t i) {
    size_t next, after, end;
    if (ascii_symbol(t->s[i]) && i + 1 < t->n && ascii_letter(t->s[i + 1])) {
        for (end = i + 2; end < t->n && ascii_letter(t->s[end]);) end++;
        return end;
    }
    unsigned f = flags_at(t, i, &next);
    if (f & (UNI_L | UNI_M)) return run(t, next, UNI_L | UNI_M);
    if (!(f & (UNI_P | UNI_S)) && !newline_at(t, i) &&
        (flags_at(t, next, &after) & (UNI_L | UNI_M))) {
        return run(t, after, UNI_L | UNI_M);
    }
    size_t begin = i + is_at(t, i, ' ');
    end = run(t, begin, UNI_P | UNI_S);
    if (end > begin) {
        while (newline_at(t, end)) end++;
        return end;
    }
    if ((end = spaces_to_newline(t, i)) > i) return end;
    return spaces(t, i);
}

/* ---- Bloom ---- */

/*  ?[^(\s|.,!?…。，、।۔،)]+  */
static size_t bloom(struct span *t, size_t i) {
    size_t begin = i + is_at(t, i, ' '), end = begin;
    for (size_t next;; end = next) {
        if (flags_at(t, end, &next) & (UNI_SPACE | END)) break;
        uint32_t cp = char_at(t, end, &next);
        if (cp < 0x80 ? cp != 0 && strchr("(|.,!?)", (int)cp) != NULL
                      : cp == 0x2026 || cp == 0x3002 || cp == 0xFF0C || cp == 0x3001 ||
                            cp == 0x964 || cp == 0x6D4 || cp == 0x60C) {
            break;
        }
    }
    return end > begin ? end : i;
}

/* ---- the table ---- */

struct tok_pretokenizer {
    const char *names; /* separated by spaces */
    match_fn steps[7]; /* ends with NULL */
    bool adds_bos;     /* the family's habit where the file does not say */
    bool takes_whole;
};

static const struct tok_pretokenizer table[] = {
    {"default", {default_punctuation, gpt2, numbers, three_ascii_digits}, false, false},
    {"gpt-2 phi-2 olmo mpt jais gigachat trillion granite-docling exaone4 mellum modern-bert "
     "a.x-4.0 "
     "jina-es jina-de jina-v2-es jina-v2-de",
     {gpt2},
     false,
     false},
    {"llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
     {llama3},
     true,
     true},
    {"dbrx smaug-bpe glm4 chatglm-bpe", {llama3}, false, false},
    {"qwen2 deepseek-r1-qwen megrez kormo f2llmv2 stablelm2 hunyuan solar-open grok-2 bailingmoe "
     "bailingmoe2 llada-moe",
     {qwen2},
     false,
     false},
    {"qwen35", {qwen35}, false, false},
    {"deepseek-llm",
     {one_newline, deepseek_llm_letters, deepseek_llm_symbols, spaces_at_end, cjk_run, numbers},
     false,
     false},
    {"deepseek-coder",
     {one_newline, space_letters, space_punctuation, cjk_run, one_number},
     false,
     false},
    {"deepseek-v3 hunyuan-dense joyai-llm",
     {three_numbers, cjk_kana_run, deepseek_v3},
     false,
     false},
    {"starcoder refact command-r smollm codeshell exaone minerva-7b",
     {one_number, gpt2},
     false,
     false},
    {"falcon", {falcon_punctuation, gpt2, three_ascii_digits}, false, false},
    {"tekken", {tekken}, true, true},
    {"gpt-4o llama4 kanana2 minimax-m2", {gpt4o}, false, false},
    {"kimi-k2", {kimi}, false, false},
    {"seed-coder", {seed_coder}, false, false},
    {"jais-2", {jais2}, false, false},
    {"bloom poro-chat gpt3-finnish", {bloom}, false, false},
    {"viking", {bloom, one_number}, false, false},
};

static bool has_name(const char *names, const char *name, size_t len) {
    for (const char *p = names; *p;) {
        size_t width = strcspn(p, " ");
        if (width == len && memcmp(p, name, len) == 0) return true;
        p += width + (p[width] == ' ');
    }
    return false;
}

const struct tok_pretokenizer *tok_pre_find(const char *name, size_t len) {
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (has_name(table[i].names, name, len)) return &table[i];
    }
    return NULL;
}

void tok_pre_names(char *buf, size_t cap) {
    size_t used = 0;
    buf[0] = 0;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        size_t width = strcspn(table[i].names, " ");
        if (used + width + 2 > cap) return;
        if (used > 0) buf[used++] = ' ';
        memcpy(buf + used, table[i].names, width);
        used += width;
        buf[used] = 0;
    }
}

bool tok_pre_adds_bos(const struct tok_pretokenizer *pre) {
    return pre->adds_bos;
}
bool tok_pre_takes_whole(const struct tok_pretokenizer *pre) {
    return pre->takes_whole;
}

/* ---- splitting ---- */

static void split(const match_fn *steps, const char *text, size_t n, tok_piece_fn piece,
                  void *user) {
    if (!steps[0]) {
        piece(user, text, n);
        return;
    }
    struct span t = {text, n, SIZE_MAX};
    size_t gap = 0; /* begin of the text that nothing has matched yet */
    for (size_t i = 0; i < n;) {
        size_t end = steps[0](&t, i);
        if (end == i) {
            i += (size_t)uni_length(text[i]);
            continue;
        }
        if (gap < i) split(steps + 1, text + gap, i - gap, piece, user);
        split(steps + 1, text + i, end - i, piece, user);
        gap = i = end;
    }
    if (gap < n) split(steps + 1, text + gap, n - gap, piece, user);
}

void tok_pre_split(const struct tok_pretokenizer *pre, const char *text, size_t n,
                   tok_piece_fn piece, void *user) {
    split(pre->steps, text, n, piece, user);
}
