/* peak_amx.c: TDPBUSD: a 16 x 16 tile of sums takes 64 products each in one instruction. */
#if defined(__x86_64__)
#include "../peaks.h"

#include <immintrin.h>

/* Tile configuration, palette 1 (Intel SDM volume 1, chapter 18.3). */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
};

/* Constant, as GCC 12 takes only the first eight bytes for read by _tile_loadconfig and would drop
 * stores to the rest. */
static const struct tile_config all_tiles_full = {
    .palette = 1,
    .bytes_per_row = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

static int64_t dot(int64_t steps) {
    _tile_loadconfig(&all_tiles_full);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t s = 0; s < steps; s++) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
    return steps * 4 * 16 * 16 * 64 * 2;
}

static uint64_t read_bytes(const void *p, size_t bytes) {
    return peak_read_streams(p, bytes);
}

const struct amber_peak amber_peak_amx = {"amx", dot, read_bytes};
#else
typedef int amber_peak_amx_absent;
#endif
