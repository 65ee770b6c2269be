/* plan.h: which projection of which layer runs sparse in prefill, and how. Read once when a model
 * is opened; part of the engine from then on.
 *
 * Text form, as options carry it (Python turns plan files into it):
 *
 *     off
 *     RULE ; RULE ; ...           later rules override earlier ones
 *     RULE  = PATTERN [/CRITERION] [/MITIGATION ...] [@SCOPE] [#LAYERS]
 *     CRITERION  = act | norm | amber | amber-b | clact
 *     MITIGATION = var | ls | rsparse:R | one of dpts, dpts-median, spts, spts-channel, lpts
 *     SCOPE = all | q,k,v,o,gate,up,down in any selection
 *     LAYERS = 0-18,20,22-27
 *
 * Without a scope a rule means the policy of Amber Pruner (arXiv 2508.02128, section on layer
 * skipping): down everywhere, q and gate except in the layers that the model's preset skips. */
#ifndef AMBER_PLAN_H
#define AMBER_PLAN_H

#include "common.h"
#include "sparse.h"

/* As amber_projection. */
enum projection_id { PROJ_Q, PROJ_K, PROJ_V, PROJ_O, PROJ_GATE, PROJ_UP, PROJ_DOWN, N_PROJ };

/* What ranks the channels of a token beside |x|: a factor per input channel (methods: Amber
 * Pruner's Robust-Norm scoring; Wanda's weight norm turned around). */
enum criterion {
    CRITERION_ACT,     /* nothing */
    CRITERION_NORM,    /* norm of the channel's weight column */
    CRITERION_AMBER,   /* Robust-Norm; outlying weights count as nothing */
    CRITERION_AMBER_B, /* Robust-Norm; outlying weights only leave mean and variance */
    CRITERION_CLACT    /* norm of the channel over the tokens of the call: evaluation only */
};

/* What is shifted away before pruning and comes back after the product (arXiv 2509.22166): one
 * number of each token as a rank-1 term (D-PTS), or a vector of the file as a constant (S-PTS,
 * L-PTS). */
enum shift {
    SHIFT_NONE,
    SHIFT_MEAN,
    SHIFT_MEDIAN,
    SHIFT_SCALAR,  /* /spts: calibrated, the same for all channels */
    SHIFT_CHANNEL, /* /spts-channel: calibrated, one per channel */
    SHIFT_LEARNED  /* /lpts: learned, one per channel */
};

struct rule {
    struct amber_pattern pattern; /* kind DENSE: the projection runs dense */
    uint8_t criterion, shift;
    bool var;      /* rescale so that the row's variance survives (arXiv 2509.22166, VAR) */
    bool ls;       /* learned factor and offset at the outputs of pruned rows (same, LS) */
    uint16_t rank; /* what was pruned goes through a product of this rank (R-Sparse); 0: nowhere */
};

struct plan {
    int n_layer;
    struct rule *rules; /* [n_layer, N_PROJ]; owned */
    bool any;
    bool clact;    /* some rule ranks by the tokens of the call */
    uint64_t hash; /* of all that changes the numbers of prefill: the rules and, once the model is
                      loaded, the vectors they use and the tokens they spare; 0 for a dense plan */
};

/* The preset policies need to know the model's size: (layers, width, feed-forward width; of one
 * expert where there are any). */
struct plan_model {
    int n_layer, n_embd, n_ff;
};

/* text NULL or "off": dense. evaluation allows the criterion that serving cannot have. On success
 * plan_free releases it. */
amber_status plan_parse(const char *text, const struct plan_model *model, bool evaluation,
                        struct plan *plan, amber_error *err);
/* Adds what else the numbers depend on. */
void plan_hash_more(struct plan *plan, const void *data, size_t bytes);
void plan_free(struct plan *plan);

static inline const struct rule *plan_rule(const struct plan *plan, int layer, int projection) {
    return &plan->rules[layer * N_PROJ + projection];
}
const char *plan_projection_name(int projection);
bool rule_is_sparse(const struct rule *rule);
/* Whether the shift is a vector of the file. */
static inline bool rule_shift_is_static(const struct rule *rule) {
    return rule->shift >= SHIFT_SCALAR;
}
static inline bool rule_shift_is_dynamic(const struct rule *rule) {
    return rule->shift == SHIFT_MEAN || rule->shift == SHIFT_MEDIAN;
}
/* Largest rank of any rule. */
int plan_rank(const struct plan *plan);
bool rule_equal(const struct rule *a, const struct rule *b);

/* One line for people: "8:16/amber in 24/56 projections". */
void plan_describe(const struct plan *plan, char *buf, size_t cap);

#endif
