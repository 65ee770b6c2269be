#include "score.h"
#include "dequant.h"

#include <math.h>
#include <string.h>

/* Rows are dealt in a fixed number of chunks with an accumulator each, added up in order: the
 * result is the same for every thread count. */
#define CHUNKS 16
#define BINS   65536

struct moments {
    double *sum, *sum2; /* [CHUNKS, n_in] */
    double *count;      /* [CHUNKS, n_in] */
};

struct scan {
    const struct gguf_tensor *tensor;
    int n_out, n_in;
    float *rows; /* [threads, n_in] */
    void (*visit)(const struct scan *s, int chunk, const float *row);

    uint32_t *hist; /* [CHUNKS, bins] */
    int n_prefix;   /* second level: the upper halves that are counted */
    uint32_t prefix[4];
    float low, high; /* percentiles */
    bool all;        /* moments over all entries, not only those within the percentiles */
    struct moments m;
};

static void scan_work(void *ctx, int ith, int nth) {
    const struct scan *s = ctx;
    const struct type_info *type = type_info(s->tensor->type);
    uint64_t row_bytes = type_row_bytes(s->tensor->type, (uint64_t)s->n_in);
    float *row = s->rows + (int64_t)ith * s->n_in;
    for (int chunk = ith; chunk < CHUNKS; chunk += nth) {
        int begin, end;
        amber_split(s->n_out, 1, chunk, CHUNKS, &begin, &end);
        for (int o = begin; o < end; o++) {
            type->to_float(s->tensor->data + (uint64_t)o * row_bytes, row, s->n_in);
            s->visit(s, chunk, row);
        }
    }
}

/* Maps floats to integers of the same order. */
static uint32_t order_key(float v) {
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static float key_value(uint32_t key) {
    uint32_t u = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

static void count_upper(const struct scan *s, int chunk, const float *row) {
    uint32_t *hist = s->hist + (int64_t)chunk * BINS;
    for (int k = 0; k < s->n_in; k++) hist[order_key(row[k]) >> 16]++;
}

static void count_lower(const struct scan *s, int chunk, const float *row) {
    uint32_t *hist = s->hist + (int64_t)chunk * BINS * s->n_prefix;
    for (int k = 0; k < s->n_in; k++) {
        uint32_t key = order_key(row[k]);
        for (int i = 0; i < s->n_prefix; i++)
            if (key >> 16 == s->prefix[i]) hist[(int64_t)i * BINS + (key & 0xffff)]++;
    }
}

static void add_moments(const struct scan *s, int chunk, const float *row) {
    double *sum = s->m.sum + (int64_t)chunk * s->n_in, *sum2 = s->m.sum2 + (int64_t)chunk * s->n_in;
    double *count = s->m.count + (int64_t)chunk * s->n_in;
    for (int k = 0; k < s->n_in; k++) {
        double v = row[k];
        double kept = s->all || (row[k] >= s->low && row[k] <= s->high);
        sum[k] += kept * v;
        sum2[k] += kept * v * v;
        count[k] += kept;
    }
}

/* Adds the chunks' histograms; hist [CHUNKS, n] -> total [n]. */
static void add_chunks(const uint32_t *hist, int64_t n, uint64_t *total) {
    memset(total, 0, sizeof *total * (size_t)n);
    for (int c = 0; c < CHUNKS; c++)
        for (int64_t i = 0; i < n; i++) total[i] += hist[c * n + i];
}

/* The bin that holds the element of this rank, and the rank within the bin. */
static uint32_t find_bin(const uint64_t *total, uint64_t *rank) {
    uint32_t bin = 0;
    while (*rank >= total[bin]) *rank -= total[bin++];
    return bin;
}

/* Exact percentiles low and high with linear interpolation between neighbours, by counting: the
 * upper 16 bits of the keys first, then the lower 16 of the bins that matter. */
static void find_percentiles(struct scan *s, struct amber_pool *pool, uint64_t *total, double low,
                             double high) {
    const double at[2] = {low, high};
    const uint64_t n = (uint64_t)s->n_out * (uint64_t)s->n_in;
    uint64_t rank[4];
    for (int i = 0; i < 2; i++) {
        rank[2 * i] = (uint64_t)(at[i] * (double)(n - 1));
        rank[2 * i + 1] = rank[2 * i] + 1 < n ? rank[2 * i] + 1 : rank[2 * i];
    }
    s->visit = count_upper;
    s->n_prefix = 1;
    amber_pool_run(pool, scan_work, s);
    add_chunks(s->hist, BINS, total);
    for (int i = 0; i < 4; i++) s->prefix[i] = find_bin(total, &rank[i]);

    s->visit = count_lower;
    s->n_prefix = 4;
    memset(s->hist, 0, sizeof *s->hist * CHUNKS * BINS * 4);
    amber_pool_run(pool, scan_work, s);
    add_chunks(s->hist, 4 * BINS, total);
    double value[4];
    for (int i = 0; i < 4; i++)
        value[i] = key_value(s->prefix[i] << 16 | find_bin(total + i * BINS, &rank[i]));
    for (int i = 0; i < 2; i++) {
        double position = at[i] * (double)(n - 1), part = position - floor(position);
        *(i ? &s->high : &s->low) =
            (float)(value[2 * i] + part * (value[2 * i + 1] - value[2 * i]));
    }
}

/* Column norms around the mean -> f with the smallest at 1. */
static void finish(const struct scan *s, double mean, float *f) {
    double least = INFINITY;
    for (int k = 0; k < s->n_in; k++) {
        double sum = 0, sum2 = 0, count = 0;
        for (int c = 0; c < CHUNKS; c++) {
            sum += s->m.sum[(int64_t)c * s->n_in + k];
            sum2 += s->m.sum2[(int64_t)c * s->n_in + k];
            count += s->m.count[(int64_t)c * s->n_in + k];
        }
        double norm = sqrt(fmax(sum2 - 2 * mean * sum + count * mean * mean, 0));
        f[k] = (float)norm;
        if (norm > 0) least = fmin(least, norm);
    }
    for (int k = 0; k < s->n_in; k++) f[k] = f[k] > 0 ? (float)(f[k] / least) : 1.0f;
}

static double overall_mean(const struct scan *s) {
    double sum = 0, count = 0;
    for (int64_t i = 0; i < (int64_t)CHUNKS * s->n_in; i++) {
        sum += s->m.sum[i];
        count += s->m.count[i];
    }
    return count > 0 ? sum / count : 0;
}

amber_status score_channels(const struct gguf_tensor *tensor, int n_out, int n_in,
                            enum criterion criterion, struct amber_pool *pool, float *f,
                            amber_error *err) {
    const size_t moments = (size_t)CHUNKS * (size_t)n_in;
    struct scan s = {.tensor = tensor, .n_out = n_out, .n_in = n_in};
    s.rows = amber_alloc(sizeof *s.rows * (size_t)amber_pool_threads(pool) * (size_t)n_in);
    s.m.sum = amber_alloc(sizeof(double) * 3 * moments);
    uint64_t *total = amber_alloc(sizeof *total * 4 * BINS);
    s.hist = amber_alloc(sizeof *s.hist * CHUNKS * BINS * 4);
    amber_status status = AMBER_OK;
    if (!s.rows || !s.m.sum || !s.hist || !total) {
        status = amber_fail(err, AMBER_ERR_MEMORY, "sparse: no memory to score %d channels", n_in);
        goto done;
    }
    s.m.sum2 = s.m.sum + moments;
    s.m.count = s.m.sum2 + moments;

    double mean = 0;
    if (criterion == CRITERION_NORM) {
        s.all = true;
    } else {
        find_percentiles(&s, pool, total, 0.005, 0.995);
    }
    s.visit = add_moments;
    amber_pool_run(pool, scan_work, &s);
    if (criterion != CRITERION_NORM) mean = overall_mean(&s);
    if (criterion == CRITERION_AMBER_B) {
        memset(s.m.sum, 0, sizeof(double) * 3 * moments);
        s.all = true;
        amber_pool_run(pool, scan_work, &s);
    }
    finish(&s, mean, f);
done:
    amber_free(s.hist);
    amber_free(total);
    amber_free(s.m.sum);
    amber_free(s.rows);
    return status;
}
