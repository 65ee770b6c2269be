/* engine.c: opening a model: options, kernels, threads, weights, tokenizer; and what it tells. */
#include "cuda.h"
#include "dequant.h"
#include "tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_THREADS 1024

const char *amber_version(void) {
    return AMBER_VERSION;
}

const char *amber_isa_list(void) {
    return amber_kernels_list();
}

int32_t amber_device_list(char *buf, size_t cap) {
    const int cpu = snprintf(buf, cap, "cpu  %s\n", amber_kernels_list());
    const size_t at = (size_t)cpu < cap ? (size_t)cpu : cap;
    return cpu + cuda_list(buf ? buf + at : NULL, cap - at);
}

void amber_engine_options_defaults(amber_engine_options *options) {
    *options = (amber_engine_options){.size = sizeof *options};
}

/* Options as this version knows them: fields beyond the caller's size keep their defaults. The
 * environment fills in what the caller left open. */
static amber_status resolve_options(const amber_engine_options *options, amber_engine_options *o,
                                    amber_error *err) {
    amber_engine_options_defaults(o);
    if (options) memcpy(o, options, options->size < sizeof *o ? options->size : sizeof *o);

    const char *threads = getenv("AMBER_THREADS");
    if (!o->threads && threads && *threads) {
        char *end;
        long n = strtol(threads, &end, 10);
        if (*end || n < 1 || n > MAX_THREADS)
            return amber_fail(err, AMBER_ERR_ARGUMENT,
                              "AMBER_THREADS: expected 1..%d, found \"%.40s\"", MAX_THREADS,
                              threads);
        o->threads = (int32_t)n;
    }
    if (!o->threads) o->threads = amber_physical_cores();
    if (o->threads < 1 || o->threads > MAX_THREADS)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "threads: expected 1..%d, found %d", MAX_THREADS,
                          o->threads);
    if (o->precision != AMBER_PRECISION_INT8 && o->precision != AMBER_PRECISION_FLOAT)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "precision: expected 0 (int8) or 1 (float), found %d", o->precision);
    if (o->sparse_first_n < 0)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "sparse_first_n: expected >= 0, found %d",
                          o->sparse_first_n);
    if (!o->isa) o->isa = getenv("AMBER_ISA");
    if (o->isa && !*o->isa) o->isa = NULL;
    if (!o->device) o->device = getenv("AMBER_DEVICE");
    if (!o->device || !*o->device) o->device = "cpu";
    return AMBER_OK;
}

static amber_status select_kernels(const char *isa, struct amber_kernels *kernels,
                                   amber_error *err) {
    if (amber_kernels_select(kernels, isa)) return AMBER_OK;
    return amber_fail(err, AMBER_ERR_DEVICE, "isa: expected one of \"%s\", found \"%.40s\"",
                      amber_kernels_list(), isa ? isa : "");
}

static amber_status open_parts(amber_engine *engine, const char *path,
                               const amber_engine_options *o, amber_error *err) {
    amber_status status = select_kernels(o->isa, &engine->kernels, err);
    if (status == AMBER_OK) status = amber_pool_new(o->threads, &engine->pool, err);
    struct gguf_file *file = NULL;
    if (status == AMBER_OK) status = gguf_open(path, &file, err);
    /* Of all that may be new about a file, its architecture says most. */
    const struct arch *arch = NULL;
    if (status == AMBER_OK) status = arch_find(file, &arch, err);
    if (status == AMBER_OK) status = tok_new(file, &engine->tokenizer, err);
    if (status != AMBER_OK) {
        gguf_close(file);
        return status;
    }
    status = model_load(file, o, engine->pool, &engine->model, err);
    if (status != AMBER_OK) return status;

    int n_tokens = amber_tokenizer_size(engine->tokenizer), n_rows = engine->model.shape.n_vocab;
    if (n_tokens > n_rows)
        return amber_fail(err, AMBER_ERR_FORMAT,
                          "%s: the vocabulary has %d tokens, token_embd.weight only %d rows",
                          engine->model.file->label, n_tokens, n_rows);
    return AMBER_OK;
}

static void log_line(const struct amber_engine *engine, int level, const char *text) {
    if (engine->log) engine->log(engine->log_user, level, text);
}

static void device_name(const struct amber_engine *engine, char *buf, size_t cap) {
    const struct cuda *cuda = engine->cuda;
    if (cuda)
        snprintf(buf, cap, "cuda:%d %s", cuda->index, cuda->info.name);
    else
        snprintf(buf, cap, "cpu");
}

/* Opens the GPU that o names, before anything is loaded for it. "auto" goes on without one. */
static amber_status open_device(struct amber_engine *engine, const amber_engine_options *o,
                                amber_error *err) {
    if (!strcmp(o->device, "cpu")) return AMBER_OK;
    const bool automatic = !strcmp(o->device, "auto");
    amber_error why;
    amber_status status = cuda_open(automatic ? "cuda" : o->device, &engine->cuda, &why);
    if (status == AMBER_OK) return AMBER_OK;
    if (!automatic) return amber_fail(err, status, "%s", why.msg);
    log_line(engine, 3, why.msg);
    return AMBER_OK;
}

/* Brings the weights there. "auto" stays on the CPU where the GPU cannot have them. */
static amber_status fill_device(struct amber_engine *engine, const amber_engine_options *o,
                                amber_error *err) {
    if (!engine->cuda) return AMBER_OK;
    amber_error why;
    amber_status status = cuda_upload(engine->cuda, &engine->model, engine->pool, o->progress,
                                      o->progress_user, &why);
    if (status == AMBER_OK) return AMBER_OK;
    if (strcmp(o->device, "auto") != 0 || status == AMBER_ERR_CANCELLED)
        return amber_fail(err, status, "%s", why.msg);
    cuda_close(engine->cuda);
    engine->cuda = NULL;
    log_line(engine, 1, why.msg);
    return AMBER_OK;
}

amber_status amber_engine_open(const char *path, const amber_engine_options *options,
                               amber_engine **out, amber_error *err) {
    *out = NULL;
    double start = amber_seconds();
    amber_engine_options o;
    amber_status status = resolve_options(options, &o, err);
    if (status != AMBER_OK) return status;

    amber_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return amber_fail(err, AMBER_ERR_MEMORY, "%s: no memory", amber_basename(path));
    pthread_mutex_init(&engine->lock, NULL);
    engine->log = o.log;
    engine->log_user = o.log_user;
    status = open_device(engine, &o, err);
    if (status == AMBER_OK) status = open_parts(engine, path, &o, err);
    if (status == AMBER_OK) status = fill_device(engine, &o, err);
    if (status != AMBER_OK) {
        amber_engine_close(engine);
        return status;
    }
    engine->load_seconds = amber_seconds() - start;
    char text[320], device[160];
    device_name(engine, device, sizeof device);
    snprintf(text, sizeof text, "%s: %s, %d layers, %s, kernels %s, %d threads, %.1f MB of weights",
             engine->model.file->label, engine->model.shape.arch->name, engine->model.shape.n_layer,
             device, engine->kernels.isa, amber_pool_threads(engine->pool),
             (double)(engine->cuda ? engine->cuda->weight_bytes : engine->model.weight_bytes) /
                 1e6);
    log_line(engine, 2, text);
    *out = engine;
    return AMBER_OK;
}

void amber_engine_close(amber_engine *engine) {
    if (!engine) return;
    cuda_close(engine->cuda);
    if (engine->model.file) model_free(&engine->model);
    amber_tokenizer_close(engine->tokenizer);
    amber_pool_free(engine->pool);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

const amber_tokenizer *amber_engine_tokenizer(const amber_engine *engine) {
    return engine->tokenizer;
}

/* ---- information ---- */

struct type_bytes {
    uint32_t type;
    uint64_t bytes;
};

static int more_bytes(const void *a, const void *b) {
    uint64_t x = ((const struct type_bytes *)a)->bytes, y = ((const struct type_bytes *)b)->bytes;
    return (x < y) - (x > y);
}

static void list_types(const struct gguf_file *file, char *buf, size_t cap) {
    struct type_bytes types[64];
    int n = 0;
    for (uint64_t i = 0; i < file->n_tensors; i++) {
        int j = 0;
        while (j < n && types[j].type != file->tensors[i].type) j++;
        if (j == 64) continue;
        if (j == n) types[n++] = (struct type_bytes){file->tensors[i].type, 0};
        types[j].bytes += file->tensors[i].size;
    }
    qsort(types, (size_t)n, sizeof types[0], more_bytes);
    size_t at = 0;
    buf[0] = 0;
    for (int i = 0; i < n && at < cap; i++)
        at += (size_t)snprintf(buf + at, cap - at, "%s%s", i ? " " : "",
                               type_info(types[i].type)->name);
}

void amber_engine_get_info(const amber_engine *engine, amber_engine_info *info) {
    const struct model *m = &engine->model;
    const struct shape *s = &m->shape;
    amber_engine_info full = {
        .size = info->size,
        .precision = m->float_weights ? AMBER_PRECISION_FLOAT : AMBER_PRECISION_INT8,
        .threads = amber_pool_threads(engine->pool),
        .n_layer = s->n_layer,
        .n_embd = s->n_embd,
        .n_head = s->n_head,
        .n_head_kv = s->n_head_kv,
        .head_dim = s->head_dim,
        .n_ff = s->n_ff,
        .n_vocab = s->n_vocab,
        .n_ctx_train = s->n_ctx_train,
        .n_expert = s->n_expert,
        .n_expert_used = s->n_expert_used,
        .window = s->window,
        .n_params = m->n_params,
        .file_bytes = (int64_t)m->file->size,
        .weight_bytes = m->weight_bytes,
        .load_seconds = engine->load_seconds,
        .coverage = m->coverage,
        .skipped = model_skipped(m, &engine->kernels),
        .sparse_min = m->sparse_min,
    };
    model_work(m, &full.layer_multiplications, &full.token_bytes);
    plan_describe(&m->plan, full.sparse, sizeof full.sparse);
    snprintf(full.architecture, sizeof full.architecture, "%s", s->arch->name);
    device_name(engine, full.device, sizeof full.device);
    if (engine->cuda) full.device_bytes = engine->cuda->weight_bytes;
    snprintf(full.isa, sizeof full.isa, "%s", engine->kernels.isa);
    if (amber_engine_meta(engine, "general.name", full.name, sizeof full.name) < 0)
        snprintf(full.name, sizeof full.name, "%s", m->file->label);
    list_types(m->file, full.weight_types, sizeof full.weight_types);
    memcpy(info, &full, info->size < sizeof full ? info->size : sizeof full);
}

int64_t amber_engine_work(const amber_engine *engine, int32_t layer, int32_t projection,
                          int32_t matrix[2]) {
    const struct shape *s = &engine->model.shape;
    matrix[0] = matrix[1] = 0;
    if (layer < 0 || layer >= s->n_layer || projection < 0 || projection >= N_PROJ) return 0;
    return model_projection_work(s, layer, projection, matrix);
}

int32_t amber_engine_meta(const amber_engine *engine, const char *key, char *buf, size_t cap) {
    const struct gguf_kv *kv = gguf_find(engine->model.file, key);
    return kv ? gguf_format_value(kv, buf, cap) : -1;
}

int32_t amber_engine_pattern(const amber_engine *engine, int32_t index, char *buf, size_t cap,
                             double *share) {
    struct amber_pattern pattern;
    char text[AMBER_PATTERN_TEXT];
    if (index < 0 || !model_pattern(&engine->model, index, &pattern, share)) return -1;
    amber_pattern_format(&pattern, text);
    return snprintf(buf, cap, "%s", text);
}

void amber_engine_set_sparse_min(amber_engine *engine, int32_t tokens) {
    engine->model.sparse_min = tokens;
}

int32_t amber_engine_meta_key(const amber_engine *engine, int32_t index, char *buf, size_t cap) {
    const struct gguf_file *file = engine->model.file;
    if (index < 0 || (uint64_t)index >= file->n_kv) return -1;
    struct gguf_string key = file->kv[index].key;
    return snprintf(buf, cap, "%.*s", (int)key.len, key.data);
}

amber_status amber_memory_estimate(const char *path, const amber_engine_options *options,
                                   const amber_session_options *session, amber_memory *memory,
                                   amber_error *err) {
    amber_session_options so;
    amber_session_options_defaults(&so);
    if (session) memcpy(&so, session, amber_min((int)session->size, (int)sizeof so));
    amber_engine_options o;
    struct amber_kernels kernels;
    amber_status status = resolve_options(options, &o, err);
    if (status == AMBER_OK) status = select_kernels(o.isa, &kernels, err);
    struct gguf_file *file = NULL;
    if (status == AMBER_OK) status = gguf_open(path, &file, err);
    if (status != AMBER_OK) return status;

    bool floats = o.precision == AMBER_PRECISION_FLOAT;
    struct shape shape;
    struct plan plan = {0};
    amber_memory full = {.size = memory->size};
    status = model_estimate(file, floats, &shape, &full.weights_bytes, &full.mapped_bytes, err);
    if (status == AMBER_OK)
        status = model_read_plan(file, &shape, o.sparse, o.evaluation != 0, &plan, err);
    if (status == AMBER_OK)
        status = session_estimate(&shape, floats, &plan, o.threads, &kernels, &so, &full.kv_bytes,
                                  &full.scratch_bytes, err);
    if (status == AMBER_OK) full.coverage = model_coverage(&plan, &shape);
    plan_free(&plan);
    shape_free(&shape);
    gguf_close(file);
    if (status != AMBER_OK) return status;
    full.total_bytes = full.weights_bytes + full.mapped_bytes + full.kv_bytes + full.scratch_bytes;
    memcpy(memory, &full, memory->size < sizeof full ? memory->size : sizeof full);
    return AMBER_OK;
}
