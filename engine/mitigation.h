/* mitigation.h: what a pruning rule needs of a layer beside its weights: channel scores, and the
 * vectors and factors that give back what pruning took. */
#ifndef AMBER_MITIGATION_H
#define AMBER_MITIGATION_H

#include "model.h"

/* Makes `out` ready for rows that `rule` prunes. t: the source of the weights; NULL: they do not
 * count, as of experts, where one mask per token serves all (arXiv 2508.02128 on mixtures). stem:
 * the layer's name, such as "blk.0.ffn_down". factor: what the layer's outputs were multiplied by.
 * Errors: AMBER_ERR_UNSUPPORTED where the rule wants vectors that the file does not carry. */
amber_status mitigation_load(struct model *m, struct amber_pool *pool, const struct gguf_tensor *t,
                             const char *stem, const struct rule *rule, float factor,
                             struct linear *out, amber_error *err);

#endif
