/* model.h: a model's shape (arch.c reads it from a file's keys) and its weights (model.c binds and
 * converts them). */
#ifndef AMBER_MODEL_H
#define AMBER_MODEL_H

#include "gguf.h"
#include "kernels.h"
#include "plan.h"
#include "threads.h"

/* One row per architecture: what makes it differ from the others, as data. */
struct arch {
    const char *name;    /* general.architecture */
    bool rope_halves;    /* RoPE pairs (i, i + n/2) instead of (2i, 2i+1) */
    bool sliding_window; /* honours attention.sliding_window */
};

struct shape {
    const struct arch *arch;
    int n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab, n_rot, n_ctx_train;
    int window; /* positions a token sees, itself included; 0: all */
    float norm_eps;
    float attn_scale;  /* 1 / sqrt(head_dim) */
    float rope_mscale; /* factor on cos and sin (YaRN) */
    double *rope_freq; /* [n_rot / 2] radians per position, scaling included; owned */
};

/* y = x W^T + bias. Exactly one of w8.q and f32 is set, by the engine's precision. */
struct linear {
    struct amber_w8 w8;
    const float *f32;        /* [n_out, n_in] */
    const float *bias;       /* [n_out] padded to whole panels, or NULL */
    const struct rule *rule; /* how its input is pruned in prefill; NULL: not at all */
    const float *score;      /* [n_in] channel factors of the rule's criterion, or NULL */
    int n_out, n_in;
};

struct layer {
    const float *attn_norm, *ffn_norm; /* [n_embd] */
    struct linear q, k, v, o, gate, up, down;
};

struct model {
    struct gguf_file *file;
    struct shape shape;
    const struct gguf_tensor *embedding; /* [n_vocab, n_embd], any type; rows are read in place */
    const float *output_norm;            /* [n_embd] */
    struct linear output;                /* [n_vocab, n_embd]; a tied head is converted as well */
    struct layer *layers;                /* [n_layer] */
    struct plan plan;
    int sparse_first_n; /* leading tokens that stay dense */
    double coverage;    /* share of the layers' multiplications with a sparse operand */
    bool packed;        /* an Amber GGUF: w8 and scores point into the mapping */
    bool float_weights;
    int64_t n_params, weight_bytes;
    void **blocks; /* every allocation of the weights, for free */
    int n_blocks, cap_blocks;
};

/* Reads and checks the shape. On success the caller frees shape->rope_freq. */
amber_status arch_read_shape(const struct gguf_file *file, struct shape *shape, amber_error *err);
/* Names of the supported architectures, separated by spaces. */
const char *arch_list(void);

/* Takes the file over (model_free closes it), also when it fails. options are resolved ones. */
amber_status model_load(struct gguf_file *file, const amber_engine_options *options,
                        struct amber_pool *pool, struct model *model, amber_error *err);
void model_free(struct model *model);
/* Share of the layers' multiplications that the plan saves with these kernels in a long prompt. */
double model_skipped(const struct model *model, const struct amber_kernels *kernels);
/* Bytes that model_load would hold for this file, without converting anything. */
amber_status model_estimate(const struct gguf_file *file, bool float_weights, struct shape *shape,
                            int64_t *weight_bytes, int64_t *mapped_bytes, amber_error *err);

/* The plan that an options' sparse text means for this file: "auto" is the one in the file's key
 * amber.plan, dense where it has none. On success plan_free releases it. */
amber_status model_read_plan(const struct gguf_file *file, const struct shape *shape,
                             const char *sparse, struct plan *plan, amber_error *err);

/* One embedding row as float32. x [n_embd] */
void model_embed(const struct model *model, int32_t token, float *x);

#endif
