/* test_threads.c: the pool runs every part once, from parked and from spinning workers. */
#include "check.h"
#include "threads.h"

#include <stdatomic.h>
#include <unistd.h>

static atomic_int hits[8];
static atomic_long sum;

static void count(void *ctx, int ith, int nth) {
    (void)nth;
    atomic_fetch_add(&hits[ith], 1);
    atomic_fetch_add(&sum, *(int *)ctx);
}

int main(void) {
    for (int n = 1; n <= 5; n++) {
        struct amber_pool *pool = NULL;
        CHECK_EQ(amber_pool_new(n, &pool, NULL), AMBER_OK);
        CHECK_EQ(amber_pool_threads(pool), n);
        for (int i = 0; i < 8; i++) atomic_store(&hits[i], 0);
        atomic_store(&sum, 0);
        long expected = 0;
        for (int round = 0; round < 2000; round++) {
            if (round % 500 == 499) usleep(20000); /* long enough for the workers to park */
            amber_pool_run(pool, count, &round);
            expected += (long)round * n;
            CHECK_EQ(atomic_load(&sum), expected);
        }
        for (int i = 0; i < 8; i++) CHECK_EQ(atomic_load(&hits[i]), i < n ? 2000 : 0);
        amber_pool_free(pool);
    }
    amber_pool_free(NULL);

    /* The parts of a split cover everything once, in order, cut at multiples of the step. */
    for (int n = 0; n < 70; n++) {
        for (int step = 1; step <= 16; step += 5) {
            for (int nth = 1; nth <= 7; nth++) {
                int at = 0;
                for (int ith = 0; ith < nth; ith++) {
                    int begin, end;
                    amber_split(n, step, ith, nth, &begin, &end);
                    CHECK(begin == at && end >= begin && (begin % step == 0 || begin == n));
                    at = end;
                }
                CHECK_EQ(at, n);
            }
        }
    }
    CHECK(amber_physical_cores() >= 1);
    return check_summary();
}
