/* AVX-512 with VNNI and BF16: a block's 16 outputs are the 16 lanes of a register. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "cpu_x86.h"
#include "kernels.h"

enum { LANES = 16 };
#define QUERIES 8
typedef __m512 lanes;

static inline lanes widen16(const uint16_t *from) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

static inline lanes widen8(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

#define PASS_OWN_QUANTISE
#include "passes.h"

enum { AHEAD = 2304 }; /* bytes to prefetch ahead: about eight groups of 4 bits */

static int usable(void) { return (ebb_x86() & EBB_AVX512) != 0; }

INLINE void prefetch(const uint8_t *p, int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)p + AHEAD + i, _MM_HINT_T0);
}

INLINE __m512i four(const int8_t *codes) { /* the same four activations in every lane */
    int32_t bits;
    memcpy(&bits, codes, 4);
    return _mm512_set1_epi32(bits);
}

INLINE __m512 scaled(__m512i sum, __m512 scales, float scale, __m512 total) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scales, _mm512_set1_ps(scale)), total);
}

/* `m` is a constant wherever these are inlined, so the sums stay in registers. */
INLINE void tile4(const uint8_t *p, int groups, int m, const ebb_row *x, float *out, size_t stride) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512 total[8];
    for (int j = 0; j < m; j++) total[j] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++, p += 288) {
        prefetch(p, 288);
        __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
        __m512i w[8];
        for (int v = 0; v < 4; v++) {
            __m512i both = _mm512_loadu_si512(p + 32 + v * 64);
            w[2 * v] = _mm512_and_si512(both, low);
            w[2 * v + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
        for (int j = 0; j < m; j++) {
            const int8_t *a = x[j].group[g].codes;
            __m512i even = _mm512_set1_epi32(x[j].group[g].sum), odd = _mm512_setzero_si512();
            for (int v = 0; v < 8; v += 2) {
                even = _mm512_dpbusd_epi32(even, w[v], four(a + 4 * v));
                odd = _mm512_dpbusd_epi32(odd, w[v + 1], four(a + 4 * v + 4));
            }
            total[j] = scaled(_mm512_add_epi32(even, odd), scales, x[j].group[g].scale, total[j]);
        }
    }
    for (int j = 0; j < m; j++) _mm512_storeu_ps(out + j * stride, total[j]);
}

INLINE void tile8(const uint8_t *p, int groups, int m, const ebb_row *x, float *out, size_t stride) {
    __m512 total[8];
    for (int j = 0; j < m; j++) total[j] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++, p += 544) {
        prefetch(p, 544);
        __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
        __m512i w[8];
        for (int v = 0; v < 8; v++) w[v] = _mm512_loadu_si512(p + 32 + v * 64);
        for (int j = 0; j < m; j++) {
            const int8_t *a = x[j].group[g].codes;
            __m512i even = _mm512_set1_epi32(x[j].group[g].sum), odd = _mm512_setzero_si512();
            for (int v = 0; v < 8; v += 2) {
                even = _mm512_dpbusd_epi32(even, w[v], four(a + 4 * v));
                odd = _mm512_dpbusd_epi32(odd, w[v + 1], four(a + 4 * v + 4));
            }
            total[j] = scaled(_mm512_add_epi32(even, odd), scales, x[j].group[g].scale, total[j]);
        }
    }
    for (int j = 0; j < m; j++) _mm512_storeu_ps(out + j * stride, total[j]);
}

INLINE __m512bh pair(const uint16_t *x) {
    int32_t bits;
    memcpy(&bits, x, 4);
    return (__m512bh)_mm512_set1_epi32(bits);
}

INLINE void tile16(const uint8_t *p, int pairs, int m, const ebb_row *x, float *out, size_t stride) {
    __m512 even[8], odd[8];
    for (int j = 0; j < m; j++) even[j] = odd[j] = _mm512_setzero_ps();
    int i = 0;
    for (; i + 1 < pairs; i += 2, p += 128) {
        prefetch(p, 128);
        __m512bh w0 = (__m512bh)_mm512_loadu_si512(p), w1 = (__m512bh)_mm512_loadu_si512(p + 64);
        for (int j = 0; j < m; j++) {
            even[j] = _mm512_dpbf16_ps(even[j], w0, pair(x[j].bf16 + 2 * i));
            odd[j] = _mm512_dpbf16_ps(odd[j], w1, pair(x[j].bf16 + 2 * i + 2));
        }
    }
    if (i < pairs)
        for (int j = 0; j < m; j++)
            even[j] = _mm512_dpbf16_ps(even[j], (__m512bh)_mm512_loadu_si512(p), pair(x[j].bf16 + 2 * i));
    for (int j = 0; j < m; j++) _mm512_storeu_ps(out + j * stride, _mm512_add_ps(even[j], odd[j]));
}

#define DISPATCH(name, tile)                                                                                          \
    static void name(const uint8_t *block, int count, int m, const ebb_row *x, float *out, size_t stride) {           \
        switch (m) {                                                                                                  \
            case 1: tile(block, count, 1, x, out, stride); break;                                                     \
            case 2: tile(block, count, 2, x, out, stride); break;                                                     \
            case 3: tile(block, count, 3, x, out, stride); break;                                                     \
            case 4: tile(block, count, 4, x, out, stride); break;                                                     \
            case 5: tile(block, count, 5, x, out, stride); break;                                                     \
            case 6: tile(block, count, 6, x, out, stride); break;                                                     \
            case 7: tile(block, count, 7, x, out, stride); break;                                                     \
            default: tile(block, count, 8, x, out, stride); break;                                                    \
        }                                                                                                             \
    }
DISPATCH(block4, tile4)
DISPATCH(block8, tile8)
DISPATCH(block16, tile16)

static void quantise(const float *x, int n, int offset, ebb_group *out) {
    for (int g = 0; g < n / EBB_GROUP; g++, x += EBB_GROUP) {
        __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
        __m512i sizes = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(a)), _mm512_castps_si512(_mm512_abs_ps(b)));
        int32_t largest = _mm512_reduce_max_epi32(sizes); /* as in pass_quantise: the largest of the bits, a NaN too */
        float most;
        memcpy(&most, &largest, sizeof most);
        __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0);
        __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
        const __m512i least = _mm512_set1_epi32(-127); /* a NaN becomes the smallest integer: sums must not overflow */
        qa = _mm512_max_epi32(qa, least), qb = _mm512_max_epi32(qb, least);
        _mm_storeu_si128((__m128i *)out[g].codes, _mm512_cvtsepi32_epi8(qa));
        _mm_storeu_si128((__m128i *)(out[g].codes + 16), _mm512_cvtsepi32_epi8(qb));
        out[g].scale = most / 127.0f;
        out[g].sum = -_mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb)) * offset;
    }
}

const ebb_kernels ebb_avx512 = {"avx512",     usable,    block4,   block8,    block16,    quantise,
                                pass_to_bf16, pass_norm, pass_add, pass_gate, pass_attend, QUERIES,
                                pass_code8, pass_code4};
