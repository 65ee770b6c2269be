/* cuda.c: finding libamber_cuda and its GPUs, and bringing a model's weights there. */
#define _GNU_SOURCE /* dladdr */

#include "cuda.h"
#include "cuda/layout.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the library ---- */

static const struct amber_cuda_api *api;
static char missing[512]; /* why there is no api */
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* The add-on lies beside the file that this code is in, or where the loader looks. */
static void beside(char *path, size_t size) {
    Dl_info info;
    path[0] = 0;
    if (!dladdr((void *)&missing, &info) || !info.dli_fname) return;
    const char *slash = strrchr(info.dli_fname, '/');
    if (slash)
        snprintf(path, size, "%.*s/libamber_cuda.so", (int)(slash - info.dli_fname),
                 info.dli_fname);
}

/* NULL: `missing` tells why. A library that is there and cannot be loaded is told by the loader's
 * words. */
static void *open_library(void) {
    const char *given = getenv("AMBER_CUDA_LIBRARY");
    char path[512];
    beside(path, sizeof path);
    const char *found = given && *given ? given : NULL;
    if (!found && path[0] && access(path, F_OK) == 0) found = path;
    void *library = dlopen(found ? found : "libamber_cuda.so", RTLD_NOW | RTLD_LOCAL);
    if (library) return library;
    snprintf(missing, sizeof missing, "%s",
             found ? dlerror() : "this build has no libamber_cuda.so (build with AMBER_CUDA=ON)");
    return NULL;
}

static void load(void) {
    void *library = open_library();
    if (!library) return;
    const struct amber_cuda_api *found = dlsym(library, AMBER_CUDA_SYMBOL);
    if (found && found->version == AMBER_CUDA_VERSION) {
        api = found;
        return;
    }
    snprintf(missing, sizeof missing, "libamber_cuda.so: expected version %d, found %d",
             AMBER_CUDA_VERSION, found ? found->version : 0);
    dlclose(library);
}

/* Number of GPUs; 0 with the reason in why. */
static int count_gpus(char *why, size_t size) {
    pthread_once(&once, load);
    if (api) return api->count(why, size);
    snprintf(why, size, "%s", missing);
    return 0;
}

int cuda_list(char *buf, size_t cap) {
    char why[512] = "";
    const int n = count_gpus(why, sizeof why);
    if (n == 0) return snprintf(buf, cap, "cuda  none: %s\n", why);
    size_t at = 0;
    for (int i = 0; i < n; i++) {
        struct amber_cuda_info info = {.name = "GPU"};
        char *to = at < cap ? buf + at : NULL;
        const size_t left = at < cap ? cap - at : 0;
        if (api->describe(i, &info, why, sizeof why))
            at += (size_t)snprintf(to, left, "cuda:%d  %s, %.1f GB, %.1f GB free\n", i, info.name,
                                   (double)info.total_bytes / 1e9, (double)info.free_bytes / 1e9);
        else
            at += (size_t)snprintf(to, left, "cuda:%d  %s cannot be used: %s\n", i, info.name, why);
    }
    return (int)at;
}

amber_status cuda_open(const char *name, struct cuda **out, amber_error *err) {
    *out = NULL;
    char why[512] = "";
    long wanted = -1;
    if (strncmp(name, "cuda", 4) != 0 || (name[4] && name[4] != ':'))
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "device: expected cpu, auto, cuda or cuda:N, found \"%.40s\"", name);
    if (name[4]) {
        char *end;
        wanted = strtol(name + 5, &end, 10);
        if (end == name + 5 || *end || wanted < 0 || wanted > 1023)
            return amber_fail(err, AMBER_ERR_ARGUMENT,
                              "device: expected cuda:N with N from 0 on, found \"%.40s\"", name);
    }
    const int n = count_gpus(why, sizeof why);
    if (n == 0) return amber_fail(err, AMBER_ERR_DEVICE, "device %s: none here: %s", name, why);
    if (wanted >= n)
        return amber_fail(err, AMBER_ERR_DEVICE, "device %s: expected cuda:0..cuda:%d", name,
                          n - 1);
    struct cuda *cuda = calloc(1, sizeof *cuda);
    if (!cuda) return amber_fail(err, AMBER_ERR_MEMORY, "device %s: no memory", name);
    cuda->api = api;
    for (int i = wanted < 0 ? 0 : (int)wanted; i < (wanted < 0 ? n : (int)wanted + 1); i++) {
        if (!api->describe(i, &cuda->info, why, sizeof why)) continue;
        cuda->index = i;
        cuda->device = api->open(i, why, sizeof why);
        if (cuda->device) break;
    }
    if (!cuda->device) {
        amber_status status = amber_fail(err, AMBER_ERR_DEVICE, "device %s: %s cannot be used: %s",
                                         name, cuda->info.name, why);
        free(cuda);
        return status;
    }
    *out = cuda;
    return AMBER_OK;
}

void cuda_close(struct cuda *cuda) {
    if (!cuda) return;
    cuda->api->close(cuda->device);
    free(cuda);
}

/* ---- weights ---- */

struct upload {
    struct cuda *cuda;
    struct model *model;
    struct amber_pool *pool;
    uint8_t *fragments; /* of one matrix, on the way */
    int64_t largest;    /* bytes of it */
    int64_t done, total;
    enum { COUNT, COPY, FORGET } pass; /* COUNT: only total and largest; FORGET: host's matrices */
    amber_progress_fn progress;
    void *user;
    amber_error *err;
};

static amber_status no_room(const struct upload *u) {
    return amber_fail(u->err, AMBER_ERR_MEMORY,
                      "%s on cuda:%d: the weights need %.1f MB, %.1f MB are free (use a smaller "
                      "model, or the CPU)",
                      u->model->file->label, u->cuda->index, (double)u->total / 1e6,
                      (double)u->cuda->info.free_bytes / 1e6);
}

/* Memory for what will be copied there piece by piece. */
static amber_status make_room(struct upload *u, int64_t bytes, void *out) {
    if (u->pass == COUNT) u->total += bytes;
    if (u->pass != COPY) return AMBER_OK;
    void *p = u->cuda->api->alloc(u->cuda->device, bytes, 0);
    *(void **)out = p;
    return p ? AMBER_OK : no_room(u);
}

static void copy(struct upload *u, void *to, const void *from, int64_t bytes) {
    u->cuda->api->upload(u->cuda->device, to, from, bytes);
    u->done += bytes;
}

static amber_status put(struct upload *u, const float *from, int n, const float **out) {
    if (!from) return AMBER_OK;
    float *to = NULL;
    amber_status status = make_room(u, 4 * (int64_t)n, &to);
    if (!to) return status;
    copy(u, to, from, 4 * (int64_t)n);
    *out = to;
    return AMBER_OK;
}

static amber_status put_norm(struct upload *u, struct norm *norm, int parts) {
    const int n = norm->step ? norm->step * (parts - 1) + norm->n : norm->n;
    amber_status status = put(u, norm->weight, n, &norm->device_weight);
    return status == AMBER_OK ? put(u, norm->bias, n, &norm->device_bias) : status;
}

struct fragments_job {
    const struct amber_w8 *w;
    uint8_t *to;
};

/* The panels of kernels.h as fragments: without their offset of 128. */
static void fragments_work(void *ctx, int ith, int nth) {
    const struct fragments_job *job = ctx;
    const struct amber_w8 *w = job->w;
    int begin, end;
    amber_split((int)amber_round_up(w->n_out, FRAG_COLS), FRAG_COLS, ith, nth, &begin, &end);
    for (int o = begin; o < end; o++) {
        const uint8_t *panel = w->q + (size_t)(o / AMBER_PANEL) * AMBER_PANEL * (size_t)w->k_pad;
        for (int k = 0; k < w->k_pad; k += 4) {
            const uint8_t *from = panel + (size_t)k * AMBER_PANEL + (size_t)(o % AMBER_PANEL * 4);
            uint8_t *at = job->to + frag_b_offset(o, k, w->k_pad);
            for (int i = 0; i < 4; i++) at[i] = o < w->n_out ? (uint8_t)(from[i] - 128) : 0;
        }
    }
}

static void forget(struct linear *w, int n) {
    for (int i = 0; i < n; i++) {
        w[i].w8.q = w[i].pruned_w8.q = NULL;
        w[i].w8.scale = w[i].pruned_w8.scale = NULL;
    }
}

/* n matrices of one shape, one behind the other. */
static amber_status put_linears(struct upload *u, struct linear *w, int n) {
    const struct model *model = u->model;
    const int64_t bytes = (int64_t)frag_b_bytes(w->w8.n_out, w->w8.k_pad), n_out = w->n_out;
    if (n_out == 0) return AMBER_OK;
    if (u->pass == FORGET) {
        forget(w, n);
        return AMBER_OK;
    }
    if (bytes > u->largest) u->largest = bytes;
    struct cuda_linear unused = {0},
                       *d = u->pass == COUNT ? &unused : model_keep(u->model, sizeof *d);
    if (!d) return amber_fail(u->err, AMBER_ERR_MEMORY, "%s: no memory", model->file->label);
    *d = unused;
    amber_status status = make_room(u, n * bytes, &d->b);
    if (status == AMBER_OK) status = make_room(u, 4 * n * n_out, &d->scale);
    if (status == AMBER_OK && w->w8.bias) status = make_room(u, 4 * n * n_out, &d->bias);
    if (status == AMBER_OK && w->pruned_w8.sum) status = make_room(u, 4 * n * n_out, &d->sum);
    if (status == AMBER_OK) status = put(u, w->score, w->n_in, &d->score);
    if (status != AMBER_OK || u->pass == COUNT) return status;
    w->cuda = d;
    for (int i = 0; i < n; i++) {
        char why[160];
        amber_pool_run(u->pool, fragments_work, &(struct fragments_job){&w[i].w8, u->fragments});
        copy(u, d->b + i * bytes, u->fragments, bytes);
        copy(u, d->scale + i * n_out, w[i].w8.scale, 4 * n_out);
        if (d->bias) copy(u, d->bias + i * n_out, w[i].w8.bias, 4 * n_out);
        if (d->sum) copy(u, d->sum + i * n_out, w[i].pruned_w8.sum, 4 * n_out);
        if (!u->cuda->api->finish(u->cuda->device, why, sizeof why)) /* fragments are used again */
            return amber_fail(u->err, AMBER_ERR_DEVICE, "cuda:%d: %s", u->cuda->index, why);
        if (u->progress && u->progress(u->user, AMBER_PHASE_LOAD, u->done, u->total))
            return amber_fail(u->err, AMBER_ERR_CANCELLED, "%s: cancelled", model->file->label);
    }
    return AMBER_OK;
}

static amber_status put_experts(struct upload *u, struct experts *x) {
    const struct shape *s = &u->model->shape;
    struct linear *linears[] = {x->gate, x->up, x->down};
    amber_status status = put(u, x->router, s->n_expert * s->n_embd, &x->device_router);
    if (status == AMBER_OK) status = put(u, x->router_bias, s->n_expert, &x->device_router_bias);
    if (status == AMBER_OK) status = put(u, x->choice_bias, s->n_expert, &x->device_choice_bias);
    if (status == AMBER_OK) status = put(u, x->shared_router, s->n_embd, &x->device_shared_router);
    for (int i = 0; i < 3 && status == AMBER_OK; i++)
        status = put_linears(u, linears[i], s->n_expert);
    return status;
}

static amber_status put_layer(struct upload *u, struct layer *l) {
    const struct shape *s = &u->model->shape;
    struct norm *norms[] = {&l->attn_norm,     &l->post_attn_norm, &l->ffn_norm,
                            &l->post_ffn_norm, &l->q_norm,         &l->k_norm};
    struct linear *linears[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    amber_status status = AMBER_OK;
    for (int i = 0; i < 6 && status == AMBER_OK; i++) {
        const int heads = i == 4 ? s->n_head : i == 5 ? s->n_head_kv : 1;
        if (norms[i]->weight) status = put_norm(u, norms[i], heads * s->head_dim / norms[i]->n);
    }
    for (int i = 0; i < 7 && status == AMBER_OK; i++) status = put_linears(u, linears[i], 1);
    if (status == AMBER_OK) status = put(u, l->sinks, s->n_head, &l->device_sinks);
    return status == AMBER_OK && l->experts.router ? put_experts(u, &l->experts) : status;
}

static amber_status put_model(struct upload *u) {
    amber_status status = AMBER_OK;
    for (int il = 0; il < u->model->shape.n_layer && status == AMBER_OK; il++)
        status = put_layer(u, &u->model->layers[il]);
    if (status == AMBER_OK) status = put_norm(u, &u->model->output_norm, 1);
    return status == AMBER_OK ? put_linears(u, &u->model->output, 1) : status;
}

/* What the kernels do not know, by name. */
static const char *unsupported(const struct model *m) {
    if (m->float_weights) return "precision float";
    if (m->shape.clamp > 0) return "models that clamp q, k and v";
    if (m->shape.head_dim > AMBER_HEAD_MAX || m->shape.head_dim % 8) return "heads of this width";
    if (!m->plan.any) return NULL;
    for (int i = 0; i < m->shape.n_layer * N_PROJ; i++) {
        const struct rule *rule = &m->plan.rules[i];
        if (!rule_is_sparse(rule)) continue;
        if (rule->criterion == CRITERION_CLACT) return "the criterion clact";
        if (rule->shift > SHIFT_MEDIAN) return "shifts that the file carries (spts, lpts)";
        if (rule->ls) return "learned scales (ls)";
        if (rule->rank) return "low-rank factors (rsparse)";
    }
    return NULL;
}

amber_status cuda_upload(struct cuda *cuda, struct model *model, struct amber_pool *pool,
                         amber_progress_fn progress, void *user, amber_error *err) {
    const char *what = unsupported(model);
    if (what)
        return amber_fail(err, AMBER_ERR_UNSUPPORTED,
                          "%s on cuda:%d: %s run on the CPU only (use device cpu)",
                          model->file->label, cuda->index, what);
    struct upload u = {cuda, model, pool, NULL, 0, 0, 0, COUNT, progress, user, err};
    amber_status status = put_model(&u);
    if (u.total > cuda->info.free_bytes) return no_room(&u);
    u.pass = COPY;
    u.fragments = amber_alloc((size_t)u.largest);
    if (!u.fragments) return amber_fail(err, AMBER_ERR_MEMORY, "%s: no memory", model->file->label);
    if (status == AMBER_OK) status = put_model(&u);
    char why[160];
    if (!cuda->api->finish(cuda->device, why, sizeof why) && status == AMBER_OK)
        status = amber_fail(err, AMBER_ERR_DEVICE, "cuda:%d: %s", cuda->index, why);
    amber_free(u.fragments);
    if (status != AMBER_OK) return status;
    u.pass = FORGET;
    put_model(&u);
    model_drop_matrices(model);
    cuda->weight_bytes = u.total;
    return AMBER_OK;
}
