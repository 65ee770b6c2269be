/* packed.h: Amber GGUF, a GGUF file whose matrices already lie as the kernels read them.
 *
 * amber-quantize writes it. Beside the keys of any GGUF file:
 *
 *     amber.format         1; a reader refuses what is newer
 *     amber.layout         "p16k4o128": panels of 16 outputs x 4 inputs, bytes of weight + 128,
 *                          inputs padded to 64 (struct amber_w8 in kernels.h)
 *     amber.tied_output    the head was made from token_embd.weight
 *     amber.plan           the plan that sparse = "auto" means, as plan.h reads it; optional
 *     amber.plan.*         what that plan cost when it was made: kl_mean, perplexity, ...; optional
 *     amber.permuted       channels stand in another order than in the source
 *     amber.source.*       name, size and SHA-256 of the source
 *     general.alignment    a multiple of 64
 *
 * and in place of every matrix NAME.weight of a linear layer, the head included:
 *
 *     NAME.weight  I8   [k_pad * 16, panels]   the panels, one after the other
 *     NAME.scale   F32  [panels * 16]          of each output; 0 in the padding
 *     NAME.score   F32  [n_in, 3]              channel factors for norm, amber and amber-b, taken from
 *                                              the weights before rounding; not for the head
 *
 * and where a method of a plan needs them (mitigation.c), all F32:
 *
 *     NAME.shift           [n_in]              what is taken off before pruning; the key amber.shift
 *                                              says which method made them: spts, spts-channel, lpts
 *     NAME.gain, .offset   [n_out]             LS
 *     NAME.left            [rank, n_out]       R-Sparse
 *     NAME.right           [n_in, rank]
 *
 * Norms and biases are as in any file; token_embd.weight keeps its type. Weights are used where the
 * file is mapped: nothing is copied, and processes share the pages. */
#ifndef AMBER_PACKED_H
#define AMBER_PACKED_H

#include "gguf.h"
#include "kernels.h"
#include "plan.h"

/* Whether this is an Amber GGUF; fails where it is one of another format or layout. */
amber_status packed_check(const struct gguf_file *file, bool *packed, amber_error *err);
/* The matrix `name` (without ".weight"), in the mapping. bias and sum stay NULL. */
amber_status packed_matrix(const struct gguf_file *file, const char *name, int n_out, int n_in,
                           struct amber_w8 *w, amber_error *err);
/* f [n_in], in the mapping. */
amber_status packed_score(const struct gguf_file *file, const char *name, int n_in,
                          enum criterion criterion, const float **f, amber_error *err);
/* Rows first..first+count-1 of one panel as float32. rows [count, n_in] */
void packed_rows(const struct amber_w8 *w, int first, int count, float *rows);
/* Asks the system to read the file ahead. */
void packed_read_ahead(const struct gguf_file *file);

#endif
