/* amber.h: the public interface of libamber, and the only header a program needs.
 *
 * Amber loads a GGUF language model, holds its linear weights as INT8, and runs prefill in row
 * batches and decode one row at a time.
 *
 * The nouns:
 *   amber_engine     a loaded model: mapping, weights, kernels. Immutable after open; sessions and
 *                    threads share it.
 *   amber_session    one timeline: token history, KV cache, logits of its last token.
 *   amber_tokenizer  text <-> token ids; borrowed from an engine, or opened alone from any GGUF
 *                    file, a vocabulary-only one too.
 *   amber_sampler    logits -> next token, with its own random state and penalty window.
 *
 * The rules:
 *   - The library never prints, exits or aborts. A function that can fail returns an amber_status
 *     (or a negative count) and fills the caller's amber_error, which may be NULL.
 *   - Option structs begin with `size_t size`: set it to sizeof the struct (the *_defaults()
 *     functions do), so that a program built against an older header keeps working.
 *   - Callers hand over the whole token prefix (amber_session_sync). The session keeps what it
 *     already holds of it, so nobody keeps positions and every second turn is cached.
 *   - A session is used by one thread at a time. Sessions of one engine may be used by different
 *     threads; their computations take turns on the engine's threads.
 *   - Strings are UTF-8. Messages read "where: expected, found (what to do)".
 */
#ifndef AMBER_H
#define AMBER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AMBER_VERSION "0.1.0"

/* The library hides everything but this interface. */
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* The part between the two cffi markers is read by the Python binding's build as it stands. */
/* cffi: begin */

typedef enum amber_status {
    AMBER_OK = 0,
    AMBER_ERR_ARGUMENT = 1,    /* a caller's value is out of range */
    AMBER_ERR_IO = 2,          /* a file cannot be opened or mapped */
    AMBER_ERR_FORMAT = 3,      /* a file is damaged or is not GGUF */
    AMBER_ERR_UNSUPPORTED = 4, /* a sound file that this version cannot run */
    AMBER_ERR_CONTEXT = 5,     /* more tokens than the session's context holds */
    AMBER_ERR_MEMORY = 6,      /* an allocation failed */
    AMBER_ERR_CANCELLED = 7,   /* a progress callback asked to stop */
    AMBER_ERR_DEVICE = 8       /* a device or an instruction set that was asked for is missing */
} amber_status;

typedef struct amber_error {
    int32_t code;   /* an amber_status */
    char msg[1024]; /* NUL-terminated */
} amber_error;

typedef struct amber_engine amber_engine;
typedef struct amber_session amber_session;
typedef struct amber_tokenizer amber_tokenizer;
typedef struct amber_text_stream amber_text_stream;
typedef struct amber_sampler amber_sampler;

typedef enum amber_phase {
    AMBER_PHASE_LOAD = 0,   /* done/total in bytes of source weights */
    AMBER_PHASE_PREFILL = 1 /* done/total in thousandths of a token, moving with every layer */
} amber_phase;

/* A non-zero return cancels: the call under way ends with AMBER_ERR_CANCELLED. */
typedef int (*amber_progress_fn)(void *user, int32_t phase, int64_t done, int64_t total);
/* level: 0 error, 1 warning, 2 information, 3 detail. */
typedef void (*amber_log_fn)(void *user, int32_t level, const char *text);

/* Linear layers of a transformer block, by what they are to it. */
typedef enum amber_projection {
    AMBER_PROJECTION_Q = 0,
    AMBER_PROJECTION_K = 1,
    AMBER_PROJECTION_V = 2,
    AMBER_PROJECTION_O = 3,
    AMBER_PROJECTION_GATE = 4,
    AMBER_PROJECTION_UP = 5,
    AMBER_PROJECTION_DOWN = 6
} amber_projection;

/* What linear layers read in prefill, before it is pruned and quantized: x [rows, n_in] float32,
 * valid during the call, of the tokens at positions pos .. pos + rows - 1. projection is the first
 * of those that share the input: Q stands for K and V too, GATE for UP; experts share one input.
 * Called on the thread that computes, once per batch for each of the four inputs of a layer. The
 * last layer computes O, GATE and DOWN only for rows whose logits are wanted: all of them come with
 * amber_session_score from position 0. The engine must not be used from inside. */
typedef void (*amber_tap_fn)(void *user, int32_t layer, int32_t projection, int32_t pos,
                             int32_t rows, int32_t n_in, const float *x);

typedef enum amber_precision {
    AMBER_PRECISION_INT8 = 0, /* INT8 weights per output channel, INT8 activations per token */
    AMBER_PRECISION_FLOAT = 1 /* float32 throughout: the reference, slow and large */
} amber_precision;

typedef struct amber_engine_options {
    size_t size;
    int32_t threads;   /* 0: AMBER_THREADS, else the number of physical cores */
    int32_t precision; /* an amber_precision */
    const char *isa;   /* NULL: AMBER_ISA, else the best of this CPU; see amber_isa_list() */
    amber_progress_fn progress;
    void *progress_user;
    amber_log_fn log;
    void *log_user;
    /* Which projections run N:M activation-sparse in prefill: NULL or "off", "auto" (the plan that
     * an Amber GGUF carries; off where there is none), a pattern such as "8:16" with an optional
     * "/criterion", "/mitigation", "@projections" and "#layers", or several rules separated by ';'
     * ("8:16/amber@q,gate#0-18; 12:16x4t2@down"). A pattern alone follows the policy of Amber
     * Pruner: down, q and gate. Decode is always dense. */
    const char *sparse;
    int32_t sparse_first_n; /* the first tokens of a session that stay dense */
    /* Not 0: the engine only measures, and may rank channels by the other tokens of a batch
     * (criterion clact): its answers depend on how a prompt is cut into batches. */
    int32_t evaluation;
    /* Where the model runs: NULL: AMBER_DEVICE, else "cpu"; "cuda" (the first NVIDIA GPU that can be
     * used), "cuda:N"; "auto": a GPU where there is one that can run this model, else the CPU. */
    const char *device;
} amber_engine_options;

typedef struct amber_engine_info {
    size_t size;
    char architecture[32];
    char name[96];
    char weight_types[96]; /* types found in the file, most bytes first: "Q4_K Q6_K F32" */
    char isa[16];          /* the kernel column in use */
    int32_t precision, threads;
    int32_t n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab;
    int32_t n_ctx_train;
    int64_t n_params;
    int64_t file_bytes;
    int64_t weight_bytes; /* memory held for weights beside the mapping */
    double load_seconds;
    char sparse[96]; /* what runs sparse in prefill, or "off" */
    double coverage; /* share of the layers' multiplications that have a sparse operand */
    double skipped;  /* share of them that this machine's kernels leave out; the rest is computed */
    int32_t n_expert, n_expert_used; /* 0: no mixture of experts */
    int32_t window;                  /* positions that windowed layers see; 0: no such layers */
    int64_t layer_multiplications;   /* of the layers' projections, for one token */
    int64_t token_bytes;             /* of weight matrices that one token's decoding reads */
    int32_t sparse_min;              /* see amber_engine_set_sparse_min */
    char device[160];                /* "cpu", or "cuda:0 NVIDIA H100" */
    int64_t device_bytes;            /* memory of the GPU held for weights */
} amber_engine_info;

typedef struct amber_memory {
    size_t size;
    int64_t weights_bytes; /* converted weights */
    int64_t mapped_bytes;  /* part of the file that stays in use (embedding rows, norms) */
    int64_t kv_bytes;      /* KV cache for the asked context */
    int64_t scratch_bytes; /* activations of one row batch, logits */
    int64_t total_bytes;
    double coverage; /* as amber_engine_info.coverage, of the options' plan */
} amber_memory;

/* What keys and values are kept as. */
typedef enum amber_kv_type {
    AMBER_KV_F16 = 0, /* float16; float32 with AMBER_PRECISION_FLOAT */
    AMBER_KV_INT8 = 1 /* INT8, a float32 scale per position and head; on the CPU, not in float */
} amber_kv_type;

typedef struct amber_session_options {
    size_t size;
    int32_t n_ctx;              /* tokens the session can hold; 0: min(4096, trained context) */
    int32_t n_batch;            /* most rows of one prefill batch, even; 0: 512 */
    amber_progress_fn progress; /* called inside prefill, between layers */
    void *progress_user;
    amber_tap_fn tap; /* called inside prefill; NULL: costs nothing */
    void *tap_user;
    int32_t kv_type; /* an amber_kv_type */
} amber_session_options;

typedef struct amber_session_stats {
    size_t size;
    int32_t n_ctx, n_past;
    int32_t cached_tokens;  /* of the last sync: tokens that were already there */
    int32_t prefill_tokens; /* of the last sync that computed two or more rows */
    int32_t prefill_sparse; /* whether the plan ran in the last sync that computed anything */
    double prefill_seconds;
    int64_t decode_tokens; /* since amber_session_new or amber_session_reset_stats */
    double decode_seconds;
    int64_t kv_bytes, scratch_bytes;
    int32_t n_batch; /* most rows of one batch */
} amber_session_stats;

typedef struct amber_sampling {
    size_t size;
    float temperature;       /* <= 0: greedy */
    int32_t top_k;           /* <= 0: all */
    float top_p;             /* >= 1: all */
    float min_p;             /* <= 0: all */
    float repeat_penalty;    /* 1: none */
    float frequency_penalty; /* 0: none */
    float presence_penalty;  /* 0: none */
    int32_t penalty_last_n;  /* tokens the penalties look back at; 0: none, -1: all */
    uint64_t seed;           /* AMBER_SEED_RANDOM: drawn from the system; see amber_sampler_seed */
    int32_t n_logit_bias;
    const int32_t *logit_bias_tokens; /* [n_logit_bias] */
    const float *logit_bias_values;   /* [n_logit_bias], added to the logits; -INFINITY bans */
} amber_sampling;

/* ---- library ---- */

const char *amber_version(void);
/* Kernel columns that this CPU can run, best first, separated by spaces: "avx512vnni avx2 ref". */
const char *amber_isa_list(void);
/* A line for each device that options.device can name, and for those that cannot be used the reason:
 * "cpu  avx512vnni avx2 ref", "cuda:0  NVIDIA H100, 85.0 GB, 84.1 GB free", "cuda  none: no NVIDIA
 * driver". Returns the full length without the NUL; the text is cut to cap - 1. */
int32_t amber_device_list(char *buf, size_t cap);

/* ---- engine ---- */

void amber_engine_options_defaults(amber_engine_options *options);
/* Opens and converts a model. options may be NULL. *out is NULL on failure. */
amber_status amber_engine_open(const char *path, const amber_engine_options *options,
                               amber_engine **out, amber_error *err);
/* All sessions must be freed first. NULL is allowed. */
void amber_engine_close(amber_engine *engine);
/* info->size must be set by the caller. */
void amber_engine_get_info(const amber_engine *engine, amber_engine_info *info);
/* Multiplications of a projection of a layer for one token, those of all its experts in use
 * included, and in matrix the size of its weights [n_out, n_in], of one expert where there are any; 0
 * where the layer has none, or there is no such layer or projection. */
int64_t amber_engine_work(const amber_engine *engine, int32_t layer, int32_t projection,
                          int32_t matrix[2]);
/* What opening `path` and a session with these options would take; either options may be NULL. Reads
 * only the header. memory->size must be set by the caller. */
amber_status amber_memory_estimate(const char *path, const amber_engine_options *options,
                                   const amber_session_options *session, amber_memory *memory,
                                   amber_error *err);
/* Metadata of the file as text. Arrays are written as "[type x count]". Returns the full length
 * without the NUL (the text is cut to cap - 1), or -1 where the key or index is absent. */
int32_t amber_engine_meta(const amber_engine *engine, const char *key, char *buf, size_t cap);
int32_t amber_engine_meta_key(const amber_engine *engine, int32_t index, char *buf, size_t cap);
const amber_tokenizer *amber_engine_tokenizer(const amber_engine *engine);
/* The index-th of the plan's different patterns as text ("8:16x4t2"), and the share of the layers'
 * multiplications whose input it prunes. Returns as amber_engine_meta. */
int32_t amber_engine_pattern(const amber_engine *engine, int32_t index, char *buf, size_t cap,
                             double *share);
/* From now on prompts run dense whose batches hold fewer than so many new tokens, as where a plan
 * gains nothing on this machine; 0, the initial state: none. A prompt of more than n_batch new tokens
 * is cut into batches of about the same size. Not while a session computes. */
void amber_engine_set_sparse_min(amber_engine *engine, int32_t tokens);

/* ---- session ---- */

#define AMBER_SESSIONS_MAX 256 /* that amber_sessions_append takes at once */

void amber_session_options_defaults(amber_session_options *options);
amber_status amber_session_new(amber_engine *engine, const amber_session_options *options,
                               amber_session **out, amber_error *err);
void amber_session_free(amber_session *session);
/* Makes the session hold exactly tokens[0..n): keeps the common prefix, forgets the rest of what it
 * held, computes what is new, and leaves the logits of the last token. On AMBER_ERR_CANCELLED the
 * session holds a shorter consistent prefix of `tokens`, and a later sync goes on from there. On
 * any other failure it is unchanged. n must be at least 1. */
amber_status amber_session_sync(amber_session *session, const int32_t *tokens, int32_t n,
                                amber_error *err);
/* Adds one token: a decode step, dense whatever the plan. */
amber_status amber_session_append(amber_session *session, int32_t token, amber_error *err);
/* Adds one token to each of n different sessions of one engine, tokens[i] to sessions[i]: a decode
 * step that reads each weight once for all of them. Leaves in each the same bits as
 * amber_session_append would, one session after the other; decode_seconds of each grow by the whole
 * step's. n is at most AMBER_SESSIONS_MAX and the largest n_batch among them. AMBER_ERR_UNSUPPORTED
 * for more than one on a GPU. After a failure no session has gained a token. */
amber_status amber_sessions_append(amber_session *const *sessions, const int32_t *tokens, int32_t n,
                                   amber_error *err);
/* As sync from an empty session, and writes the logits of positions first..n-1 to
 * out [(n - first), n_vocab] float32. Used to measure quality. */
amber_status amber_session_score(amber_session *session, const int32_t *tokens, int32_t n,
                                 int32_t first, float *out, amber_error *err);
/* Forgets all tokens from position n on. Logits are gone until the next sync or append. */
amber_status amber_session_rewind(amber_session *session, int32_t n, amber_error *err);
/* [n_vocab] float32 of the last token, valid until the next call on the session; NULL where there
 * are none (new, rewound or cancelled session). */
const float *amber_session_logits(const amber_session *session);
int32_t amber_session_length(const amber_session *session);
const int32_t *amber_session_tokens(const amber_session *session); /* [length] */
/* Writes the session's tokens, their keys and values and its logits to a file, in place of what it
 * held (session_file.c describes the format). A failure leaves an older file as it was. */
amber_status amber_session_save(amber_session *session, const char *path, amber_error *err);
/* Makes the session hold what was saved; a sync then computes only what a prompt has beyond it.
 * AMBER_ERR_FORMAT where the file is damaged or no session, AMBER_ERR_ARGUMENT where it comes from
 * another model, precision or sparsity plan, AMBER_ERR_CONTEXT where it holds more than n_ctx: these
 * leave the session unchanged. AMBER_ERR_DEVICE where a GPU fails leaves it empty. */
amber_status amber_session_load(amber_session *session, const char *path, amber_error *err);
/* What one linear layer makes of rows such as a tap shows: x [rows, n_in] -> y [rows, n_out] float32.
 * pruned: as prefill does under the engine's plan, for a prompt of these rows; 0: dense. Measures what
 * pruning costs a projection by itself; the session's tokens stay. AMBER_ERR_ARGUMENT where the layer
 * has no such matrix (experts are no single one) or another shape, AMBER_ERR_UNSUPPORTED on a GPU. */
amber_status amber_session_project(amber_session *session, int32_t layer, int32_t projection,
                                   int32_t rows, int32_t n_in, int32_t n_out, const float *x,
                                   int32_t pruned, float *y, amber_error *err);
void amber_session_get_stats(const amber_session *session, amber_session_stats *stats);
void amber_session_reset_stats(amber_session *session);

/* ---- tokenizer ---- */

#define AMBER_TOKEN_CONTROL 1 /* <s>, <|im_end|>: not text; detokenize skips it unless asked */
#define AMBER_TOKEN_EOG     2 /* ends a generation: EOS, end of turn and their kin */
#define AMBER_TOKEN_BYTE    4 /* one raw byte */
#define AMBER_TOKEN_UNKNOWN 8
#define AMBER_TOKEN_USER    16 /* user-defined text that is always matched whole */

amber_status amber_tokenizer_open(const char *path, amber_tokenizer **out, amber_error *err);
void amber_tokenizer_close(amber_tokenizer *tokenizer); /* not for an engine's own */
int32_t amber_tokenizer_size(const amber_tokenizer *tokenizer);
/* Ids, or -1 where the vocabulary has none. */
int32_t amber_tokenizer_bos(const amber_tokenizer *tokenizer);
int32_t amber_tokenizer_eos(const amber_tokenizer *tokenizer);
/* Whether the model wants a BOS in front (the file's own word, else its family's habit). */
int32_t amber_tokenizer_adds_bos(const amber_tokenizer *tokenizer);
int32_t amber_token_flags(const amber_tokenizer *tokenizer, int32_t token);
/* The vocabulary's own spelling of a token, not NUL-terminated; NULL where out of range. */
const char *amber_token_text(const amber_tokenizer *tokenizer, int32_t token, int32_t *length);
/* The id of an exact vocabulary entry such as "<|im_end|>", or -1. */
int32_t amber_token_find(const amber_tokenizer *tokenizer, const char *text, int32_t length);
/* Writes up to cap ids and returns how many there are in all (call again when more than cap), or a
 * negative amber_status. add_special puts BOS (and where the model asks for it EOS) around the
 * text; parse_special reads special tokens' spellings inside the text as those tokens. Bytes that
 * are not valid UTF-8 are taken as U+FFFD. */
int32_t amber_tokenize(const amber_tokenizer *tokenizer, const char *text, int32_t length,
                       int32_t add_special, int32_t parse_special, int32_t *out, int32_t cap,
                       amber_error *err);
/* Writes up to cap bytes (no NUL) and returns how many there are in all, or a negative
 * amber_status. keep_special writes control tokens' spellings too. Special tokens are otherwise
 * left out, and so is the space that tokenize put in front. The bytes may be broken UTF-8 where the
 * tokens are. */
int32_t amber_detokenize(const amber_tokenizer *tokenizer, const int32_t *tokens, int32_t n,
                         int32_t keep_special, char *out, int32_t cap, amber_error *err);

/* Token-by-token text that never ends inside a UTF-8 sequence: bytes are held back until they are
 * complete; a byte that can never become valid is written as U+FFFD. The tokenizer must outlive it.
 * `continues` says that earlier text precedes, so that a leading space is kept. */
amber_text_stream *amber_text_stream_new(const amber_tokenizer *tokenizer, int32_t keep_special,
                                         int32_t continues);
void amber_text_stream_free(amber_text_stream *stream);
/* Returns the new text, valid until the next call, and its length in bytes; NULL without memory. */
const char *amber_text_stream_push(amber_text_stream *stream, int32_t token, int32_t *length);
/* What was held back, as U+FFFD where it is incomplete. */
const char *amber_text_stream_finish(amber_text_stream *stream, int32_t *length);

/* ---- sampler ---- */

/* temperature 0.8, top_k 40, top_p 0.95, min_p 0.05, no penalties (window 64), random seed. */
void amber_sampling_defaults(amber_sampling *sampling);
amber_status amber_sampler_new(const amber_sampling *sampling, int32_t n_vocab, amber_sampler **out,
                               amber_error *err);
void amber_sampler_free(amber_sampler *sampler);
uint64_t amber_sampler_seed(const amber_sampler *sampler); /* the one in use */
/* Makes a token count for the penalties: for the prompt's tokens and for every sampled one. */
amber_status amber_sampler_accept(amber_sampler *sampler, int32_t token);
/* Next token from logits [n_vocab] float32, which are not changed. Order: bias, penalties, top_k,
 * top_p, min_p, temperature. Returns a token, or a negative amber_status where none is finite. */
int32_t amber_sampler_sample(amber_sampler *sampler, const float *logits);

/* ---- measuring ---- */

/* The two limits of this machine, to hold measured speeds against, with `threads` threads:
 * INT8 operations per second of the dot product of kernel column `isa` (NULL: the best) on
 * registers alone, a multiply and its addition counting as two; and bytes per second of reading 1
 * GiB (or an eighth of the memory) again and again from end to end, which a cache of that size
 * would answer in place of the memory. The best of many short trials each; takes about a second. */
amber_status amber_measure_peaks(int32_t threads, const char *isa, double *int8_ops_per_second,
                                 double *read_bytes_per_second, amber_error *err);

/* Single kernels by themselves: on one thread by the calling thread's CPU time, on several (split as
 * in the engine) by the clock.
 *   "gemm"       the INT8 product of `rows` rows with [n_out, n_in] weights, of rows that `pattern`
 *                pruned. Up to 16 rows, and where `cold`, the weights come from memory each time.
 *   "prepare"    what precedes it: rows of n_in float32 pruned, quantized and listed.
 *   "attention"  `rows` tokens behind `depth` others, cache of kv_type; up to 16 rows from memory. */
typedef struct amber_kernel_timer amber_kernel_timer;
typedef struct amber_kernel_case {
    const char *isa, *kernel, *pattern; /* isa NULL: the best; pattern NULL: dense */
    int32_t threads;                    /* 0: 1 */
    int32_t rows, n_out, n_in, cold;
    int32_t depth, n_head, n_head_kv, head_dim; /* of attention */
    const amber_kernel_timer
        *weights;    /* a product's, to be borrowed; it must live longer. NULL: own
                                          ones, as where its shape differs */
    int32_t kv_type; /* of attention, an amber_kv_type */
} amber_kernel_case;
amber_status amber_kernel_timer_new(const amber_kernel_case *c, amber_kernel_timer **out,
                                    amber_error *err);
void amber_kernel_timer_free(amber_kernel_timer *timer);
/* Seconds of one call, the mean of as many as take 2 ms. The first run of a timer takes longer. */
double amber_kernel_timer_run(amber_kernel_timer *timer);

/* cffi: end */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#define AMBER_SEED_RANDOM UINT64_MAX

#ifdef __cplusplus
}
#endif

#endif
