/* session.c: one timeline of tokens. Decides what of a prefix is already there, cuts the rest into
 * batches, and keeps the cache consistent whatever happens in between. */
#include "cuda.h"

#include <stdlib.h>
#include <string.h>

#define DEFAULT_CTX   4096
#define DEFAULT_BATCH 512
#define MAX_BATCH     8192

/* ---- memory ---- */

static int widest_input(const struct shape *s) {
    int wide = amber_max(amber_max(s->n_embd, s->n_ff), s->n_head * s->head_dim);
    return amber_max(amber_max(wide, s->n_ff_expert), s->n_ff_shared);
}

/* One place lists every buffer, so that the estimate and the allocation cannot disagree. Calls `each`
 * with the address of the pointer and the bytes; stops at the first false. */
typedef bool (*buffer_fn)(void *user, void **at, int64_t bytes, bool is_kv);

static bool each_input(struct activation *in, bool floats, bool rest, int64_t rows, int64_t wide,
                       buffer_fn each, void *user) {
    const int64_t f32 = sizeof(float), i32 = sizeof(int32_t);
    if (!each(user, (void **)&in->rest, rest * f32 * rows * wide, false)) return false;
    if (floats) return each(user, (void **)&in->f32, f32 * rows * wide, false);
    int64_t stride = amber_a8_stride((int)amber_round_up(wide, AMBER_K_ALIGN));
    return each(user, (void **)&in->a8.q, rows * stride, false) &&
           each(user, (void **)&in->a8.scale, f32 * rows, false) &&
           each(user, (void **)&in->shift, f32 * rows, false) &&
           each(user, (void **)&in->a8.sum, i32 * rows, false);
}

static bool each_buffer(const struct shape *s, bool floats, const struct plan *plan, int threads,
                        const struct amber_kernels *kernels, struct amber_session *session,
                        buffer_fn each, void *user) {
    struct batch *b = &session->batch;
    const int64_t f32 = sizeof(float), i32 = sizeof(int32_t), rows = b->n_batch,
                  wide = widest_input(s);
    const int64_t q = (int64_t)s->n_head * s->head_dim, kv = (int64_t)s->n_head_kv * s->head_dim;
    b->row_scratch_bytes = amber_round_up(5 * f32 * wide, 64) +
                           amber_round_up((int64_t)amber_prune_scratch((int)wide), 64);
    const int n_inputs = plan_inputs(plan), n_lists = floats ? 0 : plan_lists(plan, kernels);
    const int64_t rank = plan_rank(plan);
    for (int i = 0; i < n_inputs; i++)
        if (!each_input(&b->in[i], floats, rank > 0, rows, wide, each, user)) return false;
    /* A first row that stands alone takes a pair for itself. */
    const int64_t pairs = rows / 2 + 1;
    for (int i = 0; i < n_lists; i++) {
        int64_t stride = amber_nm_stride((int)amber_round_up(wide, AMBER_K_ALIGN));
        if (!each(user, (void **)&b->lists[i], pairs * stride, false)) return false;
    }
    b->kv_position_bytes =
        kv * amber_cell_bytes(b->cells) + (b->cells == AMBER_CELLS_I8) * f32 * s->n_head_kv;
    int64_t positions = 0;
    for (int il = 0; il < s->n_layer; il++) positions += 2 * layer_positions(b, s, il);
    const int64_t slots = rows * s->n_expert_used;
    const int64_t dense = rows * amber_max(s->n_ff, s->n_ff_shared),
                  sparse = slots * s->n_ff_expert;
    const int64_t hidden = dense > sparse ? dense : sparse;
    const bool with_y =
        s->n_expert || s->arch->norms == NORM_POST || s->arch->norms == NORM_PRE_POST;
    const int64_t expert_wide = amber_max(s->n_embd, s->n_ff_expert);
    const int64_t list_stride = amber_nm_stride((int)amber_round_up(expert_wide, AMBER_K_ALIGN));
    for (int i = 0; i < 2 && i < n_lists && slots; i++)
        if (!each(user, (void **)&b->expert_lists[i], (slots / 2 + s->n_expert) * list_stride,
                  false))
            return false;
    for (int i = 0; i < 2 && slots; i++)
        if (!each_input(&b->gathered[i], floats, false, slots, expert_wide, each, user))
            return false;
    const int64_t angles = f32 * rows * (s->n_rot / 2);
    return each(user, (void **)&b->kv, positions * b->kv_position_bytes, true) &&
           each(user, (void **)&session->tokens, (int64_t)sizeof(int32_t) * b->n_ctx, false) &&
           each(user, (void **)&session->logits, f32 * s->n_vocab, false) &&
           each(user, (void **)&b->x_base, f32 * rows * s->n_embd, false) &&
           each(user, (void **)&b->q, f32 * rows * q, false) &&
           each(user, (void **)&b->attn, f32 * rows * q, false) &&
           each(user, (void **)&b->k, f32 * rows * kv, false) &&
           each(user, (void **)&b->v, f32 * rows * kv, false) &&
           each(user, (void **)&b->gate, s->arch->no_gate ? 0 : f32 * hidden, false) &&
           each(user, (void **)&b->up, f32 * hidden, false) &&
           each(user, (void **)&b->y, with_y * f32 * rows * s->n_embd, false) &&
           each(user, (void **)&b->router, f32 * rows * s->n_expert, false) &&
           each(user, (void **)&b->chosen, i32 * slots, false) &&
           each(user, (void **)&b->share, f32 * slots, false) &&
           each(user, (void **)&b->slot, i32 * slots, false) &&
           each(user, (void **)&b->expert_at, slots ? i32 * (s->n_expert + 1) : 0, false) &&
           each(user, (void **)&b->expert_out, f32 * slots * s->n_embd, false) &&
           each(user, (void **)&b->cos[0], angles, false) &&
           each(user, (void **)&b->sin[0], angles, false) &&
           each(user, (void **)&b->cos[1], s->rope_local ? angles : 0, false) &&
           each(user, (void **)&b->sin[1], s->rope_local ? angles : 0, false) &&
           each(user, (void **)&b->row_scratch, b->row_scratch_bytes * threads, false) &&
           each(user, (void **)&b->attn_scratch, (int64_t)kernels->attention_scratch * threads,
                false) &&
           each(user, (void **)&b->low_rank, f32 * rows * rank, false) &&
           each(user, (void **)&b->column_norm, plan->clact ? f32 * wide : 0, false) &&
           each(user, (void **)&b->tap_rows, b->tap || plan->clact ? f32 * rows * wide : 0, false);
}

static bool count_buffer(void *user, void **at, int64_t bytes, bool is_kv) {
    (void)at;
    struct amber_session *session = user;
    *(is_kv ? &session->kv_bytes : &session->scratch_bytes) += bytes;
    return true;
}

#define MAX_BUFFERS (28 + 6 * (MAX_INPUTS + 2))

static bool make_buffer(void *user, void **at, int64_t bytes, bool is_kv) {
    struct amber_session *session = user;
    if (bytes == 0) return true;
    *at = amber_alloc((size_t)bytes);
    if (!*at) return false;
    session->blocks[session->n_blocks++] = *at;
    return count_buffer(user, at, bytes, is_kv);
}

/* Takes the options of a session up. floats: in float mode. */
static amber_status set_sizes(const struct shape *s, const amber_session_options *o, bool floats,
                              struct batch *b, amber_error *err) {
    const int n_ctx = o->n_ctx, n_batch = o->n_batch;
    if (o->kv_type != AMBER_KV_F16 && o->kv_type != AMBER_KV_INT8)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "kv_type: expected f16 (0) or int8 (1), found %d", o->kv_type);
    if (floats && o->kv_type == AMBER_KV_INT8)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "kv_type: float32 keys and values belong to precision float, found int8 "
                          "(leave kv_type out, or use precision int8)");
    b->cells = floats                        ? AMBER_CELLS_F32
               : o->kv_type == AMBER_KV_INT8 ? AMBER_CELLS_I8
                                             : AMBER_CELLS_F16;
    if (n_ctx < 0 || n_ctx > (1 << 28))
        return amber_fail(err, AMBER_ERR_ARGUMENT, "n_ctx: expected 1..268435456 or 0, found %d",
                          n_ctx);
    if (n_batch < 0 || n_batch > MAX_BATCH)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "n_batch: expected 2..%d or 0, found %d",
                          MAX_BATCH, n_batch);
    if (s->arch->positions && n_ctx > s->n_ctx_train)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "n_ctx: expected at most %d, the positions that this model has learned, "
                          "found %d",
                          s->n_ctx_train, n_ctx);
    b->n_ctx = n_ctx ? n_ctx : amber_min(DEFAULT_CTX, s->n_ctx_train);
    b->n_batch = (int)amber_round_up(n_batch ? n_batch : DEFAULT_BATCH, 2);
    b->n_batch = amber_min(b->n_batch, (int)amber_round_up(b->n_ctx, 2));
    /* A ring that attention can read (kernels.h); a context that is no longer needs no ring. */
    b->window_ctx = amber_min(b->n_ctx, (int)amber_round_up(s->window + b->n_batch + 62, 64));
    b->rope_freq[0] = s->rope_long && b->n_ctx > s->n_ctx_orig ? s->rope_long : s->rope_freq;
    b->rope_freq[1] = s->rope_local;
    return AMBER_OK;
}

/* What a session would take: for amber_memory_estimate. */
amber_status session_estimate(const struct shape *s, bool floats, const struct plan *plan,
                              int threads, const struct amber_kernels *kernels,
                              const amber_session_options *options, int64_t *kv_bytes,
                              int64_t *scratch_bytes, amber_error *err) {
    struct amber_session session = {0};
    amber_status status = set_sizes(s, options, floats, &session.batch, err);
    if (status != AMBER_OK) return status;
    each_buffer(s, floats, plan, threads, kernels, &session, count_buffer, &session);
    *kv_bytes = session.kv_bytes;
    *scratch_bytes = session.scratch_bytes;
    return AMBER_OK;
}

/* ---- life ---- */

static int on_tick(void *user, int il) {
    struct amber_session *session = user;
    if (!session->progress) return 0;
    int64_t in_batch = 1000LL * session->batch.rows * il / session->batch.model->shape.n_layer;
    return session->progress(session->progress_user, AMBER_PHASE_PREFILL,
                             session->progress_done + in_batch, session->progress_total);
}

/* Buffers on the engine's GPU; the tokens and the last logits are the host's. */
static amber_status new_on_gpu(struct amber_session *session, amber_error *err) {
    struct batch *b = &session->batch;
    if (b->tap)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "session: a tap sees the inputs of layers on the CPU only (use device "
                          "cpu)");
    if (b->cells == AMBER_CELLS_I8)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "kv_type: expected f16 on a GPU, found int8 (use device cpu)");
    if (!make_buffer(session, (void **)&session->tokens, 4 * (int64_t)b->n_ctx, false) ||
        !make_buffer(session, (void **)&session->logits, 4 * (int64_t)b->model->shape.n_vocab,
                     false))
        return amber_fail(err, AMBER_ERR_MEMORY, "session: no memory");
    amber_status status = cuda_batch_new(session->engine->cuda, b, err);
    if (status == AMBER_OK)
        cuda_batch_bytes(b->model, b, &session->kv_bytes, &session->scratch_bytes);
    return status;
}

void amber_session_options_defaults(amber_session_options *options) {
    *options = (amber_session_options){.size = sizeof *options};
}

amber_status amber_session_new(amber_engine *engine, const amber_session_options *options,
                               amber_session **out, amber_error *err) {
    *out = NULL;
    amber_session_options o;
    amber_session_options_defaults(&o);
    if (options) memcpy(&o, options, amber_min((int)options->size, (int)sizeof o));

    const struct model *model = &engine->model;
    struct amber_session *session = calloc(1, sizeof *session);
    void **blocks = calloc(MAX_BUFFERS, sizeof *blocks);
    if (!session || !blocks) {
        free(session);
        free(blocks);
        return amber_fail(err, AMBER_ERR_MEMORY, "session: no memory");
    }
    session->blocks = blocks;
    session->engine = engine;
    session->progress = o.progress;
    session->progress_user = o.progress_user;
    struct batch *b = &session->batch;
    b->model = model;
    b->op = engine->cuda ? &cuda_ops : &cpu_ops;
    b->kernels = &engine->kernels;
    b->pool = engine->pool;
    b->tick_user = session;
    b->tap = o.tap;
    b->tap_user = o.tap_user;

    amber_status status = set_sizes(&model->shape, &o, model->float_weights, b, err);
    if (status != AMBER_OK) {
        amber_session_free(session);
        return status;
    }
    if (engine->cuda) {
        pthread_mutex_lock(&engine->lock);
        status = new_on_gpu(session, err);
        pthread_mutex_unlock(&engine->lock);
        if (status == AMBER_OK)
            *out = session;
        else
            amber_session_free(session);
        return status;
    }
    if (!each_buffer(&model->shape, model->float_weights, &model->plan, amber_pool_threads(b->pool),
                     b->kernels, session, make_buffer, session)) {
        int n_ctx = b->n_ctx;
        double held = (double)(session->kv_bytes + session->scratch_bytes) / 1e6;
        int64_t kv = 0, scratch = 0;
        session_estimate(&model->shape, model->float_weights, &model->plan,
                         amber_pool_threads(b->pool), b->kernels, &o, &kv, &scratch, NULL);
        amber_session_free(session);
        return amber_fail(
            err, AMBER_ERR_MEMORY,
            "session: a context of %d tokens needs %.1f MB, got %.1f MB (use a smaller "
            "context)",
            n_ctx, (double)(kv + scratch) / 1e6, held);
    }
    *out = session;
    return AMBER_OK;
}

void amber_session_free(amber_session *session) {
    if (!session) return;
    pthread_mutex_lock(&session->engine->lock);
    cuda_batch_free(&session->batch);
    pthread_mutex_unlock(&session->engine->lock);
    for (int i = 0; i < session->n_blocks; i++) amber_free(session->blocks[i]);
    amber_free(session->step_logits);
    free(session->blocks);
    free(session);
}

/* ---- computing ---- */

/* Where the batch that starts at pos ends: batches of even size as equal as can be, that end at even
 * positions, so that a pair of positions (2i, 2i + 1) is never cut. */
static int batch_end(const struct batch *b, int pos, int n) {
    int count = n - pos;
    int batches = (count + b->n_batch - 1) / b->n_batch;
    int size = (int)amber_round_up((count + batches - 1) / batches, 2);
    int end = pos + amber_min(size, b->n_batch);
    if (end >= n) return n;
    return end - end % 2 > pos ? end - end % 2 : end;
}

/* Before the tokens from n_past to n are computed: sparse by the size of their batches, so that one
 * prompt does not change its kind on the way. */
static void begin_prefill(struct amber_session *session, int n) {
    struct batch *b = &session->batch;
    b->prefill = true;
    b->sparse = b->model->plan.any &&
                batch_end(b, session->n_past, n) - session->n_past >= b->model->sparse_min;
}

/* Where computing can go on that wants to go on at position pos: there, unless a ring has lost
 * positions that its window shows; then from the start. */
static int resume_at(const struct amber_session *session, int pos) {
    const struct batch *b = &session->batch;
    const int window = b->model->shape.window;
    if (!window) return pos;
    const int oldest = session->n_written - b->window_ctx, wanted = pos - window + 1;
    return oldest <= 0 || oldest <= amber_max(wanted, 0) ? pos : 0;
}

/* Computes tokens[session->n_past..n) and appends them. Logits of positions first_out..n-1 go to out
 * [(n - first_out), n_vocab]. After a cancellation the session holds the batches that were finished. */
static amber_status extend(struct amber_session *session, const int32_t *tokens, int n,
                           int first_out, float *out, amber_error *err) {
    struct batch *b = &session->batch;
    session->n_past = resume_at(session, session->n_past);
    if (session->n_past == 0) session->n_written = 0;
    const int n_vocab = b->model->shape.n_vocab;
    session->has_logits = false;
    session->progress_total = 1000LL * (n - session->n_past);
    session->progress_done = 0;
    /* A single row is over before anyone could cancel it. */
    b->tick = n - session->n_past > 1 ? on_tick : NULL;

    while (session->n_past < n) {
        int pos = session->n_past, end = batch_end(b, pos, n), rows = end - pos;
        int first = amber_min(amber_max(first_out - pos, 0), rows);
        float *logits = first < rows ? out + (int64_t)(pos + first - first_out) * n_vocab : NULL;
        session->n_written = amber_max(session->n_written, end);
        pthread_mutex_lock(&session->engine->lock);
        amber_status status = forward(b, tokens + pos, rows, pos, first, logits);
        pthread_mutex_unlock(&session->engine->lock);
        if (status == AMBER_ERR_DEVICE)
            return amber_fail(err, status, "cuda:%d: %s", session->engine->cuda->index, b->why);
        if (status != AMBER_OK)
            return amber_fail(err, status, "prefill: cancelled after %d of %d tokens", pos, n);
        memmove(session->tokens + pos, tokens + pos, sizeof *tokens * (size_t)rows);
        session->n_past = end;
        session->progress_done += 1000LL * rows;
    }
    if (b->tick && session->progress)
        session->progress(session->progress_user, AMBER_PHASE_PREFILL, session->progress_total,
                          session->progress_total);
    return AMBER_OK;
}

static amber_status check_tokens(const struct amber_session *session, const int32_t *tokens, int n,
                                 amber_error *err) {
    int n_vocab = session->batch.model->shape.n_vocab;
    if (n < 1)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "prompt: expected at least 1 token, found 0");
    if (n > session->batch.n_ctx)
        return amber_fail(
            err, AMBER_ERR_CONTEXT,
            "prompt has %d tokens, context is %d (use a larger context or shorten the "
            "prompt)",
            n, session->batch.n_ctx);
    for (int i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= n_vocab)
            return amber_fail(err, AMBER_ERR_ARGUMENT,
                              "token %d of the prompt: expected 0..%d, found %d", i, n_vocab - 1,
                              tokens[i]);
    }
    return AMBER_OK;
}

amber_status amber_session_sync(amber_session *session, const int32_t *tokens, int32_t n,
                                amber_error *err) {
    amber_status status = check_tokens(session, tokens, n, err);
    if (status != AMBER_OK) return status;

    int common = 0;
    while (common < n && common < session->n_past && tokens[common] == session->tokens[common])
        common++;
    session->stats.cached_tokens = common;
    if (common == n && session->n_past == n && session->has_logits) return AMBER_OK;
    /* Logits come out of a computed row only, so a fully cached prompt computes its last one again. */
    common = resume_at(session, amber_min(common, n - 1));
    session->stats.cached_tokens = common;
    session->n_past = common;
    begin_prefill(session, n);

    double start = amber_seconds();
    status = extend(session, tokens, n, n - 1, session->logits, err);
    double seconds = amber_seconds() - start;
    session->stats.prefill_sparse = session->batch.sparse;
    if (n - common > 1) {
        session->stats.prefill_tokens = session->n_past - common;
        session->stats.prefill_seconds = seconds;
    } else {
        session->stats.decode_tokens++;
        session->stats.decode_seconds += seconds;
    }
    session->has_logits = status == AMBER_OK;
    return status;
}

amber_status amber_session_append(amber_session *session, int32_t token, amber_error *err) {
    int n = session->n_past;
    if (n >= session->batch.n_ctx)
        return amber_fail(err, AMBER_ERR_CONTEXT,
                          "context is full: %d tokens, context is %d (use a larger context)", n + 1,
                          session->batch.n_ctx);
    if (token < 0 || token >= session->batch.model->shape.n_vocab)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "token: expected 0..%d, found %d",
                          session->batch.model->shape.n_vocab - 1, token);
    double start = amber_seconds();
    session->batch.prefill = session->batch.sparse = false;
    session->tokens[n] = token;
    amber_status status = extend(session, session->tokens, n + 1, n, session->logits, err);
    session->has_logits = status == AMBER_OK;
    session->stats.decode_tokens++;
    session->stats.decode_seconds += amber_seconds() - start;
    return status;
}

/* ---- several sessions at once ---- */

static amber_status check_step(amber_session *const *sessions, const int32_t *tokens, int n,
                               amber_error *err) {
    if (n < 1 || n > AMBER_SESSIONS_MAX)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "sessions: expected 1 to %d, found %d",
                          AMBER_SESSIONS_MAX, n);
    for (int i = 0; i < n; i++) {
        const struct amber_session *session = sessions[i];
        const int n_ctx = session->batch.n_ctx, n_vocab = session->batch.model->shape.n_vocab;
        if (session->engine != sessions[0]->engine)
            return amber_fail(err, AMBER_ERR_ARGUMENT,
                              "sessions: expected those of one engine, found another's at %d", i);
        for (int j = 0; j < i; j++)
            if (session == sessions[j])
                return amber_fail(err, AMBER_ERR_ARGUMENT,
                                  "sessions: expected different ones, found the same at %d and %d",
                                  j, i);
        if (session->n_past >= n_ctx)
            return amber_fail(err, AMBER_ERR_CONTEXT,
                              "context of session %d is full: %d tokens, context is %d (use a "
                              "larger context)",
                              i, session->n_past + 1, n_ctx);
        if (tokens[i] < 0 || tokens[i] >= n_vocab)
            return amber_fail(err, AMBER_ERR_ARGUMENT,
                              "token of session %d: expected 0..%d, found %d", i, n_vocab - 1,
                              tokens[i]);
    }
    if (n > 1 && sessions[0]->engine->cuda)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "sessions: several at once run on the CPU only (append to one after the "
                          "other, or use device cpu)");
    return AMBER_OK;
}

/* The one whose buffers hold the most rows. */
static struct amber_session *roomiest(amber_session *const *sessions, int n) {
    struct amber_session *best = sessions[0];
    for (int i = 1; i < n; i++)
        if (sessions[i]->batch.n_batch > best->batch.n_batch) best = sessions[i];
    return best;
}

static bool make_step_logits(struct amber_session *session, int rows) {
    if (rows <= session->step_rows) return true;
    const int64_t row = (int64_t)sizeof(float) * session->batch.model->shape.n_vocab;
    float *logits = amber_alloc((size_t)(row * rows));
    if (!logits) return false;
    amber_free(session->step_logits);
    session->scratch_bytes += row * (rows - session->step_rows);
    session->step_logits = logits;
    session->step_rows = rows;
    return true;
}

/* A session whose ring has lost what the next token sees is computed again. */
static amber_status recover(struct amber_session *session, amber_error *err) {
    const int n = session->n_past;
    if (resume_at(session, n) == n) return AMBER_OK;
    session->batch.prefill = session->batch.sparse = false;
    return extend(session, session->tokens, n, n, NULL, err);
}

amber_status amber_sessions_append(amber_session *const *sessions, const int32_t *tokens, int32_t n,
                                   amber_error *err) {
    amber_status status = check_step(sessions, tokens, n, err);
    if (status != AMBER_OK) return status;
    if (n == 1) return amber_session_append(sessions[0], tokens[0], err);
    struct amber_session *host = roomiest(sessions, n);
    struct batch *b = &host->batch;
    if (n > b->n_batch)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "sessions: expected at most n_batch, %d, found %d (use a larger n_batch)",
                          b->n_batch, n);
    if (!make_step_logits(host, n))
        return amber_fail(err, AMBER_ERR_MEMORY, "sessions: no memory for the logits of %d", n);

    double start = amber_seconds();
    struct place places[AMBER_SESSIONS_MAX];
    for (int i = 0; i < n; i++) {
        struct amber_session *session = sessions[i];
        if ((status = recover(session, err)) != AMBER_OK) return status;
        places[i] = (struct place){&session->batch, session->n_past};
    }
    pthread_mutex_lock(&host->engine->lock);
    b->prefill = b->sparse = false;
    b->tick = NULL;
    b->places = places;
    status = forward(b, tokens, n, 0, 0, host->step_logits);
    b->places = NULL;
    pthread_mutex_unlock(&host->engine->lock);
    if (status != AMBER_OK) return status;
    const int n_vocab = b->model->shape.n_vocab;
    const double seconds = amber_seconds() - start;
    for (int i = 0; i < n; i++) {
        struct amber_session *session = sessions[i];
        memcpy(session->logits, host->step_logits + (int64_t)i * n_vocab,
               sizeof(float) * (size_t)n_vocab);
        session->tokens[session->n_past++] = tokens[i];
        session->n_written = amber_max(session->n_written, session->n_past);
        session->has_logits = true;
        session->stats.decode_tokens++;
        session->stats.decode_seconds += seconds;
    }
    return AMBER_OK;
}

amber_status amber_session_score(amber_session *session, const int32_t *tokens, int32_t n,
                                 int32_t first, float *out, amber_error *err) {
    amber_status status = check_tokens(session, tokens, n, err);
    if (status != AMBER_OK) return status;
    if (first < 0 || first >= n)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "first: expected 0..%d, found %d", n - 1, first);
    session->n_past = 0;
    begin_prefill(session, n);
    double start = amber_seconds();
    status = extend(session, tokens, n, first, out, err);
    session->stats.cached_tokens = 0;
    session->stats.prefill_tokens = session->n_past;
    session->stats.prefill_sparse = session->batch.sparse;
    session->stats.prefill_seconds = amber_seconds() - start;
    return status;
}

amber_status amber_session_rewind(amber_session *session, int32_t n, amber_error *err) {
    if (n < 0 || n > session->n_past)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "rewind: expected 0..%d, found %d",
                          session->n_past, n);
    if (n < session->n_past) session->has_logits = false;
    session->n_past = n;
    return AMBER_OK;
}

static const struct linear *layer_matrix(const struct layer *l, int projection) {
    const struct linear *const w[N_PROJ] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    /* Beside experts, the layer's own matrices are the shared expert's: not what a rule is about. */
    const bool feed_forward = projection >= PROJ_GATE;
    return feed_forward && l->experts.router ? NULL : w[projection];
}

amber_status amber_session_project(amber_session *session, int32_t layer, int32_t projection,
                                   int32_t rows, int32_t n_in, int32_t n_out, const float *x,
                                   int32_t pruned, float *y, amber_error *err) {
    struct batch *b = &session->batch;
    const struct model *model = b->model;
    if (b->cuda)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "project: single layers run on the CPU only (use device cpu)");
    if (layer < 0 || layer >= model->shape.n_layer || projection < 0 || projection >= N_PROJ)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "project: expected layer 0..%d and projection 0..%d, found %d and %d",
                          model->shape.n_layer - 1, N_PROJ - 1, layer, projection);
    const struct linear *w = layer_matrix(&model->layers[layer], projection);
    if (!w || !w->n_out)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "project: layer %d has no single matrix for %s",
                          layer, plan_projection_name(projection));
    if (n_in != w->n_in || n_out != w->n_out || rows < 0)
        return amber_fail(
            err, AMBER_ERR_ARGUMENT,
            "project: %s of layer %d: expected %d inputs and %d outputs, found %d and "
            "%d for %d rows",
            plan_projection_name(projection), layer, w->n_in, w->n_out, n_in, n_out, rows);
    pthread_mutex_lock(&session->engine->lock);
    const amber_tap_fn tap = b->tap;
    b->tap = NULL;
    b->prefill = b->sparse = pruned != 0;
    b->layer = layer;
    for (int first = 0; first < rows; first += b->n_batch) {
        b->pos0 = first;
        b->rows = amber_min(b->n_batch, rows - first);
        b->op->prepare(b, x + (int64_t)first * n_in, &w, 1);
        b->op->linear(b, &w, (float *[]){y + (int64_t)first * n_out}, 1);
    }
    b->tap = tap;
    pthread_mutex_unlock(&session->engine->lock);
    return AMBER_OK;
}

/* ---- looking ---- */

const float *amber_session_logits(const amber_session *session) {
    return session->has_logits ? session->logits : NULL;
}

int32_t amber_session_length(const amber_session *session) {
    return session->n_past;
}

const int32_t *amber_session_tokens(const amber_session *session) {
    return session->tokens;
}

void amber_session_get_stats(const amber_session *session, amber_session_stats *stats) {
    amber_session_stats full = session->stats;
    full.n_ctx = session->batch.n_ctx;
    full.n_past = session->n_past;
    full.n_batch = session->batch.n_batch;
    full.kv_bytes = session->kv_bytes;
    full.scratch_bytes = session->scratch_bytes;
    full.size = stats->size;
    memcpy(stats, &full, stats->size < sizeof full ? stats->size : sizeof full);
}

void amber_session_reset_stats(amber_session *session) {
    session->stats = (amber_session_stats){0};
}
