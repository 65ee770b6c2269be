/* score.h: channel scores f [n_in] of a weight matrix, from its float values. */
#ifndef AMBER_SCORE_H
#define AMBER_SCORE_H

#include "gguf.h"
#include "plan.h"
#include "threads.h"

/* Fills f [n_in] with the criterion's factor per input channel, smallest 1; a channel whose weights
 * are all zero gets 1. CRITERION_ACT needs none and is not allowed here.
 *
 *   norm      f_j = ||W[:,j]||_2
 *   amber     Robust-Norm of arXiv 2508.02128: weights outside the 0.5th..99.5th percentile of the
 *             matrix are discarded, the rest standardized with one mean, f_j = column norm. A
 *             constant factor changes no mask, so the division by the deviation is left out.
 *   amber-b   as arXiv 2509.22166's code reads it: percentiles for the mean only, norm over all.
 *
 * Results do not depend on the number of threads. */
amber_status score_channels(const struct gguf_tensor *tensor, int n_out, int n_in,
                            enum criterion criterion, struct amber_pool *pool, float *f,
                            amber_error *err);

#endif
