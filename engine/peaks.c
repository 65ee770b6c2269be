/* peaks.c: measures the two limits of this machine that prefill and decode run into. */
#include "common.h"
#include "kernels.h"
#include "peaks.h"
#include "threads.h"

#include <string.h>
#include <unistd.h>

#define MAX_THREADS 1024
/* The best of many short trials counts: whatever else runs only makes a trial slower, and a short
 * one has a chance to meet a quiet moment of all threads. */
#define MULTIPLY_TRIALS  100
#define MULTIPLY_SECONDS 0.002 /* of a trial; long against the start of the threads */
#define BUFFER_BYTES     ((int64_t)1 << 30)
#define SECTION_BYTES    ((int64_t)64 << 20) /* of a trial that reads */
#define READ_PASSES      4                   /* over the whole buffer */
#define STEP_BYTES       16384               /* of the split over the threads */

static const struct amber_peak *find_peak(const char *isa) {
    static const struct amber_peak *const peaks[] = {
#if defined(__x86_64__)
        &amber_peak_amx, &amber_peak_avx512vnni, &amber_peak_avxvnni, &amber_peak_avx2,
#elif defined(__aarch64__)
        &amber_peak_i8mm,
        &amber_peak_neon,
#endif
        &amber_peak_ref,
    };
    for (size_t i = 0; i < sizeof peaks / sizeof peaks[0]; i++)
        if (strcmp(peaks[i]->isa, isa) == 0) return peaks[i];
    return NULL;
}

struct job {
    const struct amber_peak *peak;
    int64_t steps;
    uint8_t *section; /* [units * STEP_BYTES] */
    int units;
    volatile int64_t operations; /* of one thread */
    volatile uint64_t sink;
};

static void multiply(void *ctx, int ith, int nth) {
    struct job *job = ctx;
    (void)nth;
    int64_t operations = job->peak->dot(job->steps);
    if (ith == 0) job->operations = operations;
}

static void fill(void *ctx, int ith, int nth) {
    struct job *job = ctx;
    int begin, end;
    amber_split(job->units, 1, ith, nth, &begin, &end);
    /* Written, since pages that nobody wrote may all be the same page of zeros. */
    memset(job->section + (int64_t)begin * STEP_BYTES, ith + 1, (size_t)(end - begin) * STEP_BYTES);
}

static void read_part(void *ctx, int ith, int nth) {
    struct job *job = ctx;
    int begin, end;
    amber_split(job->units, 1, ith, nth, &begin, &end);
    uint64_t x = job->peak->read(job->section + (int64_t)begin * STEP_BYTES,
                                 (size_t)(end - begin) * STEP_BYTES);
    if (ith == 0) job->sink = x;
}

static double best_multiply(struct amber_pool *pool, struct job *job) {
    double best = 0;
    job->steps = 256;
    for (int trial = 0; trial < MULTIPLY_TRIALS;) {
        double start = amber_seconds();
        amber_pool_run(pool, multiply, job);
        double seconds = amber_seconds() - start;
        if (seconds < MULTIPLY_SECONDS && job->steps < (INT64_C(1) << 40)) {
            job->steps *= 2;
            continue;
        }
        double rate = (double)job->operations * amber_pool_threads(pool) / seconds;
        if (rate > best) best = rate;
        trial++;
    }
    return best;
}

/* Every section is read in turn, so a cache smaller than the buffer has forgotten it by the next
 * pass. */
static double best_read(struct amber_pool *pool, struct job *job, uint8_t *buffer, int sections) {
    double best = 0;
    for (int trial = 0; trial < (1 + READ_PASSES) * sections; trial++) {
        job->section = buffer + trial % sections * SECTION_BYTES;
        double start = amber_seconds();
        amber_pool_run(pool, trial < sections ? fill : read_part, job);
        double rate = (double)SECTION_BYTES / (amber_seconds() - start);
        if (trial >= sections && rate > best) best = rate;
    }
    return best;
}

amber_status amber_measure_peaks(int32_t threads, const char *isa, double *int8_ops_per_second,
                                 double *read_bytes_per_second, amber_error *err) {
    *int8_ops_per_second = *read_bytes_per_second = 0;
    if (threads < 1 || threads > MAX_THREADS)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "peaks: expected 1..%d threads, found %d",
                          MAX_THREADS, threads);
    struct amber_kernels kernels;
    const struct amber_peak *peak = NULL;
    if (amber_kernels_select(&kernels, isa)) peak = find_peak(kernels.isa);
    if (!peak)
        return amber_fail(err, AMBER_ERR_DEVICE, "peaks: expected one of \"%s\", found \"%.40s\"",
                          amber_kernels_list(), isa ? isa : "");

    /* An eighth of the memory at most: a small machine has a small cache, too. */
    int64_t bytes = BUFFER_BYTES, memory = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    if (memory > 0 && bytes > memory / 8) bytes = memory / 8;
    int sections = amber_max(1, (int)(bytes / SECTION_BYTES));
    struct job job = {.peak = peak, .units = (int)(SECTION_BYTES / STEP_BYTES)};
    uint8_t *buffer = amber_alloc((size_t)(sections * SECTION_BYTES));
    if (!buffer)
        return amber_fail(err, AMBER_ERR_MEMORY, "peaks: no memory for a buffer of %d MB",
                          (int)(sections * SECTION_BYTES >> 20));
    struct amber_pool *pool;
    amber_status status = amber_pool_new(threads, &pool, err);
    if (status == AMBER_OK) {
        *int8_ops_per_second = best_multiply(pool, &job);
        *read_bytes_per_second = best_read(pool, &job, buffer, sections);
        amber_pool_free(pool);
    }
    amber_free(buffer);
    return status;
}
