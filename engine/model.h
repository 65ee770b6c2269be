/* model.h: a model's shape (arch.c reads it from a file's keys) and its weights (model.c binds and
 * converts them). */
#ifndef AMBER_MODEL_H
#define AMBER_MODEL_H

#include "gguf.h"
#include "kernels.h"
#include "plan.h"
#include "threads.h"

/* Where a block normalizes: before its two halves, after them, or both. Both halves of a parallel
 * block read the block's input: normed once, or where the file has two norms each by its own. */
enum norm_places { NORM_PRE, NORM_PRE_POST, NORM_POST, NORM_PARALLEL, NORM_PRE_OR_PARALLEL };

/* What makes the input of the down projection from those of the gate and up ones. CLAMPED is
 * gpt-oss's SwiGLU (kernels.h), the others are f(gate) * up, or f(up) without a gate. GELU is its tanh
 * form, GELU_ERF the exact one. */
enum act_fn { ACT_SILU, ACT_GELU, ACT_GELU_ERF, ACT_RELU2, ACT_CLAMPED };

/* One row per architecture: what makes it differ from the others, as data. What a file says itself
 * (biases, norms of q and k, fused matrices, experts, most factors) needs no entry. */
struct arch {
    const char *name; /* general.architecture */
    enum norm_places norms;
    const char *ffn_norm; /* what the file calls it, where not ffn_norm */
    bool layer_norm;      /* LayerNorm, else RMSNorm */
    bool norm_plain;      /* norms have no weights */
    enum act_fn act;
    bool no_gate;         /* the feed-forward half is down(f(up(x))), else down(f(gate(x)) up(x)) */
    bool rope_halves;     /* RoPE pairs (i, i + n/2) instead of (2i, 2i+1) */
    bool positions;       /* a learned vector per position, added to the embedding */
    int no_rope_period;   /* every so many-th layer goes without RoPE; 0: none */
    bool rope_windowed;   /* in a model with windows only windowed layers have RoPE */
    bool rope_first;      /* q and k are rotated before they are normed */
    int window_period;    /* with a sliding window, every so many-th layer still sees everything;
                              1: none does; 0: the architecture has no windows */
    int window;           /* where the file does not say */
    double window_base;   /* RoPE base of windowed layers, without scaling; 0: the others' */
    bool scale_embedding; /* by sqrt(n_embd) */
    int wide_layers;      /* a model of so many layers scales scores by the width per head */
    float attn_softcap, final_softcap; /* where the file does not say */
    bool divide_logits;                /* by logit_scale, else multiplied */
    bool factors_told;                 /* without its factors a file is incomplete */
    bool gate_counted;                 /* feed_forward_length is that of gate and up together */
    int alibi_layers;                  /* a model of so many layers has ALiBi in place of RoPE */
    bool expert_norm;                  /* the chosen experts' shares are normed to a sum of 1 */
    bool expert_sigmoid;               /* shares are sigmoids, where the file does not say */
    bool yarn_exact;                   /* YaRN's ramp begins and ends between channels */
};

enum { MAX_EXPERTS = 1024 };

struct shape {
    const struct arch *arch;
    int n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab, n_rot, n_ctx_train;
    int window;        /* positions that a token sees in a windowed layer, itself included; or 0 */
    uint8_t *windowed; /* [n_layer] owned, and the block that holds mixture */
    uint8_t *mixture;  /* [n_layer] the feed-forward half is a mixture of experts */
    int n_expert, n_expert_used, n_ff_expert, n_ff_shared; /* 0: none */
    bool expert_norm, expert_sigmoid;
    bool parallel;      /* blocks of NORM_PARALLEL are so */
    float expert_scale; /* of the experts' shares */
    float norm_eps;
    float attn_scale, attn_softcap, final_softcap;  /* a cap of 0: none */
    float clamp;                                    /* of q, k and v; 0: none */
    float embed_scale, residual_scale, logit_scale; /* factors; 1: none */
    /* Radians per position, scaling included, [n_rot / 2] each. */
    double *rope_freq;        /* owned, and the block that holds the others */
    const double *rope_long;  /* for contexts beyond n_ctx_orig, or NULL (longrope) */
    const double *rope_local; /* for windowed layers, or NULL: the same */
    int n_ctx_orig;
    float rope_mscale; /* factor on cos and sin; 1 for rope_local */
    /* Queries grow by 1 + temperature * log(1 + floor(position / temperature_length)). */
    double temperature;
    int temperature_length;
};

static inline bool layer_has_rope(const struct shape *s, int il) {
    if (s->arch->rope_windowed && s->window) return s->windowed[il];
    return !s->arch->no_rope_period || (il + 1) % s->arch->no_rope_period;
}
static inline int layer_window(const struct shape *s, int il) {
    return s->windowed[il] ? s->window : 0;
}

/* LayerNorm or RMSNorm by the architecture; weight NULL: there is none at this place. */
struct norm {
    const float *weight, *bias;               /* bias may be NULL */
    int n;                                    /* elements that are normed together */
    int step;                                 /* from one head's weights to the next's; 0: shared */
    const float *device_weight, *device_bias; /* on the model's GPU */
};

/* y = x W^T + bias. Exactly one of w8.q and f32 is set, by the engine's precision. */
struct linear {
    struct amber_w8 w8;
    const float *f32;        /* [n_out, n_in] */
    const float *bias;       /* [n_out] padded to whole panels, or NULL */
    const struct rule *rule; /* how its input is pruned in prefill; NULL: not at all */
    const float *score;      /* [n_in] channel factors of the rule's criterion, or NULL */
    /* What pruned rows take in place of w8, f32 and bias: the same where the rule has no vectors. */
    struct amber_w8 pruned_w8;
    const float *pruned_f32, *pruned_bias;
    const float *shift;             /* [n_in] taken off rows before they are pruned, or NULL */
    const float *left, *right;      /* [n_out, rank], [rank, n_in]: what was pruned away; or NULL */
    const struct cuda_linear *cuda; /* on the model's GPU, or NULL */
    int n_out, n_in;
};

/* A mixture of experts. The router is float32 in every mode. */
struct experts {
    const float *router;             /* [n_expert, n_embd]; NULL: the layer has no experts */
    const float *router_bias;        /* [n_expert], or NULL */
    const float *choice_bias;        /* [n_expert] on shares when experts are chosen, or NULL */
    const float *shared_router;      /* [n_embd], or NULL: the shared expert's share is 1 */
    struct linear *gate, *up, *down; /* [n_expert] each; one block that gate owns */
    /* The same on the model's GPU; its matrices are those of gate[0].cuda and kin, all in one. */
    const float *device_router, *device_router_bias, *device_choice_bias, *device_shared_router;
};

struct layer {
    struct norm attn_norm, post_attn_norm, ffn_norm, post_ffn_norm; /* [n_embd] */
    struct norm q_norm, k_norm;               /* of each head, or of all heads together */
    const float *sinks, *device_sinks;        /* [n_head] attention's, or NULL */
    bool parallel;                            /* the feed-forward half reads what attention reads */
    struct linear q, k, v, o, gate, up, down; /* gate.n_out 0: down reads f(up) */
    struct experts experts; /* gate, up, down are then the shared expert, or have no outputs */
};

struct model {
    struct gguf_file *file;
    struct shape shape;
    const struct gguf_tensor *embedding; /* [n_vocab, n_embd], any type; rows are read in place */
    const float *positions;              /* [n_ctx_train, n_embd] added to it, or NULL */
    struct norm output_norm;             /* [n_embd] */
    struct linear output;                /* [n_vocab, n_embd]; a tied head is converted as well */
    struct layer *layers;                /* [n_layer] */
    struct plan plan;
    int sparse_first_n; /* leading tokens that stay dense */
    int sparse_min;     /* batches of fewer new tokens run dense */
    double coverage;    /* share of the layers' multiplications with a sparse operand */
    bool packed;        /* an Amber GGUF: w8 and scores point into the mapping */
    bool float_weights;
    int64_t n_params, weight_bytes;
    struct model_block *blocks; /* every allocation of the weights, for free */
    int n_blocks, cap_blocks;
};

struct model_block {
    void *at;
    size_t bytes;
    bool matrix; /* INT8 of one linear, and its scales */
};

/* The file's row of the table. */
amber_status arch_find(const struct gguf_file *file, const struct arch **out, amber_error *err);
/* Reads and checks the shape. On success shape_free releases it. */
amber_status arch_read_shape(const struct gguf_file *file, struct shape *shape, amber_error *err);
void shape_free(struct shape *shape);
/* Names of the supported architectures, separated by spaces. */
const char *arch_list(void);

/* Takes the file over (model_free closes it), also when it fails. options are resolved ones. */
amber_status model_load(struct gguf_file *file, const amber_engine_options *options,
                        struct amber_pool *pool, struct model *model, amber_error *err);
void model_free(struct model *model);
/* Memory that lives as long as the model; NULL where there is none. */
void *model_keep(struct model *model, size_t bytes);
/* Frees the INT8 matrices, for a model whose linears read theirs elsewhere: w8.q and w8.scale are gone. */
void model_drop_matrices(struct model *model);
/* What one token costs: multiplications of the layers' projections, and bytes of all matrices that it
 * reads, the head's included. */
void model_work(const struct model *model, int64_t *multiplications, int64_t *bytes);
/* Multiplications of one projection of a layer for one token, and its matrix [n_out, n_in]: in a
 * mixture that of one expert, and the work of all that are used. 0 where the layer has none. */
int64_t model_projection_work(const struct shape *s, int il, int projection, int32_t matrix[2]);
/* Share of the layers' multiplications that have a sparse operand under a plan. */
double model_coverage(const struct plan *plan, const struct shape *s);
/* Share of the layers' multiplications that the plan saves with these kernels in a long prompt. */
double model_skipped(const struct model *model, const struct amber_kernels *kernels);
/* The index-th of the plan's different patterns, and the share of the layers' multiplications whose
 * input it prunes. false: there are fewer. */
bool model_pattern(const struct model *model, int index, struct amber_pattern *pattern,
                   double *share);
/* Bytes that model_load would hold for this file, without converting anything. */
amber_status model_estimate(const struct gguf_file *file, bool float_weights, struct shape *shape,
                            int64_t *weight_bytes, int64_t *mapped_bytes, amber_error *err);

/* The plan that an options' sparse text means for this file: "auto" is the one in the file's key
 * amber.plan, dense where it has none. evaluation: as in the options. On success plan_free releases it. */
amber_status model_read_plan(const struct gguf_file *file, const struct shape *shape,
                             const char *sparse, bool evaluation, struct plan *plan,
                             amber_error *err);

/* One embedding row as float32, scaled as the architecture wants, with that of its position in models
 * that learn those. x [n_embd] */
void model_embed(const struct model *model, int32_t token, int position, float *x);

#endif
