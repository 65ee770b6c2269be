/* plan.h: which projection of which layer runs sparse in prefill, and how. Read once when a model
 * is opened; part of the engine from then on.
 *
 * Text form, as options carry it (Python turns plan files into it):
 *
 *     off
 *     RULE ; RULE ; ...           later rules override earlier ones
 *     RULE  = PATTERN [/CRITERION] [/MITIGATION ...] [@SCOPE] [#LAYERS]
 *     SCOPE = all | q,k,v,o,gate,up,down in any selection
 *     LAYERS = 0-18,20,22-27
 *
 * Without a scope a rule means the policy of Amber Pruner (arXiv 2508.02128, section on layer
 * skipping): down everywhere, q and gate except in the layers that the model's preset skips. */
#ifndef AMBER_PLAN_H
#define AMBER_PLAN_H

#include "common.h"
#include "sparse.h"

enum projection_id { /* as amber_projection */
                     PROJ_Q,
                     PROJ_K,
                     PROJ_V,
                     PROJ_O,
                     PROJ_GATE,
                     PROJ_UP,
                     PROJ_DOWN,
                     N_PROJ
};

/* What ranks the channels of a token beside |x|: a factor per input channel (methods: Amber
 * Pruner's Robust-Norm scoring; Wanda's weight norm turned around). */
enum criterion {
    CRITERION_ACT,    /* nothing */
    CRITERION_NORM,   /* norm of the channel's weight column */
    CRITERION_AMBER,  /* Robust-Norm; outlying weights count as nothing */
    CRITERION_AMBER_B /* Robust-Norm; outlying weights only leave mean and variance */
};

/* What is shifted away before pruning and comes back as a rank-1 term (arXiv 2509.22166, D-PTS). */
enum shift { SHIFT_NONE, SHIFT_MEAN, SHIFT_MEDIAN };

struct rule {
    struct amber_pattern pattern; /* kind DENSE: the projection runs dense */
    uint8_t criterion, shift;
    bool var; /* rescale so that the row's variance survives (arXiv 2509.22166, VAR) */
};

struct plan {
    int n_layer;
    struct rule *rules; /* [n_layer, N_PROJ]; owned */
    bool any;
    uint64_t hash; /* of all rules; 0 for a dense plan */
};

/* The preset policies need to know the model's size: (layers, width, feed-forward width). */
struct plan_model {
    int n_layer, n_embd, n_ff;
};

/* text NULL or "off": dense. On success plan_free releases it. */
amber_status plan_parse(const char *text, const struct plan_model *model, struct plan *plan,
                        amber_error *err);
void plan_free(struct plan *plan);

static inline const struct rule *plan_rule(const struct plan *plan, int layer, int projection) {
    return &plan->rules[layer * N_PROJ + projection];
}
const char *plan_projection_name(int projection);
bool rule_is_sparse(const struct rule *rule);
bool rule_equal(const struct rule *a, const struct rule *b);

/* One line for people: "8:16 in 24/56 projections". */
void plan_describe(const struct plan *plan, char *buf, size_t cap);

#endif
