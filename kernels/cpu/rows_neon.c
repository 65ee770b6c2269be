/* rows_neon.c: the row operations and the float32 matrix product, Advanced SIMD. */
#if defined(__aarch64__)
#include "columns.h"
#include "vec_neon.h"

#define NAME(operation) amber_##operation##_neon
#include "rows_body.h"

#endif
