/* A page holds 32 tokens of every layer and key head. For each there are, one after the other,
 *
 *     keys    [D, 32]  with the tokens side by side (see attend.h)
 *     scales  [32]     float32, only where keys and values are int8
 *     values  [32, W]  with the inputs side by side; W is D padded to a multiple of 32
 *     scales  [32]
 */
#include "cache.h"

#include <math.h>

static size_t scale_bytes(const ebb_model *model) { return model->kv_bits == 8 ? EBB_PAGE * sizeof(float) : 0; }

static size_t key_bytes(const ebb_model *model) {
    return (size_t)EBB_PAGE * model->head_dim * (model->kv_bits / 8) + scale_bytes(model);
}

static size_t keys_at(const ebb_model *model, int layer, int head) {
    size_t value_bytes = (size_t)EBB_PAGE * ebb_value_width(model->head_dim) * (model->kv_bits / 8) + scale_bytes(model);
    return ((size_t)layer * model->kv_heads + head) * (key_bytes(model) + value_bytes);
}

size_t ebb_page_bytes(const ebb_model *model) { return keys_at(model, model->layers, 0); }

/* Keeps a vector of n numbers: number i goes to place i * step. */
static void keep(const float *vector, int n, int kv_bits, void *numbers, size_t step, float *scale) {
    if (kv_bits == 16) {
        uint16_t *to = numbers;
        for (int i = 0; i < n; i++) to[i * step] = ebb_to_bf16(vector[i]);
        return;
    }
    int8_t *to = numbers;
    float most = 0;
    for (int i = 0; i < n; i++) most = fabsf(vector[i]) > most ? fabsf(vector[i]) : most;
    float inverse = most > 0 ? 127.0f / most : 0;
    for (int i = 0; i < n; i++) {
        float code = rintf(vector[i] * inverse);
        to[i * step] = (int8_t)(code > -127.0f ? code : -127.0f); /* NaN, of infinite numbers, must not become an integer */
    }
    *scale = most / 127.0f;
}

static void rotate(float *head, const float *turn, int dim) { /* neighbouring pairs, as the student is trained */
    for (int i = 0; i < dim / 2; i++) {
        float a = head[2 * i], b = head[2 * i + 1], cosine = turn[i], sine = turn[dim / 2 + i];
        head[2 * i] = a * cosine - b * sine;
        head[2 * i + 1] = b * cosine + a * sine;
    }
}

void ebb_remember(const ebb_model *model, const ebb_batch *batch, int layer, int token, int head, float *qkv, const float *turn) {
    int dim = model->head_dim, share = model->heads / model->kv_heads, wide = ebb_value_width(dim), bits = model->kv_bits;
    float *key = qkv + (size_t)(model->heads + head) * dim, *value = key + (size_t)model->kv_heads * dim;
    for (int h = head * share; h < (head + 1) * share; h++) rotate(qkv + (size_t)h * dim, turn, dim);
    rotate(key, turn, dim);
    const int32_t *pages = batch->page_table + (size_t)batch->sequence[token] * batch->pages_per_sequence;
    int page = batch->position[token] / EBB_PAGE, t = batch->position[token] % EBB_PAGE, bytes = bits / 8;
    uint8_t *keys = batch->page[pages[page]] + keys_at(model, layer, head), *values = keys + key_bytes(model);
    float *key_scales = (float *)(values - scale_bytes(model));
    float *value_scales = (float *)(values + (size_t)EBB_PAGE * wide * bytes);
    keep(key, dim, bits, keys + (size_t)t * bytes, EBB_PAGE, key_scales + t);
    keep(value, dim, bits, values + (size_t)t * wide * bytes, 1, value_scales + t);
}

void ebb_look(const ebb_kernels *kernels, const ebb_model *model, const ebb_batch *batch, int layer, int first, int last,
              int head, const float *qkv, float *mixed, float *scratch) {
    int dim = model->head_dim, share = model->heads / model->kv_heads;
    ebb_attention a = {.dim = dim, .kv_bits = model->kv_bits, .page = batch->page, .scratch = scratch};
    a.keys = keys_at(model, layer, head);
    a.values = a.keys + key_bytes(model);
    for (int unit = first * share; unit < last * share; unit++) {
        int token = unit / share, h = head * share + unit % share;
        a.query[a.rows] = qkv + ((size_t)token * (model->heads + 2 * model->kv_heads) + h) * dim;
        a.out[a.rows] = mixed + ((size_t)token * model->heads + h) * dim;
        a.length[a.rows++] = batch->position[token] + 1;
        int next = (unit + 1) / share;
        if (a.rows < kernels->queries && next < last && batch->sequence[next] == batch->sequence[token]) continue;
        a.pages = batch->page_table + (size_t)batch->sequence[token] * batch->pages_per_sequence;
        kernels->attend(&a);
        a.rows = 0;
    }
}
