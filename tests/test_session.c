/* test_session.c: a session's promises on a small random model: results do not depend on how a
 * prompt was cut, cached, rewound or threaded; bad calls are refused; cancelling leaves a usable
 * prefix. */
#include "amber.h"
#include "check.h"
#include "tiny_gguf.h"

#include <unistd.h>

#define N_PROMPT 77

static char path[64];
static int32_t prompt[N_PROMPT];

static amber_engine *open_engine(int threads, int precision) {
    amber_engine_options o;
    amber_engine_options_defaults(&o);
    o.threads = threads;
    o.precision = precision;
    amber_engine *engine = NULL;
    amber_error err = {0};
    if (!CHECK(amber_engine_open(path, &o, &engine, &err) == AMBER_OK))
        fprintf(stderr, "%s\n", err.msg);
    return engine;
}

static amber_session *open_session(amber_engine *engine, int n_ctx, int n_batch) {
    amber_session_options o;
    amber_session_options_defaults(&o);
    o.n_ctx = n_ctx;
    o.n_batch = n_batch;
    amber_session *session = NULL;
    CHECK_EQ(amber_session_new(engine, &o, &session, NULL), AMBER_OK);
    return session;
}

static int same_logits(const amber_session *a, const float *reference) {
    const float *logits = amber_session_logits(a);
    return logits && memcmp(logits, reference, sizeof(float) * TINY_VOCAB) == 0;
}

static void test_cuts(int precision) {
    float reference[TINY_VOCAB];
    amber_engine *one = open_engine(1, precision);
    amber_session *s = open_session(one, 128, 128);
    CHECK_EQ(amber_session_sync(s, prompt, N_PROMPT, NULL), AMBER_OK);
    memcpy(reference, amber_session_logits(s), sizeof reference);
    int finite = 1;
    for (int i = 0; i < TINY_VOCAB; i++) finite &= reference[i] - reference[i] == 0;
    CHECK(finite);
    amber_session_free(s);

    for (int threads = 1; threads <= 3; threads++) {
        amber_engine *engine = open_engine(threads, precision);
        for (int n_batch = 2; n_batch <= 66; n_batch += 16) {
            s = open_session(engine, 128, n_batch);
            CHECK_EQ(amber_session_sync(s, prompt, N_PROMPT, NULL), AMBER_OK);
            CHECK(same_logits(s, reference));
            amber_session_free(s);
        }
        /* Token by token: decode equals prefill bit for bit. */
        s = open_session(engine, 128, 0);
        for (int i = 0; i < N_PROMPT; i++)
            CHECK_EQ(amber_session_append(s, prompt[i], NULL), AMBER_OK);
        CHECK(same_logits(s, reference));
        amber_session_free(s);
        amber_engine_close(engine);
    }

    /* A prefix that diverged is rewound, and what is common is cached. */
    amber_session_stats stats = {.size = sizeof stats};
    s = open_session(one, 128, 0);
    int32_t other[N_PROMPT];
    memcpy(other, prompt, sizeof other);
    other[41] ^= 1;
    CHECK_EQ(amber_session_sync(s, other, N_PROMPT, NULL), AMBER_OK);
    CHECK(!same_logits(s, reference));
    CHECK_EQ(amber_session_sync(s, prompt, N_PROMPT, NULL), AMBER_OK);
    CHECK(same_logits(s, reference));
    amber_session_get_stats(s, &stats);
    CHECK_EQ(stats.cached_tokens, 41);
    /* The same prompt again costs nothing; a shorter one computes its last row anew. */
    CHECK_EQ(amber_session_sync(s, prompt, N_PROMPT, NULL), AMBER_OK);
    amber_session_get_stats(s, &stats);
    CHECK_EQ(stats.cached_tokens, N_PROMPT);
    CHECK_EQ(amber_session_rewind(s, 10, NULL), AMBER_OK);
    CHECK(amber_session_logits(s) == NULL);
    CHECK_EQ(amber_session_sync(s, prompt, 9, NULL), AMBER_OK);
    CHECK_EQ(amber_session_length(s), 9);
    CHECK_EQ(amber_session_sync(s, prompt, N_PROMPT, NULL), AMBER_OK);
    CHECK(same_logits(s, reference));

    /* Scores of all positions: the last row is the logits, the others those of shorter prompts. */
    static float scores[N_PROMPT * TINY_VOCAB];
    amber_session *small = open_session(one, 128, 16);
    CHECK_EQ(amber_session_score(small, prompt, N_PROMPT, 20, scores, NULL), AMBER_OK);
    CHECK(memcmp(scores + (N_PROMPT - 1 - 20) * TINY_VOCAB, reference, sizeof reference) == 0);
    CHECK_EQ(amber_session_sync(s, prompt, 34, NULL), AMBER_OK);
    CHECK(same_logits(s, scores + (33 - 20) * TINY_VOCAB));
    amber_session_free(small);
    amber_session_free(s);
    amber_engine_close(one);
}

struct cancel {
    int calls, stop_at;
    int64_t last;
    int monotone;
};

static int on_progress(void *user, int32_t phase, int64_t done, int64_t total) {
    struct cancel *c = user;
    if (phase != AMBER_PHASE_PREFILL) return 0;
    c->monotone &= done >= c->last && done <= total;
    c->last = done;
    return ++c->calls == c->stop_at;
}

static void test_cancel(void) {
    amber_engine *engine = open_engine(2, AMBER_PRECISION_INT8);
    amber_session *whole = open_session(engine, 128, 0);
    CHECK_EQ(amber_session_sync(whole, prompt, N_PROMPT, NULL), AMBER_OK);
    for (int stop_at = 1; stop_at < 20; stop_at++) {
        struct cancel c = {.stop_at = stop_at, .monotone = 1};
        amber_session_options o;
        amber_session_options_defaults(&o);
        o.n_ctx = 128;
        o.n_batch = 16;
        o.progress = on_progress;
        o.progress_user = &c;
        amber_session *s = NULL;
        amber_error err = {0};
        CHECK_EQ(amber_session_new(engine, &o, &s, &err), AMBER_OK);
        CHECK_EQ(amber_session_sync(s, prompt, N_PROMPT, &err),
                 stop_at <= 15 ? AMBER_ERR_CANCELLED : 0);
        CHECK(c.monotone);
        if (stop_at <= 15) {
            CHECK_EQ(err.code, AMBER_ERR_CANCELLED);
            CHECK_STR(err.msg, "cancelled");
            CHECK(amber_session_logits(s) == NULL);
            CHECK(amber_session_length(s) < N_PROMPT);
            c.last = 0;
        }
        CHECK_EQ(amber_session_sync(s, prompt, N_PROMPT, NULL), AMBER_OK);
        CHECK(same_logits(s, amber_session_logits(whole)));
        amber_session_free(s);
    }
    amber_session_free(whole);
    amber_engine_close(engine);
}

static void test_refusals(void) {
    amber_engine *engine = open_engine(1, AMBER_PRECISION_INT8);
    amber_session *s = open_session(engine, 40, 0);
    amber_error err = {0};
    CHECK_EQ(amber_session_sync(s, prompt, N_PROMPT, &err), AMBER_ERR_CONTEXT);
    CHECK_STR(err.msg, "77");
    CHECK_STR(err.msg, "40");
    CHECK_EQ(amber_session_sync(s, prompt, 0, &err), AMBER_ERR_ARGUMENT);
    int32_t bad[2] = {5, TINY_VOCAB};
    CHECK_EQ(amber_session_sync(s, bad, 2, &err), AMBER_ERR_ARGUMENT);
    CHECK_STR(err.msg, "300");
    bad[1] = -1;
    CHECK_EQ(amber_session_sync(s, bad, 2, &err), AMBER_ERR_ARGUMENT);
    CHECK_EQ(amber_session_sync(s, prompt, 40, NULL), AMBER_OK);
    CHECK_EQ(amber_session_append(s, 1, &err), AMBER_ERR_CONTEXT);
    CHECK_EQ(amber_session_length(s), 40); /* a refusal changes nothing */
    CHECK(amber_session_logits(s) != NULL);
    CHECK_EQ(amber_session_rewind(s, 41, &err), AMBER_ERR_ARGUMENT);
    CHECK_EQ(amber_session_append(s, TINY_VOCAB, &err), AMBER_ERR_CONTEXT);
    CHECK_EQ(amber_session_score(s, prompt, 10, 10, NULL, &err), AMBER_ERR_ARGUMENT);
    amber_session_free(s);

    amber_session_options o;
    amber_session_options_defaults(&o);
    o.n_ctx = 1 << 28;
    amber_session *huge = NULL;
    o.n_batch = -4;
    CHECK_EQ(amber_session_new(engine, &o, &huge, &err), AMBER_ERR_ARGUMENT);
    CHECK(huge == NULL);
    amber_engine_close(engine);

    amber_engine_options e;
    amber_engine_options_defaults(&e);
    e.isa = "pentium";
    CHECK_EQ(amber_engine_open(path, &e, &engine, &err), AMBER_ERR_DEVICE);
    CHECK_STR(err.msg, "pentium");
    CHECK_STR(err.msg, "ref");
    amber_engine_options_defaults(&e);
    e.threads = -1;
    CHECK_EQ(amber_engine_open(path, &e, &engine, &err), AMBER_ERR_ARGUMENT);
    e.threads = 1;
    e.precision = 7;
    CHECK_EQ(amber_engine_open(path, &e, &engine, &err), AMBER_ERR_ARGUMENT);
    CHECK_EQ(amber_engine_open("/nonexistent/x.gguf", NULL, &engine, &err), AMBER_ERR_IO);
    CHECK(engine == NULL);
}

/* What the estimate says is what opening takes. */
static void check_estimate(int precision, int kv_type) {
    amber_engine_options o;
    amber_engine_options_defaults(&o);
    o.threads = 2;
    o.precision = precision;
    amber_session_options so;
    amber_session_options_defaults(&so);
    so.n_ctx = 100;
    so.n_batch = 32;
    so.kv_type = kv_type;
    amber_memory memory = {.size = sizeof memory};
    CHECK_EQ(amber_memory_estimate(path, &o, &so, &memory, NULL), AMBER_OK);
    amber_engine *engine = open_engine(2, precision);
    amber_engine_info info = {.size = sizeof info};
    amber_engine_get_info(engine, &info);
    CHECK_EQ(info.weight_bytes, memory.weights_bytes);
    amber_session *s = NULL;
    CHECK_EQ(amber_session_new(engine, &so, &s, NULL), AMBER_OK);
    amber_session_stats stats = {.size = sizeof stats};
    amber_session_get_stats(s, &stats);
    CHECK_EQ(stats.kv_bytes, memory.kv_bytes);
    const int row = precision ? 4 * info.head_dim : kv_type ? info.head_dim + 4 : 2 * info.head_dim;
    CHECK_EQ(stats.kv_bytes, 100LL * 2 * info.n_layer * info.n_head_kv * row);
    CHECK_EQ(stats.scratch_bytes, memory.scratch_bytes);
    CHECK_EQ(stats.n_ctx, 100);
    amber_session_free(s);
    amber_engine_close(engine);
}

static void test_estimate(void) {
    check_estimate(AMBER_PRECISION_INT8, AMBER_KV_F16);
    check_estimate(AMBER_PRECISION_INT8, AMBER_KV_INT8);
    check_estimate(AMBER_PRECISION_FLOAT, AMBER_KV_F16);
}

/* Types of the cache that there are not, and the one that float mode does not take. */
static void test_kv_types(void) {
    amber_session_options o;
    amber_session_options_defaults(&o);
    amber_error err = {0};
    amber_session *s = NULL;
    amber_engine *engine = open_engine(1, AMBER_PRECISION_FLOAT);
    o.kv_type = AMBER_KV_INT8;
    CHECK_EQ(amber_session_new(engine, &o, &s, &err), AMBER_ERR_UNSUPPORTED);
    CHECK_STR(err.msg, "precision int8");
    o.kv_type = 2;
    CHECK_EQ(amber_session_new(engine, &o, &s, &err), AMBER_ERR_ARGUMENT);
    CHECK_STR(err.msg, "found 2");
    CHECK(s == NULL);
    amber_engine_close(engine);
}

static int cancel_load(void *user, int32_t phase, int64_t done, int64_t total) {
    (void)total;
    int *calls = user;
    return phase == AMBER_PHASE_LOAD && done > 0 && ++*calls == 7;
}

static void test_cancel_load(void) {
    int calls = 0;
    amber_engine_options o;
    amber_engine_options_defaults(&o);
    o.progress = cancel_load;
    o.progress_user = &calls;
    amber_engine *engine = NULL;
    amber_error err = {0};
    CHECK_EQ(amber_engine_open(path, &o, &engine, &err), AMBER_ERR_CANCELLED);
    CHECK(engine == NULL);
    CHECK_EQ(calls, 7);
}

int main(void) {
    snprintf(path, sizeof path, "/tmp/amber-tiny-%d.gguf", (int)getpid());
    if (tiny_write(path, 42) != 0) {
        fprintf(stderr, "cannot write %s\n", path);
        return 1;
    }
    for (int i = 0; i < N_PROMPT; i++) prompt[i] = (i * 37 + 11) % TINY_VOCAB;
    test_cuts(AMBER_PRECISION_INT8);
    test_cuts(AMBER_PRECISION_FLOAT);
    test_cancel();
    test_refusals();
    test_estimate();
    test_kv_types();
    test_cancel_load();
    unlink(path);
    return check_summary();
}
