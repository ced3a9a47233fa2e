/* Holds every instruction set of this machine against the portable one, without Python: used under qemu-user and under
 * the sanitizers. Prints one line for each and exits with 1 if any differs. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static uint32_t state = 1;
static uint32_t dice(void) { return state = state * 1664525u + 1013904223u, state >> 8; }
static float uniform(void) { return (float)dice() / 8388608.0f - 1.0f; }

/* `mixed` is 0 for a model of one kind of matrix, or the bits of every other one. */
static float *run(const char *isa, int model_bits, int mixed, int kv_bits, int threads) {
    if (ebb_use_isa(isa)) return NULL;
    enum { C = 96, F = 160, H = 6, K = 2, D = 16, V = 77, L = 2, M = 21 };
    state = 7;
    int shapes[4][2] = {{(H + 2 * K) * D, C}, {C, H * D}, {2 * F, C}, {C, F}};
    ebb_layer layer[L];
    float *ones = malloc(sizeof(float) * 256);
    for (int i = 0; i < 256; i++) ones[i] = 1.0f + 0.1f * uniform();
    ebb_matrix embedding = {0};
    for (int l = 0; l <= L; l++) {
        ebb_matrix *parts[4] = {l < L ? &layer[l].qkv : &embedding, l < L ? &layer[l].output : NULL,
                                l < L ? &layer[l].gate_up : NULL, l < L ? &layer[l].down : NULL};
        for (int i = 0; i < (l < L ? 4 : 1); i++) {
            int rows = l < L ? shapes[i][0] : V, columns = l < L ? shapes[i][1] : C;
            int bits = mixed && (l + i) % 2 == 0 ? mixed : model_bits;
            uint8_t *packed = aligned_alloc(64, (ebb_packed_bytes(bits, rows, columns) + 63) / 64 * 64);
            size_t n = (size_t)rows * columns;
            uint16_t *scales = malloc(n / 16), *wide = malloc(n * 2);
            int8_t *codes = malloc(n);
            for (size_t k = 0; k < n / 32; k++) scales[k] = (uint16_t)(0x2000 + dice() % 0x400);
            for (size_t k = 0; k < n; k++) codes[k] = (int8_t)(dice() % 255 - 127), wide[k] = ebb_to_bf16(0.2f * uniform());
            if (bits == 4) ebb_pack4((uint8_t *)codes, scales, 0, rows, columns, packed);
            if (bits == 8) ebb_pack8(codes, scales, 0, rows, columns, packed);
            if (bits == 16) ebb_pack16(wide, 0, rows, columns, packed);
            *parts[i] = (ebb_matrix){rows, columns, bits, 0, packed, NULL};
            free(scales), free(wide), free(codes);
        }
        if (l < L) layer[l].norm_in = layer[l].norm_mid = ones;
    }
    float frequency[D / 2];
    for (int i = 0; i < D / 2; i++) frequency[i] = powf(10000.0f, -2.0f * i / D);
    ebb_model model = {C, F, L, H, K, D, V, kv_bits, M, M, 64, threads, 1e-5f, 0, frequency, layer, embedding, embedding, ones};
    ebb_engine *engine = ebb_open(&model);
    uint8_t *page[3];
    for (int p = 0; p < 3; p++) page[p] = aligned_alloc(64, (ebb_page_bytes(&model) + 63) / 64 * 64);
    int32_t id[M], position[M], sequence[M], output[M], table[4] = {2, 0, 1, 1};
    for (int j = 0; j < M; j++) { /* two sequences side by side, one of them beyond a page after the second step */
        id[j] = (int32_t)(dice() % V), sequence[j] = j % 3 == 2, output[j] = j;
        position[j] = j % 3 == 2 ? j / 3 : j - j / 3 - (j % 3 == 2);
    }
    float *logits = malloc(sizeof(float) * 3 * M * V), hidden[M * C];
    ebb_batch batch = {M, M, 2, threads, id, position, sequence, table, page, output, logits, hidden};
    int seen[2] = {0, 0};
    for (int s = 0; s < 3; s++) {
        for (int j = 0; j < M; j++) position[j] = seen[sequence[j]]++;
        batch.logits = logits + (size_t)s * M * V;
        ebb_step(engine, &batch);
    }
    ebb_close(engine);
    for (int p = 0; p < 3; p++) free(page[p]);
    for (int l = 0; l < L; l++)
        free((void *)layer[l].qkv.data), free((void *)layer[l].output.data), free((void *)layer[l].gate_up.data),
            free((void *)layer[l].down.data);
    free((void *)embedding.data), free(ones);
    return logits;
}

enum { GROUPS = 4001 };
typedef struct {
    uint16_t scale8[GROUPS], scale4[GROUPS];
    int8_t code8[GROUPS * EBB_GROUP];
    uint8_t code4[GROUPS * EBB_GROUP / 2];
    int refused;
} coded;

/* Codes groups of all magnitudes that can be coded, and one that cannot. */
static coded *code(const char *isa) {
    if (ebb_use_isa(isa)) return NULL;
    state = 9;
    coded *to = calloc(1, sizeof *to);
    uint16_t *weights = malloc(2 * GROUPS * EBB_GROUP);
    for (int g = 0; g < GROUPS; g++)
        for (int i = 0; i < EBB_GROUP; i++) weights[g * EBB_GROUP + i] = ebb_to_bf16(uniform() * powf(2.0f, (float)(g % 170 - 152)));
    to->refused = ebb_code8(weights, GROUPS, to->code8, to->scale8) | ebb_code4(weights, GROUPS, to->code4, to->scale4);
    weights[77] = 0x7fc0;
    uint8_t nibbles[8 * EBB_GROUP];
    uint16_t scales[8];
    to->refused |= ebb_code4(weights, 2, nibbles, scales) | 2 * !ebb_code4(weights, 3, nibbles, scales);
    free(weights);
    return to;
}

static int code_alike(const char *name) {
    coded *wanted = code("portable"), *found = code(name);
    int wrong = found && (wanted->refused || memcmp(found, wanted, sizeof *found));
    if (found) printf("%s codes%s\n", name, wrong ? " WRONG" : "");
    free(wanted), free(found);
    return wrong;
}

int main(void) {
    const char *names[] = {"avx512", "avxvnni", "avx2", "i8mm", "dotprod", "portable"};
    int failed = 0;
    for (int n = 0; n < 6; n++) failed |= code_alike(names[n]);
    int kinds[5][2] = {{4, 0}, {8, 0}, {16, 0}, {4, 16}, {16, 8}};
    for (int k = 0; k < 5; k++)
        for (int kv = 8; kv <= 16; kv *= 2) {
            int bits = kinds[k][0], mixed = kinds[k][1];
            float *wanted = run("portable", bits, mixed, kv, 1);
            for (int n = 0; n < 6; n++)
                for (int threads = 1; threads <= 3; threads += 2) {
                    float *found = run(names[n], bits, mixed, kv, threads), worst = 0, most = 0;
                    if (!found) continue;
                    for (int i = 0; i < 3 * 21 * 77; i++) {
                        float off = fabsf(found[i] - wanted[i]);
                        worst = off > worst || off != off ? off : worst, most = fabsf(wanted[i]) > most ? fabsf(wanted[i]) : most;
                    }
                    int wrong = !(worst <= 0.02f * most);
                    printf("%s bits %d and %d kv %d threads %d: largest difference %.2g of %.2g%s\n", names[n], bits,
                           mixed ? mixed : bits, kv, threads, worst, most, wrong ? " WRONG" : "");
                    failed |= wrong;
                    free(found);
                }
            free(wanted);
        }
    return failed;
}
