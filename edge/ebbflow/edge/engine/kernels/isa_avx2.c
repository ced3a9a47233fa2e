/* AVX2 and FMA, with and without VNNI: a block's 16 outputs are the lanes of two registers. Compiled twice; EBB_VNNI says
 * which. Without VNNI, `maddubs` adds two products in 16 bits: 4-bit weights cannot overflow them, 8-bit weights are
 * multiplied as magnitudes, with their signs moved to the activations. bfloat16 is widened to float32. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "cpu_x86.h"
#include "kernels.h"

enum { LANES = 8 };
#define QUERIES 4
typedef __m256 lanes;

static inline lanes widen16(const uint16_t *from) {
    __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

static inline lanes widen8(const int8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

#include "passes.h"

enum { AHEAD = 2304, HALF = 8 };

#ifdef EBB_VNNI
static int usable(void) { return (ebb_x86() & EBB_AVXVNNI) != 0; }
#else
static int usable(void) { return (ebb_x86() & EBB_AVX2) != 0; }
#endif

INLINE void prefetch(const uint8_t *p, int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)p + AHEAD + i, _MM_HINT_T0);
}

INLINE __m256i four(const int8_t *codes) {
    int32_t bits;
    memcpy(&bits, codes, 4);
    return _mm256_set1_epi32(bits);
}

/* sum + the four products of each lane; weights 0..15 unsigned. */
INLINE __m256i dot4(__m256i sum, __m256i weights, __m256i a) {
#ifdef EBB_VNNI
    return _mm256_dpbusd_avx_epi32(sum, weights, a);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(weights, a), _mm256_set1_epi16(1)));
#endif
}

#ifdef EBB_VNNI
enum { OFFSET8 = 1 }; /* 8-bit weights are multiplied as they are stored, plus 128 */
#else
enum { OFFSET8 = 0 };
#endif

/* The same with weights stored plus 128. */
INLINE __m256i dot8(__m256i sum, __m256i weights, __m256i a) {
#ifdef EBB_VNNI
    return _mm256_dpbusd_avx_epi32(sum, weights, a);
#else
    __m256i w = _mm256_xor_si256(weights, _mm256_set1_epi8((char)0x80));
    __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
#endif
}

INLINE __m256 scaled(__m256i sum, __m256 scales, float scale, __m256 total) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scales, _mm256_set1_ps(scale)), total);
}

/* Eight of the 16 outputs: `half` is 0 or 1. */
INLINE void tile4(const uint8_t *p, int groups, int m, const ebb_row *x, float *out, size_t stride, int half) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256 total[4];
    for (int j = 0; j < m; j++) total[j] = _mm256_setzero_ps();
    for (int g = 0; g < groups; g++, p += 288) {
        if (!half) prefetch(p, 288);
        __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + half * 16)));
        __m256i sum[4];
        for (int j = 0; j < m; j++) sum[j] = _mm256_set1_epi32(x[j].group[g].sum);
        for (int v = 0; v < 4; v++) {
            __m256i both = _mm256_loadu_si256((const __m256i *)(p + 32 + v * 64 + half * 32));
            __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            for (int j = 0; j < m; j++) {
                const int8_t *a = x[j].group[g].codes + 8 * v;
                sum[j] = dot4(dot4(sum[j], first, four(a)), second, four(a + 4));
            }
        }
        for (int j = 0; j < m; j++) total[j] = scaled(sum[j], scales, x[j].group[g].scale, total[j]);
    }
    for (int j = 0; j < m; j++) _mm256_storeu_ps(out + j * stride + half * HALF, total[j]);
}

INLINE void tile8(const uint8_t *p, int groups, int m, const ebb_row *x, float *out, size_t stride, int half) {
    __m256 total[4];
    for (int j = 0; j < m; j++) total[j] = _mm256_setzero_ps();
    for (int g = 0; g < groups; g++, p += 544) {
        if (!half) prefetch(p, 544);
        __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + half * 16)));
        __m256i sum[4];
        for (int j = 0; j < m; j++) sum[j] = _mm256_set1_epi32(OFFSET8 ? x[j].group[g].sum : 0);
        for (int v = 0; v < 8; v++) {
            __m256i w = _mm256_loadu_si256((const __m256i *)(p + 32 + v * 64 + half * 32));
            for (int j = 0; j < m; j++) sum[j] = dot8(sum[j], w, four(x[j].group[g].codes + 4 * v));
        }
        for (int j = 0; j < m; j++) total[j] = scaled(sum[j], scales, x[j].group[g].scale, total[j]);
    }
    for (int j = 0; j < m; j++) _mm256_storeu_ps(out + j * stride + half * HALF, total[j]);
}

INLINE void tile16(const uint8_t *p, int pairs, int m, const ebb_row *x, float *out, size_t stride, int half) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    __m256 total[4];
    for (int j = 0; j < m; j++) total[j] = _mm256_setzero_ps();
    for (int i = 0; i < pairs; i++, p += 64) {
        if (!half && i % 2 == 0) prefetch(p, 128);
        __m256i both = _mm256_loadu_si256((const __m256i *)(p + half * 32));
        __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(both, high));
        for (int j = 0; j < m; j++) {
            total[j] = _mm256_fmadd_ps(even, _mm256_set1_ps(ebb_from_bf16(x[j].bf16[2 * i])), total[j]);
            total[j] = _mm256_fmadd_ps(odd, _mm256_set1_ps(ebb_from_bf16(x[j].bf16[2 * i + 1])), total[j]);
        }
    }
    for (int j = 0; j < m; j++) _mm256_storeu_ps(out + j * stride + half * HALF, total[j]);
}

/* Four rows at a time, so that sums and weights fit into 16 registers. */
#define DISPATCH(name, tile)                                                                                          \
    static void name(const uint8_t *block, int count, int m, const ebb_row *x, float *out, size_t stride) {           \
        for (int j = 0; j < m; j += 4)                                                                                \
            for (int half = 0; half < 2; half++) {                                                                    \
                switch (m - j) {                                                                                      \
                    case 1: tile(block, count, 1, x + j, out + j * stride, stride, half); break;                      \
                    case 2: tile(block, count, 2, x + j, out + j * stride, stride, half); break;                      \
                    case 3: tile(block, count, 3, x + j, out + j * stride, stride, half); break;                      \
                    default: tile(block, count, 4, x + j, out + j * stride, stride, half); break;                     \
                }                                                                                                     \
            }                                                                                                         \
    }
DISPATCH(block4, tile4)
DISPATCH(block8, tile8)
DISPATCH(block16, tile16)

#ifdef EBB_VNNI
const ebb_kernels ebb_avxvnni = {"avxvnni",    usable,    block4,   block8,    block16,    pass_quantise,
                                 pass_to_bf16, pass_norm, pass_add, pass_gate, pass_attend, QUERIES,
                                 pass_code8, pass_code4};
#else
const ebb_kernels ebb_avx2 = {"avx2",       usable,    block4,   block8,    block16,    pass_quantise,
                              pass_to_bf16, pass_norm, pass_add, pass_gate, pass_attend, QUERIES,
                              pass_code8, pass_code4};
#endif
