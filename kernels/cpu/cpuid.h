/* cpuid.h: which instruction sets this process may use. */
#ifndef AMBER_CPUID_H
#define AMBER_CPUID_H

#include <stdbool.h>

struct amber_cpu {
    bool avx2;       /* AVX2, FMA, F16C, and the system saves their registers */
    bool avxvnni;    /* 256-bit VNNI in its VEX form */
    bool avx512vnni; /* AVX-512 F, BW, VL, DQ, VNNI */
    bool amx;        /* AMX-INT8, and the system has granted the tile registers */
    bool neon;       /* Advanced SIMD with the dot product instructions */
    bool i8mm;       /* the same with the products of INT8 matrices */
};

struct amber_cpu amber_cpu_detect(void);

#endif
