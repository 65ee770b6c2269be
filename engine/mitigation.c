/* mitigation.c: one form for all methods (arXiv 2509.22166), y being what a layer gives for a pruned
 * row and W its weights as they are held:
 *
 *     z = x - shift,   y = g (W kept(z)) + W shift + c + bias + left right (z - kept(z))
 *
 * A shift of the token's own (D-PTS) is a term of the product's epilogue. A shift of the file (S-PTS,
 * L-PTS), g and c (LS) are other scales and biases of the same weights, made here: they cost nothing
 * when rows are multiplied. */
#include "mitigation.h"
#include "dequant.h"
#include "packed.h"
#include "score.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static amber_status no_memory(const struct model *m, const char *stem, amber_error *err) {
    return amber_fail(err, AMBER_ERR_MEMORY, "%s: no memory for the sparse rule of %s",
                      m->file->label, stem);
}

static int padded_outputs(const struct linear *w) {
    return (int)amber_round_up(w->n_out, AMBER_PANEL);
}

/* W v for the weights as they are held. v [n_in], or NULL: of ones; y [padded outputs] */
static void times(const struct linear *w, const float *v, float *y) {
    const int groups = w->w8.k_pad / 4;
    memset(y, 0, sizeof *y * (size_t)padded_outputs(w));
    for (int o = 0; o < w->n_out; o++) {
        double sum = 0;
        if (w->f32) {
            const float *row = w->f32 + (int64_t)o * w->n_in;
            for (int k = 0; k < w->n_in; k++) sum += (double)row[k] * (v ? (double)v[k] : 1);
            y[o] = (float)sum;
            continue;
        }
        const uint8_t *lane = w->w8.q + (int64_t)(o / AMBER_PANEL) * groups * AMBER_PANEL * 4 +
                              (int64_t)(o % AMBER_PANEL) * 4;
        for (int k = 0; k < w->n_in; k++)
            sum +=
                (lane[(int64_t)(k / 4) * AMBER_PANEL * 4 + k % 4] - 128) * (v ? (double)v[k] : 1.0);
        y[o] = (float)(sum * (double)w->w8.scale[o]);
    }
}

/* The vectors of a rule lie in an Amber GGUF that says which method made its shifts. */
static amber_status find_vector(struct model *m, const char *stem, const char *part,
                                const char *method, uint64_t ne0, uint64_t ne1, const float **out,
                                amber_error *err) {
    char name[96];
    snprintf(name, sizeof name, "%s.%s", stem, part);
    const struct gguf_tensor *t = gguf_find_tensor(m->file, name);
    if (!t)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: sparse: /%s: expected a file that carries %s, found none "
                          "(amber-quantize --mitigation or tools/learn_mitigations.py makes one)",
                          m->file->label, method, name);
    if (t->type != TYPE_F32 || t->ne[0] != ne0 || t->ne[1] != ne1 || t->ne[2] != 1 || t->ne[3] != 1)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tensor %s: expected F32 %" PRIu64 " x %" PRIu64 ", found %s %" PRIu64
                          " x %" PRIu64,
                          m->file->label, name, ne0, ne1, type_info(t->type)->name, t->ne[0],
                          t->ne[1]);
    if ((uintptr_t)t->data % sizeof(float))
        return amber_fail(err, AMBER_ERR_FORMAT, "%s: tensor %s: expected an aligned offset",
                          m->file->label, name);
    *out = (const float *)(const void *)t->data;
    for (uint64_t i = 0; i < ne0 * ne1; i++)
        if (!isfinite((*out)[i]))
            return amber_fail(err, AMBER_ERR_FORMAT,
                              "%s: tensor %s: expected finite values, found %g at %" PRIu64
                              " (damaged file)",
                              m->file->label, name, (double)(*out)[i], i);
    plan_hash_more(&m->plan, *out, t->size);
    return AMBER_OK;
}

static const char *shift_name(const struct rule *rule) {
    return rule->shift == SHIFT_SCALAR    ? "spts"
           : rule->shift == SHIFT_CHANNEL ? "spts-channel"
                                          : "lpts";
}

static amber_status load_shift(struct model *m, const char *stem, const struct rule *rule,
                               struct linear *out, amber_error *err) {
    const char *method = shift_name(rule);
    struct gguf_string made = {"", 0};
    if (gguf_get_string(m->file, "amber.shift", &made, err) < 0) return AMBER_ERR_FORMAT;
    if (made.len && (made.len != strlen(method) || memcmp(made.data, method, made.len) != 0))
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: sparse: expected /%.*s, whose shifts the file carries, found /%s",
                          m->file->label, (int)(made.len > 20 ? 20 : made.len), made.data, method);
    return find_vector(m, stem, "shift", method, (uint64_t)out->n_in, 1, &out->shift, err);
}

/* Scales, biases and in float mode weights as pruned rows read them. */
static amber_status load_outputs(struct model *m, const char *stem, const struct rule *rule,
                                 float factor, struct linear *out, amber_error *err) {
    const float *gain = NULL, *offset = NULL;
    const uint64_t n = (uint64_t)out->n_out;
    if (rule->ls) {
        amber_status status = find_vector(m, stem, "gain", "ls", n, 1, &gain, err);
        if (status == AMBER_OK) status = find_vector(m, stem, "offset", "ls", n, 1, &offset, err);
        if (status != AMBER_OK) return status;
    }
    const int padded = padded_outputs(out);
    float *bias = model_keep(m, 2 * sizeof *bias * (size_t)padded), *scale = bias + padded;
    if (!bias) return no_memory(m, stem, err);
    if (out->shift)
        times(out, out->shift, bias);
    else
        memset(bias, 0, sizeof *bias * (size_t)padded);
    for (int o = 0; o < out->n_out; o++)
        bias[o] += (out->bias ? out->bias[o] : 0) + (offset ? factor * offset[o] : 0);
    out->pruned_bias = out->pruned_w8.bias = bias;
    if (!gain) return AMBER_OK;
    if (out->f32) {
        const int64_t row = out->n_in;
        float *w = model_keep(m, sizeof *w * n * (size_t)row);
        if (!w) return no_memory(m, stem, err);
        for (int64_t o = 0; o < out->n_out; o++)
            for (int64_t k = 0; k < row; k++) w[o * row + k] = out->f32[o * row + k] * gain[o];
        out->pruned_f32 = w;
        return AMBER_OK;
    }
    for (int o = 0; o < padded; o++) scale[o] = o < out->n_out ? out->w8.scale[o] * gain[o] : 0;
    out->pruned_w8.scale = scale;
    return AMBER_OK;
}

static amber_status load_factors(struct model *m, const char *stem, const struct rule *rule,
                                 float factor, struct linear *out, amber_error *err) {
    const uint64_t rank = rule->rank;
    amber_status status =
        find_vector(m, stem, "right", "rsparse", (uint64_t)out->n_in, rank, &out->right, err);
    if (status == AMBER_OK)
        status =
            find_vector(m, stem, "left", "rsparse", rank, (uint64_t)out->n_out, &out->left, err);
    if (status != AMBER_OK || factor == 1) return status;
    const int64_t n = (int64_t)rank * out->n_out;
    float *scaled = model_keep(m, sizeof *scaled * (size_t)n);
    if (!scaled) return no_memory(m, stem, err);
    for (int64_t i = 0; i < n; i++) scaled[i] = out->left[i] * factor;
    out->left = scaled;
    return AMBER_OK;
}

amber_status mitigation_load(struct model *m, struct amber_pool *pool, const struct gguf_tensor *t,
                             const char *stem, const struct rule *rule, float factor,
                             struct linear *out, amber_error *err) {
    out->pruned_w8 = out->w8;
    out->pruned_f32 = out->f32;
    out->pruned_bias = out->bias;
    if (!rule_is_sparse(rule)) return AMBER_OK;
    out->rule = rule;
    const bool fixed = rule_shift_is_static(rule);
    if (!t && (fixed || rule->ls || rule->rank || rule->criterion == CRITERION_CLACT))
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s: sparse: expected act, var or dpts for experts, found a method that "
                          "looks at more than one token for %s",
                          m->file->label, stem);
    amber_status status = fixed ? load_shift(m, stem, rule, out, err) : AMBER_OK;
    if (status == AMBER_OK && (fixed || rule->ls))
        status = load_outputs(m, stem, rule, factor, out, err);
    if (status == AMBER_OK && rule->rank) status = load_factors(m, stem, rule, factor, out, err);
    if (status != AMBER_OK) return status;
    if (rule_shift_is_dynamic(rule) && !out->f32) {
        float *sums = model_keep(m, sizeof *sums * (size_t)padded_outputs(out));
        if (!sums) return no_memory(m, stem, err);
        times(out, NULL, sums);
        out->pruned_w8.sum = sums;
    }
    if (rule->criterion == CRITERION_ACT || rule->criterion == CRITERION_CLACT || !t)
        return AMBER_OK;
    if (m->packed) return packed_score(m->file, stem, out->n_in, rule->criterion, &out->score, err);
    float *score = model_keep(m, sizeof *score * (size_t)out->n_in);
    if (!score) return no_memory(m, stem, err);
    out->score = score;
    return score_channels(t, out->n_out, out->n_in, rule->criterion, pool, score, err);
}
