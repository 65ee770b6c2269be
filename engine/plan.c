/* plan.c: reads a sparsity plan and knows the presets of the paper's models. */
#include "plan.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_RANK 1024

static const char *const projection_names[N_PROJ] = {"q", "k", "v", "o", "gate", "up", "down"};

/* Layers whose q and gate stay dense, from the sensitivity study of arXiv 2508.02128, by the shape
 * that identifies the model. */
static const struct preset {
    struct plan_model model;
    int n_skip, skip[8];
} presets[] = {
    {{32, 4096, 14336}, 5, {19, 21, 28, 30, 31}}, /* Llama-3.1-8B */
    {{28, 3584, 18944}, 5, {0, 6, 23, 26, 27}},   /* Qwen2-7B */
    {{48, 2048, 768}, 3, {41, 46, 47}},           /* Qwen3-30B-A3B */
};

struct text {
    const char *at, *end;
};

const char *plan_projection_name(int projection) {
    return projection_names[projection];
}

bool rule_is_sparse(const struct rule *rule) {
    return rule->pattern.kind != AMBER_PATTERN_DENSE;
}

bool rule_equal(const struct rule *a, const struct rule *b) {
    const struct amber_pattern *p = &a->pattern, *q = &b->pattern;
    return p->kind == q->kind && p->n == q->n && p->m == q->m && p->block == q->block &&
           p->tokens == q->tokens && p->relief == q->relief && a->criterion == b->criterion &&
           a->shift == b->shift && a->var == b->var && a->ls == b->ls && a->rank == b->rank;
}

int plan_rank(const struct plan *plan) {
    int most = 0;
    for (int i = 0; i < plan->n_layer * N_PROJ; i++)
        if (plan->rules[i].rank > most) most = plan->rules[i].rank;
    return most;
}

/* ---- reading ---- */

static struct text trim(struct text t) {
    while (t.at < t.end && isspace((unsigned char)*t.at)) t.at++;
    while (t.at < t.end && isspace((unsigned char)t.end[-1])) t.end--;
    return t;
}

/* The part up to the first of `stops`; *t moves behind it. */
static struct text until(struct text *t, const char *stops) {
    struct text part = {t->at, t->at};
    while (part.end < t->end && !strchr(stops, *part.end)) part.end++;
    t->at = part.end < t->end ? part.end + 1 : t->end;
    return trim(part);
}

static bool equals(struct text t, const char *word) {
    return (size_t)(t.end - t.at) == strlen(word) && memcmp(t.at, word, strlen(word)) == 0;
}

static int clip(struct text t) {
    return t.end - t.at > 60 ? 60 : (int)(t.end - t.at);
}

/* Decimal number of at most six digits; false where there is none. */
static bool read_number(struct text *t, int *out) {
    const char *start = t->at;
    int value = 0;
    while (t->at < t->end && isdigit((unsigned char)*t->at) && t->at - start < 6)
        value = value * 10 + (*t->at++ - '0');
    *out = value;
    return t->at > start;
}

static const char *const criteria[] = {"act", "norm", "amber", "amber-b", "clact"};
static const char *const shifts[] = {"none", "dpts", "dpts-median", "spts", "spts-channel", "lpts"};
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static int find_word(struct text word, const char *const *words, int n) {
    int i = 0;
    while (i < n && !equals(word, words[i])) i++;
    return i;
}

/* Sets one of the places of a rule that hold one method. */
static amber_status set_once(uint8_t *place, int value, struct text word, const char *const *words,
                             amber_error *err) {
    if (*place && *place != value)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sparse: expected one of %s and %.*s, found both", words[*place],
                          clip(word), word.at);
    *place = (uint8_t)value;
    return AMBER_OK;
}

static amber_status read_rank(struct text word, struct rule *rule, amber_error *err) {
    struct text number = {word.at + strlen("rsparse:"), word.end};
    int rank = 0;
    if (!read_number(&number, &rank) || number.at != number.end || rank < 1 || rank > MAX_RANK)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sparse: expected rsparse:R with a rank R of 1-%d, found \"%.*s\"",
                          MAX_RANK, clip(word), word.at);
    rule->rank = (uint16_t)rank;
    return AMBER_OK;
}

static amber_status read_method(struct text word, bool evaluation, struct rule *rule,
                                amber_error *err) {
    int i = find_word(word, criteria, COUNT(criteria));
    if (i == CRITERION_CLACT && !evaluation)
        return amber_fail(
            err, AMBER_ERR_UNSUPPORTED,
            "sparse: clact ranks a token by the other tokens of the call, so answers would "
            "change with batching and caching; use act, norm or amber (amber-eval can measure it)");
    if (i < COUNT(criteria)) return set_once(&rule->criterion, i, word, criteria, err);
    if (equals(word, "none")) return AMBER_OK;
    if ((i = find_word(word, shifts, COUNT(shifts))) < COUNT(shifts))
        return set_once(&rule->shift, i, word, shifts, err);
    if ((size_t)(word.end - word.at) >= strlen("rsparse:") &&
        memcmp(word.at, "rsparse:", strlen("rsparse:")) == 0)
        return read_rank(word, rule, err);
    if (equals(word, "var"))
        rule->var = true;
    else if (equals(word, "ls"))
        rule->ls = true;
    else
        return amber_fail(
            err, AMBER_ERR_ARGUMENT,
            "sparse: expected a criterion (act, norm, amber, amber-b) or a mitigation "
            "(var, dpts, dpts-median, spts, spts-channel, lpts, ls, "
            "rsparse:R), found \"%.*s\"",
            clip(word), word.at);
    return AMBER_OK;
}

static amber_status read_scope(struct text scope, bool chosen[N_PROJ], amber_error *err) {
    while (scope.at < scope.end) {
        struct text word = until(&scope, ",");
        int i = 0;
        while (i < N_PROJ && !equals(word, projection_names[i])) i++;
        if (i < N_PROJ) {
            chosen[i] = true;
        } else if (equals(word, "all")) {
            for (int j = 0; j < N_PROJ; j++) chosen[j] = true;
        } else {
            return amber_fail(
                err, AMBER_ERR_ARGUMENT,
                "sparse: scope: expected all, q, k, v, o, gate, up or down, found \"%.*s\"",
                clip(word), word.at);
        }
    }
    return AMBER_OK;
}

static amber_status read_layers(struct text layers, bool *chosen, int n_layer, amber_error *err) {
    while (layers.at < layers.end) {
        struct text range = until(&layers, ","), t = range;
        int first, last;
        bool ok = read_number(&t, &first);
        last = first;
        if (ok && t.at < t.end && *t.at == '-') {
            t.at++;
            ok = read_number(&t, &last);
        }
        if (!ok || t.at != t.end || first > last || last >= n_layer)
            return amber_fail(
                err, AMBER_ERR_ARGUMENT,
                "sparse: layers: expected numbers or ranges within 0-%d, found \"%.*s\"",
                n_layer - 1, clip(range), range.at);
        for (int i = first; i <= last; i++) chosen[i] = true;
    }
    return AMBER_OK;
}

/* The paper's policy, for a rule without a scope. */
static bool policy_has(const struct plan_model *model, int layer, int projection) {
    if (projection == PROJ_DOWN) return true;
    if (projection != PROJ_Q && projection != PROJ_GATE) return false;
    for (size_t i = 0; i < sizeof presets / sizeof presets[0]; i++) {
        const struct preset *p = &presets[i];
        if (memcmp(&p->model, model, sizeof *model) != 0) continue;
        for (int j = 0; j < p->n_skip; j++)
            if (p->skip[j] == layer) return false;
    }
    return true;
}

static amber_status read_rule(struct text t, const struct plan_model *model, bool evaluation,
                              struct plan *plan, bool *layers, amber_error *err) {
    struct text head = t, scope = {NULL, NULL}, where = {NULL, NULL};
    head = until(&t, "@#");
    bool has_scope = head.end < t.end && t.at > head.at && t.at[-1] == '@';
    if (has_scope) scope = until(&t, "#");
    bool has_layers = t.at > head.at && t.at[-1] == '#';
    if (has_layers) where = trim(t);

    struct rule rule = {0};
    struct text pattern = until(&head, "/");
    char why[160];
    if (!amber_pattern_parse(pattern.at, (size_t)(pattern.end - pattern.at), &rule.pattern, why,
                             sizeof why))
        return amber_fail(err, AMBER_ERR_ARGUMENT, "sparse: %s", why);
    while (head.at < head.end) {
        amber_status status = read_method(until(&head, "/"), evaluation, &rule, err);
        if (status != AMBER_OK) return status;
    }

    bool chosen[N_PROJ] = {false};
    amber_status status = AMBER_OK;
    if (has_scope) status = read_scope(scope, chosen, err);
    memset(layers, !has_layers, (size_t)model->n_layer);
    if (status == AMBER_OK && has_layers) status = read_layers(where, layers, model->n_layer, err);
    if (status != AMBER_OK) return status;

    for (int il = 0; il < model->n_layer; il++)
        for (int p = 0; p < N_PROJ; p++)
            if (layers[il] && (has_scope ? chosen[p] : policy_has(model, il, p)))
                plan->rules[il * N_PROJ + p] = rule;
    return AMBER_OK;
}

void plan_hash_more(struct plan *plan, const void *data, size_t bytes) {
    plan->hash = amber_hash(plan->hash, data, bytes);
}

/* Over the rules' numbers, so that equal plans are equal however they were written. */
static void hash_rules(struct plan *plan) {
    plan->hash = AMBER_HASH_START;
    for (int i = 0; i < plan->n_layer * N_PROJ; i++) {
        const struct rule *r = &plan->rules[i];
        const struct amber_pattern *p = &r->pattern;
        int32_t fields[] = {p->kind,      p->n,     p->m,   p->block, p->tokens, p->relief,
                            r->criterion, r->shift, r->var, r->ls,    r->rank};
        plan_hash_more(plan, fields, sizeof fields);
    }
}

amber_status plan_parse(const char *text, const struct plan_model *model, bool evaluation,
                        struct plan *plan, amber_error *err) {
    *plan = (struct plan){.n_layer = model->n_layer};
    plan->rules = calloc((size_t)model->n_layer * N_PROJ, sizeof *plan->rules);
    bool *layers = malloc((size_t)model->n_layer * sizeof *layers);
    amber_status status = AMBER_OK;
    if (!plan->rules || !layers) status = amber_fail(err, AMBER_ERR_MEMORY, "sparse: no memory");

    if (status == AMBER_OK && text && strcmp(text, "off") != 0) {
        struct text rest = {text, text + strlen(text)};
        do {
            status = read_rule(until(&rest, ";"), model, evaluation, plan, layers, err);
        } while (status == AMBER_OK && rest.at < rest.end);
    }
    free(layers);
    if (status != AMBER_OK) {
        plan_free(plan);
        return status;
    }
    for (int i = 0; i < plan->n_layer * N_PROJ; i++) {
        const struct rule *rule = &plan->rules[i];
        plan->any |= rule_is_sparse(rule);
        plan->clact |= rule_is_sparse(rule) && rule->criterion == CRITERION_CLACT;
    }
    if (plan->any) hash_rules(plan);
    return AMBER_OK;
}

void plan_free(struct plan *plan) {
    free(plan->rules);
    *plan = (struct plan){0};
}

/* "/amber/dpts/var/ls/rsparse:64" of what a rule has, in a fixed order. */
static void describe_methods(const struct rule *rule, char out[64]) {
    char rank[16] = "";
    if (rule->rank) snprintf(rank, sizeof rank, "/rsparse:%d", rule->rank);
    snprintf(out, 64, "%s%s%s%s%s%s%s", rule->criterion ? "/" : "",
             rule->criterion ? criteria[rule->criterion] : "", rule->shift ? "/" : "",
             rule->shift ? shifts[rule->shift] : "", rule->var ? "/var" : "", rule->ls ? "/ls" : "",
             rank);
}

void plan_describe(const struct plan *plan, char *buf, size_t cap) {
    if (!plan->any) {
        snprintf(buf, cap, "off");
        return;
    }
    int sparse = 0, total = plan->n_layer * N_PROJ, kinds = 0;
    const struct rule *first = NULL;
    for (int i = 0; i < total; i++) {
        const struct rule *r = &plan->rules[i];
        if (!rule_is_sparse(r)) continue;
        sparse++;
        if (!first) first = r;
        if (!rule_equal(first, r)) kinds = 1;
    }
    char pattern[AMBER_PATTERN_TEXT], methods[64];
    amber_pattern_format(&first->pattern, pattern);
    describe_methods(first, methods);
    snprintf(buf, cap, "%s%s in %d/%d projections", kinds ? "mixed patterns" : pattern,
             kinds ? "" : methods, sparse, total);
}
