/* test_sampler.c: the sampler against a plain float64 reference that sorts everything. */
#include "amber.h"
#include "check.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

/* ---- the reference ---- */

struct entry {
    double logit;
    int id;
};

static int by_order(const void *a, const void *b) {
    const struct entry *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id - y->id;
}

/* Fills p[n] with each token's probability and returns how many tokens are kept. `counts` [n] is
 * how often the penalty window holds a token, or NULL. */
static int reference(const amber_sampling *o, const float *logits, const int *counts, int n,
                     double *p) {
    struct entry *e = malloc((size_t)n * sizeof *e);
    int m = 0;
    for (int i = 0; i < n; i++) {
        double x = logits[i];
        for (int b = 0; b < o->n_logit_bias; b++)
            if (o->logit_bias_tokens[b] == i) x += (double)o->logit_bias_values[b];
        if (counts && counts[i]) {
            x = x > 0 ? x / o->repeat_penalty : x * o->repeat_penalty;
            x -= (double)counts[i] * o->frequency_penalty + o->presence_penalty;
        }
        p[i] = 0;
        if (x > -INFINITY) e[m++] = (struct entry){x, i};
    }
    qsort(e, (size_t)m, sizeof *e, by_order);
    if (o->top_k > 0 && o->top_k < m) m = o->top_k;
    if (o->top_p < 1) {
        double total = 0, mass = 0;
        int kept = 0;
        for (int i = 0; i < m; i++) total += exp(e[i].logit - e[0].logit);
        while (kept < m && mass < (double)o->top_p * total)
            mass += exp(e[kept++].logit - e[0].logit);
        m = kept;
    }
    if (o->min_p > 0)
        while (m > 1 && exp(e[m - 1].logit - e[0].logit) < (double)o->min_p) m--;
    if (!(o->temperature > 0)) m = 1;
    double total = 0;
    for (int i = 0; i < m; i++)
        total += p[e[i].id] = m == 1 ? 1 : exp((e[i].logit - e[0].logit) / (double)o->temperature);
    for (int i = 0; i < m; i++) p[e[i].id] /= total;
    free(e);
    return m;
}

/* ---- helpers ---- */

static uint32_t lcg_state = 1;
static double uniform(void) { /* the test's own numbers; quality is of no matter */
    lcg_state = lcg_state * 1664525u + 1013904223u;
    return (lcg_state >> 8) / 16777216.0;
}

static amber_sampling plain(void) {
    amber_sampling o;
    amber_sampling_defaults(&o);
    o.temperature = 1;
    o.top_k = 0;
    o.top_p = 1;
    o.min_p = 0;
    o.seed = 1;
    return o;
}

static amber_sampler *make(const amber_sampling *o, int n) {
    amber_sampler *s = NULL;
    amber_error err = {0};
    if (!CHECK(amber_sampler_new(o, n, &s, &err) == AMBER_OK)) fprintf(stderr, "    %s\n", err.msg);
    return s;
}

/* Draws and compares with p: a token of probability 0 must never come, and the chi-square statistic
 * over the others, tokens expected less than 10 times pooled, must stay below the bound that a
 * right sampler exceeds with probability e^-25: df + 2 sqrt(25 df) + 50 (Laurent, Massart 2000,
 * lemma 1). */
static void check_draws(amber_sampler *s, const float *logits, int n, const double *p, int draws) {
    int *seen = calloc((size_t)n, sizeof *seen), outside = 0;
    for (int i = 0; i < draws; i++) {
        int token = amber_sampler_sample(s, logits);
        if (!CHECK(token >= 0 && token < n)) break;
        seen[token]++;
    }
    double chi = 0, rest_expected = 0, rest_seen = 0;
    int df = -1;
    for (int i = 0; i < n; i++) {
        double expected = p[i] * draws;
        if (p[i] == 0) {
            outside += seen[i];
        } else if (expected < 10) {
            rest_expected += expected;
            rest_seen += seen[i];
        } else {
            chi += (seen[i] - expected) * (seen[i] - expected) / expected;
            df++;
        }
    }
    if (rest_expected >= 10) {
        chi += (rest_seen - rest_expected) * (rest_seen - rest_expected) / rest_expected;
        df++;
    }
    CHECK_EQ(outside, 0);
    if (df > 0 && !CHECK(chi < df + 2 * sqrt(25.0 * df) + 50))
        fprintf(stderr, "    chi-square %g at %d degrees\n", chi, df);
    free(seen);
}

/* ---- tests ---- */

static void test_greedy(void) {
    amber_sampling o = plain();
    o.temperature = 0;
    amber_sampler *s = make(&o, 5);
    CHECK_EQ(amber_sampler_sample(s, (float[]){1, 3, 2, 3, 0}), 1); /* tie: lower id */
    CHECK_EQ(amber_sampler_sample(s, (float[]){NAN, -5, NAN, -4, -INFINITY}), 3);
    CHECK_EQ(amber_sampler_sample(s, (float[]){0, INFINITY, 1, NAN, 2}), 1);
    CHECK_EQ(amber_sampler_sample(s, (float[]){-FLT_MAX, NAN, NAN, -FLT_MAX, NAN}), 0);
    amber_sampler_free(s);
}

static void test_hostile_logits(void) {
    for (int mode = 0; mode < 5; mode++) {
        amber_sampling o = plain();
        if (mode == 0) o.temperature = 0;
        if (mode == 2) o.top_k = 2;
        if (mode == 3) o.top_p = 0.5f;
        if (mode == 4) o.min_p = 0.5f;
        amber_sampler *s = make(&o, 4);
        CHECK(amber_sampler_sample(s, (float[]){NAN, NAN, NAN, NAN}) < 0);
        CHECK(amber_sampler_sample(s, (float[]){-INFINITY, NAN, -INFINITY, NAN}) < 0);
        CHECK(amber_sampler_sample(s, (float[]){INFINITY, NAN, -INFINITY, NAN}) < 0);
        for (int i = 0; i < 100; i++) {
            CHECK_EQ(amber_sampler_sample(s, (float[]){NAN, -INFINITY, 3, NAN}), 2);
            CHECK_EQ(amber_sampler_sample(s, (float[]){0, FLT_MAX, -FLT_MAX, 1}), 1);
            CHECK_EQ(amber_sampler_sample(s, (float[]){0, 1, INFINITY, 1}), 2);
        }
        amber_sampler_free(s);
    }
    /* Temperatures at the ends of float: nearly greedy, nearly uniform. */
    amber_sampling o = plain();
    o.temperature = FLT_TRUE_MIN;
    amber_sampler *s = make(&o, 3);
    for (int i = 0; i < 100; i++) CHECK_EQ(amber_sampler_sample(s, (float[]){1, 1.0001f, 0}), 1);
    amber_sampler_free(s);
    o.temperature = FLT_MAX;
    s = make(&o, 3);
    double third[3] = {1 / 3.0, 1 / 3.0, 1 / 3.0};
    check_draws(s, (float[]){0, 100, -100}, 3, third, 3000);
    amber_sampler_free(s);
    /* The caller's logits stay as they are. */
    float logits[4] = {NAN, INFINITY, 0, 1};
    const float before[4] = {logits[0], logits[1], logits[2], logits[3]};
    o = plain();
    s = make(&o, 4);
    amber_sampler_sample(s, logits);
    CHECK(memcmp(logits, before, sizeof logits) == 0);
    amber_sampler_free(s);
}

/* Every mix of the truncations on logits with many ties. A huge temperature makes what is kept
 * uniform, so that the set itself is seen: with 60 draws a token, one of 300 kept tokens stays away
 * with probability below 300 e^-60. */
static void test_kept_sets(void) {
    enum { N = 300 };
    static const int top_k[] = {0, 1, 7, 40, 299, 300, 1000};
    static const float top_p[] = {1, 1e-6f, 0.3f, 0.9f, 0.999f};
    static const float min_p[] = {0, 0.02f, 0.5f, 1};
    float logits[N];
    double p[N];
    int sets = 0;
    for (int a = 0; a < 7; a++)
        for (int b = 0; b < 5; b++)
            for (int c = 0; c < 4; c++) {
                for (int i = 0; i < N; i++) logits[i] = (float)floor(uniform() * 32) / 4;
                if (sets % 3 == 0)
                    for (int i = 0; i < N; i += 5) logits[i] = NAN;
                amber_sampling o = plain();
                o.temperature = 1e9f;
                o.top_k = top_k[a];
                o.top_p = top_p[b];
                o.min_p = min_p[c];
                o.seed = (uint64_t)++sets;
                int m = reference(&o, logits, NULL, N, p);
                amber_sampler *s = make(&o, N);
                int seen[N] = {0}, wrong = 0;
                for (int i = 0; i < 60 * m; i++) seen[amber_sampler_sample(s, logits)] = 1;
                for (int i = 0; i < N; i++) wrong += seen[i] != (p[i] > 0);
                if (!CHECK(wrong == 0))
                    fprintf(stderr, "    top_k %d top_p %g min_p %g: %d tokens\n", o.top_k,
                            (double)o.top_p, (double)o.min_p, wrong);
                amber_sampler_free(s);
            }
}

static void test_distributions(void) {
    enum { N = 1000 };
    static float logits[N];
    static double p[N];
    for (int round = 0; round < 24; round++) {
        for (int i = 0; i < N; i++) logits[i] = (float)(12 * uniform() - 6);
        amber_sampling o = plain();
        o.temperature = (float[]){0.3f, 0.8f, 1, 2.5f}[round % 4];
        o.top_k = round % 3 == 0 ? 50 : 0;
        o.top_p = round % 2 ? 0.9f : 1;
        o.min_p = round % 5 == 0 ? 0.05f : 0;
        o.seed = 100 + (uint64_t)round;
        int32_t bias_tokens[3] = {5, 17, 5};
        float bias_values[3] = {4, -INFINITY, 2.5f};
        if (round % 2 == 0) {
            o.n_logit_bias = 3;
            o.logit_bias_tokens = bias_tokens;
            o.logit_bias_values = bias_values;
        }
        reference(&o, logits, NULL, N, p);
        amber_sampler *s = make(&o, N);
        bias_tokens[0] = 999; /* the sampler holds its own copy */
        check_draws(s, logits, N, p, 20000);
        amber_sampler_free(s);
    }
}

static void test_penalties(void) {
    enum { N = 40 };
    float logits[N];
    double p[N];
    static const int last_n[] = {-1, 0, 1, 5, 64, 100, INT32_MAX};
    for (int round = 0; round < 21; round++) {
        for (int i = 0; i < N; i++) logits[i] = (float)(6 * uniform() - 3);
        amber_sampling o = plain();
        o.repeat_penalty = (float[]){1.3f, 1, 0.7f}[round % 3];
        o.frequency_penalty = round % 2 ? 0.25f : 0;
        o.presence_penalty = round % 4 < 2 ? 0.5f : -0.5f;
        o.penalty_last_n = last_n[round % 7];
        amber_sampler *s = make(&o, N);
        int history[300], counts[N] = {0}, n_history = 0;
        for (int i = 0; i < 300; i++) {
            history[n_history++] = (int)(uniform() * uniform() * N);
            CHECK_EQ(amber_sampler_accept(s, history[i]), AMBER_OK);
        }
        int look = o.penalty_last_n < 0 || o.penalty_last_n > 300 ? 300 : o.penalty_last_n;
        for (int i = 300 - look; i < 300; i++) counts[history[i]]++;
        reference(&o, logits, counts, N, p);
        check_draws(s, logits, N, p, 20000);
        CHECK_EQ(amber_sampler_accept(s, -1), AMBER_ERR_ARGUMENT);
        CHECK_EQ(amber_sampler_accept(s, N), AMBER_ERR_ARGUMENT);
        amber_sampler_free(s);
    }
    /* A repeat penalty pushes a negative logit down too. */
    amber_sampling o = plain();
    o.temperature = 0;
    o.repeat_penalty = 2;
    amber_sampler *s = make(&o, 2);
    amber_sampler_accept(s, 0);
    CHECK_EQ(amber_sampler_sample(s, (float[]){-1, -1.5f}), 1);
    CHECK_EQ(amber_sampler_sample(s, (float[]){-1, -2.5f}), 0);
    CHECK_EQ(amber_sampler_sample(s, (float[]){3, 1.4f}), 0);
    CHECK_EQ(amber_sampler_sample(s, (float[]){3, 1.6f}), 1);
    amber_sampler_free(s);
}

static void test_bans(void) {
    amber_sampling o = plain();
    o.temperature = 0;
    o.n_logit_bias = 2;
    o.logit_bias_tokens = (int32_t[]){0, 1};
    o.logit_bias_values = (float[]){-INFINITY, -INFINITY};
    amber_sampler *s = make(&o, 3);
    CHECK_EQ(amber_sampler_sample(s, (float[]){9, INFINITY, 1}), 2);
    CHECK(amber_sampler_sample(s, (float[]){9, 9, NAN}) < 0);
    amber_sampler_free(s);
}

static void test_seeds(void) {
    enum { N = 500, DRAWS = 200 };
    static float logits[N];
    int tokens[3][DRAWS];
    for (int i = 0; i < N; i++) logits[i] = (float)uniform();
    for (int run = 0; run < 3; run++) {
        amber_sampling o = plain();
        o.seed = run < 2 ? 0 : 1;
        amber_sampler *s = make(&o, N);
        CHECK_EQ(amber_sampler_seed(s), o.seed);
        for (int i = 0; i < DRAWS; i++) tokens[run][i] = amber_sampler_sample(s, logits);
        amber_sampler_free(s);
    }
    CHECK(memcmp(tokens[0], tokens[1], sizeof tokens[0]) == 0);
    CHECK(memcmp(tokens[0], tokens[2], sizeof tokens[0]) != 0);

    amber_sampling o = plain();
    o.seed = AMBER_SEED_RANDOM;
    amber_sampler *a = make(&o, N), *b = make(&o, N), *c = make(&o, N);
    CHECK(amber_sampler_seed(a) != AMBER_SEED_RANDOM);
    CHECK(amber_sampler_seed(a) != amber_sampler_seed(b) ||
          amber_sampler_seed(b) != amber_sampler_seed(c)); /* equal: once in 2^64 */
    amber_sampler_free(a);
    amber_sampler_free(b);
    amber_sampler_free(c);
}

static void refused(amber_sampling o, int n, const char *word) {
    amber_sampler *s = (void *)&o;
    amber_error err = {0};
    CHECK_EQ(amber_sampler_new(&o, n, &s, &err), AMBER_ERR_ARGUMENT);
    CHECK(s == NULL);
    CHECK_EQ(err.code, AMBER_ERR_ARGUMENT);
    CHECK_STR(err.msg, word);
    CHECK_EQ(amber_sampler_new(&o, n, &s, NULL), AMBER_ERR_ARGUMENT);
}

#define REFUSED(field, value)                                                                      \
    do {                                                                                           \
        amber_sampling bad = plain();                                                              \
        bad.field = value;                                                                         \
        refused(bad, 10, #field);                                                                  \
    } while (0)

static void test_arguments(void) {
    REFUSED(temperature, NAN);
    REFUSED(temperature, INFINITY);
    REFUSED(temperature, -INFINITY);
    REFUSED(top_p, 0);
    REFUSED(top_p, -0.5f);
    REFUSED(top_p, NAN);
    REFUSED(min_p, 1.5f);
    REFUSED(min_p, NAN);
    REFUSED(repeat_penalty, 0);
    REFUSED(repeat_penalty, -1);
    REFUSED(repeat_penalty, NAN);
    REFUSED(repeat_penalty, INFINITY);
    REFUSED(frequency_penalty, NAN);
    REFUSED(presence_penalty, INFINITY);
    REFUSED(penalty_last_n, -2);
    REFUSED(n_logit_bias, -1);
    REFUSED(size, 0);
    refused(plain(), 0, "n_vocab");
    refused(plain(), -5, "n_vocab");

    amber_sampling o = plain();
    o.n_logit_bias = 1;
    refused(o, 10, "NULL");
    o.logit_bias_tokens = (int32_t[]){10};
    o.logit_bias_values = (float[]){1};
    refused(o, 10, "from 0 to 9, found 10");
    o.logit_bias_tokens = (int32_t[]){-1};
    refused(o, 10, "found -1");
    o.logit_bias_tokens = (int32_t[]){3};
    o.logit_bias_values = (float[]){NAN};
    refused(o, 10, "bias");
    o.logit_bias_values = (float[]){INFINITY};
    refused(o, 10, "bias");

    /* An older, shorter struct: what it lacks has its default. */
    o = plain();
    o.temperature = 0;
    o.n_logit_bias = -1;
    o.size = offsetof(amber_sampling, top_k);
    amber_sampler *s = make(&o, 2);
    CHECK_EQ(amber_sampler_sample(s, (float[]){0, 1}), 1);
    amber_sampler_free(s);
    s = make(NULL, 2);
    amber_sampler_free(s);
    amber_sampler_free(NULL);
    o = plain();
    s = make(&o, 1);
    CHECK_EQ(amber_sampler_sample(s, (float[]){-7}), 0);
    amber_sampler_free(s);
}

int main(void) {
    test_greedy();
    test_hostile_logits();
    test_kept_sets();
    test_distributions();
    test_penalties();
    test_bans();
    test_seeds();
    test_arguments();
    return check_summary();
}
