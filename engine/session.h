/* session.h: what an engine and a session hold, and the seam between session.c (whose turn it is),
 * forward.c (the model's computation as prose) and ops*.c (each step split over the threads). */
#ifndef AMBER_SESSION_H
#define AMBER_SESSION_H

#include "model.h"

#include <pthread.h>

struct amber_engine {
    struct model model;
    struct amber_kernels kernels;
    struct cuda *cuda; /* the GPU that the model is on; NULL: the CPU */
    struct amber_pool *pool;
    amber_tokenizer *tokenizer;
    pthread_mutex_t lock; /* one computation at a time on the pool */
    double load_seconds;
    amber_log_fn log;
    void *log_user;
};

/* Rows as the linear layers read them: INT8 with a scale per row, or float32 in float mode. */
struct activation {
    const struct linear *of; /* whose pruning rule made it; NULL: dense */
    struct amber_a8 a8;      /* rows of the current batch */
    float *shift;            /* [rows] what the rule took off; a8.shift points here where it does */
    float *f32;              /* [rows, n] */
    float *rest;             /* [rows, n] what pruning took away, for rules with factors */
    int pruned_from;         /* rows before it are dense, and so are all where of is NULL */
    struct amber_nm nm;      /* keep > 0: rows from pruned_from on are also in lists */
};

/* Projections that share an input need at most one dense and three differently pruned copies. */
#define MAX_INPUTS 4

struct batch;

/* Where a row belongs: the cache that it reads and adds to, and its position there. */
struct place {
    const struct batch *cache;
    int position;
};

/* One forward pass over `rows` consecutive tokens of one session, or over one token each of several
 * sessions, and the scratch it works in. All buffers are sized for the session's n_batch rows when
 * the session is made; nothing is allocated here. */
struct batch {
    const struct model *model;
    const struct ops *op;
    struct cuda_batch *cuda; /* buffers of a GPU; NULL on the CPU */
    char why[160];           /* what went wrong on a device */
    const struct amber_kernels *kernels;
    struct amber_pool *pool;

    int rows, pos0;             /* rows at positions pos0 .. pos0 + rows - 1 of the own cache; */
    const struct place *places; /* or, where not NULL, each row at its own place */
    bool prefill;               /* else a step of decoding */
    bool sparse;                /* the plan's rules apply: in prefill of enough tokens */
    int n_ctx, n_batch;
    float *x;         /* [rows, n_embd] residual stream */
    float *q, *attn;  /* [rows, n_head * head_dim] */
    float *k, *v;     /* [rows, n_head_kv * head_dim] */
    float *gate, *up; /* [rows, n_ff] */
    float *y;         /* [rows, n_embd] a half's output before its norm; the input of experts */
    const double *rope_freq[2]; /* all layers; windowed layers where these differ, or NULL */
    float *cos[2], *sin[2];     /* [rows, n_rot / 2] */
    struct activation in[MAX_INPUTS];
    uint8_t *lists[MAX_INPUTS]; /* [pairs of rows, amber_nm_stride] for inputs that need them */
    int n_in, n_inputs;         /* row length and number of inputs in use */
    float *low_rank;            /* [rows, largest rank of the plan] */
    float *column_norm;         /* [n_in] of all rows, for the criterion clact */
    uint8_t *row_scratch;       /* [threads, row_scratch_bytes] */
    int64_t row_scratch_bytes;
    uint8_t *attn_scratch; /* [threads, kernels->attention_scratch] */

    /* Mixture of experts. A slot is one choice of one row: row * n_expert_used + choice. */
    float *router;                 /* [rows, n_expert] */
    int32_t *chosen;               /* [slots] expert */
    float *share;                  /* [slots] */
    int32_t *slot;                 /* [slots] in the order of their experts */
    int32_t *expert_at;            /* [n_expert + 1] where an expert's slots begin in that order */
    struct activation gathered[2]; /* rows in that order */
    uint8_t *expert_lists[2];      /* gathered rows in lists, see expert_lists_at */
    float *expert_out;             /* [slots, n_embd] */

    /* KV cache: K, then V of one layer after the other, [n_head_kv, positions, head_dim] cells each,
     * and behind INT8 cells their scales, float32 [n_head_kv, positions]. Windowed layers hold a
     * ring of window_ctx positions: what cannot be seen any more is overwritten. */
    uint8_t *kv;
    int64_t kv_position_bytes; /* of K or of V of one position of one layer */
    int window_ctx;
    enum amber_cells cells; /* float32 in float mode */

    int layer; /* the one under way */
    /* Sees the inputs of the layers' linears in prefill; NULL: nobody does. */
    amber_tap_fn tap;
    void *tap_user;
    float *tap_rows; /* [rows, n_in] of the input under way; also where the criterion is clact */

    /* Called between layers; non-zero cancels. */
    int (*tick)(void *user, int layer);
    void *tick_user;

    float *x_base; /* start of the x buffer: a batch that narrows moves x */
};

struct amber_session {
    struct amber_engine *engine;
    struct batch batch;
    int32_t *tokens; /* [n_ctx] */
    int n_past;      /* tokens whose K and V are in the cache */
    int n_written;   /* positions that were ever written since the cache was empty */
    bool has_logits;
    float *logits;      /* [n_vocab] */
    float *step_logits; /* [step_rows, n_vocab] of steps of several sessions, made when needed */
    int step_rows;

    amber_progress_fn progress;
    void *progress_user;
    int64_t progress_done, progress_total; /* thousandths of a token */

    void **blocks;
    int n_blocks;
    int64_t kv_bytes, scratch_bytes;
    amber_session_stats stats;
};

static inline struct place place_of(const struct batch *b, int r) {
    return b->places ? b->places[r] : (struct place){b, b->pos0 + r};
}

/* Positions that the cache of layer il holds. */
int layer_positions(const struct batch *b, const struct shape *s, int il);

/* ---- session.c ---- */

/* Bytes of the cache and the buffers of a session with these options. */
amber_status session_estimate(const struct shape *s, bool floats, const struct plan *plan,
                              int threads, const struct amber_kernels *kernels,
                              const amber_session_options *options, int64_t *kv_bytes,
                              int64_t *scratch_bytes, amber_error *err);

/* ---- forward.c ---- */

/* Runs the rows of `tokens` through the model: fills the KV cache for them and writes the logits of
 * rows first_out..rows-1 to logits [(rows - first_out), n_vocab]; first_out == rows wants none. Where
 * the rows have places of their own, pos0 and first_out are 0.
 * AMBER_ERR_CANCELLED where the batch's tick said so; the cache then holds nothing new that counts. */
amber_status forward(struct batch *b, const int32_t *tokens, int rows, int pos0, int first_out,
                     float *logits);

/* Most inputs that any group of projections of this plan needs at once, and how many of them are
 * read from lists. */
int plan_inputs(const struct plan *plan);
int plan_lists(const struct plan *plan, const struct amber_kernels *kernels);

/* ---- steps ---- */

/* A device's steps, each over all rows of the batch. Those that give no status are told by `end`. */
struct ops {
    /* x = embeddings of the tokens, angles of their positions. false: there is nothing left to do,
     * *status tells what came of it (a device may replay a whole recorded step). */
    bool (*begin)(struct batch *b, const int32_t *tokens, float *logits, amber_status *status);
    /* Waits for what was begun. On failure the batch's `why` is filled. */
    amber_status (*end)(struct batch *b);
    /* The three sources of an input, each made ready for the n linear layers w that will read it:
     * pruned where their rules say so, and quantized.
     * in = norm(x), or x where there is none */
    void (*norm)(struct batch *b, const struct norm *norm, const struct linear *const w[], int n);
    /* in = the rows of src [rows, n_in] */
    void (*prepare)(struct batch *b, const float *src, const struct linear *const w[], int n);
    /* in = activation(gate) * up, or activation(up) in a model without gate */
    void (*activate)(struct batch *b, const struct linear *w);
    /* y[i] = w[i](in) for the n linear layers that the input was made for. Layers without outputs
     * are passed over. */
    void (*linear)(struct batch *b, const struct linear *const w[], float *const y[], int n);
    /* x += w(in), or x += post(w(in)) where there is such a norm. */
    void (*linear_residual)(struct batch *b, const struct linear *w, const struct norm *post);
    /* Norms q and k where the layer does, rotates them, and writes k and v to the cache. */
    void (*rope_and_store)(struct batch *b, int il);
    /* attn = attention of q over the cache of layer il. */
    void (*attention)(struct batch *b, int il);
    /* y = norm(x) and each row's experts. */
    void (*route)(struct batch *b, int il);
    /* x += the shares of the chosen experts, each down(activation(gate y) * up y). */
    void (*experts)(struct batch *b, int il);
    /* x += what an expert gives that every token has, by its own share where it has one. */
    void (*shared_expert)(struct batch *b, int il);
    /* From here on only rows first..rows-1 go on. q and x move along. */
    void (*keep_rows)(struct batch *b, int first);
    /* logits [rows, n_vocab] = cap(output(norm(x))), host memory on every device. */
    void (*head)(struct batch *b, float *logits);
    /* Copies of cells of the KV cache, between two steps. On failure the batch's `why` is filled. */
    bool (*read_cells)(struct batch *b, void *host, const uint8_t *cells, size_t bytes);
    bool (*write_cells)(struct batch *b, uint8_t *cells, const void *host, size_t bytes);
};
extern const struct ops cpu_ops;

#endif
