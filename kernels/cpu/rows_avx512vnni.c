/* rows_avx512vnni.c: the row operations and the float32 matrix product, 512-bit. */
#if defined(__x86_64__)
#include "columns.h"
#include "vec_avx512.h"

#define NAME(operation) amber_##operation##_avx512vnni
#include "rows_body.h"

#endif
