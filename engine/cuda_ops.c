/* cuda_ops.c: the steps of the forward pass on a GPU. Buffers of the batch are its memory; steps are
 * queued, and the last one waits for them. What a step computes stands in ops*.c and kernels/. */
#include "cuda.h"
#include "cuda/layout.h"
#include "ops.h"

#include <stdlib.h>
#include <string.h>

/* Rows from which on 2:4 forms are stored packed; the masked product gives the same integers. */
enum { MIN_PACKED = 32 };
/* Rows whose logits are computed at a time: a tile of fragments. */
enum { HEAD_ROWS = FRAG_ROWS };

struct cuda_input {
    const struct linear *of; /* whose rule pruned it; NULL: dense */
    int form, k_pad;
    uint8_t *a, *e;
    float *scale, *shifted;
};

struct cuda_batch {
    struct cuda *cuda;
    struct cuda_input in[MAX_INPUTS];
    int n_inputs;
    /* Mixtures of experts, see device.h for slots and places. */
    int32_t *chosen, *place, *row_of, *expert_of, *begin, *count;
    float *share, *expert_out;       /* [slots]; [places, n_embd] */
    struct cuda_input at_experts[2]; /* inputs in the order of places */
    /* What a step starts from, copied at once: positions, angles, growth of queries, embeddings. */
    uint8_t *step, *step_host;
    int32_t *pos;                /* of the batch's first row */
    float *growth;               /* of its queries, or NULL */
    float *q;                    /* start of the q buffer: a batch that narrows moves it */
    float *logits, *logits_host; /* [HEAD_ROWS, n_vocab] */
    float *pending;              /* where the last row's logits go at the end of the step */
    /* A decode step is run once, recorded the second time, and replayed from then on. */
    int decoded;
    bool recording;
    struct amber_cuda_graph *graph;
    void **blocks;
    int n_blocks;
};

/* ---- memory ---- */

#define MAX_BLOCKS (24 + 4 * (MAX_INPUTS + 2))

typedef bool (*buffer_fn)(void *user, void **at, int64_t bytes, int fill, bool is_kv);

static int64_t step_bytes(const struct shape *s, int64_t rows) {
    return rows * (4 + 4 + 4 * (int64_t)s->n_embd + 4 * 4 * (int64_t)(s->n_rot / 2));
}

/* Rows of the fragments that `rows` rows take at their experts, each expert's in tiles of their own; a
 * decode step has no tiles. */
static int64_t places_of(const struct shape *s, int64_t rows) {
    const int64_t slots = rows * s->n_expert_used;
    const int64_t experts = slots < s->n_expert ? slots : s->n_expert;
    return rows == 1 ? slots : amber_round_up(slots + experts * (FRAG_ROWS - 1), FRAG_ROWS);
}

static bool each_input(struct cuda_input *in, int64_t rows, int wide, buffer_fn each, void *user) {
    const int k_pad = (int)amber_round_up(wide, FRAG_BLOCK);
    int64_t a = 0, e = 0;
    for (int form = 0; form < N_FORMS; form++) {
        const int64_t a_bytes = (int64_t)frag_a_bytes(form, (int)rows, k_pad);
        const int64_t e_bytes = (int64_t)frag_meta_bytes(form, (int)rows, k_pad);
        a = a > a_bytes ? a : a_bytes;
        e = e > e_bytes ? e : e_bytes;
    }
    return each(user, (void **)&in->a, a, 0, false) &&
           each(user, (void **)&in->e, e, FRAG_EMPTY_META & 0xff, false) &&
           each(user, (void **)&in->scale, 4 * rows, 0, false) &&
           each(user, (void **)&in->shifted, 4 * rows, 0, false);
}

static bool each_expert_buffer(const struct shape *s, struct cuda_batch *c, int64_t rows,
                               buffer_fn each, void *user) {
    const int64_t slots = rows * s->n_expert_used;
    const int64_t places = slots ? places_of(s, rows) : 0;
    const int64_t outputs = places > rows || !slots ? places : rows; /* the shared expert's too */
    for (int i = 0; i < 2 && slots; i++)
        if (!each_input(&c->at_experts[i], places, amber_max(s->n_embd, s->n_ff_expert), each,
                        user))
            return false;
    return each(user, (void **)&c->chosen, 4 * slots, 0, false) &&
           each(user, (void **)&c->place, 4 * slots, 0, false) &&
           each(user, (void **)&c->share, 4 * slots, 0, false) &&
           each(user, (void **)&c->row_of, 4 * places, 0, false) &&
           each(user, (void **)&c->expert_of, 4 * places, 0, false) &&
           each(user, (void **)&c->begin, 4 * (int64_t)s->n_expert, 0, false) &&
           each(user, (void **)&c->count, 4 * (int64_t)s->n_expert, 0, false) &&
           each(user, (void **)&c->expert_out, 4 * outputs * s->n_embd, 0, false);
}

static bool each_buffer(const struct model *m, struct batch *b, struct cuda_batch *c,
                        buffer_fn each, void *user) {
    const struct shape *s = &m->shape;
    const int64_t f32 = sizeof(float), rows = b->n_batch;
    const int64_t q = (int64_t)s->n_head * s->head_dim, kv = (int64_t)s->n_head_kv * s->head_dim;
    const int ff = amber_max(s->n_ff, s->n_ff_shared);
    const int wide = amber_max(amber_max(s->n_embd, ff), (int)q);
    int64_t positions = 0, hidden = rows * ff;
    for (int i = 0; i < plan_inputs(&m->plan); i++)
        if (!each_input(&c->in[i], rows, wide, each, user)) return false;
    if (!each_expert_buffer(s, c, rows, each, user)) return false;
    if (s->n_expert && places_of(s, rows) * s->n_ff_expert > hidden)
        hidden = places_of(s, rows) * s->n_ff_expert;
    b->kv_position_bytes = kv * 2;
    for (int il = 0; il < s->n_layer; il++) positions += 2 * layer_positions(b, s, il);
    return each(user, (void **)&b->kv, positions * b->kv_position_bytes, 0, true) &&
           each(user, (void **)&c->step, step_bytes(s, rows), 0, false) &&
           each(user, (void **)&c->logits, f32 * HEAD_ROWS * s->n_vocab, 0, false) &&
           each(user, (void **)&c->q, f32 * rows * q, 0, false) &&
           each(user, (void **)&b->attn, f32 * rows * q, 0, false) &&
           each(user, (void **)&b->k, f32 * rows * kv, 0, false) &&
           each(user, (void **)&b->v, f32 * rows * kv, 0, false) &&
           each(user, (void **)&b->gate, s->arch->no_gate ? 0 : f32 * hidden, 0, false) &&
           each(user, (void **)&b->up, f32 * hidden, 0, false) &&
           each(user, (void **)&b->y, f32 * rows * s->n_embd, 0, false);
}

struct count {
    int64_t kv, scratch;
};

static bool count_buffer(void *user, void **at, int64_t bytes, int fill, bool is_kv) {
    (void)at, (void)fill;
    struct count *count = user;
    *(is_kv ? &count->kv : &count->scratch) += bytes;
    return true;
}

static bool make_buffer(void *user, void **at, int64_t bytes, int fill, bool is_kv) {
    (void)is_kv;
    struct cuda_batch *c = user;
    if (bytes == 0) return true;
    *at = c->cuda->api->alloc(c->cuda->device, bytes, fill);
    if (*at) c->blocks[c->n_blocks++] = *at;
    return *at != NULL;
}

void cuda_batch_bytes(const struct model *model, struct batch *b, int64_t *kv, int64_t *scratch) {
    struct cuda_batch c = {0};
    struct count count = {0, 0};
    each_buffer(model, b, &c, count_buffer, &count);
    *kv = count.kv;
    *scratch = count.scratch;
}

amber_status cuda_batch_new(struct cuda *cuda, struct batch *b, amber_error *err) {
    const struct amber_cuda_api *api = cuda->api;
    const struct shape *s = &b->model->shape;
    struct cuda_batch *c = calloc(1, sizeof *c);
    void **blocks = calloc(MAX_BLOCKS, sizeof *blocks);
    if (!c || !blocks) {
        free(c);
        free(blocks);
        return amber_fail(err, AMBER_ERR_MEMORY, "session: no memory");
    }
    c->cuda = cuda;
    c->blocks = blocks;
    b->cuda = c;
    c->step_host = api->host_alloc(cuda->device, step_bytes(s, b->n_batch));
    c->logits_host = api->host_alloc(cuda->device, 4 * (int64_t)HEAD_ROWS * s->n_vocab);
    int64_t kv, scratch;
    char why[160];
    struct amber_cuda_info now = {.free_bytes = 0};
    cuda_batch_bytes(b->model, b, &kv, &scratch);
    /* What other sessions hold is no longer free; an estimate that does not fit is not begun. */
    const bool known = api->describe(cuda->index, &now, why, sizeof why);
    if ((known && kv + scratch > now.free_bytes) || !c->step_host || !c->logits_host ||
        !each_buffer(b->model, b, c, make_buffer, c))
        return amber_fail(err, AMBER_ERR_MEMORY,
                          "session on cuda:%d: a context of %d tokens needs %.1f MB, %.1f MB are "
                          "free (use a smaller context)",
                          cuda->index, b->n_ctx, (double)(kv + scratch) / 1e6,
                          (double)now.free_bytes / 1e6);
    return AMBER_OK;
}

void cuda_batch_free(struct batch *b) {
    struct cuda_batch *c = b->cuda;
    if (!c) return;
    const struct amber_cuda_api *api = c->cuda->api;
    char why[160];
    api->finish(c->cuda->device, why, sizeof why);
    api->forget(c->cuda->device, c->graph);
    for (int i = 0; i < c->n_blocks; i++) api->free(c->cuda->device, c->blocks[i]);
    api->host_free(c->cuda->device, c->step_host);
    api->host_free(c->cuda->device, c->logits_host);
    free(c->blocks);
    free(c);
    b->cuda = NULL;
}

/* ---- begin and end ---- */

static amber_status end_step(struct batch *b) {
    struct cuda_batch *c = b->cuda;
    const struct amber_cuda_api *api = c->cuda->api;
    if (c->recording) {
        c->recording = false;
        c->graph = api->recorded(c->cuda->device);
        if (c->graph) api->replay(c->cuda->device, c->graph);
    }
    if (!api->finish(c->cuda->device, b->why, sizeof b->why)) {
        c->decoded = 0; /* what it had to make may be lacking */
        return AMBER_ERR_DEVICE;
    }
    if (c->pending) memcpy(c->pending, c->logits_host, 4 * (size_t)b->model->shape.n_vocab);
    c->pending = NULL;
    return AMBER_OK;
}

static bool begin_step(struct batch *b, const int32_t *tokens, float *logits,
                       amber_status *status) {
    struct cuda_batch *c = b->cuda;
    const struct amber_cuda_api *api = c->cuda->api;
    const struct shape *s = &b->model->shape;
    const int64_t rows = b->rows, half = s->n_rot / 2;
    /* A step that may be cancelled, the last row of a prompt, is none: a recording has to end. */
    const bool decode = rows == 1 && !b->sparse && logits && !b->tick;
    *status = AMBER_OK;
    /* After a cancelled step the copy of its beginning may still be under way. */
    if (!api->finish(c->cuda->device, b->why, sizeof b->why)) {
        *status = AMBER_ERR_DEVICE;
        return false;
    }
    c->pending = NULL;
    uint8_t *host = c->step_host, *at = c->step;
    for (int r = 0; r < b->rows; r++) ((int32_t *)(void *)host)[r] = b->pos0 + r;
    c->pos = (int32_t *)(void *)at;
    host += 4 * rows, at += 4 * rows;
    for (int t = 0; t < 2 && b->rope_freq[t]; t++) {
        float *angles = (float *)(void *)host;
        rope_angles(b, t, angles, angles + rows * half);
        b->cos[t] = (float *)(void *)at;
        b->sin[t] = b->cos[t] + rows * half;
        host += 8 * rows * half, at += 8 * rows * half;
    }
    c->growth = NULL;
    for (int r = 0; r < b->rows && s->temperature; r++) {
        c->growth = (float *)(void *)at;
        ((float *)(void *)host)[r] = query_growth(s, b->pos0 + r);
    }
    host += 4 * rows, at += 4 * rows;
    b->x = (float *)(void *)at;
    b->q = c->q;
    for (int r = 0; r < b->rows; r++)
        model_embed(b->model, tokens[r], b->pos0 + r,
                    (float *)(void *)host + (int64_t)r * s->n_embd);
    host += 4 * rows * s->n_embd;

    if (decode && c->graph) {
        api->replay(c->cuda->device, c->graph);
        c->pending = logits;
        *status = end_step(b);
        return false;
    }
    if (decode && c->decoded++ > 0) {
        c->recording = true;
        api->record(c->cuda->device);
    }
    api->upload(c->cuda->device, c->step, c->step_host, host - c->step_host);
    return true;
}

static void keep_rows(struct batch *b, int first) {
    const struct shape *s = &b->model->shape;
    b->q += (int64_t)first * s->n_head * s->head_dim;
    b->x += (int64_t)first * s->n_embd;
    b->cuda->pos += first;
    if (b->cuda->growth) b->cuda->growth += first;
    b->pos0 += first;
    b->rows -= first;
}

/* ---- inputs ---- */

static const struct cuda_input *input_for(const struct batch *b, const struct linear *w) {
    const struct linear *of = pruned_for(b, w);
    int i = 0;
    while (!same_input(b->cuda->in[i].of, of)) i++;
    return &b->cuda->in[i];
}

/* The input of w, and of what reads the same. Rows that stand at experts are pruned one by one. */
static void make_input(struct batch *b, struct input_args g, const struct linear *w,
                       struct cuda_input *in) {
    const struct cuda *cuda = b->cuda->cuda;
    const struct linear *of = pruned_for(b, w);
    in->of = of;
    in->form = FORM_DENSE;
    in->k_pad = g.k_pad = (int)amber_round_up(w->n_in, FRAG_BLOCK);
    g.n = w->n_in;
    g.odd = b->pos0 % 2;
    g.pruned_from = amber_min(first_pruned(b), b->rows);
    g.pattern = (struct amber_pattern){.kind = AMBER_PATTERN_DENSE};
    if (of) {
        g.pattern = of->rule->pattern;
        if (g.row_of) g.pattern.tokens = 1;
        g.f = of->cuda->score;
        g.var = of->rule->var;
        if (of->rule->shift == SHIFT_MEAN) g.shift = INPUT_MEAN;
        if (of->rule->shift == SHIFT_MEDIAN) g.shift = INPUT_MEDIAN;
        if (g.pruned_from == 0 && b->rows >= MIN_PACKED) in->form = frag_form_of(&g.pattern);
    }
    g.form = in->form;
    g.a = in->a;
    g.e = in->e;
    g.scale = in->scale;
    g.shifted = g.shift ? in->shifted : NULL;
    cuda->api->input(cuda->device, &g);
}

/* One input per rule among the n layers, all from the same source. */
static void make_inputs(struct batch *b, struct input_args g, const struct linear *const w[],
                        int n) {
    struct cuda_batch *c = b->cuda;
    c->n_inputs = 0;
    g.rows = b->rows;
    for (int i = 0; i < n; i++) {
        if (w[i]->n_out == 0) continue;
        int j = 0;
        while (j < c->n_inputs && !same_input(c->in[j].of, pruned_for(b, w[i]))) j++;
        if (j == c->n_inputs) make_input(b, g, w[i], &c->in[c->n_inputs++]);
    }
}

static void norm_input(struct batch *b, const struct norm *norm, const struct linear *const w[],
                       int n) {
    struct input_args g = {.source = INPUT_COPY, .x = b->x, .eps = b->model->shape.norm_eps};
    if (norm->weight) {
        g.source = b->model->shape.arch->layer_norm ? INPUT_LAYERNORM : INPUT_RMSNORM;
        g.weight = norm->device_weight;
        g.bias = norm->device_bias;
    }
    make_inputs(b, g, w, n);
}

static void copy_input(struct batch *b, const float *src, const struct linear *const w[], int n) {
    make_inputs(b, (struct input_args){.source = INPUT_COPY, .x = src}, w, n);
}

static struct input_args activation(const struct batch *b) {
    static const int sources[] = {[ACT_SILU] = INPUT_SILU,
                                  [ACT_GELU] = INPUT_GELU,
                                  [ACT_GELU_ERF] = INPUT_GELU_ERF,
                                  [ACT_RELU2] = INPUT_RELU2,
                                  [ACT_CLAMPED] = INPUT_CLAMPED};
    const struct arch *arch = b->model->shape.arch;
    return (struct input_args){.source = sources[arch->act],
                               .x = arch->no_gate ? b->up : b->gate,
                               .up = arch->no_gate ? NULL : b->up};
}

static void activation_input(struct batch *b, const struct linear *w) {
    make_inputs(b, activation(b), &w, 1);
}

/* ---- products ---- */

/* Rows first .. first + rows - 1 of an input; first is a multiple of FRAG_ROWS. */
static struct gemm_args product(const struct cuda_input *in, const struct linear *w, int first,
                                int rows, float *y) {
    const bool shifted = in->of && rule_shift_is_dynamic(in->of->rule);
    return (struct gemm_args){.form = in->form,
                              .a = in->a + frag_a_bytes(in->form, first, in->k_pad),
                              .e = in->e + frag_meta_bytes(in->form, first, in->k_pad),
                              .b = w->cuda->b,
                              .a_scale = in->scale + first,
                              .shift = shifted ? in->shifted + first : NULL,
                              .w_scale = w->cuda->scale,
                              .w_sum = w->cuda->sum,
                              .bias = w->cuda->bias,
                              .y = y,
                              .ldy = w->n_out,
                              .rows = rows,
                              .n_out = w->n_out,
                              .k_pad = in->k_pad};
}

static void multiply(struct batch *b, const struct linear *w, int first, int rows, float *y,
                     bool add) {
    struct gemm_args g = product(input_for(b, w), w, first, rows, y);
    g.add = add;
    b->cuda->cuda->api->gemm(b->cuda->cuda->device, &g);
}

static void linear(struct batch *b, const struct linear *const w[], float *const y[], int n) {
    for (int i = 0; i < n; i++)
        if (w[i]->n_out) multiply(b, w[i], 0, b->rows, y[i], false);
}

static void norm_rows(struct batch *b, const struct norm *norm, const float *x, float *y, int width,
                      bool add) {
    if (!norm->weight) return;
    const struct cuda *cuda = b->cuda->cuda;
    cuda->api->norm(cuda->device,
                    &(struct norm_args){.x = x,
                                        .y = y,
                                        .weight = norm->device_weight,
                                        .bias = norm->device_bias,
                                        .ld = width,
                                        .rows = b->rows,
                                        .parts = width / norm->n,
                                        .n = norm->n,
                                        .step = norm->step,
                                        .eps = b->model->shape.norm_eps,
                                        .layer_norm = b->model->shape.arch->layer_norm,
                                        .add = add});
}

static void linear_residual(struct batch *b, const struct linear *w, const struct norm *post) {
    const bool add = !post->weight;
    multiply(b, w, 0, b->rows, add ? b->x : b->y, add);
    norm_rows(b, post, b->y, b->x, b->model->shape.n_embd, true);
}

static void head(struct batch *b, float *logits) {
    struct cuda_batch *c = b->cuda;
    const struct amber_cuda_api *api = c->cuda->api;
    const int64_t n_vocab = b->model->shape.n_vocab;
    const struct linear *w[] = {&b->model->output};
    const float cap = b->model->shape.final_softcap;
    norm_input(b, &b->model->output_norm, w, 1);
    for (int first = 0; first < b->rows; first += HEAD_ROWS) {
        const int rows = amber_min(b->rows - first, HEAD_ROWS);
        multiply(b, w[0], first, rows, c->logits, false);
        if (cap > 0)
            api->softcap(c->cuda->device,
                         &(struct softcap_args){.x = c->logits, .n = rows * n_vocab, .cap = cap});
        api->download(c->cuda->device, c->logits_host, c->logits, 4 * rows * n_vocab);
        if (b->rows == 1) { /* may be recorded: the end of the step waits */
            c->pending = logits;
            return;
        }
        if (!api->finish(c->cuda->device, b->why, sizeof b->why)) return;
        memcpy(logits + first * n_vocab, c->logits_host, 4 * (size_t)(rows * n_vocab));
    }
}

/* ---- attention ---- */

static void rope_and_store(struct batch *b, int il) {
    const struct shape *s = &b->model->shape;
    const struct layer *l = &b->model->layers[il];
    const struct cuda *cuda = b->cuda->cuda;
    const int table = s->windowed[il] && b->rope_freq[1];
    struct rope_args g = {.q = b->q,
                          .k = b->k,
                          .v = b->v,
                          .pos0 = b->cuda->pos,
                          .rows = b->rows,
                          .n_head = s->n_head,
                          .n_head_kv = s->n_head_kv,
                          .head_dim = s->head_dim,
                          .n_rot = s->n_rot,
                          .n_ctx = layer_positions(b, s, il),
                          .halves = s->arch->rope_halves};
    if (layer_has_rope(s, il)) {
        g.cos = b->cos[table];
        g.sin = b->sin[table];
    }
    if (s->arch->rope_first && g.cos) { /* rotated now, stored when it is normed */
        cuda->api->rope(cuda->device, &g);
        g.cos = g.sin = NULL;
    }
    norm_rows(b, &l->q_norm, b->q, b->q, s->n_head * s->head_dim, false);
    norm_rows(b, &l->k_norm, b->k, b->k, s->n_head_kv * s->head_dim, false);
    g.growth = b->cuda->growth;
    g.keys = (uint16_t *)(void *)kv_layer(b, il, false);
    g.values = (uint16_t *)(void *)kv_layer(b, il, true);
    cuda->api->rope(cuda->device, &g);
}

static void attention(struct batch *b, int il) {
    const struct shape *s = &b->model->shape;
    const struct cuda *cuda = b->cuda->cuda;
    cuda->api->attention(
        cuda->device,
        &(struct attention_args){.q = b->q,
                                 .out = b->attn,
                                 .k = (const uint16_t *)(const void *)kv_layer(b, il, false),
                                 .v = (const uint16_t *)(const void *)kv_layer(b, il, true),
                                 .sink = b->model->layers[il].device_sinks,
                                 .pos0 = b->cuda->pos,
                                 .rows = b->rows,
                                 .n_head = s->n_head,
                                 .n_head_kv = s->n_head_kv,
                                 .head_dim = s->head_dim,
                                 .n_ctx = layer_positions(b, s, il),
                                 .window = layer_window(s, il),
                                 .scale = s->attn_scale,
                                 .softcap = s->attn_softcap});
}

static bool read_cells(struct batch *b, void *host, const uint8_t *cells, size_t bytes) {
    const struct cuda *cuda = b->cuda->cuda;
    cuda->api->download(cuda->device, host, cells, (int64_t)bytes);
    return cuda->api->finish(cuda->device, b->why, sizeof b->why);
}

static bool write_cells(struct batch *b, uint8_t *cells, const void *host, size_t bytes) {
    const struct cuda *cuda = b->cuda->cuda;
    cuda->api->upload(cuda->device, cells, host, (int64_t)bytes);
    return cuda->api->finish(cuda->device, b->why, sizeof b->why);
}

/* ---- mixtures of experts ---- */

static void route(struct batch *b, int il) {
    const struct shape *s = &b->model->shape;
    const struct layer *l = &b->model->layers[il];
    struct cuda_batch *c = b->cuda;
    const struct amber_cuda_api *api = c->cuda->api;
    norm_rows(b, &l->ffn_norm, b->x, b->y, s->n_embd, false);
    api->route(c->cuda->device, &(struct route_args){.x = b->y,
                                                     .router = l->experts.device_router,
                                                     .bias = l->experts.device_router_bias,
                                                     .choice_bias = l->experts.device_choice_bias,
                                                     .chosen = c->chosen,
                                                     .share = c->share,
                                                     .rows = b->rows,
                                                     .n = s->n_embd,
                                                     .n_expert = s->n_expert,
                                                     .used = s->n_expert_used,
                                                     .scale = s->expert_scale,
                                                     .norm = s->expert_norm,
                                                     .sigmoid = s->expert_sigmoid});
    api->sort(c->cuda->device, &(struct sort_args){.chosen = c->chosen,
                                                   .place = c->place,
                                                   .row_of = c->row_of,
                                                   .expert_of = c->expert_of,
                                                   .begin = c->begin,
                                                   .count = c->count,
                                                   .rows = b->rows,
                                                   .used = s->n_expert_used,
                                                   .n_expert = s->n_expert,
                                                   .align = b->rows == 1 ? 1 : FRAG_ROWS,
                                                   .places = (int)places_of(s, b->rows)});
}

/* The experts' products with their rows; w [n_expert]. */
static void multiply_experts(struct batch *b, const struct linear *w, const struct cuda_input *in,
                             float *y) {
    const struct shape *s = &b->model->shape;
    const struct cuda_batch *c = b->cuda;
    struct gemm_args g = product(in, w, 0, b->rows, y);
    g.n_expert = s->n_expert;
    if (b->rows == 1) {
        g.rows = s->n_expert_used;
        g.expert_of = c->expert_of;
    } else {
        g.begin = c->begin;
        g.count = c->count;
        g.usual_rows = (b->rows * s->n_expert_used + s->n_expert - 1) / s->n_expert;
    }
    c->cuda->api->gemm(c->cuda->device, &g);
}

static void bring_to_experts(struct batch *b, const struct cuda_input *from,
                             struct cuda_input *to) {
    const struct cuda_batch *c = b->cuda;
    const bool shifted = from->of && rule_shift_is_dynamic(from->of->rule);
    to->of = from->of;
    to->form = from->form;
    to->k_pad = from->k_pad;
    c->cuda->api->gather(c->cuda->device, &(struct gather_args){
                                              .row_of = c->row_of,
                                              .a = from->a,
                                              .e = from->e,
                                              .scale = from->scale,
                                              .shifted = shifted ? from->shifted : NULL,
                                              .to_a = to->a,
                                              .to_e = to->e,
                                              .to_scale = to->scale,
                                              .to_shifted = to->shifted,
                                              .form = from->form,
                                              .k_pad = from->k_pad,
                                              .places = (int)places_of(&b->model->shape, b->rows)});
}

static void experts(struct batch *b, int il) {
    const struct shape *s = &b->model->shape;
    const struct experts *x = &b->model->layers[il].experts;
    struct cuda_batch *c = b->cuda;
    const struct linear *gate_up[] = {x->gate, x->up};
    copy_input(b, b->y, gate_up, 2);
    for (int i = 0; i < c->n_inputs; i++) bring_to_experts(b, &c->in[i], &c->at_experts[i]);
    for (int i = 0; i < 2; i++)
        multiply_experts(b, gate_up[i], &c->at_experts[input_for(b, gate_up[i]) - c->in],
                         i == 0 ? b->gate : b->up);
    struct input_args g = activation(b);
    g.rows = (int)places_of(s, b->rows);
    g.row_of = c->row_of;
    make_input(b, g, x->down, &c->at_experts[0]);
    multiply_experts(b, x->down, &c->at_experts[0], c->expert_out);
    c->cuda->api->combine(c->cuda->device, &(struct combine_args){.out = c->expert_out,
                                                                  .share = c->share,
                                                                  .place = c->place,
                                                                  .x = b->x,
                                                                  .rows = b->rows,
                                                                  .n = s->n_embd,
                                                                  .used = s->n_expert_used});
}

static void shared_expert(struct batch *b, int il) {
    const struct layer *w = &b->model->layers[il];
    const struct cuda_batch *c = b->cuda;
    const struct linear *gate_up[] = {&w->gate, &w->up};
    copy_input(b, b->y, gate_up, 2);
    linear(b, gate_up, (float *[]){b->gate, b->up}, 2);
    activation_input(b, &w->down);
    if (!w->experts.shared_router) {
        linear_residual(b, &w->down, &w->post_ffn_norm);
        return;
    }
    multiply(b, &w->down, 0, b->rows, c->expert_out, false);
    c->cuda->api->gated(c->cuda->device,
                        &(struct gated_args){.in = b->y,
                                             .out = c->expert_out,
                                             .router = w->experts.device_shared_router,
                                             .x = b->x,
                                             .rows = b->rows,
                                             .n = b->model->shape.n_embd});
}

const struct ops cuda_ops = {.begin = begin_step,
                             .end = end_step,
                             .norm = norm_input,
                             .prepare = copy_input,
                             .activate = activation_input,
                             .linear = linear,
                             .linear_residual = linear_residual,
                             .rope_and_store = rope_and_store,
                             .attention = attention,
                             .route = route,
                             .experts = experts,
                             .shared_expert = shared_expert,
                             .keep_rows = keep_rows,
                             .head = head,
                             .read_cells = read_cells,
                             .write_cells = write_cells};
