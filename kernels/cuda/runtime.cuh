/* runtime.cuh: the CUDA runtime behind device.h: memory, copies, launches, recorded graphs. */
#ifndef AMBER_CUDA_RUNTIME_CUH
#define AMBER_CUDA_RUNTIME_CUH

#include "device.h"
#include "simt.h"

#include <stdio.h>
#include <stdlib.h>

struct amber_cuda_graph {
    cudaGraphExec_t exec;
};

enum { RUNTIME_KERNELS = 128 };

struct runtime {
    int index;
    cudaStream_t stream;
    cudaError_t error; /* the first since the last finish */
    const void *opted[RUNTIME_KERNELS];
    int n_opted;
};

/* Tells whether this build has code for a GPU. */
KERNEL(32, 1) void runtime_kernel(const int) {}

static void runtime_note(runtime *r, cudaError_t error) {
    if (r->error == cudaSuccess) r->error = error;
}

static int runtime_count(char *why, size_t size) {
    int n = 0, driver = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error == cudaSuccess && n > 0) return n;
    cudaDriverGetVersion(&driver);
    if (driver == 0)
        snprintf(why, size, "no NVIDIA driver");
    else if (error == cudaErrorInsufficientDriver)
        snprintf(why, size, "the driver knows CUDA %d.%d, %d.%d is needed", driver / 1000,
                 driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    else
        snprintf(why, size, "%s", error == cudaSuccess ? "no GPU" : cudaGetErrorString(error));
    return 0;
}

static bool runtime_describe(int index, struct amber_cuda_info *info, char *why, size_t size) {
    cudaDeviceProp p;
    size_t available = 0, total = 0;
    cudaError_t error = cudaGetDeviceProperties(&p, index);
    if (error == cudaSuccess) {
        snprintf(info->name, sizeof info->name, "%s", p.name);
        info->major = p.major;
        info->minor = p.minor;
        info->total_bytes = (int64_t)p.totalGlobalMem;
        if (p.major < 8) {
            snprintf(why, size, "compute capability %d.%d, 8.0 is needed", p.major, p.minor);
            return false;
        }
        error = cudaSetDevice(index);
    }
    cudaFuncAttributes code;
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, (const void *)runtime_kernel);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        cudaGetLastError();
        snprintf(why, size,
                 "this build has no kernels for compute capability %d.%d (see "
                 "AMBER_CUDA_ARCHS)",
                 p.major, p.minor);
        return false;
    }
    if (error == cudaSuccess) error = cudaMemGetInfo(&available, &total);
    info->free_bytes = (int64_t)available;
    if (error != cudaSuccess) snprintf(why, size, "%s", cudaGetErrorString(error));
    return error == cudaSuccess;
}

static bool runtime_open(runtime *r, int index, char *why, size_t size) {
    r->index = index;
    r->error = cudaSuccess;
    r->n_opted = 0;
    cudaError_t error = cudaSetDevice(index);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&r->stream, cudaStreamNonBlocking);
    if (error != cudaSuccess) snprintf(why, size, "%s", cudaGetErrorString(error));
    return error == cudaSuccess;
}
static void runtime_close(runtime *r) {
    cudaSetDevice(r->index);
    cudaStreamDestroy(r->stream);
}

static void *runtime_alloc(runtime *r, size_t bytes) {
    void *p = NULL;
    cudaSetDevice(r->index);
    if (cudaMalloc(&p, bytes ? bytes : 1) == cudaSuccess) return p;
    cudaGetLastError(); /* running out of memory is told by NULL alone */
    return NULL;
}
static void runtime_free(runtime *r, void *p) {
    cudaSetDevice(r->index);
    cudaFree(p);
}
static void *runtime_host_alloc(runtime *r, size_t bytes) {
    void *p = NULL;
    cudaSetDevice(r->index);
    if (cudaMallocHost(&p, bytes) == cudaSuccess) return p;
    cudaGetLastError();
    return NULL;
}
static void runtime_host_free(runtime *r, void *p) {
    cudaSetDevice(r->index);
    cudaFreeHost(p);
}
static void runtime_fill(runtime *r, void *p, int value, size_t bytes) {
    runtime_note(r, cudaMemsetAsync(p, value, bytes, r->stream));
}
static void runtime_copy(runtime *r, void *to, const void *from, size_t bytes, bool up) {
    cudaSetDevice(r->index);
    runtime_note(r,
                 cudaMemcpyAsync(to, from, bytes,
                                 up ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, r->stream));
}
static bool runtime_finish(runtime *r, char *why, size_t size) {
    cudaSetDevice(r->index);
    runtime_note(r, cudaStreamSynchronize(r->stream));
    const cudaError_t error = r->error;
    if (error == cudaSuccess) return true;
    snprintf(why, size, "%s", cudaGetErrorString(error));
    /* Running out of memory passes; after an illegal address every later call fails again by itself. */
    cudaGetLastError();
    r->error = cudaSuccess;
    return false;
}

static void runtime_record(runtime *r) {
    cudaSetDevice(r->index);
    runtime_note(r, cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
}
static amber_cuda_graph *runtime_recorded(runtime *r) {
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    cudaError_t error = cudaStreamEndCapture(r->stream, &graph);
    if (error == cudaSuccess) error = cudaGraphInstantiate(&exec, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    amber_cuda_graph *g = error == cudaSuccess ? (amber_cuda_graph *)malloc(sizeof *g) : NULL;
    runtime_note(r, error);
    if (g) g->exec = exec;
    return g;
}
static void runtime_replay(runtime *r, amber_cuda_graph *g) {
    cudaSetDevice(r->index);
    runtime_note(r, cudaGraphLaunch(g->exec, r->stream));
}
static void runtime_forget(amber_cuda_graph *g) {
    cudaGraphExecDestroy(g->exec);
    free(g);
}

/* More than 48 KiB of shared memory have to be asked for. Once per kernel, and all that a block can
 * have: another size, or another user of the GPU in this process, then takes nothing back that a
 * launch or a recorded graph relies on. */
static void runtime_opt_in(runtime *r, const void *kernel) {
    for (int i = 0; i < r->n_opted; i++)
        if (r->opted[i] == kernel) return;
    cudaFuncAttributes code;
    int most = 0;
    cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, r->index);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most - (int)code.sharedSizeBytes);
    runtime_note(r, error);
    if (error == cudaSuccess && r->n_opted < RUNTIME_KERNELS) r->opted[r->n_opted++] = kernel;
}

template <typename Args>
static void runtime_launch(runtime *r, void (*kernel)(Args), dim3 grid, int threads, size_t shared,
                           const Args &args) {
    cudaSetDevice(r->index);
    if (shared > 48 << 10) runtime_opt_in(r, (const void *)kernel);
    kernel<<<grid, threads, shared, r->stream>>>(args);
    runtime_note(r, cudaGetLastError());
}

#endif
