/* rows_avx2.c: the row operations and the float32 matrix product, 256-bit. */
#if defined(__x86_64__)
#include "columns.h"
#include "vec_avx2.h"

#define NAME(operation) amber_##operation##_avx2
#include "rows_body.h"

#endif
