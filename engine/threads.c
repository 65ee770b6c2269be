#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define cpu_relax() _mm_pause()
#elif defined(__aarch64__)
#define cpu_relax() __asm__ volatile("yield")
#else
#define cpu_relax() ((void)0)
#endif

/* A decode step runs about ten short jobs per layer with a few microseconds between them. Waking a
 * parked thread costs more than such a job, so a worker spins this many pauses (some 100 us) before
 * it parks, and so does the caller that waits for the last worker. Longer spinning would keep a core
 * from the very thread that is waited for where other programs want the cores too. */
#define SPIN_PAUSES 4000

struct amber_pool {
    int n_threads;
    pthread_t *threads; /* [n_threads - 1] */
    int n_started;

    amber_work_fn work;
    void *ctx;
    atomic_uint generation; /* odd steps of work: a new value starts the workers */
    atomic_int running;     /* workers that have not finished this generation */
    atomic_int parked;      /* workers that need the wake-up call */
    atomic_bool waiting;    /* the caller needs the done call */
    atomic_bool stop;
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
};

struct worker {
    struct amber_pool *pool;
    int ith;
};

static unsigned wait_for_work(struct amber_pool *pool, unsigned seen) {
    for (int i = 0; i < SPIN_PAUSES; i++) {
        unsigned now = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (now != seen) return now;
        cpu_relax();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->parked, 1);
    unsigned now;
    while ((now = atomic_load(&pool->generation)) == seen)
        pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->parked, 1);
    pthread_mutex_unlock(&pool->lock);
    return now;
}

static void *worker_main(void *arg) {
    struct worker self = *(struct worker *)arg;
    free(arg);
    unsigned seen = 0;
    for (;;) {
        seen = wait_for_work(self.pool, seen);
        if (atomic_load(&self.pool->stop)) return NULL;
        self.pool->work(self.pool->ctx, self.ith, self.pool->n_threads);
        if (atomic_fetch_sub(&self.pool->running, 1) == 1 && atomic_load(&self.pool->waiting)) {
            pthread_mutex_lock(&self.pool->lock);
            pthread_cond_signal(&self.pool->done);
            pthread_mutex_unlock(&self.pool->lock);
        }
    }
}

static void wait_for_workers(struct amber_pool *pool) {
    for (int i = 0; i < SPIN_PAUSES; i++) {
        if (atomic_load_explicit(&pool->running, memory_order_acquire) == 0) return;
        cpu_relax();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->waiting, true);
    while (atomic_load(&pool->running) > 0) pthread_cond_wait(&pool->done, &pool->lock);
    atomic_store(&pool->waiting, false);
    pthread_mutex_unlock(&pool->lock);
}

static void start_generation(struct amber_pool *pool) {
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->parked) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
}

amber_status amber_pool_new(int n_threads, struct amber_pool **out, amber_error *err) {
    *out = NULL;
    struct amber_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return amber_fail(err, AMBER_ERR_MEMORY, "threads: no memory for the pool");
    pool->n_threads = n_threads;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->threads = calloc((size_t)n_threads, sizeof *pool->threads);
    for (int i = 1; pool->threads && i < n_threads; i++) {
        struct worker *self = malloc(sizeof *self);
        if (!self) break;
        *self = (struct worker){pool, i};
        if (pthread_create(&pool->threads[i - 1], NULL, worker_main, self) != 0) {
            free(self);
            break;
        }
        pool->n_started++;
    }
    if (!pool->threads || pool->n_started != n_threads - 1) {
        int started = pool->n_started + 1;
        amber_pool_free(pool);
        return amber_fail(err, AMBER_ERR_MEMORY,
                          "threads: expected %d, the system gave %d (ask for fewer threads)",
                          n_threads, started);
    }
    *out = pool;
    return AMBER_OK;
}

void amber_pool_free(struct amber_pool *pool) {
    if (!pool) return;
    atomic_store(&pool->stop, true);
    start_generation(pool);
    for (int i = 0; i < pool->n_started; i++) pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_cond_destroy(&pool->done);
    pthread_mutex_destroy(&pool->lock);
    free(pool->threads);
    free(pool);
}

int amber_pool_threads(const struct amber_pool *pool) {
    return pool->n_threads;
}

void amber_pool_run(struct amber_pool *pool, amber_work_fn work, void *ctx) {
    if (pool->n_threads == 1) {
        work(ctx, 0, 1);
        return;
    }
    pool->work = work;
    pool->ctx = ctx;
    atomic_store(&pool->running, pool->n_threads - 1);
    start_generation(pool);
    work(ctx, 0, pool->n_threads);
    wait_for_workers(pool);
}

#if defined(__linux__)
/* Whole CPUs that the container's quota grants; a large number without a quota. */
static int cgroup_cpus(void) {
    long quota = 0, period = 0;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (!f) return 1 << 20;
    int n = fscanf(f, "%ld %ld", &quota, &period);
    fclose(f);
    if (n != 2 || quota <= 0 || period <= 0) return 1 << 20;
    return (int)((quota + period - 1) / period);
}

int amber_physical_cores(void) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        return amber_max(1, (int)sysconf(_SC_NPROCESSORS_ONLN));
    /* A core counts once, by its first allowed hardware thread. */
    cpu_set_t seen;
    CPU_ZERO(&seen);
    int cores = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        if (!CPU_ISSET(cpu, &seen)) cores++;
        char path[96];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list",
                 cpu);
        FILE *f = fopen(path, "r");
        if (!f) continue;
        int a, b;
        char separator;
        while (fscanf(f, "%d", &a) == 1) {
            b = a;
            if (fscanf(f, "%c", &separator) == 1 && separator == '-' && fscanf(f, "%d", &b) == 1)
                if (fscanf(f, "%c", &separator) != 1) separator = '\n';
            for (int i = a; i <= b && i >= 0 && i < CPU_SETSIZE; i++) CPU_SET(i, &seen);
        }
        fclose(f);
    }
    return amber_max(1, amber_min(cores, cgroup_cpus()));
}
#else
int amber_physical_cores(void) {
    return amber_max(1, (int)sysconf(_SC_NPROCESSORS_ONLN));
}
#endif
