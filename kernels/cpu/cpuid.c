/* cpuid.c: feature detection. A feature counts only where the system also saves its registers
 * (XCR0; Intel SDM volume 1, chapters 13 and 14.3), and AMX only after the system has granted it
 * (Linux kernel, Documentation/arch/x86/xstate.rst). */
#include "cpuid.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static uint64_t xgetbv0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static bool tiles_granted(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

struct amber_cpu amber_cpu_detect(void) {
    struct amber_cpu cpu = {0};
    unsigned a, b, c, d, b7, c7, d7, a71 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
    bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !avx || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return cpu;
    if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    uint64_t saved = xgetbv0();
    bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6,
         tiles = (saved & 0x60000) == 0x60000;
    cpu.avx2 = ymm && fma && f16c && (b7 >> 5 & 1);
    cpu.avxvnni = cpu.avx2 && (a71 >> 4 & 1);
    bool avx512 =
        (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1); /* F DQ BW VL */
    cpu.avx512vnni = cpu.avx2 && zmm && avx512 && (c7 >> 11 & 1);
    cpu.amx = cpu.avx512vnni && tiles && (d7 >> 24 & 1) && (d7 >> 25 & 1) && tiles_granted();
    return cpu;
}

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

struct amber_cpu amber_cpu_detect(void) {
    struct amber_cpu cpu = {0};
#if defined(__linux__)
    enum { HWCAP_DOT_PRODUCT = 1 << 20, HWCAP2_MATRIX_INT8 = 1 << 13 };
    cpu.neon = (getauxval(AT_HWCAP) & HWCAP_DOT_PRODUCT) != 0;
    cpu.i8mm = cpu.neon && (getauxval(AT_HWCAP2) & HWCAP2_MATRIX_INT8) != 0;
#elif defined(__APPLE__)
    cpu.neon = true; /* every Apple processor that runs macOS has it */
    int found = 0;
    size_t size = sizeof found;
    cpu.i8mm = sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, NULL, 0) == 0 && found;
#endif
    return cpu;
}

#else
struct amber_cpu amber_cpu_detect(void) {
    return (struct amber_cpu){0};
}
#endif
