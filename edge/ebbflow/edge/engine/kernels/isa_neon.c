/* Arm NEON with the dot-product instructions, and with the matrix product of two rows (i8mm) where there is one: four
 * outputs lie in a register. Compiled twice; EBB_I8MM says which. bfloat16 is widened to float32. */
#include <arm_neon.h>
#include <math.h>
#include <string.h>
#include <sys/auxv.h>

#include "kernels.h"

enum { LANES = 4 };
#define QUERIES 8
typedef float32x4_t lanes;

static inline lanes widen16(const uint16_t *from) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16)); }

static inline lanes widen8(const int8_t *from) {
    int32_t bits;
    memcpy(&bits, from, 4);
    int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bits)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

#include "passes.h"

enum { HALF = 8, HAS_DOT = 1 << 20, HAS_I8MM = 1 << 13 }; /* HWCAP_ASIMDDP, HWCAP2_I8MM */

static int usable(void) {
#ifdef EBB_I8MM
    if (!(getauxval(AT_HWCAP2) & HAS_I8MM)) return 0;
#endif
    return (getauxval(AT_HWCAP) & HAS_DOT) != 0;
}

/* Inputs 4v .. 4v+3 of outputs 4q .. 4q+3, signed. */
INLINE int8x16_t weights8(const uint8_t *group, int v, int q) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(group + 32 + v * 64 + q * 16), vdupq_n_u8(0x80)));
}

/* The same for 4 bits: one load holds inputs of chunk 2v in the low and of chunk 2v + 1 in the high nibbles. */
INLINE int8x16x2_t weights4(const uint8_t *group, int v, int q) {
    uint8x16_t both = vld1q_u8(group + 32 + v * 64 + q * 16);
    int8x16_t eight = vdupq_n_s8(8);
    return (int8x16x2_t){{vsubq_s8(vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), eight),
                          vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(both, 4)), eight)}};
}

INLINE float32x4_t scales_of(const uint8_t *group, int q) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)group + 4 * q)));
}

INLINE float32x4_t scaled(int32x4_t sum, float32x4_t scales, float scale, float32x4_t total) {
    return vfmaq_f32(total, vcvtq_f32_s32(sum), vmulq_n_f32(scales, scale));
}

/* The weights of chunk v for outputs 4q .. 4q+3, whatever the bits. */
INLINE void load(const uint8_t *group, int bits, int q, int8x16_t w[8]) {
    for (int v = 0; v < 8; v += 2) {
        if (bits == 4) {
            int8x16x2_t two = weights4(group, v / 2, q);
            w[v] = two.val[0];
            w[v + 1] = two.val[1];
        } else {
            w[v] = weights8(group, v, q);
            w[v + 1] = weights8(group, v + 1, q);
        }
    }
}

/* Eight outputs for m rows of activations. */
INLINE void dot_tile(const uint8_t *p, int groups, int bits, int m, const ebb_row *x, float *out, size_t stride, int half) {
    float32x4_t total[4][2];
    for (int j = 0; j < m; j++) total[j][0] = total[j][1] = vdupq_n_f32(0);
    for (int g = 0; g < groups; g++, p += bits == 4 ? 288 : 544) {
        __builtin_prefetch(p + 2304);
        for (int q = 0; q < 2; q++) {
            int8x16_t w[8];
            load(p, bits, 2 * half + q, w);
            float32x4_t scales = scales_of(p, 2 * half + q);
            for (int j = 0; j < m; j++) {
                int8x16_t a = vld1q_s8(x[j].group[g].codes), b = vld1q_s8(x[j].group[g].codes + 16);
                int32x4_t sum = vdotq_laneq_s32(vdupq_n_s32(0), w[0], a, 0);
                sum = vdotq_laneq_s32(sum, w[1], a, 1);
                sum = vdotq_laneq_s32(sum, w[2], a, 2);
                sum = vdotq_laneq_s32(sum, w[3], a, 3);
                sum = vdotq_laneq_s32(sum, w[4], b, 0);
                sum = vdotq_laneq_s32(sum, w[5], b, 1);
                sum = vdotq_laneq_s32(sum, w[6], b, 2);
                sum = vdotq_laneq_s32(sum, w[7], b, 3);
                total[j][q] = scaled(sum, scales, x[j].group[g].scale, total[j][q]);
            }
        }
    }
    for (int j = 0; j < m; j++)
        for (int q = 0; q < 2; q++) vst1q_f32(out + j * stride + half * HALF + 4 * q, total[j][q]);
}

#ifdef EBB_I8MM
/* Four outputs for two rows of activations: `vmmla` multiplies two outputs with two rows over eight inputs at once. */
INLINE void pair_tile(const uint8_t *p, int groups, int bits, const ebb_row *x, float *out, size_t stride, int q) {
    float32x4_t total[2] = {vdupq_n_f32(0), vdupq_n_f32(0)};
    for (int g = 0; g < groups; g++, p += bits == 4 ? 288 : 544) {
        __builtin_prefetch(p + 2304);
        int8x16_t w[8];
        load(p, bits, q, w);
        int32x4_t upper = vdupq_n_s32(0), lower = vdupq_n_s32(0); /* outputs 0 and 1, outputs 2 and 3 */
        for (int v = 0; v < 8; v += 2) {
            int32x4_t first = vreinterpretq_s32_s8(w[v]), second = vreinterpretq_s32_s8(w[v + 1]);
            int8x16_t a = vcombine_s8(vld1_s8(x[0].group[g].codes + 4 * v), vld1_s8(x[1].group[g].codes + 4 * v));
            upper = vmmlaq_s32(upper, vreinterpretq_s8_s32(vzip1q_s32(first, second)), a);
            lower = vmmlaq_s32(lower, vreinterpretq_s8_s32(vzip2q_s32(first, second)), a);
        }
        float32x4_t scales = scales_of(p, q);
        total[0] = scaled(vuzp1q_s32(upper, lower), scales, x[0].group[g].scale, total[0]);
        total[1] = scaled(vuzp2q_s32(upper, lower), scales, x[1].group[g].scale, total[1]);
    }
    vst1q_f32(out + 4 * q, total[0]);
    vst1q_f32(out + stride + 4 * q, total[1]);
}
#endif

INLINE void coded(const uint8_t *block, int groups, int bits, int m, const ebb_row *x, float *out, size_t stride) {
    int j = 0;
#ifdef EBB_I8MM
    for (; j + 1 < m; j += 2)
        for (int q = 0; q < 4; q++) pair_tile(block, groups, bits, x + j, out + j * stride, stride, q);
#endif
    for (; j < m; j += 4)
        for (int half = 0; half < 2; half++) {
            switch (m - j) {
                case 1: dot_tile(block, groups, bits, 1, x + j, out + j * stride, stride, half); break;
                case 2: dot_tile(block, groups, bits, 2, x + j, out + j * stride, stride, half); break;
                case 3: dot_tile(block, groups, bits, 3, x + j, out + j * stride, stride, half); break;
                default: dot_tile(block, groups, bits, 4, x + j, out + j * stride, stride, half); break;
            }
        }
}

static void block4(const uint8_t *block, int groups, int m, const ebb_row *x, float *out, size_t stride) {
    coded(block, groups, 4, m, x, out, stride);
}

static void block8(const uint8_t *block, int groups, int m, const ebb_row *x, float *out, size_t stride) {
    coded(block, groups, 8, m, x, out, stride);
}

static void block16(const uint8_t *block, int pairs, int m, const ebb_row *x, float *out, size_t stride) {
    const uint32x4_t high = vdupq_n_u32(0xffff0000u);
    for (int j = 0; j < m; j++) {
        float32x4_t total[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
        const uint8_t *p = block;
        for (int i = 0; i < pairs; i++, p += 64) {
            float even = ebb_from_bf16(x[j].bf16[2 * i]), odd = ebb_from_bf16(x[j].bf16[2 * i + 1]);
            for (int q = 0; q < 4; q++) {
                uint32x4_t both = vld1q_u32((const uint32_t *)p + 4 * q);
                total[q] = vfmaq_n_f32(total[q], vreinterpretq_f32_u32(vshlq_n_u32(both, 16)), even);
                total[q] = vfmaq_n_f32(total[q], vreinterpretq_f32_u32(vandq_u32(both, high)), odd);
            }
        }
        for (int q = 0; q < 4; q++) vst1q_f32(out + j * stride + 4 * q, total[q]);
    }
}

#ifdef EBB_I8MM
const ebb_kernels ebb_i8mm = {"i8mm",       usable,    block4,   block8,    block16,    pass_quantise,
                              pass_to_bf16, pass_norm, pass_add, pass_gate, pass_attend, QUERIES,
                              pass_code8, pass_code4};
#else
const ebb_kernels ebb_dotprod = {"dotprod",    usable,    block4,   block8,    block16,    pass_quantise,
                                 pass_to_bf16, pass_norm, pass_add, pass_gate, pass_attend, QUERIES,
                                 pass_code8, pass_code4};
#endif
