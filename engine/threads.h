/* threads.h: a small pool of threads that run one function over a split of work. */
#ifndef AMBER_THREADS_H
#define AMBER_THREADS_H

#include "common.h"

struct amber_pool;

/* work(ctx, ith, nth) is called once on each of nth threads, the caller's among them (ith 0). */
typedef void (*amber_work_fn)(void *ctx, int ith, int nth);

/* n_threads >= 1, counting the caller. */
amber_status amber_pool_new(int n_threads, struct amber_pool **out, amber_error *err);
void amber_pool_free(struct amber_pool *pool);
int amber_pool_threads(const struct amber_pool *pool);
/* Returns when all have finished. One run at a time: callers on several threads hold a lock. */
void amber_pool_run(struct amber_pool *pool, amber_work_fn work, void *ctx);

/* The part of 0..n-1 that belongs to ith of nth, cut at multiples of `step`. */
static inline void amber_split(int n, int step, int ith, int nth, int *begin, int *end) {
    int units = (n + step - 1) / step;
    int64_t a = (int64_t)units * ith / nth, b = (int64_t)units * (ith + 1) / nth;
    *begin = (int)(a * step < n ? a * step : n);
    *end = (int)(b * step < n ? b * step : n);
}

int amber_physical_cores(void);

#endif
