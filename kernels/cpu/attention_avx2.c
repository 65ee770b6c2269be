/* attention_avx2.c: attention, 256-bit. */
#if defined(__x86_64__)
#include "columns.h"
#include "vec_avx2.h"

#define NAME(operation) amber_##operation##_avx2
#define TILE_WIDE       0 /* TILE_VECTORS is 4, not 2 */
#include "attention_body.h"

#endif
