/* What an x86 processor can do and the system lets it do. Asked of the processor itself: not every compiler brings the
 * library behind __builtin_cpu_supports. */
#ifndef EBB_CPU_X86_H
#define EBB_CPU_X86_H

#include <cpuid.h>

enum { EBB_AVX2 = 1, EBB_AVXVNNI = 2, EBB_AVX512 = 4 };

static inline int ebb_x86(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    unsigned needs = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29; /* FMA, OSXSAVE, AVX, F16C */
    if ((c & needs) != needs) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* which registers the system keeps for each thread */
    if ((low & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return 0;
    int found = EBB_AVX2;
    unsigned leaves = a, wide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* AVX-512 F, DQ, BW, VL */
    int vnni = (b & wide) == wide && c >> 11 & 1 && (low & 0xe6) == 0xe6;
    if (leaves < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return found;
    if (a >> 4 & 1) found |= EBB_AVXVNNI;
    if (vnni && a >> 5 & 1) found |= EBB_AVX512; /* with BF16 */
    return found;
}

#endif
