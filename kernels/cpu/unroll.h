/* unroll.h: UNROLL before a loop of constant length has it unrolled completely. Arrays of vectors
 * that such loops index become registers only then. */
#ifndef AMBER_UNROLL_H
#define AMBER_UNROLL_H

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

#endif
