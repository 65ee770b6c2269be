/* runtime_emulate.h: the same on the CPU, for tests: one device, whose kernels run as fibers and whose
 * memory is the host's. A recorded graph is a list of what was queued; what CUDA forbids while it
 * records fails here as well. */
#ifndef AMBER_CUDA_RUNTIME_EMULATE_H
#define AMBER_CUDA_RUNTIME_EMULATE_H

#include "device.h"
#include "simt.h"

#include <functional>
#include <vector>

struct amber_cuda_graph {
    std::vector<std::function<void()>> steps;
};

struct runtime {
    amber_cuda_graph *recording;
};

static int runtime_count(char *, size_t) {
    return 1;
}
/* $AMBER_EMULATED_BYTES: how much memory it claims to have. */
static bool runtime_describe(int index, struct amber_cuda_info *info, char *why, size_t size) {
    const char *bytes = getenv("AMBER_EMULATED_BYTES");
    snprintf(info->name, sizeof info->name, "emulated");
    info->major = 8;
    info->total_bytes = info->free_bytes = bytes ? atoll(bytes) : (int64_t)1 << 40;
    if (index != 0) snprintf(why, size, "no such GPU");
    return index == 0;
}
static bool runtime_open(runtime *r, int, char *, size_t) {
    r->recording = NULL;
    return true;
}
static void runtime_close(runtime *) {}
static void *runtime_alloc(runtime *r, size_t bytes) {
    return r->recording ? NULL : aligned_alloc(256, (bytes + 511) / 256 * 256);
}
static void runtime_free(runtime *, void *p) {
    free(p);
}
static void *runtime_host_alloc(runtime *r, size_t bytes) {
    return runtime_alloc(r, bytes);
}
static void runtime_host_free(runtime *, void *p) {
    free(p);
}
template <typename F> static void runtime_do(runtime *r, F step) {
    if (r->recording)
        r->recording->steps.push_back(step);
    else
        step();
}
static void runtime_fill(runtime *r, void *p, int value, size_t bytes) {
    runtime_do(r, [=] { memset(p, value, bytes); });
}
static void runtime_copy(runtime *r, void *to, const void *from, size_t bytes, bool) {
    runtime_do(r, [=] { memcpy(to, from, bytes); });
}
static bool runtime_finish(runtime *r, char *why, size_t size) {
    if (r->recording) snprintf(why, size, "a recording has begun and not ended");
    return !r->recording;
}
static void runtime_record(runtime *r) {
    r->recording = new amber_cuda_graph;
}
static amber_cuda_graph *runtime_recorded(runtime *r) {
    amber_cuda_graph *g = r->recording;
    r->recording = NULL;
    return g;
}
static void runtime_replay(runtime *, amber_cuda_graph *g) {
    for (auto &step : g->steps) step();
}
static void runtime_forget(amber_cuda_graph *g) {
    delete g;
}
template <typename Args>
static void runtime_launch(runtime *r, void (*kernel)(Args), dim3 grid, int threads, size_t shared,
                           const Args &args) {
    runtime_do(r, [=] {
        simt_launch<typename std::remove_cv<Args>::type>(kernel, grid, threads, shared, args);
    });
}

#endif
