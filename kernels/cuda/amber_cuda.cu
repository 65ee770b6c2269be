/* amber_cuda.cu: the library behind device.h. Each step chooses its kernel and its launch. */
#include "attention.cuh"
#include "experts.cuh"
#include "gemm.cuh"
#include "input.cuh"
#include "rows.cuh"

#if defined(__CUDACC__)
#include "runtime.cuh"
#else
#include "runtime_emulate.h"
#endif

struct block {
    void *p;
    block *next;
};

struct amber_cuda_device {
    runtime rt;
    block *blocks; /* all that is allocated */
    /* Working areas grow, but those that a recorded graph may know stay until the device is closed. */
    unsigned char *scratch;
    float *partial;
    size_t scratch_bytes, partial_bytes;
};

/* ---- memory ---- */

static amber_cuda_device *open_device(int index, char *why, size_t size) {
    amber_cuda_device *d = (amber_cuda_device *)calloc(1, sizeof *d);
    if (!d) {
        snprintf(why, size, "no memory");
        return NULL;
    }
    if (runtime_open(&d->rt, index, why, size)) return d;
    free(d);
    return NULL;
}

static void close_device(amber_cuda_device *d) {
    if (!d) return;
    while (d->blocks) {
        block *b = d->blocks;
        d->blocks = b->next;
        runtime_free(&d->rt, b->p);
        free(b);
    }
    runtime_close(&d->rt);
    free(d);
}

static void *device_alloc(amber_cuda_device *d, int64_t bytes, int fill) {
    block *b = (block *)malloc(sizeof *b);
    void *p = b ? runtime_alloc(&d->rt, (size_t)bytes) : NULL;
    if (!p) {
        free(b);
        return NULL;
    }
    runtime_fill(&d->rt, p, fill, (size_t)bytes);
    b->p = p;
    b->next = d->blocks;
    d->blocks = b;
    return p;
}

static void device_free(amber_cuda_device *d, void *p) {
    for (block **at = &d->blocks; *at; at = &(*at)->next) {
        if ((*at)->p != p) continue;
        block *b = *at;
        *at = b->next;
        runtime_free(&d->rt, p);
        free(b);
        return;
    }
}

/* false: no memory; the step is then left out and finish() reports it. */
template <typename T>
static bool reserve(amber_cuda_device *d, T **area, size_t *has, size_t bytes) {
    if (*has >= bytes) return true;
    void *p = device_alloc(d, (int64_t)bytes, 0);
    if (!p) {
#if defined(__CUDACC__)
        runtime_note(&d->rt, cudaErrorMemoryAllocation);
#endif
        return false;
    }
    *area = (T *)p;
    *has = bytes;
    return true;
}

static void *host_alloc(amber_cuda_device *d, int64_t bytes) {
    return runtime_host_alloc(&d->rt, (size_t)bytes);
}
static void host_free(amber_cuda_device *d, void *p) {
    if (p) runtime_host_free(&d->rt, p);
}
static void upload(amber_cuda_device *d, void *to, const void *host, int64_t bytes) {
    runtime_copy(&d->rt, to, host, (size_t)bytes, true);
}
static void download(amber_cuda_device *d, void *host, const void *from, int64_t bytes) {
    runtime_copy(&d->rt, host, from, (size_t)bytes, false);
}
static bool finish(amber_cuda_device *d, char *why, size_t size) {
    return runtime_finish(&d->rt, why, size);
}
static void record(amber_cuda_device *d) {
    runtime_record(&d->rt);
}
static amber_cuda_graph *recorded(amber_cuda_device *d) {
    return runtime_recorded(&d->rt);
}
static void replay(amber_cuda_device *d, amber_cuda_graph *g) {
    runtime_replay(&d->rt, g);
}
static void forget(amber_cuda_device *, amber_cuda_graph *g) {
    if (g) runtime_forget(g);
}

/* ---- steps ---- */

static dim3 grid(int x, int y = 1, int z = 1) {
    return dim3((unsigned)x, (unsigned)y, (unsigned)z);
}

template <int FORM>
static void launch_input(amber_cuda_device *d, const input_args &g, int blocks, size_t shared) {
    runtime_launch(&d->rt,
                   g.form == FORM_DENSE ? input_kernel<FORM, FORM_DENSE> : input_kernel<FORM, FORM>,
                   grid(blocks), INPUT_THREADS, shared, g);
}

static void step_input(amber_cuda_device *d, const struct input_args *given) {
    input_args g = *given;
    const int form = frag_form_of(&g.pattern);
    const bool pairs = g.pattern.kind == AMBER_PATTERN_GROUP && g.pattern.tokens == 2;
    const int blocks = pairs ? (g.rows + g.odd + 1) / 2 : g.rows;
    const bool scores = g.pattern.kind != AMBER_PATTERN_DENSE;
    size_t shared = input_bytes(form, g.k_pad, pairs ? 2 : 1, scores);
    g.scratch = NULL;
    if (shared > INPUT_SHARED_MOST) {
        if (!reserve(d, &d->scratch, &d->scratch_bytes, shared * (size_t)blocks)) return;
        g.scratch = d->scratch;
        shared = 0;
    }
    switch (form) {
    case FORM_24:
        return launch_input<FORM_24>(d, g, blocks, shared);
    case FORM_R32:
        return launch_input<FORM_R32>(d, g, blocks, shared);
    case FORM_R16:
        return launch_input<FORM_R16>(d, g, blocks, shared);
    case FORM_816X:
        return launch_input<FORM_816X>(d, g, blocks, shared);
    default:
        return launch_input<FORM_DENSE>(d, g, blocks, shared);
    }
}

/* Rows of a block's tile by the rows of the product: the tile grows while it can be filled. */
static const struct {
    int rows, mt;
} tiles[] = {{32, 1}, {128, 2}, {INT32_MAX, 4}};

template <int FORM, int MT> static void launch_tile(amber_cuda_device *d, const gemm_args &g) {
    typedef gemm_tile<FORM, MT> tile;
    const dim3 blocks = grid((g.n_out + GEMM_COLS - 1) / GEMM_COLS,
                             (g.rows + tile::rows - 1) / tile::rows, g.begin ? g.n_expert : 1);
    runtime_launch(&d->rt, gemm_kernel<FORM, MT>, blocks, GEMM_THREADS, tile::shared, g);
}

template <int FORM> static void launch_gemm(amber_cuda_device *d, const gemm_args &g) {
    const int rows = g.begin ? g.usual_rows : g.rows;
    int i = 0;
    while (rows > tiles[i].rows) i++;
    switch (tiles[i].mt) {
    case 1:
        return launch_tile<FORM, 1>(d, g);
    case 2:
        return launch_tile<FORM, 2>(d, g);
    default:
        return launch_tile<FORM, 4>(d, g);
    }
}

static void step_gemm(amber_cuda_device *d, const struct gemm_args *g) {
    if ((g->rows == 1 || g->expert_of) && g->form == FORM_DENSE) {
        const dim3 blocks = grid((g->n_out + FRAG_COLS - 1) / FRAG_COLS, g->rows);
        return runtime_launch(&d->rt, gemv_kernel, blocks, GEMV_THREADS, 0, *g);
    }
    switch (g->form) {
    case FORM_24:
        return launch_gemm<FORM_24>(d, *g);
    case FORM_R32:
        return launch_gemm<FORM_R32>(d, *g);
    case FORM_R16:
        return launch_gemm<FORM_R16>(d, *g);
    case FORM_816X:
        return launch_gemm<FORM_816X>(d, *g);
    default:
        return launch_gemm<FORM_DENSE>(d, *g);
    }
}

static void step_norm(amber_cuda_device *d, const struct norm_args *g) {
    runtime_launch(&d->rt, norm_kernel, grid(g->rows, g->parts), ROW_THREADS, 0, *g);
}

static void step_rope(amber_cuda_device *d, const struct rope_args *g) {
    runtime_launch(&d->rt, rope_kernel, grid(g->rows), ROW_THREADS, 0, *g);
}

template <int HD> static void launch_flash(amber_cuda_device *d, const attention_args &g) {
    runtime_launch(&d->rt, flash_kernel<HD>, grid((g.rows + FLASH_ROWS - 1) / FLASH_ROWS, g.n_head),
                   FLASH_THREADS, flash_tile<HD>::shared, g);
}

/* Few rows, or heads too wide for the registers of the other way: a few rows at a time, so that the
 * stretches' results stay small. */
static void launch_stretches(amber_cuda_device *d, attention_args g) {
    enum { ROWS = 4 };
    const int seen = g.window && g.window < g.n_ctx ? g.window : g.n_ctx;
    g.stretches = (seen + STRETCH - 1) / STRETCH;
    const size_t parts = (size_t)ROWS * (size_t)g.n_head * (size_t)g.stretches;
    const size_t bytes = parts * (size_t)(g.head_dim + 2) * sizeof(float);
    if (!reserve(d, &d->partial, &d->partial_bytes, bytes)) return;
    g.partial = d->partial;
    const size_t shared = (size_t)(g.head_dim + STRETCH + 2 * STRETCH) * sizeof(float);
    for (int row = 0; row < g.rows; row += ROWS) {
        const int rows = g.rows - row < ROWS ? g.rows - row : ROWS;
        g.first_row = row;
        runtime_launch(&d->rt, stretch_kernel, grid(g.n_head, rows, g.stretches), STRETCH, shared,
                       g);
        runtime_launch(&d->rt, join_kernel, grid(g.n_head, rows), JOIN_THREADS, 0, g);
    }
}

static void step_attention(amber_cuda_device *d, const struct attention_args *g) {
    if (g->rows <= 4 || g->head_dim > 256) return launch_stretches(d, *g);
    if (g->head_dim <= 64) return launch_flash<64>(d, *g);
    if (g->head_dim <= 128) return launch_flash<128>(d, *g);
    launch_flash<256>(d, *g);
}

static void step_softcap(amber_cuda_device *d, const struct softcap_args *g) {
    const int blocks = (int)((g->n + ROW_THREADS - 1) / ROW_THREADS);
    runtime_launch(&d->rt, softcap_kernel, grid(blocks), ROW_THREADS, 0, *g);
}

static void step_route(amber_cuda_device *d, const struct route_args *g) {
    runtime_launch(&d->rt, route_kernel, grid(g->rows), ROUTE_THREADS, 0, *g);
}
static void step_sort(amber_cuda_device *d, const struct sort_args *g) {
    runtime_launch(&d->rt, sort_kernel, grid(g->n_expert), SORT_THREADS, 0, *g);
}
static void step_gather(amber_cuda_device *d, const struct gather_args *g) {
    runtime_launch(&d->rt, gather_kernel, grid(g->places), EXPERT_THREADS, 0, *g);
}
static void step_combine(amber_cuda_device *d, const struct combine_args *g) {
    runtime_launch(&d->rt, combine_kernel, grid(g->rows), EXPERT_THREADS, 0, *g);
}
static void step_gated(amber_cuda_device *d, const struct gated_args *g) {
    runtime_launch(&d->rt, gated_kernel, grid(g->rows), EXPERT_THREADS, 0, *g);
}

extern "C" __attribute__((visibility("default")))
const struct amber_cuda_api amber_cuda = {AMBER_CUDA_VERSION,
                                          runtime_count,
                                          runtime_describe,
                                          open_device,
                                          close_device,
                                          device_alloc,
                                          device_free,
                                          host_alloc,
                                          host_free,
                                          upload,
                                          download,
                                          finish,
                                          record,
                                          recorded,
                                          replay,
                                          forget,
                                          step_input,
                                          step_gemm,
                                          step_norm,
                                          step_rope,
                                          step_attention,
                                          step_softcap,
                                          step_route,
                                          step_sort,
                                          step_gather,
                                          step_combine,
                                          step_gated};
