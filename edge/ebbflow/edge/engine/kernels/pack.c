/* Packing: from the artefact's rows to blocks that one instruction feeds on.
 *
 * A block holds 16 outputs. For each group of 32 inputs it has the 16 float16 scales and then the codes, four inputs of
 * all 16 outputs side by side, so that a register of 64 bytes meets the same four activations in every lane of 32 bits:
 *
 *     8 bits:  16 scales | for v in 0..7:  for r in 0..15:  inputs 4v .. 4v+3 of output r, each plus 128
 *     4 bits:  16 scales | for v in 0..3:  for r in 0..15:  low nibbles inputs 8v .. 8v+3, high nibbles 8v+4 .. 8v+7,
 *                                          each plus 8
 *     16 bits: for pairs of inputs: for r in 0..15: two bfloat16
 */
#include <string.h>

#include "kernels.h"

enum { SCALES = EBB_ROWS * 2, BLOCK4 = SCALES + EBB_ROWS * EBB_GROUP / 2, BLOCK8 = SCALES + EBB_ROWS * EBB_GROUP };

static size_t block_bytes(int32_t bits, int32_t columns) {
    if (bits == 16) return (size_t)columns * EBB_ROWS * 2;
    return (size_t)(columns / EBB_GROUP) * (bits == 4 ? BLOCK4 : BLOCK8);
}

size_t ebb_packed_bytes(int32_t bits, int32_t rows, int32_t columns) {
    return (size_t)((rows + EBB_ROWS - 1) / EBB_ROWS) * block_bytes(bits, columns);
}

static uint8_t *group_of(uint8_t *out, int32_t bits, int32_t row, int32_t columns, int32_t group) {
    return out + (size_t)(row / EBB_ROWS) * block_bytes(bits, columns) + (size_t)group * (bits == 4 ? BLOCK4 : BLOCK8);
}

/* Codes of zero and scales of zero, for the outputs that pad the last block. */
static void blank(uint8_t *out, int32_t bits, int32_t row0, int32_t rows, int32_t columns) {
    int32_t end = row0 + rows;
    if (end % EBB_ROWS == 0) return;
    uint8_t *block = out + (size_t)(end / EBB_ROWS) * block_bytes(bits, columns);
    memset(block, bits == 8 ? 128 : bits == 4 ? 0x88 : 0, block_bytes(bits, columns));
    if (bits == 16) return;
    for (int32_t g = 0; g < columns / EBB_GROUP; g++) memset(group_of(block, bits, 0, columns, g), 0, SCALES);
}

int ebb_code8(const uint16_t *weights, size_t groups, int8_t *codes, uint16_t *scales) {
    return ebb_kernels_in_use()->code8(weights, groups, codes, scales);
}

int ebb_code4(const uint16_t *weights, size_t groups, uint8_t *nibbles, uint16_t *scales) {
    return ebb_kernels_in_use()->code4(weights, groups, nibbles, scales);
}

void ebb_pack4(const uint8_t *nibbles, const uint16_t *scales, int32_t row0, int32_t rows, int32_t columns, uint8_t *out) {
    int32_t groups = columns / EBB_GROUP;
    blank(out, 4, row0, rows, columns);
    for (int32_t i = 0; i < rows; i++) {
        int32_t r = (row0 + i) % EBB_ROWS;
        for (int32_t g = 0; g < groups; g++) {
            uint8_t *to = group_of(out, 4, row0 + i, columns, g);
            const uint8_t *from = nibbles + ((size_t)i * columns + (size_t)g * EBB_GROUP) / 2;
            memcpy(to + r * 2, scales + (size_t)i * groups + g, 2);
            for (int v = 0; v < 4; v++)
                for (int j = 0; j < 4; j++) {
                    uint8_t low = from[(8 * v + j) / 2] >> (j % 2 * 4) & 15;
                    uint8_t high = from[(8 * v + 4 + j) / 2] >> (j % 2 * 4) & 15;
                    to[SCALES + v * 64 + r * 4 + j] = (uint8_t)(low | high << 4);
                }
        }
    }
}

void ebb_pack8(const int8_t *codes, const uint16_t *scales, int32_t row0, int32_t rows, int32_t columns, uint8_t *out) {
    int32_t groups = columns / EBB_GROUP;
    blank(out, 8, row0, rows, columns);
    for (int32_t i = 0; i < rows; i++) {
        int32_t r = (row0 + i) % EBB_ROWS;
        for (int32_t g = 0; g < groups; g++) {
            uint8_t *to = group_of(out, 8, row0 + i, columns, g);
            const int8_t *from = codes + (size_t)i * columns + (size_t)g * EBB_GROUP;
            memcpy(to + r * 2, scales + (size_t)i * groups + g, 2);
            for (int v = 0; v < 8; v++) {
                uint32_t four;
                memcpy(&four, from + 4 * v, 4);
                four ^= 0x80808080;
                memcpy(to + SCALES + v * 64 + r * 4, &four, 4);
            }
        }
    }
}

void ebb_pack16(const uint16_t *weights, int32_t row0, int32_t rows, int32_t columns, uint8_t *out) {
    blank(out, 16, row0, rows, columns);
    for (int32_t i = 0; i < rows; i++) {
        int32_t r = (row0 + i) % EBB_ROWS;
        uint8_t *block = out + (size_t)((row0 + i) / EBB_ROWS) * block_bytes(16, columns);
        const uint16_t *from = weights + (size_t)i * columns;
        for (int32_t pair = 0; pair < columns / 2; pair++) memcpy(block + (size_t)pair * 64 + r * 4, from + 2 * pair, 4);
    }
}
