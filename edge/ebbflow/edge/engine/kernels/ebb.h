/* The engine's C interface: weights in, one call for each forward step. Nothing here allocates while it computes, locks
 * Python or trusts a size that its caller has not checked: every length below is validated in Python before it gets here.
 *
 * Letters of shapes: M new tokens of a step, S sequences, C hidden width, F feed-forward width, H query heads, K key and
 * value heads, D width of a head, V vocabulary, L layers, P pages.
 */
#ifndef EBB_H
#define EBB_H

#include <stddef.h>
#include <stdint.h>

#define EBB_ABI 1
#define EBB_API __attribute__((visibility("default")))
#define EBB_GROUP 32  /* inputs that share a scale */
#define EBB_ROWS 16   /* outputs that lie interleaved in one block */
#define EBB_PAGE 32   /* tokens of one page of the KV cache */

/* A packed matrix: blocks of 16 outputs, each a run of groups of 32 inputs (see pack.c). */
typedef struct {
    int32_t rows;        /* outputs; blocks are padded with zeros up to a multiple of 16 */
    int32_t columns;     /* inputs; a multiple of 32 for 4 and 8 bits, of 2 for 16 */
    int32_t bits;        /* 4, 8 or 16 (bfloat16) */
    int32_t reserved;
    const uint8_t *data; /* 64-byte aligned */
    const float *bias;   /* [rows] or NULL */
} ebb_matrix;

typedef struct {
    ebb_matrix qkv;        /* [(H + 2K) D, C] */
    ebb_matrix output;     /* [C, H D] */
    ebb_matrix gate_up;    /* [2F, C]: gate rows, then up rows */
    ebb_matrix down;       /* [C, F] */
    const float *norm_in;  /* [C] before attention */
    const float *norm_mid; /* [C] before the feed-forward part */
} ebb_layer;

typedef struct {
    int32_t hidden, inner, layers, heads, kv_heads, head_dim, vocabulary;
    int32_t kv_bits;         /* 16 (bfloat16) or 8 */
    int32_t max_tokens;      /* most new tokens of one step */
    int32_t max_outputs;     /* most rows of logits of one step */
    int32_t max_positions;   /* longest sequence */
    int32_t threads;
    float epsilon;           /* of the norms */
    int32_t reserved;
    const float *frequency;  /* [D/2] angle per position of each pair of a head */
    const ebb_layer *layer;  /* [L] */
    ebb_matrix embedding;    /* [V, C] */
    ebb_matrix head;         /* [V, C]; the embedding where the two are tied */
    const float *norm_out;   /* [C] */
} ebb_model;

typedef struct {
    int32_t tokens;             /* M, at least 1 */
    int32_t outputs;            /* rows of logits that are wanted */
    int32_t pages_per_sequence; /* width of page_table */
    int32_t threads;            /* that share the work: at least 1, at most the model's */
    const int32_t *id;          /* [M] */
    const int32_t *position;    /* [M] within its sequence */
    const int32_t *sequence;    /* [M] row of page_table */
    const int32_t *page_table;  /* [S, pages_per_sequence] */
    uint8_t *const *page;       /* [P] memory of each page */
    const int32_t *output;      /* [outputs] which of the M tokens */
    float *logits;              /* [outputs, V] or NULL */
    float *last_hidden;         /* [outputs, C] or NULL: normalised, what the head multiplies */
} ebb_batch;

typedef struct ebb_engine ebb_engine;

EBB_API int ebb_abi(void);
EBB_API const char *ebb_isa(void);             /* the instruction set in use, such as "avx512" */
EBB_API int ebb_use_isa(const char *name);     /* 0, or -1 if this machine lacks it; for tests */

EBB_API size_t ebb_packed_bytes(int32_t bits, int32_t rows, int32_t columns);
EBB_API size_t ebb_page_bytes(const ebb_model *model);

/* Packs `rows` outputs, of which the first becomes output `row0` of a matrix with `columns` inputs. `row0` and, except in
 * the last call, `rows` are multiples of 16. */
EBB_API void ebb_pack4(const uint8_t *nibbles, const uint16_t *scales, int32_t row0, int32_t rows, int32_t columns, uint8_t *out);
EBB_API void ebb_pack8(const int8_t *codes, const uint16_t *scales, int32_t row0, int32_t rows, int32_t columns, uint8_t *out);
EBB_API void ebb_pack16(const uint16_t *weights, int32_t row0, int32_t rows, int32_t columns, uint8_t *out);

/* Codes bfloat16 weights in groups of 32, with new scales (see code.h). -1 if a weight is too large or not finite; what was
 * written is then worth nothing. */
EBB_API int ebb_code8(const uint16_t *weights, size_t groups, int8_t *codes, uint16_t *scales);
EBB_API int ebb_code4(const uint16_t *weights, size_t groups, uint8_t *nibbles, uint16_t *scales);

/* out [m, rows] = x [m, columns] times the matrix, on one thread; for tests. -1 when there is no memory. */
EBB_API int ebb_multiply(const ebb_matrix *matrix, const float *x, int32_t m, float *out);

EBB_API ebb_engine *ebb_open(const ebb_model *model); /* NULL when there is no memory; `model` must outlive it */
EBB_API void ebb_step(ebb_engine *engine, const ebb_batch *batch);
EBB_API void ebb_close(ebb_engine *engine);

#endif
