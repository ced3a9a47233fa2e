/* Passes over vectors, written once in plain C. Each isa_*.c includes this file and is compiled for its instruction set,
 * so the compiler vectorises them. Before that it defines
 *     lanes      a register of LANES floats
 *     widen16    LANES bfloat16 as floats
 *     widen8     LANES int8 as floats
 *     QUERIES    4 or 8: as many queries as attention has registers for
 * Sums run in LANES parts, so that no compiler needs leave to reorder them. */

#define INLINE static inline __attribute__((always_inline))
typedef int32_t whole __attribute__((vector_size(sizeof(lanes))));

/* The first `count` of LANES numbers, or all where there are more; the rest are zeros. */
INLINE lanes pass_load(const float *from, int count) {
    lanes to = {0};
    if (count >= LANES) memcpy(&to, from, sizeof to);
    else memcpy(&to, from, sizeof(float) * count);
    return to;
}

INLINE void pass_store(float *to, lanes from, int count) {
    if (count >= LANES) memcpy(to, &from, sizeof from);
    else memcpy(to, &from, sizeof(float) * count);
}

INLINE lanes pass_choose(whole mask, lanes yes, lanes no) { return (lanes)((mask & (whole)yes) | (~mask & (whole)no)); }

INLINE float pass_sum(lanes parts) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += parts[i];
    return sum;
}

/* e to the x, relative error below 2e-7 (Cephes' polynomial; S. Moshier), between e to the -87 and e to the 88. */
INLINE lanes pass_exp(lanes x) {
    const lanes zero = {0};
    x = pass_choose((whole)(x > -87.0f), x, zero - 87.0f); /* a NaN too: it must not become an integer */
    x = pass_choose((whole)(x < 88.0f), x, zero + 88.0f);
    whole n = __builtin_convertvector(x * 1.44269504f + pass_choose((whole)(x < 0), zero - 0.5f, zero + 0.5f), whole);
    lanes turns = __builtin_convertvector(n, lanes);
    lanes r = x - turns * 0.693359375f + turns * 2.12194440e-4f;
    lanes p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (lanes)((n + 127) << 23);
}

static void pass_norm(const float *x, const float *weight, int n, float epsilon, float *out) {
    lanes sums = {0};
    for (int i = 0; i < n; i += LANES) {
        lanes part = pass_load(x + i, n - i);
        sums += part * part;
    }
    float factor = 1.0f / sqrtf(pass_sum(sums) / (float)n + epsilon);
    for (int i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

static void pass_add(float *restrict x, const float *restrict y, int n) {
    for (int i = 0; i < n; i++) x[i] += y[i];
}

static void pass_gate(float *restrict gate, const float *restrict up, int n) {
    for (int i = 0; i < n; i += LANES) {
        lanes g = pass_load(gate + i, n - i);
        pass_store(gate + i, g / (1.0f + pass_exp(-g)) * pass_load(up + i, n - i), n - i);
    }
}

#ifndef PASS_OWN_QUANTISE
static void pass_quantise(const float *x, int n, int offset, ebb_group *out) {
    for (int g = 0; g < n / EBB_GROUP; g++, x += EBB_GROUP) {
        /* Without their signs, floats are in the order of their bits. */
        uint32_t bits[EBB_GROUP], largest = 0;
        memcpy(bits, x, sizeof bits);
        for (int i = 0; i < EBB_GROUP; i++) largest = (bits[i] & 0x7fffffff) > largest ? bits[i] & 0x7fffffff : largest;
        float most;
        memcpy(&most, &largest, sizeof most);
        float inverse = most > 0 ? 127.0f / most : 0;
        int32_t sum = 0;
        for (int i = 0; i < EBB_GROUP; i++) {
            float value = rintf(x[i] * inverse);
            value = value > -127.0f ? value : -127.0f; /* infinite inputs give NaN here */
            int32_t code = (int32_t)(value < 127.0f ? value : 127.0f);
            out[g].codes[i] = (int8_t)code;
            sum += code;
        }
        out[g].scale = most / 127.0f;
        out[g].sum = -sum * offset;
    }
}
#endif

static void pass_to_bf16(const float *x, int n, uint16_t *out) {
    for (int i = 0; i < n; i++) out[i] = ebb_to_bf16(x[i]);
}

#include "attend.h"
#include "code.h"
