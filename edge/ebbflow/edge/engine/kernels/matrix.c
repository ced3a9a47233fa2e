#include "matrix.h"

#include <stdlib.h>
#include <string.h>

void ebb_encode(const ebb_kernels *kernels, const ebb_matrix *w, const float *x, ebb_row row) {
    if (w->bits == 16) kernels->to_bf16(x, w->columns, row.bf16);
    else kernels->quantise(x, w->columns, w->bits == 4 ? 8 : 128, row.group);
}

/* Threads share the blocks; a block meets 8 rows at a time, while it is near. */
void ebb_product(const ebb_kernels *kernels, const ebb_matrix *w, int m, const ebb_row *row, float *out, int thread,
                 int threads) {
    int blocks = (w->rows + EBB_ROWS - 1) / EBB_ROWS;
    int begin = (int)((long)blocks * thread / threads), end = (int)((long)blocks * (thread + 1) / threads);
    size_t block_bytes = ebb_packed_bytes(w->bits, EBB_ROWS, w->columns);
    void (*kernel)(const uint8_t *, int, int, const ebb_row *, float *, size_t) =
        w->bits == 4 ? kernels->block4 : w->bits == 8 ? kernels->block8 : kernels->block16;
    int count = w->bits == 16 ? w->columns / 2 : w->columns / EBB_GROUP;
    float padded[EBB_TILE * EBB_ROWS];
    for (int b = begin; b < end; b++) {
        const uint8_t *block = w->data + (size_t)b * block_bytes;
        int rows = w->rows - b * EBB_ROWS < EBB_ROWS ? w->rows - b * EBB_ROWS : EBB_ROWS;
        for (int j = 0; j < m; j += EBB_TILE) {
            int tile = m - j < EBB_TILE ? m - j : EBB_TILE;
            float *to = out + (size_t)j * w->rows + (size_t)b * EBB_ROWS;
            if (rows == EBB_ROWS) {
                kernel(block, count, tile, row + j, to, (size_t)w->rows);
            } else { /* the last block of a matrix whose outputs are not a multiple of 16 */
                kernel(block, count, tile, row + j, padded, EBB_ROWS);
                for (int i = 0; i < tile; i++) memcpy(to + (size_t)i * w->rows, padded + i * EBB_ROWS, sizeof(float) * rows);
            }
            if (w->bias)
                for (int i = 0; i < tile; i++)
                    for (int r = 0; r < rows; r++) to[(size_t)i * w->rows + r] += w->bias[b * EBB_ROWS + r];
        }
    }
}

void ebb_embed(const ebb_matrix *w, int id, float *x) {
    const uint8_t *block = w->data + (size_t)(id / EBB_ROWS) * ebb_packed_bytes(w->bits, EBB_ROWS, w->columns);
    int r = id % EBB_ROWS;
    for (int i = 0; i < w->columns; i++) {
        if (w->bits == 16) {
            x[i] = ebb_from_bf16(((const uint16_t *)block)[(size_t)(i / 2) * 32 + r * 2 + i % 2]);
            continue;
        }
        const uint8_t *group = block + (size_t)(i / EBB_GROUP) * (w->bits == 4 ? 288 : 544);
        int at = i % EBB_GROUP, code;
        if (w->bits == 4) code = (group[32 + at / 8 * 64 + r * 4 + at % 4] >> (at % 8 / 4 * 4) & 15) - 8;
        else code = group[32 + at / 4 * 64 + r * 4 + at % 4] - 128;
        x[i] = (float)code * ebb_from_f16(((const uint16_t *)group)[r]);
    }
}

int ebb_multiply(const ebb_matrix *matrix, const float *x, int32_t m, float *out) {
    const ebb_kernels *kernels = ebb_kernels_in_use();
    size_t columns = (size_t)matrix->columns, groups = (columns + EBB_GROUP - 1) / EBB_GROUP;
    ebb_row *row = malloc((size_t)m * sizeof *row);
    ebb_group *group = malloc((size_t)m * groups * sizeof *group);
    uint16_t *bf16 = malloc((size_t)m * columns * sizeof *bf16);
    int missing = !row || !group || !bf16;
    for (int32_t j = 0; !missing && j < m; j++) {
        row[j] = (ebb_row){group + j * groups, bf16 + j * columns};
        ebb_encode(kernels, matrix, x + j * columns, row[j]);
    }
    if (!missing) ebb_product(kernels, matrix, m, row, out, 0, 1);
    free(row), free(group), free(bf16);
    return missing ? -1 : 0;
}
