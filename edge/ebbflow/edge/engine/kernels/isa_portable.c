/* Plain C: any machine, and what every other instruction set is tested against. */
#include <math.h>
#include <string.h>

#include "kernels.h"

enum { LANES = 4 };
#define QUERIES 4
typedef float lanes __attribute__((vector_size(16)));

static inline lanes widen16(const uint16_t *from) {
    lanes to;
    for (int i = 0; i < LANES; i++) to[i] = ebb_from_bf16(from[i]);
    return to;
}

static inline lanes widen8(const int8_t *from) {
    lanes to;
    for (int i = 0; i < LANES; i++) to[i] = from[i];
    return to;
}

#include "passes.h"

static int usable(void) { return 1; }

static void block8(const uint8_t *block, int groups, int m, const ebb_row *x, float *out, size_t stride) {
    for (int j = 0; j < m; j++)
        for (int r = 0; r < EBB_ROWS; r++) {
            const uint8_t *p = block;
            float total = 0;
            for (int g = 0; g < groups; g++, p += 544) {
                uint16_t bits;
                memcpy(&bits, p + r * 2, 2);
                const int8_t *a = x[j].group[g].codes;
                int32_t sum = x[j].group[g].sum;
                for (int v = 0; v < 8; v++)
                    for (int i = 0; i < 4; i++) sum += p[32 + v * 64 + r * 4 + i] * a[4 * v + i];
                total += (float)sum * (ebb_from_f16(bits) * x[j].group[g].scale);
            }
            out[j * stride + r] = total;
        }
}

static void block4(const uint8_t *block, int groups, int m, const ebb_row *x, float *out, size_t stride) {
    for (int j = 0; j < m; j++)
        for (int r = 0; r < EBB_ROWS; r++) {
            const uint8_t *p = block;
            float total = 0;
            for (int g = 0; g < groups; g++, p += 288) {
                uint16_t bits;
                memcpy(&bits, p + r * 2, 2);
                const int8_t *a = x[j].group[g].codes;
                int32_t sum = x[j].group[g].sum;
                for (int v = 0; v < 4; v++)
                    for (int i = 0; i < 4; i++) {
                        uint8_t both = p[32 + v * 64 + r * 4 + i];
                        sum += (both & 15) * a[8 * v + i] + (both >> 4) * a[8 * v + 4 + i];
                    }
                total += (float)sum * (ebb_from_f16(bits) * x[j].group[g].scale);
            }
            out[j * stride + r] = total;
        }
}

static void block16(const uint8_t *block, int pairs, int m, const ebb_row *x, float *out, size_t stride) {
    for (int j = 0; j < m; j++) {
        float total[EBB_ROWS] = {0};
        for (int p = 0; p < pairs; p++) {
            const uint16_t *w = (const uint16_t *)(block + (size_t)p * 64);
            float a = ebb_from_bf16(x[j].bf16[2 * p]), b = ebb_from_bf16(x[j].bf16[2 * p + 1]);
            for (int r = 0; r < EBB_ROWS; r++) total[r] += ebb_from_bf16(w[2 * r]) * a + ebb_from_bf16(w[2 * r + 1]) * b;
        }
        memcpy(out + j * stride, total, sizeof total);
    }
}

const ebb_kernels ebb_portable = {"portable",   usable,    block4,   block8,    block16,    pass_quantise,
                                  pass_to_bf16, pass_norm, pass_add, pass_gate, pass_attend, QUERIES,
                                  pass_code8, pass_code4};
