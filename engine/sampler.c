/* sampler.c: from logits to the next token.
 *
 * What each control means follows llama.cpp's samplers of the same names, in the order bias,
 * penalties, top-k, top-p, min-p, temperature. The three truncations all keep a prefix of the same
 * order, larger logit first and among equals the lower token id, so together they keep one prefix,
 * and a full sort of the vocabulary is never needed: top-k holds a heap of k, top-p takes from a
 * heap until it has enough mass, min-p is a threshold.
 *
 * Probabilities are float64 and are added in a fixed order, so a seed gives the same tokens
 * everywhere that gives the same logits, but for the last bit of the C library's exp(). */
#include "common.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

struct candidate {
    float logit;
    int32_t id;
};

struct amber_sampler {
    amber_sampling options; /* pointers in it are the sampler's own copies */
    int32_t n_vocab;
    uint64_t state[4];
    float *logits;          /* [n_vocab] float32, after bias and penalties */
    struct candidate *cand; /* [n_vocab] */

    /* The penalties' window. */
    bool penalties;
    int32_t *count;  /* [n_vocab] how often the window holds a token */
    int32_t *window; /* [cap_window] ring once it is full; unused where the window is endless */
    int32_t cap_window, n_window, oldest;
};

/* ---- random numbers ---- */

static uint64_t rotate_left(uint64_t x, int bits) {
    return (x << bits) | (x >> (64 - bits));
}

/* Expands one word to a state: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), which Blackman and
 * Vigna recommend for seeding their generators, as it never gives four zeros. */
static void seed_state(uint64_t state[4], uint64_t seed) {
    for (int i = 0; i < 4; i++) {
        seed += UINT64_C(0x9e3779b97f4a7c15);
        uint64_t z = seed;
        z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
        state[i] = z ^ (z >> 31);
    }
}

/* xoshiro256** 1.0: Blackman, Vigna, "Scrambled linear pseudorandom number generators", ACM TOMS
 * 2021. */
static uint64_t next_word(uint64_t s[4]) {
    uint64_t result = rotate_left(s[1] * 5, 7) * 9;
    uint64_t shifted = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= shifted;
    s[3] = rotate_left(s[3], 45);
    return result;
}

/* In [0, 1), every multiple of 2^-53. */
static double next_unit(uint64_t s[4]) {
    return (double)(next_word(s) >> 11) * 0x1p-53;
}

/* ---- options ---- */

void amber_sampling_defaults(amber_sampling *sampling) {
    *sampling = (amber_sampling){
        .size = sizeof *sampling,
        .temperature = 0.8f,
        .top_k = 40,
        .top_p = 0.95f,
        .min_p = 0.05f,
        .repeat_penalty = 1.0f,
        .penalty_last_n = 64,
        .seed = AMBER_SEED_RANDOM,
    };
}

static amber_status check_options(const amber_sampling *s, int32_t n_vocab, amber_error *err) {
    if (n_vocab <= 0)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sampler: expected n_vocab of 1 or more, found %d", n_vocab);
    if (!isfinite(s->temperature))
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sampler: expected a finite temperature, found %g (0 is greedy)",
                          (double)s->temperature);
    if (!(s->top_p > 0))
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sampler: expected top_p above 0, found %g (1 keeps all)",
                          (double)s->top_p);
    if (!(s->min_p <= 1))
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sampler: expected min_p from 0 to 1, found %g (0 keeps all)",
                          (double)s->min_p);
    if (!(s->repeat_penalty > 0) || isinf(s->repeat_penalty))
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sampler: expected repeat_penalty above 0, found %g (1 is none)",
                          (double)s->repeat_penalty);
    if (!isfinite(s->frequency_penalty))
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sampler: expected a finite frequency_penalty, found %g (0 is none)",
                          (double)s->frequency_penalty);
    if (!isfinite(s->presence_penalty))
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sampler: expected a finite presence_penalty, found %g (0 is none)",
                          (double)s->presence_penalty);
    if (s->penalty_last_n < -1)
        return amber_fail(
            err, AMBER_ERR_ARGUMENT,
            "sampler: expected penalty_last_n of -1 or more, found %d (-1 is all tokens)",
            s->penalty_last_n);
    if (s->n_logit_bias < 0)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sampler: expected n_logit_bias of 0 or more, found %d", s->n_logit_bias);
    if (s->n_logit_bias > 0 && (!s->logit_bias_tokens || !s->logit_bias_values))
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sampler: expected tokens and values for %d logit biases, found NULL",
                          s->n_logit_bias);
    for (int32_t i = 0; i < s->n_logit_bias; i++) {
        if (s->logit_bias_tokens[i] < 0 || s->logit_bias_tokens[i] >= n_vocab)
            return amber_fail(err, AMBER_ERR_ARGUMENT,
                              "sampler: expected a logit bias on a token from 0 to %d, found %d",
                              n_vocab - 1, s->logit_bias_tokens[i]);
        if (!(s->logit_bias_values[i] <= FLT_MAX))
            return amber_fail(err, AMBER_ERR_ARGUMENT,
                              "sampler: expected a finite logit bias or -infinity (a ban) on token "
                              "%d, found %g",
                              s->logit_bias_tokens[i], (double)s->logit_bias_values[i]);
    }
    return AMBER_OK;
}

static amber_status draw_seed(uint64_t *seed, amber_error *err) {
    uint32_t word;
    if (getentropy(&word, sizeof word) != 0)
        return amber_fail(
            err, AMBER_ERR_IO,
            "sampler: expected a random seed from the system, found none (give a seed)");
    /* 32 bits: short enough to be typed again, and exact in JSON. */
    *seed = word;
    return AMBER_OK;
}

/* ---- life ---- */

amber_status amber_sampler_new(const amber_sampling *sampling, int32_t n_vocab, amber_sampler **out,
                               amber_error *err) {
    *out = NULL;
    amber_sampling options;
    amber_sampling_defaults(&options);
    if (sampling) {
        if (sampling->size < sizeof sampling->size)
            return amber_fail(err, AMBER_ERR_ARGUMENT,
                              "sampler: expected amber_sampling.size of %zu, found %zu (call "
                              "amber_sampling_defaults first)",
                              sizeof options, sampling->size);
        size_t known = sampling->size < sizeof options ? sampling->size : sizeof options;
        memcpy(&options, sampling, known);
        options.size = sizeof options;
    }
    amber_status status = check_options(&options, n_vocab, err);
    if (status == AMBER_OK && options.seed == AMBER_SEED_RANDOM)
        status = draw_seed(&options.seed, err);
    if (status != AMBER_OK) return status;

    amber_sampler *s = calloc(1, sizeof *s);
    if (!s) return amber_fail(err, AMBER_ERR_MEMORY, "sampler: out of memory");
    size_t n = (size_t)n_vocab, n_bias = (size_t)options.n_logit_bias;
    const int32_t *bias_tokens = options.logit_bias_tokens;
    const float *bias_values = options.logit_bias_values;
    options.logit_bias_tokens = NULL;
    options.logit_bias_values = NULL;
    s->options = options;
    s->n_vocab = n_vocab;
    s->penalties = options.penalty_last_n != 0 &&
                   (options.repeat_penalty != 1 || options.frequency_penalty != 0 ||
                    options.presence_penalty != 0);
    seed_state(s->state, options.seed);
    s->logits = malloc(n * sizeof *s->logits);
    s->cand = malloc(n * sizeof *s->cand);
    bool whole = s->logits && s->cand;
    if (s->penalties) {
        s->count = calloc(n, sizeof *s->count);
        whole = whole && s->count;
    }
    if (n_bias > 0) {
        int32_t *tokens = malloc(n_bias * sizeof *tokens);
        float *values = malloc(n_bias * sizeof *values);
        s->options.logit_bias_tokens = tokens;
        s->options.logit_bias_values = values;
        if (tokens && values) {
            memcpy(tokens, bias_tokens, n_bias * sizeof *tokens);
            memcpy(values, bias_values, n_bias * sizeof *values);
        } else {
            whole = false;
        }
    }
    if (!whole) {
        amber_sampler_free(s);
        return amber_fail(err, AMBER_ERR_MEMORY,
                          "sampler: out of memory for a vocabulary of %d tokens", n_vocab);
    }
    *out = s;
    return AMBER_OK;
}

void amber_sampler_free(amber_sampler *s) {
    if (!s) return;
    free((void *)s->options.logit_bias_tokens);
    free((void *)s->options.logit_bias_values);
    free(s->logits);
    free(s->cand);
    free(s->count);
    free(s->window);
    free(s);
}

uint64_t amber_sampler_seed(const amber_sampler *s) {
    return s->options.seed;
}

/* ---- penalties ---- */

amber_status amber_sampler_accept(amber_sampler *s, int32_t token) {
    if (token < 0 || token >= s->n_vocab) return AMBER_ERR_ARGUMENT;
    if (!s->penalties) return AMBER_OK;
    int32_t last_n = s->options.penalty_last_n;
    if (last_n > 0) {
        /* The window grows with what it holds, so that a huge penalty_last_n costs nothing. */
        if (s->n_window == s->cap_window && s->cap_window < last_n) {
            int64_t cap = s->cap_window ? 2 * (int64_t)s->cap_window : 64;
            if (cap > last_n) cap = last_n;
            int32_t *window = realloc(s->window, (size_t)cap * sizeof *window);
            if (!window) return AMBER_ERR_MEMORY;
            s->window = window;
            s->cap_window = (int32_t)cap;
        }
        if (s->n_window < last_n) {
            s->window[s->n_window++] = token;
        } else {
            s->count[s->window[s->oldest]]--;
            s->window[s->oldest] = token;
            s->oldest = (s->oldest + 1) % last_n;
        }
    }
    if (s->count[token] < INT32_MAX) s->count[token]++;
    return AMBER_OK;
}

static void apply_penalties(const amber_sampler *s) {
    float repeat = s->options.repeat_penalty;
    for (int32_t i = 0; i < s->n_vocab; i++) {
        if (s->count[i] == 0) continue;
        /* Keskar et al., "CTRL" (2019), divide; a negative logit would grow by that, so it is
         * multiplied. */
        float x = s->logits[i];
        x = x > 0 ? x / repeat : x * repeat;
        x -= (float)s->count[i] * s->options.frequency_penalty + s->options.presence_penalty;
        s->logits[i] = x;
    }
}

/* ---- selection ---- */

/* Whether a stands before b in the order of selection. */
static bool before(struct candidate a, struct candidate b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

/* Binary heaps over c[0..n). `last_first` chooses which end of the order stands at the root. */
static void sift_down(struct candidate *c, int32_t i, int32_t n, bool last_first) {
    struct candidate moving = c[i];
    for (;;) {
        int64_t child = 2 * (int64_t)i + 1;
        if (child >= n) break;
        if (child + 1 < n && before(c[child + 1], c[child]) != last_first) child++;
        if (before(c[child], moving) == last_first) break;
        c[i] = c[child];
        i = (int32_t)child;
    }
    c[i] = moving;
}

static void make_heap(struct candidate *c, int32_t n, bool last_first) {
    for (int32_t i = n / 2 - 1; i >= 0; i--) sift_down(c, i, n, last_first);
}

/* The first k candidates of the order, in order, into c[0..k). Returns how many there are, fewer
 * than k where fewer logits are finite. */
static int32_t select_top(const float *logits, int32_t n, struct candidate *c, int32_t k) {
    int32_t have = 0, i = 0;
    for (; i < n && have < k; i++)
        if (logits[i] >= -FLT_MAX) c[have++] = (struct candidate){logits[i], i};
    make_heap(c, have, true);
    /* Later ids lose ties, so only a larger logit gets in. */
    for (; i < n; i++) {
        if (logits[i] > c[0].logit) {
            c[0] = (struct candidate){logits[i], i};
            sift_down(c, 0, have, true);
        }
    }
    for (int32_t end = have - 1; end > 0; end--) {
        struct candidate last = c[0];
        c[0] = c[end];
        c[end] = last;
        sift_down(c, 0, end, true);
    }
    return have;
}

/* Moves the shortest prefix of the order whose mass reaches `target` to the end of c[0..n), its
 * first candidate last, and returns its length. Mass: sum of exp(logit - best). */
static int32_t take_mass(struct candidate *c, int32_t n, float best, double target) {
    make_heap(c, n, false);
    double mass = 0;
    int32_t taken = 0;
    while (taken < n) {
        struct candidate first = c[0];
        int32_t end = n - ++taken;
        c[0] = c[end];
        c[end] = first;
        sift_down(c, 0, end, false);
        mass += exp((double)first.logit - best);
        if (mass >= target) break;
    }
    return taken;
}

int32_t amber_sampler_sample(amber_sampler *s, const float *logits) {
    const amber_sampling *o = &s->options;
    int32_t n = s->n_vocab;
    bool finite = false;
    for (int32_t i = 0; i < n; i++) {
        float x = logits[i];
        finite |= x >= -FLT_MAX && x <= FLT_MAX;
        s->logits[i] = x == x ? x : -INFINITY;
    }
    if (!finite) return -AMBER_ERR_ARGUMENT;
    for (int32_t i = 0; i < o->n_logit_bias; i++)
        s->logits[o->logit_bias_tokens[i]] += o->logit_bias_values[i];
    if (s->penalties) apply_penalties(s);

    int32_t best_id = -1;
    float best = -INFINITY;
    for (int32_t i = 0; i < n; i++) {
        float x = s->logits[i];
        /* An overflow stays the largest, and a banned one (inf - inf) stays banned. */
        if (!(x <= FLT_MAX)) x = x == x ? FLT_MAX : -INFINITY;
        s->logits[i] = x;
        if (x > best) {
            best = x;
            best_id = i;
        }
    }
    if (best_id < 0) return -AMBER_ERR_ARGUMENT;
    if (!(o->temperature > 0)) return best_id;

    struct candidate *c = s->cand;
    int32_t count = 0;
    double total = 0; /* mass of what top_k left */
    double cut = o->min_p > 0 ? best + log((double)o->min_p) : -INFINITY;
    bool sorted = o->top_k > 0 && o->top_k < n;
    if (sorted) {
        int32_t have = select_top(s->logits, n, c, o->top_k);
        for (int32_t i = 0; i < have; i++) {
            total += exp((double)c[i].logit - best);
            count += c[i].logit >= cut;
        }
    } else {
        for (int32_t i = 0; i < n; i++) {
            float x = s->logits[i];
            if (x < -FLT_MAX) continue;
            if (o->top_p < 1) total += exp((double)x - best);
            if (x >= cut) c[count++] = (struct candidate){x, i};
        }
    }
    if (o->top_p < 1) {
        double target = o->top_p * total;
        if (sorted) {
            double mass = 0;
            for (int32_t i = 0; i < count; i++) {
                mass += exp((double)c[i].logit - best);
                if (mass >= target) count = i + 1;
            }
        } else {
            int32_t taken = take_mass(c, count, best, target);
            c += count - taken;
            count = taken;
        }
    }

    double temperature = o->temperature, mass = 0;
    for (int32_t i = 0; i < count; i++) mass += exp(((double)c[i].logit - best) / temperature);
    double drawn = next_unit(s->state) * mass;
    double passed = 0;
    for (int32_t i = 0; i < count; i++) {
        passed += exp(((double)c[i].logit - best) / temperature);
        if (drawn < passed) return c[i].id;
    }
    return best_id; /* not reached: drawn < mass, and both sums are the same */
}
