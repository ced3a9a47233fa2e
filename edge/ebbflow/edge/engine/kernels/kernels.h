/* What differs between instruction sets. Each isa_*.c fills one table; the rest of the engine calls through it. */
#ifndef EBB_KERNELS_H
#define EBB_KERNELS_H

#include "ebb.h"

enum { EBB_TILE = 8 }; /* rows of activations, or queries, that meet a block while it is in registers */

/* 32 activations as matrices of 4 and 8 bits want them. */
typedef struct {
    int32_t sum; /* of the codes, times minus what unsigned weights are too large by */
    float scale;
    int8_t codes[EBB_GROUP]; /* round(x / scale) */
} ebb_group;

/* One row of activations. */
typedef struct {
    ebb_group *group; /* [n/32] for 4 and 8 bits */
    uint16_t *bf16;   /* [n] for 16 bits */
} ebb_row;

/* Queries that look at the cached tokens of one key head of one sequence. */
typedef struct {
    int rows; /* queries, at most EBB_TILE */
    int dim, kv_bits;
    int length[EBB_TILE]; /* cached tokens that each looks at, from the first */
    const float *query[EBB_TILE];
    float *out[EBB_TILE];
    const int32_t *pages;
    uint8_t *const *page;
    size_t keys, values; /* where they begin in a page */
    float *scratch;      /* ebb_attention_floats of the longest length */
} ebb_attention;

typedef struct {
    const char *name;
    int (*usable)(void);
    /* out[m * stride + 0..15] = the 16 outputs of one block for m rows of activations, 1 <= m <= 8. */
    void (*block4)(const uint8_t *block, int groups, int m, const ebb_row *x, float *out, size_t stride);
    void (*block8)(const uint8_t *block, int groups, int m, const ebb_row *x, float *out, size_t stride);
    void (*block16)(const uint8_t *block, int pairs, int m, const ebb_row *x, float *out, size_t stride);
    void (*quantise)(const float *x, int n, int offset, ebb_group *out); /* offset: 8 for 4 bits, 128 for 8 */
    void (*to_bf16)(const float *x, int n, uint16_t *out);
    void (*norm)(const float *x, const float *weight, int n, float epsilon, float *out);
    void (*add)(float *x, const float *y, int n);
    void (*gate)(float *gate, const float *up, int n); /* gate = silu(gate) * up */
    void (*attend)(const ebb_attention *attention);
    int queries; /* most queries of one call of attend */
    int (*code8)(const uint16_t *weights, size_t groups, int8_t *codes, uint16_t *scales); /* see ebb.h */
    int (*code4)(const uint16_t *weights, size_t groups, uint8_t *nibbles, uint16_t *scales);
} ebb_kernels;

const ebb_kernels *ebb_kernels_in_use(void);
extern const ebb_kernels ebb_portable, ebb_avx2, ebb_avxvnni, ebb_avx512, ebb_dotprod, ebb_i8mm;

/* Values of a token lie in a row as wide as two registers of any instruction set. */
static inline int ebb_value_width(int dim) { return (dim + 31) / 32 * 32; }

static inline size_t ebb_attention_floats(int dim, int length) {
    return (size_t)EBB_TILE * ((size_t)(length + EBB_PAGE - 1) / EBB_PAGE * EBB_PAGE + dim + ebb_value_width(dim) + EBB_PAGE);
}

static inline float ebb_from_bf16(uint16_t bits) {
    union { uint32_t u; float f; } value = {(uint32_t)bits << 16};
    return value.f;
}

static inline uint16_t ebb_to_bf16(float x) {
    union { float f; uint32_t u; } value = {x};
    return (uint16_t)((value.u + 0x7fff + ((value.u >> 16) & 1)) >> 16);
}

static inline float ebb_from_f16(uint16_t bits) { /* finite, as the artefact's reader checks */
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    union { uint32_t u; float f; } value = {magnitude << 13};
    value.f *= 0x1p112f; /* moves the exponent's bias; exact, subnormals too */
    value.u |= sign;
    return value.f;
}

#endif
