/* attention_neon.c: attention, Advanced SIMD. */
#if defined(__aarch64__)
#include "columns.h"
#include "vec_neon.h"

#define NAME(operation) amber_##operation##_neon
#define TILE_WIDE       1 /* TILE_VECTORS is 4, not 2 */
#include "attention_body.h"

#endif
