/* model.c: finds a model's tensors, proves their shapes and converts them to what the kernels want.
 *
 * A weight matrix is read once, 16 rows (one panel) at a time: dequantized to float32, quantized to
 * INT8 with one scale per output channel, packed. Threads take panels; the pages of the source are
 * given back tensor by tensor, so the peak is one INT8 model and no second full copy. An Amber GGUF
 * has its matrices in that form already, and they are used where they are mapped. */
#include "model.h"
#include "dequant.h"
#include "mitigation.h"
#include "packed.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct loader {
    struct model *m;
    struct amber_pool *pool;
    amber_progress_fn progress;
    void *user;
    int64_t done, total; /* source bytes */
    const float *ones;   /* [n_embd], or NULL until a norm wants them */
    amber_error *err;
};

/* ---- shapes ---- */

/* A layer's projections: file name, shape as (outputs, inputs), place in struct layer. */
struct projection {
    const char *name;
    int n_out, n_in;
    size_t offset;
};

/* Of layer il. n_out is 0 for what it does not have: a gate, or in a mixture the shared expert, whose
 * matrices stand for the feed-forward half. */
static void projections(const struct shape *s, int il, struct projection p[N_PROJ]) {
    int q = s->n_head * s->head_dim, kv = s->n_head_kv * s->head_dim;
    const struct projection table[N_PROJ] = {
        [PROJ_Q] = {"attn_q", q, s->n_embd, offsetof(struct layer, q)},
        [PROJ_K] = {"attn_k", kv, s->n_embd, offsetof(struct layer, k)},
        [PROJ_V] = {"attn_v", kv, s->n_embd, offsetof(struct layer, v)},
        [PROJ_O] = {"attn_output", s->n_embd, q, offsetof(struct layer, o)},
        [PROJ_GATE] = {"ffn_gate", s->arch->no_gate ? 0 : s->n_ff, s->n_embd,
                       offsetof(struct layer, gate)},
        [PROJ_UP] = {"ffn_up", s->n_ff, s->n_embd, offsetof(struct layer, up)},
        [PROJ_DOWN] = {"ffn_down", s->n_embd, s->n_ff, offsetof(struct layer, down)},
    };
    memcpy(p, table, sizeof table);
    if (!s->mixture[il]) return;
    p[PROJ_GATE].name = "ffn_gate_shexp";
    p[PROJ_UP].name = "ffn_up_shexp";
    p[PROJ_DOWN].name = "ffn_down_shexp";
    p[PROJ_GATE].n_out = p[PROJ_UP].n_out = p[PROJ_DOWN].n_in = s->n_ff_shared;
    if (!s->n_ff_shared) p[PROJ_DOWN].n_out = 0;
}

/* The experts' matrices, each the same for all of them. */
static void expert_projections(const struct shape *s, struct projection p[3]) {
    const struct projection table[3] = {
        {"ffn_gate_exps", s->n_ff_expert, s->n_embd, offsetof(struct experts, gate)},
        {"ffn_up_exps", s->n_ff_expert, s->n_embd, offsetof(struct experts, up)},
        {"ffn_down_exps", s->n_embd, s->n_ff_expert, offsetof(struct experts, down)},
    };
    memcpy(p, table, sizeof table);
}

static int k_padded(int n_in) {
    return (int)amber_round_up(n_in, AMBER_K_ALIGN);
}
static int n_panels(int n_out) {
    return (n_out + AMBER_PANEL - 1) / AMBER_PANEL;
}

/* Bytes of a converted matrix. */
static int64_t linear_bytes(int n_out, int n_in, bool float_weights) {
    if (float_weights) return (int64_t)n_out * n_in * (int64_t)sizeof(float);
    int64_t outputs = (int64_t)n_panels(n_out) * AMBER_PANEL;
    return outputs * k_padded(n_in) + outputs * (int64_t)sizeof(float);
}

/* Proves that t, which may be NULL for a missing tensor, is float-valued and of this shape; n_out 0
 * means one-dimensional. */
static amber_status check_weight(const struct gguf_file *file, const char *name,
                                 const struct gguf_tensor *t, int n_out, int n_in,
                                 amber_error *err) {
    if (!t)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tensor %s: expected, not found (the file is incomplete or split)",
                          file->label, name);
    uint64_t rows = n_out ? (uint64_t)n_out : 1;
    if (t->ne[0] != (uint64_t)n_in || t->ne[1] != rows || t->ne[2] != 1 || t->ne[3] != 1)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: tensor %s: expected %d x %" PRIu64 ", found %" PRIu64 " x %" PRIu64
                          " x %" PRIu64,
                          file->label, name, n_in, rows, t->ne[0], t->ne[1], t->ne[2]);
    const struct type_info *type = type_info(t->type);
    if (!type || !type->to_float)
        return amber_fail(
            err, AMBER_ERR_UNSUPPORTED,
            "%s: tensor %s has type %s, which this version cannot read; Q8_0, Q6_K, Q4_K "
            "and their kin work",
            file->label, name, type ? type->name : "unknown");
    return AMBER_OK;
}

static amber_status find_weight(const struct gguf_file *file, const char *name, int n_out, int n_in,
                                const struct gguf_tensor **out, amber_error *err) {
    *out = gguf_find_tensor(file, name);
    return check_weight(file, name, *out, n_out, n_in, err);
}

/* ---- memory ---- */

static void *keep(struct model *m, size_t bytes, bool matrix) {
    if (m->n_blocks == m->cap_blocks) {
        int cap = m->cap_blocks ? 2 * m->cap_blocks : 64;
        struct model_block *blocks = realloc(m->blocks, sizeof *blocks * (size_t)cap);
        if (!blocks) return NULL;
        m->blocks = blocks;
        m->cap_blocks = cap;
    }
    void *p = amber_alloc(bytes);
    if (!p) return NULL;
    m->blocks[m->n_blocks++] = (struct model_block){p, bytes, matrix};
    m->weight_bytes += (int64_t)bytes;
    return p;
}

void *model_keep(struct model *m, size_t bytes) {
    return keep(m, bytes, false);
}

void model_drop_matrices(struct model *m) {
    int left = 0;
    for (int i = 0; i < m->n_blocks; i++) {
        if (!m->blocks[i].matrix) {
            m->blocks[left++] = m->blocks[i];
            continue;
        }
        m->weight_bytes -= (int64_t)m->blocks[i].bytes;
        amber_free(m->blocks[i].at);
    }
    m->n_blocks = left;
}

static amber_status no_memory(const struct loader *ld, const char *name, int64_t bytes) {
    return amber_fail(ld->err, AMBER_ERR_MEMORY,
                      "%s: no memory for %s (%.1f MB; %.1f MB of weights are held already)",
                      ld->m->file->label, name, (double)bytes / 1e6,
                      (double)ld->m->weight_bytes / 1e6);
}

/* ---- conversion ---- */

struct convert {
    const struct gguf_tensor *tensor;
    const struct amber_w8 *packed; /* the source in an Amber GGUF, else NULL */
    const struct type_info *type;
    uint64_t row_bytes;
    int n_out, n_in, k_pad;
    uint8_t *q;
    float *scale;
    float *f32;
    float *panel; /* [threads, 16, n_in] */
};

static void convert_work(void *ctx, int ith, int nth) {
    const struct convert *c = ctx;
    int begin, end;
    amber_split(n_panels(c->n_out), 1, ith, nth, &begin, &end);
    float *rows = c->panel + (int64_t)ith * AMBER_PANEL * c->n_in;
    for (int panel = begin; panel < end; panel++) {
        int first = panel * AMBER_PANEL, count = amber_min(AMBER_PANEL, c->n_out - first);
        float *dst = c->f32 ? c->f32 + (int64_t)first * c->n_in : rows;
        if (c->packed)
            packed_rows(c->packed, first, count, dst);
        else
            c->type->to_float(c->tensor->data + (uint64_t)first * c->row_bytes, dst,
                              (int64_t)count * c->n_in);
        if (!c->f32) amber_pack_w8_panel(c->q, c->scale, rows, panel, count, c->n_in, c->k_pad);
    }
}

static amber_status report(struct loader *ld, const struct gguf_tensor *t) {
    ld->done += (int64_t)t->size;
    if (ld->progress && ld->progress(ld->user, AMBER_PHASE_LOAD, ld->done, ld->total))
        return amber_fail(ld->err, AMBER_ERR_CANCELLED, "%s: loading was cancelled",
                          ld->m->file->label);
    return AMBER_OK;
}

static amber_status load_linear(struct loader *ld, const struct gguf_tensor *t, const char *name,
                                int n_out, int n_in, struct linear *out) {
    struct model *m = ld->m;
    struct convert c = {.tensor = t, .type = type_info(t->type), .n_out = n_out, .n_in = n_in};
    c.row_bytes = type_row_bytes(t->type, (uint64_t)n_in);
    c.k_pad = k_padded(n_in);
    *out = (struct linear){.n_out = n_out, .n_in = n_in};

    int64_t bytes = linear_bytes(n_out, n_in, m->float_weights);
    uint8_t *block = keep(m, (size_t)bytes, !m->float_weights);
    if (!block) return no_memory(ld, name, bytes);
    if (m->float_weights) {
        out->f32 = c.f32 = (float *)block;
    } else {
        int64_t outputs = (int64_t)n_panels(n_out) * AMBER_PANEL;
        c.q = block;
        c.scale = (float *)(block + outputs * c.k_pad);
        int64_t scratch = (int64_t)amber_pool_threads(ld->pool) * AMBER_PANEL * n_in;
        c.panel = amber_alloc((size_t)scratch * sizeof(float));
        if (!c.panel) return no_memory(ld, name, scratch * (int64_t)sizeof(float));
        out->w8 = (struct amber_w8){
            .q = c.q, .scale = c.scale, .n_out = n_out, .n_in = n_in, .k_pad = c.k_pad};
    }
    amber_pool_run(ld->pool, convert_work, &c);
    amber_free(c.panel);
    if (t != m->embedding) gguf_drop_pages(m->file, t);
    m->n_params += (int64_t)n_out * n_in;
    return report(ld, t);
}

/* A matrix of an Amber GGUF: mapped, or in float mode multiplied out. t: to drop its pages then. */
static amber_status use_packed(struct loader *ld, const struct gguf_tensor *t, const char *name,
                               const struct amber_w8 *w8, struct linear *out) {
    struct model *m = ld->m;
    *out = (struct linear){.n_out = w8->n_out, .n_in = w8->n_in};
    m->n_params += (int64_t)w8->n_out * w8->n_in;
    if (!m->float_weights) {
        out->w8 = *w8;
        return AMBER_OK;
    }
    struct convert c = {.packed = w8, .n_out = w8->n_out, .n_in = w8->n_in};
    int64_t bytes = linear_bytes(w8->n_out, w8->n_in, true);
    out->f32 = c.f32 = model_keep(m, (size_t)bytes);
    if (!c.f32) return no_memory(ld, name, bytes);
    amber_pool_run(ld->pool, convert_work, &c);
    if (t) gguf_drop_pages(m->file, t);
    return AMBER_OK;
}

/* The matrix `stem`.weight of an Amber GGUF. */
static amber_status load_packed(struct loader *ld, const char *stem, int n_out, int n_in,
                                struct linear *out) {
    struct amber_w8 w8;
    amber_status status = packed_matrix(ld->m->file, stem, n_out, n_in, &w8, ld->err);
    if (status != AMBER_OK) return status;
    char name[64];
    snprintf(name, sizeof name, "%s.weight", stem);
    const struct gguf_tensor *t = gguf_find_tensor(ld->m->file, name);
    status = use_packed(ld, t, name, &w8, out);
    return status == AMBER_OK ? report(ld, t) : status;
}

/* A one-dimensional tensor as float32, padded with zeros to whole panels. t NULL: missing. */
static amber_status load_vector(struct loader *ld, const char *name, const struct gguf_tensor *t,
                                int n, const float **out) {
    amber_status status = check_weight(ld->m->file, name, t, 0, n, ld->err);
    if (status != AMBER_OK) return status;
    float *v = model_keep(ld->m, sizeof(float) * (size_t)amber_round_up(n, AMBER_PANEL));
    if (!v) return no_memory(ld, name, n);
    type_info(t->type)->to_float(t->data, v, n);
    ld->m->n_params += n;
    *out = v;
    return report(ld, t);
}

/* The tensor that holds a projection's rows, or those rows of the tensor that holds several: attn_qkv
 * has q, k and v one below the other, and an ffn_up of twice the height has the gate above. suffix:
 * "weight" or "bias". view->data is NULL where the file has none. */
static void find_rows(const struct model *m, int il, int id, const struct projection *p,
                      const char *suffix, struct gguf_tensor *view) {
    const struct shape *s = &m->shape;
    const int q = s->n_head * s->head_dim, kv = s->n_head_kv * s->head_dim;
    const int qkv[] = {[PROJ_Q] = 0, [PROJ_K] = q, [PROJ_V] = q + kv};
    const bool bias = strcmp(suffix, "bias") == 0;
    char name[64];
    snprintf(name, sizeof name, "blk.%d.%s.%s", il, p->name, suffix);
    const struct gguf_tensor *t = gguf_find_tensor(m->file, name);
    int64_t first = 0, height = p->n_out;
    if (!t && id <= PROJ_V) {
        snprintf(name, sizeof name, "blk.%d.attn_qkv.%s", il, suffix);
        t = gguf_find_tensor(m->file, name);
        first = qkv[id];
        height = q + 2 * kv;
    } else if (id == PROJ_GATE || id == PROJ_UP) {
        char gate[64], up[64];
        snprintf(gate, sizeof gate, "blk.%d.ffn_gate.weight", il);
        snprintf(up, sizeof up, "blk.%d.ffn_up.%s", il, suffix);
        const struct gguf_tensor *both = gguf_find_tensor(m->file, up);
        if (!gguf_find_tensor(m->file, gate) && both &&
            both->ne[bias ? 0 : 1] == 2 * (uint64_t)s->n_ff) {
            t = both;
            first = id == PROJ_UP ? s->n_ff : 0;
            height = 2 * (int64_t)s->n_ff;
        }
    }
    *view = (struct gguf_tensor){0};
    if (!t) return;
    *view = *t;
    const uint64_t row = bias ? type_row_bytes(t->type, 1) : type_row_bytes(t->type, t->ne[0]);
    if (t->ne[bias ? 0 : 1] != (uint64_t)height || height == p->n_out || row == 0) return;
    view->data += (uint64_t)first * row;
    view->ne[bias ? 0 : 1] = (uint64_t)p->n_out;
    view->size = (uint64_t)p->n_out * row;
}

/* Multiplies a layer's outputs by a factor. Vectors that lie in a mapped file are copied. */
static amber_status scale_linear(struct loader *ld, struct linear *w, float factor) {
    if (factor == 1) return AMBER_OK;
    const int outputs = n_panels(w->n_out) * AMBER_PANEL;
    float *scale = model_keep(ld->m, 2 * sizeof *scale * (size_t)outputs);
    if (!scale) return no_memory(ld, "scaled outputs", 2 * outputs * (int64_t)sizeof *scale);
    if (w->f32) {
        float *f32 = (float *)(uintptr_t)w->f32; /* made by load_linear or load_packed */
        for (int64_t i = 0; i < (int64_t)w->n_out * w->n_in; i++) f32[i] *= factor;
    } else {
        for (int o = 0; o < outputs; o++) scale[o] = w->w8.scale[o] * factor;
        w->w8.scale = scale;
    }
    if (!w->bias) return AMBER_OK;
    float *bias = scale + outputs;
    for (int o = 0; o < outputs; o++) bias[o] = w->bias[o] * factor;
    w->bias = w->w8.bias = bias;
    return AMBER_OK;
}

static amber_status load_projection(struct loader *ld, int il, int id, const struct projection *p) {
    struct linear *out = (struct linear *)((char *)&ld->m->layers[il] + p->offset);
    char stem[48], name[64];
    snprintf(stem, sizeof stem, "blk.%d.%s", il, p->name);
    snprintf(name, sizeof name, "%s.weight", stem);
    struct gguf_tensor t = {0};
    amber_status status;
    if (ld->m->packed) {
        status = load_packed(ld, stem, p->n_out, p->n_in, out);
    } else {
        find_rows(ld->m, il, id, p, "weight", &t);
        status = check_weight(ld->m->file, name, t.data ? &t : NULL, p->n_out, p->n_in, ld->err);
        if (status == AMBER_OK) status = load_linear(ld, &t, name, p->n_out, p->n_in, out);
    }
    struct gguf_tensor bias;
    find_rows(ld->m, il, id, p, "bias", &bias);
    if (status == AMBER_OK && bias.data) {
        snprintf(name, sizeof name, "%s.bias", stem);
        status = load_vector(ld, name, &bias, p->n_out, &out->bias);
        out->w8.bias = out->bias;
    }
    const bool residual = id == PROJ_O || id == PROJ_DOWN;
    const float factor = residual ? ld->m->shape.residual_scale : 1;
    if (status == AMBER_OK) status = scale_linear(ld, out, factor);
    return status == AMBER_OK
               ? mitigation_load(ld->m, ld->pool, &t, stem, plan_rule(&ld->m->plan, il, id), factor,
                                 out, ld->err)
               : status;
}

/* Row e of the biases of all experts, [n_out, n_expert]. */
static amber_status load_expert_bias(struct loader *ld, const struct gguf_tensor *all, int e,
                                     struct linear *w) {
    float *bias = model_keep(ld->m, sizeof *bias * (size_t)amber_round_up(w->n_out, AMBER_PANEL));
    if (!bias) return no_memory(ld, "the experts' biases", w->n_out * (int64_t)sizeof *bias);
    const uint64_t row = type_row_bytes(all->type, all->ne[0]);
    type_info(all->type)->to_float(all->data + (uint64_t)e * row, bias, w->n_out);
    w->bias = w->w8.bias = bias;
    ld->m->n_params += w->n_out;
    return AMBER_OK;
}

/* One of the experts' matrices, for all of them: slices of one tensor [n_in, n_out, n_expert]. */
static amber_status load_expert_matrices(struct loader *ld, int il, int id,
                                         const struct projection *p, struct linear *w) {
    struct model *m = ld->m;
    const int n = m->shape.n_expert, padded = n_panels(p->n_out) * AMBER_PANEL;
    char stem[48], name[64];
    snprintf(stem, sizeof stem, "blk.%d.%s", il, p->name);
    snprintf(name, sizeof name, "%s.weight", stem);
    struct amber_w8 all = {0};
    struct gguf_tensor t = {0};
    amber_status status;
    if (m->packed) {
        status = packed_matrix(m->file, stem, n * padded, p->n_in, &all, ld->err);
    } else {
        const struct gguf_tensor *found = gguf_find_tensor(m->file, name);
        if (found) t = *found;
        if (t.ne[2] == (uint64_t)n) {
            t.ne[1] *= (uint64_t)n;
            t.ne[2] = 1;
        }
        status = check_weight(m->file, name, found ? &t : NULL, n * p->n_out, p->n_in, ld->err);
        t.ne[1] = (uint64_t)p->n_out;
        t.size = type_row_bytes(t.type, (uint64_t)p->n_in) * (uint64_t)p->n_out;
    }
    const struct gguf_tensor *bias = NULL;
    if (status == AMBER_OK) {
        snprintf(name, sizeof name, "%s.bias", stem);
        bias = gguf_find_tensor(m->file, name);
        if (bias) status = check_weight(m->file, name, bias, n, p->n_out, ld->err);
        snprintf(name, sizeof name, "%s.weight", stem);
    }
    for (int e = 0; e < n && status == AMBER_OK; e++) {
        if (m->packed) {
            struct amber_w8 one = all;
            one.n_out = p->n_out;
            one.q += (int64_t)e * padded * all.k_pad;
            one.scale += (int64_t)e * padded;
            status = use_packed(ld, NULL, name, &one, &w[e]);
        } else {
            status = load_linear(ld, &t, name, p->n_out, p->n_in, &w[e]);
            t.data += t.size;
        }
        if (status == AMBER_OK && bias) status = load_expert_bias(ld, bias, e, &w[e]);
        if (status == AMBER_OK && id == PROJ_DOWN)
            status = scale_linear(ld, &w[e], m->shape.residual_scale);
        if (status == AMBER_OK)
            status = mitigation_load(m, ld->pool, NULL, stem, plan_rule(&m->plan, il, id), 1, &w[e],
                                     ld->err);
    }
    return status == AMBER_OK && m->packed ? report(ld, gguf_find_tensor(m->file, name)) : status;
}

/* A float matrix that stays float. */
static amber_status load_floats(struct loader *ld, const char *name, int n_out, int n_in,
                                const float **out) {
    const struct gguf_tensor *t = NULL;
    amber_status status = find_weight(ld->m->file, name, n_out, n_in, &t, ld->err);
    if (status != AMBER_OK) return status;
    const int64_t n = (int64_t)n_in * amber_max(n_out, 1);
    const int64_t kept = amber_round_up(n_in, AMBER_PANEL) * amber_max(n_out, 1);
    float *v = model_keep(ld->m, sizeof *v * (size_t)kept);
    if (!v) return no_memory(ld, name, n * (int64_t)sizeof *v);
    type_info(t->type)->to_float(t->data, v, n);
    ld->m->n_params += n;
    *out = v;
    return report(ld, t);
}

static amber_status load_experts(struct loader *ld, int il) {
    struct experts *x = &ld->m->layers[il].experts;
    const struct shape *s = &ld->m->shape;
    char name[64];
    snprintf(name, sizeof name, "blk.%d.ffn_gate_inp.weight", il);
    amber_status status = load_floats(ld, name, s->n_expert, s->n_embd, &x->router);
    snprintf(name, sizeof name, "blk.%d.ffn_gate_inp.bias", il);
    if (status == AMBER_OK && gguf_find_tensor(ld->m->file, name))
        status = load_floats(ld, name, 0, s->n_expert, &x->router_bias);
    snprintf(name, sizeof name, "blk.%d.exp_probs_b.bias", il);
    if (status == AMBER_OK && gguf_find_tensor(ld->m->file, name))
        status = load_floats(ld, name, 0, s->n_expert, &x->choice_bias);
    snprintf(name, sizeof name, "blk.%d.ffn_gate_inp_shexp.weight", il);
    if (status == AMBER_OK && s->n_ff_shared && gguf_find_tensor(ld->m->file, name))
        status = load_floats(ld, name, 0, s->n_embd, &x->shared_router);
    if (status != AMBER_OK) return status;

    x->gate = calloc(3 * (size_t)s->n_expert, sizeof *x->gate);
    if (!x->gate) return no_memory(ld, "the table of experts", 0);
    x->up = x->gate + s->n_expert;
    x->down = x->up + s->n_expert;
    struct projection p[3];
    expert_projections(s, p);
    struct linear *w[3] = {x->gate, x->up, x->down};
    for (int i = 0; i < 3 && status == AMBER_OK; i++)
        status = load_expert_matrices(ld, il, PROJ_GATE + i, &p[i], w[i]);
    return status;
}

/* The weights of all norms in a model whose norms have none. */
static amber_status plain_norm(struct loader *ld, struct norm *norm) {
    if (!ld->ones) {
        const int padded = (int)amber_round_up(norm->n, AMBER_PANEL);
        float *ones = model_keep(ld->m, sizeof *ones * (size_t)padded);
        if (!ones) return no_memory(ld, "norms", padded * (int64_t)sizeof *ones);
        for (int i = 0; i < padded; i++) ones[i] = 1;
        ld->ones = ones;
    }
    norm->weight = ld->ones;
    return AMBER_OK;
}

/* stem.weight and, where the file has it, stem.bias. */
static amber_status load_norm(struct loader *ld, const char *stem, struct norm *norm) {
    char name[64];
    norm->n = ld->m->shape.n_embd;
    if (ld->m->shape.arch->norm_plain) return plain_norm(ld, norm);
    snprintf(name, sizeof name, "%s.weight", stem);
    amber_status status =
        load_vector(ld, name, gguf_find_tensor(ld->m->file, name), norm->n, &norm->weight);
    snprintf(name, sizeof name, "%s.bias", stem);
    const struct gguf_tensor *bias = gguf_find_tensor(ld->m->file, name);
    if (status == AMBER_OK && bias) status = load_vector(ld, name, bias, norm->n, &norm->bias);
    return status;
}

/* The norm of queries or keys, where the file has one: over each head, with the heads' own weights
 * or shared ones, or over the whole row. */
static amber_status load_head_norm(struct loader *ld, int il, const char *stem, int n_head,
                                   struct norm *norm) {
    char name[64];
    snprintf(name, sizeof name, "blk.%d.%s.weight", il, stem);
    const struct gguf_tensor *t = gguf_find_tensor(ld->m->file, name);
    if (!t) return AMBER_OK;
    const int head = ld->m->shape.head_dim;
    struct gguf_tensor flat = *t;
    norm->n = t->ne[0] == (uint64_t)head ? head : n_head * head;
    if (t->ne[0] == (uint64_t)head && t->ne[1] == (uint64_t)n_head && n_head > 1) {
        norm->step = head;
        flat.ne[0] = (uint64_t)n_head * (uint64_t)head;
        flat.ne[1] = 1;
    }
    return load_vector(ld, name, &flat, norm->step ? n_head * head : norm->n, &norm->weight);
}

static bool has_norm(const struct loader *ld, int il, const char *name) {
    char full[64];
    snprintf(full, sizeof full, "blk.%d.%s.weight", il, name);
    return gguf_find_tensor(ld->m->file, full) != NULL;
}

static amber_status load_norms(struct loader *ld, int il) {
    struct layer *layer = &ld->m->layers[il];
    const enum norm_places places = ld->m->shape.arch->norms;
    const bool pre = places != NORM_POST, post = places == NORM_POST || places == NORM_PRE_POST;
    char stem[64];
    const char *attn_norm = "attn_norm", *ffn_norm = ld->m->shape.arch->ffn_norm;
    if (!ffn_norm) ffn_norm = "ffn_norm";
    layer->parallel = places == NORM_PARALLEL
                          ? ld->m->shape.parallel
                          : places == NORM_PRE_OR_PARALLEL && !has_norm(ld, il, ffn_norm);
    /* Falcon's larger models call the norm of the feed-forward half by the name of the other's. */
    if (layer->parallel && has_norm(ld, il, "attn_norm_2"))
        attn_norm = "attn_norm_2", ffn_norm = "attn_norm";
    const bool shared = layer->parallel && !has_norm(ld, il, ffn_norm);
    const struct {
        const char *name;
        bool wanted;
        struct norm *norm;
    } norms[] = {
        {attn_norm, pre, &layer->attn_norm},
        {"post_attention_norm", post, &layer->post_attn_norm},
        {ffn_norm, pre && !shared, &layer->ffn_norm},
        {"post_ffw_norm", post, &layer->post_ffn_norm},
    };
    amber_status status = AMBER_OK;
    for (size_t i = 0; i < sizeof norms / sizeof norms[0] && status == AMBER_OK; i++) {
        if (!norms[i].wanted) continue;
        snprintf(stem, sizeof stem, "blk.%d.%s", il, norms[i].name);
        status = load_norm(ld, stem, norms[i].norm);
    }
    if (shared) layer->ffn_norm = layer->attn_norm;
    const struct shape *s = &ld->m->shape;
    if (status == AMBER_OK)
        status = load_head_norm(ld, il, "attn_q_norm", s->n_head, &layer->q_norm);
    if (status == AMBER_OK)
        status = load_head_norm(ld, il, "attn_k_norm", s->n_head_kv, &layer->k_norm);
    return status;
}

static amber_status load_layer(struct loader *ld, int il) {
    amber_status status = load_norms(ld, il);
    struct projection p[N_PROJ];
    projections(&ld->m->shape, il, p);
    for (int i = 0; i < N_PROJ && status == AMBER_OK; i++)
        if (p[i].n_out) status = load_projection(ld, il, i, &p[i]);
    char name[64];
    snprintf(name, sizeof name, "blk.%d.attn_sinks.weight", il);
    const struct gguf_tensor *sinks = gguf_find_tensor(ld->m->file, name);
    if (status == AMBER_OK && sinks)
        status = load_vector(ld, name, sinks, ld->m->shape.n_head, &ld->m->layers[il].sinks);
    return status == AMBER_OK && ld->m->shape.mixture[il] ? load_experts(ld, il) : status;
}

static bool same_pattern(const struct amber_pattern *p, const struct amber_pattern *q) {
    return p->kind == q->kind && p->n == q->n && p->m == q->m && p->block == q->block &&
           p->tokens == q->tokens && p->relief == q->relief;
}

int64_t model_projection_work(const struct shape *s, int il, int projection, int32_t matrix[2]) {
    struct projection p[N_PROJ], expert[3];
    projections(s, il, p);
    expert_projections(s, expert);
    const struct projection *own = &p[projection];
    int64_t work = (int64_t)own->n_out * own->n_in;
    if (s->mixture[il] && projection >= PROJ_GATE) {
        own = &expert[projection - PROJ_GATE];
        work += (int64_t)s->n_expert_used * own->n_out * own->n_in;
    }
    matrix[0] = own->n_out;
    matrix[1] = own->n_in;
    return work;
}

/* Share of the multiplications of the layers' linear projections whose input is sparse: the coverage
 * of arXiv 2508.02128; where `only` is given, sparse by that pattern. With kernels, the share that
 * these leave out. */
static double sparse_share(const struct plan *plan, const struct shape *s,
                           const struct amber_pattern *only, const struct amber_kernels *kernels) {
    double share = 0, total = 0;
    for (int il = 0; il < s->n_layer; il++) {
        for (int i = 0; i < N_PROJ; i++) {
            const struct rule *rule = plan_rule(plan, il, i);
            int32_t matrix[2];
            const double work = (double)model_projection_work(s, il, i, matrix);
            const double chosen = s->mixture[il] && i >= PROJ_GATE
                                      ? (double)s->n_expert_used * matrix[0] * matrix[1]
                                      : 0;
            total += work;
            if (!rule_is_sparse(rule) || (only && !same_pattern(only, &rule->pattern))) continue;
            int keep = kernels ? amber_nm_listed(kernels, &rule->pattern) : 0;
            if (!kernels) share += work;
            if (keep) share += (work - chosen) * (16 - keep) / 16;
            int alone = kernels ? amber_nm_listed_alone(kernels, &rule->pattern) : 0;
            if (alone) share += chosen * (16 - alone) / 16;
        }
    }
    return share / total;
}

double model_coverage(const struct plan *plan, const struct shape *s) {
    return sparse_share(plan, s, NULL, NULL);
}

void model_work(const struct model *m, int64_t *multiplications, int64_t *bytes) {
    const struct shape *s = &m->shape;
    *multiplications = 0;
    *bytes = linear_bytes(s->n_vocab, s->n_embd, m->float_weights);
    for (int il = 0; il < s->n_layer; il++) {
        struct projection p[N_PROJ], expert[3];
        projections(s, il, p);
        expert_projections(s, expert);
        for (int i = 0; i < N_PROJ; i++) {
            *multiplications += (int64_t)p[i].n_out * p[i].n_in;
            *bytes += linear_bytes(p[i].n_out, p[i].n_in, m->float_weights);
        }
        for (int i = 0; i < 3 && s->mixture[il]; i++) {
            *multiplications += s->n_expert_used * (int64_t)expert[i].n_out * expert[i].n_in;
            *bytes +=
                s->n_expert_used * linear_bytes(expert[i].n_out, expert[i].n_in, m->float_weights);
        }
    }
}

double model_skipped(const struct model *m, const struct amber_kernels *kernels) {
    return m->float_weights ? 0 : sparse_share(&m->plan, &m->shape, NULL, kernels);
}

bool model_pattern(const struct model *m, int index, struct amber_pattern *pattern, double *share) {
    const struct plan *plan = &m->plan;
    for (int i = 0, found = 0; i < plan->n_layer * N_PROJ; i++) {
        if (!rule_is_sparse(&plan->rules[i])) continue;
        int first = 0;
        while (!rule_is_sparse(&plan->rules[first]) ||
               !same_pattern(&plan->rules[first].pattern, &plan->rules[i].pattern))
            first++;
        if (first < i || found++ < index) continue;
        *pattern = plan->rules[i].pattern;
        *share = sparse_share(plan, &m->shape, pattern, NULL);
        return true;
    }
    return false;
}

amber_status model_read_plan(const struct gguf_file *file, const struct shape *s,
                             const char *sparse, bool evaluation, struct plan *plan,
                             amber_error *err) {
    struct gguf_string text = {"off", 3};
    bool automatic = sparse && strcmp(sparse, "auto") == 0;
    if (!automatic && sparse) text = (struct gguf_string){sparse, strlen(sparse)};
    if (automatic && gguf_get_string(file, "amber.plan", &text, err) < 0) return AMBER_ERR_FORMAT;
    char *copy = malloc((size_t)text.len + 1);
    if (!copy) return amber_fail(err, AMBER_ERR_MEMORY, "%s: no memory for the plan", file->label);
    memcpy(copy, text.data, (size_t)text.len);
    copy[text.len] = 0;
    const struct plan_model model = {s->n_layer, s->n_embd, s->n_expert ? s->n_ff_expert : s->n_ff};
    amber_status status = plan_parse(copy, &model, evaluation, plan, err);
    free(copy);
    if (status != AMBER_OK && automatic && err) {
        char why[sizeof err->msg];
        memcpy(why, err->msg, sizeof why);
        return amber_fail(err, AMBER_ERR_FORMAT, "%s: key amber.plan: %s", file->label, why);
    }
    return status;
}

static amber_status load_head(struct loader *ld) {
    struct model *m = ld->m;
    struct shape *s = &m->shape;
    const struct gguf_tensor *head = m->embedding;
    bool tied = !gguf_find_tensor(m->file, "output.weight");
    if (m->packed && gguf_get_bool(m->file, "amber.tied_output", &tied, ld->err) < 0)
        return AMBER_ERR_FORMAT;
    if (!tied) m->n_params += (int64_t)s->n_vocab * s->n_embd; /* the embedding, not converted */
    amber_status status = AMBER_OK;
    if (m->packed) {
        status = load_packed(ld, "output", s->n_vocab, s->n_embd, &m->output);
    } else {
        if (!tied)
            status = find_weight(m->file, "output.weight", s->n_vocab, s->n_embd, &head, ld->err);
        if (status == AMBER_OK)
            status = load_linear(ld, head, "output.weight", s->n_vocab, s->n_embd, &m->output);
    }
    const struct gguf_tensor *bias = gguf_find_tensor(m->file, "output.bias");
    if (status == AMBER_OK && bias) {
        status = load_vector(ld, "output.bias", bias, s->n_vocab, &m->output.bias);
        m->output.w8.bias = m->output.bias;
    }
    return status;
}

static amber_status load_all(struct loader *ld, const char *sparse, bool evaluation) {
    struct model *m = ld->m;
    struct shape *s = &m->shape;
    amber_status status = arch_read_shape(m->file, s, ld->err);
    if (status != AMBER_OK) return status;
    status = packed_check(m->file, &m->packed, ld->err);
    if (status == AMBER_OK)
        status = model_read_plan(m->file, s, sparse, evaluation, &m->plan, ld->err);
    m->coverage = status == AMBER_OK ? model_coverage(&m->plan, s) : 0;
    if (m->plan.any) plan_hash_more(&m->plan, &m->sparse_first_n, sizeof m->sparse_first_n);
    if (status == AMBER_OK)
        status = find_weight(m->file, "token_embd.weight", s->n_vocab, s->n_embd, &m->embedding,
                             ld->err);
    if (status != AMBER_OK) return status;

    m->layers = calloc((size_t)s->n_layer, sizeof *m->layers);
    if (!m->layers)
        return no_memory(ld, "the layer table", (int64_t)sizeof *m->layers * s->n_layer);
    if (m->packed) packed_read_ahead(m->file);
    for (uint64_t i = 0; i < m->file->n_tensors; i++)
        ld->total += (int64_t)m->file->tensors[i].size;

    if (s->arch->positions)
        status = load_floats(ld, "position_embd.weight", s->n_ctx_train, s->n_embd, &m->positions);
    for (int il = 0; il < s->n_layer && status == AMBER_OK; il++) status = load_layer(ld, il);
    if (status == AMBER_OK) status = load_norm(ld, "output_norm", &m->output_norm);
    if (status == AMBER_OK) status = load_head(ld);
    return status == AMBER_OK ? scale_linear(ld, &m->output, s->logit_scale) : status;
}

amber_status model_load(struct gguf_file *file, const amber_engine_options *options,
                        struct amber_pool *pool, struct model *m, amber_error *err) {
    *m = (struct model){.file = file,
                        .float_weights = options->precision == AMBER_PRECISION_FLOAT,
                        .sparse_first_n = options->sparse_first_n};
    struct loader ld = {.m = m,
                        .pool = pool,
                        .progress = options->progress,
                        .user = options->progress_user,
                        .err = err};
    amber_status status = load_all(&ld, options->sparse, options->evaluation != 0);
    if (status != AMBER_OK) model_free(m);
    return status;
}

void model_free(struct model *m) {
    for (int i = 0; i < m->n_blocks; i++) amber_free(m->blocks[i].at);
    free(m->blocks);
    for (int il = 0; m->layers && il < m->shape.n_layer; il++) free(m->layers[il].experts.gate);
    free(m->layers);
    plan_free(&m->plan);
    shape_free(&m->shape);
    gguf_close(m->file);
    *m = (struct model){0};
}

static bool ends_with(const struct gguf_tensor *t, const char *end) {
    const size_t n = strlen(end);
    return t->name.len > n && memcmp(t->name.data + t->name.len - n, end, n) == 0;
}

/* Vectors of an Amber GGUF that are used where they are mapped. */
static bool lies_mapped(const struct gguf_tensor *t) {
    static const char *const parts[] = {".scale", ".shift", ".gain", ".offset"};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        if (ends_with(t, parts[i])) return true;
    return false;
}

static bool is_positions(const struct gguf_tensor *t) {
    static const char name[] = "position_embd.weight";
    return t->name.len == sizeof name - 1 && memcmp(t->name.data, name, sizeof name - 1) == 0;
}

/* Norms, biases, routers and learned positions as the loader keeps them. */
static int64_t vector_bytes(const struct gguf_file *file) {
    int64_t bytes = 0;
    for (uint64_t i = 0; i < file->n_tensors; i++) {
        const struct gguf_tensor *t = &file->tensors[i];
        const bool vectors = t->ne[1] == 1 || ends_with(t, "_exps.bias");
        if ((vectors && !lies_mapped(t)) || ends_with(t, "_inp.weight") || is_positions(t))
            bytes += amber_round_up((int64_t)t->ne[0], AMBER_PANEL) * (int64_t)t->ne[1] *
                     (int64_t)sizeof(float);
    }
    return bytes;
}

amber_status model_estimate(const struct gguf_file *file, bool float_weights, struct shape *s,
                            int64_t *weight_bytes, int64_t *mapped_bytes, amber_error *err) {
    bool packed = false;
    amber_status status = arch_read_shape(file, s, err);
    if (status == AMBER_OK) status = packed_check(file, &packed, err);
    if (status != AMBER_OK) return status;
    int64_t matrices = linear_bytes(s->n_vocab, s->n_embd, float_weights);
    for (int il = 0; il < s->n_layer; il++) {
        struct projection p[N_PROJ], expert[3];
        projections(s, il, p);
        expert_projections(s, expert);
        for (int i = 0; i < N_PROJ; i++)
            matrices += linear_bytes(p[i].n_out, p[i].n_in, float_weights);
        for (int i = 0; i < 3 && s->mixture[il]; i++)
            matrices += s->n_expert * linear_bytes(expert[i].n_out, expert[i].n_in, float_weights);
    }
    bool mapped = packed && !float_weights;
    *weight_bytes = vector_bytes(file) + (mapped ? 0 : matrices);
    *mapped_bytes =
        (int64_t)gguf_find_tensor(file, "token_embd.weight")->size + (mapped ? matrices : 0);
    return AMBER_OK;
}

void model_embed(const struct model *m, int32_t token, int position, float *x) {
    const struct type_info *type = type_info(m->embedding->type);
    const int n = m->shape.n_embd;
    const uint64_t row = type_row_bytes(m->embedding->type, (uint64_t)n);
    type->to_float(m->embedding->data + (uint64_t)token * row, x, n);
    if (m->shape.embed_scale != 1)
        for (int i = 0; i < n; i++) x[i] *= m->shape.embed_scale;
    if (!m->positions) return;
    const float *learned = m->positions + (int64_t)position * n;
    for (int i = 0; i < n; i++) x[i] += learned[i];
}
