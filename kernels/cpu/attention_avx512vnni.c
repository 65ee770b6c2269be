/* attention_avx512vnni.c: attention, 512-bit. */
#if defined(__x86_64__)
#include "columns.h"
#include "vec_avx512.h"

#define NAME(operation) amber_##operation##_avx512vnni
#define TILE_WIDE       1 /* TILE_VECTORS is 4, not 2 */
#include "attention_body.h"

#endif
