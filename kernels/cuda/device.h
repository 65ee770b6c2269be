/* device.h: what libamber_cuda does for the engine: memory, copies and the steps of the forward pass
 * on one GPU, as a table of functions that dlopen finds under the name amber_cuda. C on both sides.
 *
 * Pointers in these structs are device memory unless it says host. Steps are queued in order and
 * return at once; the first error of any of them is kept and given by finish(). A device is used by
 * one thread at a time. */
#ifndef AMBER_CUDA_DEVICE_H
#define AMBER_CUDA_DEVICE_H

#include "../sparse.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AMBER_CUDA_VERSION 3
#define AMBER_CUDA_SYMBOL  "amber_cuda"

/* How the input of a matrix product is stored (layout.h). */
enum frag_form { FORM_DENSE, FORM_24, FORM_R32, FORM_R16, FORM_816X, N_FORMS };

enum input_source {
    INPUT_COPY,
    INPUT_RMSNORM,
    INPUT_LAYERNORM,
    INPUT_SILU, /* this and what follows: activations of kernels.h */
    INPUT_GELU,
    INPUT_GELU_ERF, /* the exact one */
    INPUT_RELU2,
    INPUT_CLAMPED /* with up */
};
enum input_shift { INPUT_NO_SHIFT, INPUT_MEAN, INPUT_MEDIAN };

/* The INT8 input of products, made from rows x [rows, n] float32: copied, normed, or activated
 * (x is the gate; times up where that is given), then pruned and quantized. */
struct input_args {
    int source;
    const float *x, *up;
    const float *weight, *bias; /* of norms; bias may be NULL */
    float eps;
    int rows, n, k_pad; /* k_pad: n rounded up to 64 */
    int pruned_from;    /* rows from here on are pruned; packed forms: 0 */
    int odd;            /* 1 where row 0 stands at an odd position: pairs are (2i, 2i + 1) */
    struct amber_pattern pattern;
    const float *f;         /* [n] channel factors, or NULL */
    int shift;              /* what is taken off a row before it is pruned */
    bool var;               /* scale[] also restores the row's variance */
    int form;               /* FORM_DENSE, or the pattern's own form */
    uint8_t *a, *e;         /* frag_a_bytes, frag_meta_bytes; e started out as FRAG_EMPTY_META */
    float *scale, *shifted; /* [rows]; shifted where there is a shift, else NULL */
    const int32_t *row_of;  /* rows are places (below), of this row of the batch; or NULL */
    uint8_t *scratch;       /* the library's own */
};

/* y[t][n] = acc * (a_scale[t] * w_scale[n]), + shift[t] * w_sum[n] and + bias[n] where these are, and
 * where `add` on top of y: the epilogue of kernels.h, operation by operation. */
struct gemm_args {
    int form;
    const uint8_t *a, *e, *b;
    const float *a_scale, *shift;
    const float *w_scale, *w_sum, *bias; /* [n_out] */
    float *y;                            /* [rows, ldy] */
    int64_t ldy;
    int rows, n_out, k_pad;
    bool add;
    /* Of n_expert matrices one behind the other in b, w_scale, w_sum and bias, each place's own, or NULL.
     * Products of one place each go by expert_of; others by begin and count, where `rows` is the most
     * that an expert can have and usual_rows what it has as a rule. */
    const int32_t *begin, *count, *expert_of;
    int n_expert, usual_rows;
};

/* Mixtures of experts. A slot is one choice of one row: row * used + choice. A place is where a slot's
 * row stands among the rows of its expert; those of one expert stand together. */

/* Logits x [rows, n] router [n_expert, n] + bias; the `used` largest, lower expert first among equals,
 * and their shares, softmax or sigmoid, normed to a sum of 1 where `norm`, times scale. With a choice
 * bias the experts are chosen by share + choice_bias. n_expert at most 1024. */
struct route_args {
    const float *x, *router;
    const float *bias, *choice_bias; /* [n_expert], or NULL */
    int32_t *chosen;                 /* [slots] */
    float *share;                    /* [slots] */
    int rows, n, n_expert, used;
    float scale;
    bool norm, sigmoid;
};

/* Gives every slot a place: experts in order, rows in order within one, each expert's from a multiple
 * of `align` on. */
struct sort_args {
    const int32_t *chosen;
    int32_t *place;              /* [slots] */
    int32_t *row_of, *expert_of; /* [places]; row -1: nobody stands here */
    int32_t *begin, *count;      /* [n_expert] */
    int rows, used, n_expert, align, places;
};

/* Copies rows of an input of a product to their places. */
struct gather_args {
    const int32_t *row_of;
    const uint8_t *a, *e;
    const float *scale, *shifted; /* shifted may be NULL */
    uint8_t *to_a, *to_e;
    float *to_scale, *to_shifted;
    int form, k_pad, places;
};

/* x [rows, n] += share * out [places, n] of every slot, in the order of the experts. used <= 256 */
struct combine_args {
    const float *out, *share;
    const int32_t *place;
    float *x;
    int rows, n, used;
};

/* x [rows, n] += sigmoid(router [n] . in [rows, n]) * out [rows, n] */
struct gated_args {
    const float *in, *out, *router;
    float *x;
    int rows, n;
};

/* y = norm(x) over n elements, or (add) y += norm(x); parts groups of n to a row of ld elements, with
 * weights from part * step on. y may be x. */
struct norm_args {
    const float *x;
    float *y;
    const float *weight, *bias;
    int64_t ld;
    int rows, parts, n, step;
    float eps;
    bool layer_norm, add;
};

/* Rotates the heads of q and k (cos NULL: not at all), multiplies q by its row's growth, and writes k
 * and v to the cache (keys NULL: not at all): [n_head_kv, n_ctx, head_dim] float16, position p in row
 * p % n_ctx. */
struct rope_args {
    float *q, *k;
    const float *v, *cos, *sin; /* [rows, n_rot / 2] */
    const float *growth;        /* [rows], or NULL */
    uint16_t *keys, *values;
    const int32_t *pos0; /* position of row 0 */
    int rows, n_head, n_head_kv, head_dim, n_rot, n_ctx;
    bool halves;
};

/* Causal attention as kernels.h defines it, over a float16 cache. */
struct attention_args {
    const float *q; /* [rows, n_head, head_dim] */
    float *out;
    const uint16_t *k, *v;
    const float *sink; /* [n_head], or NULL */
    const int32_t *pos0;
    float *partial; /* the library's own */
    int rows, first_row, n_head, n_head_kv, head_dim, n_ctx, window, stretches;
    float scale, softcap;
};

/* x[i] = cap * tanh(x[i] / cap) */
struct softcap_args {
    float *x;
    int64_t n;
    float cap;
};

struct amber_cuda_info {
    char name[128];
    int major, minor; /* compute capability */
    int64_t total_bytes, free_bytes;
};

struct amber_cuda_device;
struct amber_cuda_graph;

struct amber_cuda_api {
    int version; /* AMBER_CUDA_VERSION; nothing else may be read where it differs */
    /* Number of GPUs; 0 with the reason in why (a missing or too old driver) where there are none. */
    int (*count)(char *why, size_t size);
    /* false: it cannot be used, why tells the reason; info is filled as far as it is known. */
    bool (*describe)(int index, struct amber_cuda_info *info, char *why, size_t size);
    struct amber_cuda_device *(*open)(int index, char *why, size_t size); /* NULL: see why */
    void (*close)(struct amber_cuda_device *d); /* and frees all that was allocated from it */

    void *(*alloc)(struct amber_cuda_device *d, int64_t bytes, int fill); /* NULL: no memory */
    void (*free)(struct amber_cuda_device *d, void *p);
    void *(*host_alloc)(struct amber_cuda_device *d, int64_t bytes); /* for fast copies */
    void (*host_free)(struct amber_cuda_device *d, void *p);
    void (*upload)(struct amber_cuda_device *d, void *to, const void *host, int64_t bytes);
    void (*download)(struct amber_cuda_device *d, void *host, const void *from, int64_t bytes);
    /* Waits for all that is queued. false: a step failed, and with it all that followed. */
    bool (*finish)(struct amber_cuda_device *d, char *why, size_t size);

    /* Between these two, steps are recorded instead of run; copies too, from and to host_alloc. */
    void (*record)(struct amber_cuda_device *d);
    struct amber_cuda_graph *(*recorded)(struct amber_cuda_device *d); /* NULL: it failed */
    void (*replay)(struct amber_cuda_device *d, struct amber_cuda_graph *g);
    void (*forget)(struct amber_cuda_device *d, struct amber_cuda_graph *g);

    void (*input)(struct amber_cuda_device *d, const struct input_args *g);
    void (*gemm)(struct amber_cuda_device *d, const struct gemm_args *g);
    void (*norm)(struct amber_cuda_device *d, const struct norm_args *g);
    void (*rope)(struct amber_cuda_device *d, const struct rope_args *g);
    void (*attention)(struct amber_cuda_device *d, const struct attention_args *g);
    void (*softcap)(struct amber_cuda_device *d, const struct softcap_args *g);
    void (*route)(struct amber_cuda_device *d, const struct route_args *g);
    void (*sort)(struct amber_cuda_device *d, const struct sort_args *g);
    void (*gather)(struct amber_cuda_device *d, const struct gather_args *g);
    void (*combine)(struct amber_cuda_device *d, const struct combine_args *g);
    void (*gated)(struct amber_cuda_device *d, const struct gated_args *g);
};

#endif
