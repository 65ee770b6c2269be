/* simt_emulate.h: a block of CUDA threads on one CPU thread. Every CUDA thread is a fiber; it runs
 * until it reaches a barrier or an operation of its whole warp, which the last lane to arrive carries
 * out for all. Slow and exact; for tests. */
#ifndef AMBER_CUDA_SIMT_EMULATE_H
#define AMBER_CUDA_SIMT_EMULATE_H

#include "mma_emulate.h"

#include <stdio.h>
#include <stdlib.h>

#define KERNEL(threads, blocks) static
#define DEVICE                  static inline
#define SHARED                  static
#define DYNAMIC_SHARED(name)    unsigned char *name = simt.shared

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 {
    uint32_t x, y, z, w;
};

enum { SIMT_THREADS = 1024, SIMT_STACK = 64 << 10 };

/* ---- fibers ----
 *
 * simt_context is a place to go on; simt_switch leaves this one for another. ucontext does it
 * everywhere, with a system call each time; on x86-64 a few instructions do it without. */
#if defined(__x86_64__)
typedef void *simt_context; /* the stack pointer, callee-saved registers above it */

extern "C" void simt_switch_stacks(simt_context *from, simt_context to);
asm(".text\n"
    ".local simt_switch_stacks\n"
    ".type simt_switch_stacks, @function\n"
    "simt_switch_stacks:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\n"
    "movq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\n"
    "ret\n");

static inline void simt_switch(simt_context *from, simt_context *to) {
    simt_switch_stacks(from, *to);
}
static inline void simt_prepare(simt_context *c, char *stack, void (*enter)(void)) {
    void **top = (void **)(void *)(stack + SIMT_STACK); /* malloc aligned it to 16 */
    memset(top - 8, 0, 8 * sizeof *top);
    top[-2] = (void *)enter;
    *c = top - 8;
}
#else
#include <ucontext.h>
typedef ucontext_t simt_context;

static inline void simt_switch(simt_context *from, simt_context *to) {
    swapcontext(from, to);
}
static inline void simt_prepare(simt_context *c, char *stack, void (*enter)(void)) {
    getcontext(c);
    c->uc_stack.ss_sp = stack;
    c->uc_stack.ss_size = SIMT_STACK;
    c->uc_link = NULL;
    makecontext(c, enter, 0);
}
#endif

/* What a lane brings to an operation of its warp, and takes away. */
struct simt_operands {
    const uint32_t *a, *b, *e;
    void *c;
    uint64_t value, result;
    int mask;
};
enum simt_kind {
    SIMT_SHUFFLE,
    SIMT_MMA_S8,
    SIMT_MMA_SP_S8,
    SIMT_MMA_F16,
    SIMT_LDMATRIX,
    SIMT_LDMATRIX_T
};

struct simt_fiber {
    simt_context context;
    char *stack;
    bool done;
    long waits_warp, waits_block; /* the generation that has to pass; -1: none */
};

struct simt_state {
    simt_fiber fiber[SIMT_THREADS];
    simt_context scheduler;
    int n, current, done, arrived;
    long generation;
    struct {
        simt_operands *lane[32];
        int arrived, kind;
        long generation;
    } warp[SIMT_THREADS / 32];
    unsigned char *shared;
    dim3 block, block_dim, grid_dim;
    void (*run)(const void *args);
    const void *args;
};
static simt_state simt;

#define threadIdx (dim3((unsigned)simt.current, 0, 0))
#define blockIdx  (simt.block)
#define blockDim  (simt.block_dim)
#define gridDim   (simt.grid_dim)

[[noreturn]] static inline void simt_fail(const char *what) {
    fprintf(stderr, "emulated block: %s\n", what);
    abort();
}

static inline void simt_yield(void) {
    simt_switch(&simt.fiber[simt.current].context, &simt.scheduler);
}

static inline void sync_block(void) {
    simt_fiber *me = &simt.fiber[simt.current];
    if (++simt.arrived + simt.done == simt.n) {
        simt.arrived = 0;
        simt.generation++;
        return;
    }
    me->waits_block = simt.generation;
    simt_yield();
}

static inline void simt_carry_out(int kind, simt_operands *const lane[32]) {
    const uint32_t *a[32], *b[32], *e[32];
    for (int l = 0; l < 32; l++) a[l] = lane[l]->a, b[l] = lane[l]->b, e[l] = lane[l]->e;
    if (kind == SIMT_SHUFFLE) {
        for (int l = 0; l < 32; l++) lane[l]->result = lane[l ^ lane[l]->mask]->value;
    } else if (kind == SIMT_LDMATRIX || kind == SIMT_LDMATRIX_T) {
        uint32_t (*out[32])[4];
        const void *row[32];
        for (int l = 0; l < 32; l++) out[l] = (uint32_t (*)[4])lane[l]->c, row[l] = a[l];
        emulate_ldmatrix(out, row, kind == SIMT_LDMATRIX_T);
    } else if (kind == SIMT_MMA_F16) {
        float (*c[32])[4];
        for (int l = 0; l < 32; l++) c[l] = (float (*)[4])lane[l]->c;
        emulate_mma_f16(c, a, b);
    } else {
        int32_t (*c[32])[4];
        for (int l = 0; l < 32; l++) c[l] = (int32_t (*)[4])lane[l]->c;
        if (kind == SIMT_MMA_S8)
            emulate_mma_s8(c, a, b);
        else if (!emulate_mma_sp_s8(c, a, b, e))
            simt_fail("metadata names a pair that is not ordered");
    }
}

static inline void simt_warp(int kind, simt_operands *mine) {
    auto *warp = &simt.warp[simt.current / 32];
    if (warp->arrived > 0 && warp->kind != kind) simt_fail("lanes of a warp have gone apart");
    warp->kind = kind;
    warp->lane[simt.current % 32] = mine;
    if (++warp->arrived == 32) {
        warp->arrived = 0;
        warp->generation++;
        simt_carry_out(kind, warp->lane);
        return;
    }
    simt.fiber[simt.current].waits_warp = warp->generation;
    simt_yield();
}

static inline void simt_enter(void) {
    simt.run(simt.args);
    simt_fiber *me = &simt.fiber[simt.current];
    me->done = true;
    simt.done++;
    if (simt.arrived > 0 && simt.arrived + simt.done == simt.n) {
        simt.arrived = 0;
        simt.generation++;
    }
    simt_switch(&me->context, &simt.scheduler);
}

static inline bool simt_waits(int i) {
    simt_fiber *f = &simt.fiber[i];
    if (f->waits_warp == simt.warp[i / 32].generation || f->waits_block == simt.generation)
        return true;
    f->waits_warp = f->waits_block = -1;
    return false;
}

static inline void simt_run_block(void) {
    simt.done = simt.arrived = 0;
    for (int w = 0; w < simt.n / 32; w++) simt.warp[w].arrived = 0;
    for (int i = 0; i < simt.n; i++) {
        simt_fiber *f = &simt.fiber[i];
        if (!f->stack) f->stack = (char *)malloc(SIMT_STACK);
        if (!f->stack) simt_fail("no memory");
        simt_prepare(&f->context, f->stack, simt_enter);
        f->done = false;
        f->waits_warp = f->waits_block = -1;
    }
    while (simt.done < simt.n) {
        bool moved = false;
        for (int i = 0; i < simt.n; i++) {
            if (simt.fiber[i].done || simt_waits(i)) continue;
            simt.current = i;
            simt_switch(&simt.scheduler, &simt.fiber[i].context);
            moved = true;
        }
        if (!moved) simt_fail("all threads wait");
    }
}

/* Runs a kernel of one argument over a grid, block after block. Shared memory starts as rubbish. */
template <typename Args>
static inline void simt_launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared,
                               const Args &args) {
    struct call {
        void (*kernel)(Args);
        const Args *args;
    } c = {kernel, &args};
    if (threads % 32 || threads > SIMT_THREADS) simt_fail("threads of a block");
    simt.run = [](const void *p) { ((const call *)p)->kernel(*((const call *)p)->args); };
    simt.args = &c;
    simt.n = threads;
    simt.block_dim = dim3((unsigned)threads);
    simt.grid_dim = grid;
    simt.shared = (unsigned char *)aligned_alloc(128, (shared + 255) / 128 * 128);
    if (!simt.shared) simt_fail("no memory");
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                memset(simt.shared, 0xa5, shared);
                simt.block = dim3(x, y, z);
                simt_run_block();
            }
    free(simt.shared);
}

template <typename T> static inline T simt_shuffle(T v, int mask) {
    simt_operands o = {};
    memcpy(&o.value, &v, sizeof v);
    o.mask = mask;
    simt_warp(SIMT_SHUFFLE, &o);
    memcpy(&v, &o.result, sizeof v);
    return v;
}
static inline float shuffle_xor(float v, int mask) {
    return simt_shuffle(v, mask);
}
static inline int shuffle_xor(int v, int mask) {
    return simt_shuffle(v, mask);
}
static inline uint32_t shuffle_xor(uint32_t v, int mask) {
    return simt_shuffle(v, mask);
}
static inline double shuffle_xor(double v, int mask) {
    return simt_shuffle(v, mask);
}
static inline void add_shared(int *at, int v) {
    *at += v;
}
static inline int dot4(uint32_t a, uint32_t b, int c) {
    for (int i = 0; i < 4; i++) c += emulate_byte(a, i) * emulate_byte(b, i);
    return c;
}
static inline uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t both = (uint64_t)y << 32 | x;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++)
        out |= (uint32_t)(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return out;
}
static inline uint16_t half_bits(float v) {
    return f16_bits_from_f32(v);
}
static inline float float_of_half(uint16_t h) {
    return f32_from_f16_bits(h);
}
static inline uint4 load16(const void *p) {
    uint4 v;
    memcpy(&v, p, 16);
    return v;
}
static inline void mma_s8(int (&c)[4], const uint32_t *a, const uint32_t *b) {
    simt_operands o = {};
    o.a = a, o.b = b, o.c = &c;
    simt_warp(SIMT_MMA_S8, &o);
}
static inline void mma_sp_s8(int (&c)[4], const uint32_t *a, const uint32_t *b, uint32_t e) {
    simt_operands o = {};
    o.a = a, o.b = b, o.e = &e, o.c = &c;
    simt_warp(SIMT_MMA_SP_S8, &o);
}
static inline void mma_f16(float (&c)[4], const uint32_t *a, const uint32_t *b) {
    simt_operands o = {};
    o.a = a, o.b = b, o.c = &c;
    simt_warp(SIMT_MMA_F16, &o);
}
template <bool TRANSPOSED> static inline void load_matrices(uint32_t *out, const uint16_t *row) {
    simt_operands o = {};
    o.a = (const uint32_t *)(const void *)row, o.c = out;
    simt_warp(TRANSPOSED ? SIMT_LDMATRIX_T : SIMT_LDMATRIX, &o);
}
static inline void copy16(void *shared, const void *global, bool exists) {
    if (exists)
        memcpy(shared, global, 16);
    else
        memset(shared, 0, 16);
}
static inline void copy_commit(void) {}
template <int left> static inline void copy_wait(void) {}

#endif
