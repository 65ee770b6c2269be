/* simt.h: what the kernels ask of the hardware beyond plain C++: warp exchanges, barriers, tensor-core
 * instructions, asynchronous copies. Under nvcc these are the instructions; elsewhere simt_emulate.h
 * runs every thread of a block as a fiber, so that the kernels' own text is tested without a GPU. */
#ifndef AMBER_CUDA_SIMT_H
#define AMBER_CUDA_SIMT_H

#include "choose.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define DEVICE                  static __device__ __forceinline__
#define SHARED                  __shared__
#define DYNAMIC_SHARED(name)    extern __shared__ __align__(16) unsigned char name[]

DEVICE void sync_block(void) {
    __syncthreads();
}
DEVICE float shuffle_xor(float v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}
DEVICE int shuffle_xor(int v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}
DEVICE uint32_t shuffle_xor(uint32_t v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}
DEVICE double shuffle_xor(double v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}
DEVICE void add_shared(int *at, int v) {
    atomicAdd(at, v);
}
/* c + the sum of four signed products. */
DEVICE int dot4(uint32_t a, uint32_t b, int c) {
    return __dp4a((int)a, (int)b, c);
}
/* Bytes of the pair (y, x): byte i of the result is byte (selector >> 4 i & 7) of it, x's first. */
DEVICE uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
    return __byte_perm(x, y, selector);
}
DEVICE uint16_t half_bits(float v) {
    return __half_as_ushort(__float2half_rn(v));
}
DEVICE float float_of_half(uint16_t h) {
    return __half2float(__ushort_as_half(h));
}
DEVICE uint4 load16(const void *p) {
    return *reinterpret_cast<const uint4 *>(p);
}

DEVICE void mma_s8(int (&c)[4], const uint32_t *a, const uint32_t *b) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_sp_s8(int (&c)[4], const uint32_t *a, const uint32_t *b, uint32_t e) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                   "r"(b[3]), "r"(e));
}
DEVICE void mma_f16(float (&c)[4], const uint32_t *a, const uint32_t *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* Four 8x8 matrices of halves in shared memory to registers: row r of matrix i is where lane 8 i + r
 * points. */
template <bool TRANSPOSED> DEVICE void load_matrices(uint32_t *out, const uint16_t *row) {
    const uint32_t from = (uint32_t)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(from)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(from)
                     : "memory");
}
/* 16 bytes from global to shared memory, in the background; zeros where there is nothing to read. */
DEVICE void copy16(void *shared, const void *global, bool exists) {
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(exists ? 16 : 0)
                 : "memory");
}
DEVICE void copy_commit(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Waits until at most `left` of this thread's groups are under way. */
template <int left> DEVICE void copy_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

#else
#include "simt_emulate.h"
#endif

/* Keys that order like the numbers; of a NaN without sign the largest. */
DEVICE uint32_t order_bits(float v) {
    union {
        float f;
        uint32_t u;
    } bits = {v};
    return bits.u >> 31 ? ~bits.u : bits.u | 0x80000000u;
}
DEVICE float order_value(uint32_t key) {
    union {
        uint32_t u;
        float f;
    } bits = {key >> 31 ? key & 0x7fffffffu : ~key};
    return bits.f;
}

DEVICE float lane_sum(float v) {
    for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
}
DEVICE double lane_sum(double v) {
    for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
}
DEVICE int lane_sum(int v) {
    for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
}
DEVICE uint32_t lane_max(uint32_t v) {
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint32_t other = shuffle_xor(v, mask);
        v = v > other ? v : other;
    }
    return v;
}

/* Sums and maxima over a block of up to 1024 threads, in one order whatever the row; every thread gets
 * the result. slot: 32 elements of shared memory that nobody else uses meanwhile. */
template <typename T> DEVICE T block_sum(T v, T *slot) {
    const int warps = (int)blockDim.x / 32, warp = (int)threadIdx.x / 32;
    v = lane_sum(v);
    if (threadIdx.x % 32 == 0) slot[warp] = v;
    sync_block();
    T sum = 0;
    for (int i = 0; i < warps; i++) sum += slot[i];
    sync_block();
    return sum;
}
DEVICE uint32_t block_max(uint32_t v, uint32_t *slot) {
    const int warps = (int)blockDim.x / 32, warp = (int)threadIdx.x / 32;
    v = lane_max(v);
    if (threadIdx.x % 32 == 0) slot[warp] = v;
    sync_block();
    uint32_t most = 0;
    for (int i = 0; i < warps; i++) most = most > slot[i] ? most : slot[i];
    sync_block();
    return most;
}

#endif
