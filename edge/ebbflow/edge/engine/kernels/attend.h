/* Attention of up to 8 queries over the cached tokens of one key head. Included by passes.h, so compiled for each
 * instruction set.
 *
 * Both halves multiply a broadcast number with a register: keys lie with the 32 tokens of a page side by side, values with
 * the inputs of a token side by side, so that no sum runs across a register.
 */

enum { TILE = 2 * LANES }; /* tokens or inputs at a time: two registers for each query */

INLINE lanes attend_load(const uint8_t *from, int kv_bits, size_t at) {
    return kv_bits == 16 ? widen16((const uint16_t *)from + at) : widen8((const int8_t *)from + at);
}

/* score[r][0..31] of one page; the queries come as query[i][r], already divided by the root of the width. `ahead` is what
 * will be read next. */
INLINE void attend_score(const uint8_t *keys, const uint8_t *ahead, int rows, int dim, int kv_bits, const float *query,
                         float *score, size_t stride) {
    for (int t = 0; t < EBB_PAGE; t += TILE) {
        lanes sum[EBB_TILE][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (lanes){0};
        for (int i = 0; i < dim; i++) {
            __builtin_prefetch(ahead + ((size_t)i * EBB_PAGE + t) * (kv_bits / 8));
            lanes first = attend_load(keys, kv_bits, (size_t)i * EBB_PAGE + t);
            lanes second = attend_load(keys, kv_bits, (size_t)i * EBB_PAGE + t + LANES);
            for (int r = 0; r < rows; r++) {
                sum[r][0] += first * query[i * rows + r];
                sum[r][1] += second * query[i * rows + r];
            }
        }
        if (kv_bits == 8) {
            lanes scale[2];
            memcpy(scale, keys + (size_t)dim * EBB_PAGE + sizeof(float) * t, sizeof scale);
            for (int r = 0; r < rows; r++) sum[r][0] *= scale[0], sum[r][1] *= scale[1];
        }
        for (int r = 0; r < rows; r++) memcpy(score + r * stride + t, sum[r], sizeof sum[r]);
    }
}

/* out[r][..] += the weighted values of the first `tokens` tokens of one page; the weights come as weight[t][r]. */
INLINE void attend_mix(const uint8_t *values, const uint8_t *ahead, int rows, int width, int kv_bits, int tokens,
                       const float *weight, float *out) {
    for (int i = 0; i < width; i += TILE) {
        lanes sum[EBB_TILE][2];
        for (int r = 0; r < rows; r++) memcpy(sum[r], out + (size_t)r * width + i, sizeof sum[r]);
        for (int t = 0; t < tokens; t++) {
            __builtin_prefetch(ahead + ((size_t)t * width + i) * (kv_bits / 8));
            lanes first = attend_load(values, kv_bits, (size_t)t * width + i);
            lanes second = attend_load(values, kv_bits, (size_t)t * width + i + LANES);
            for (int r = 0; r < rows; r++) {
                sum[r][0] += first * weight[t * rows + r];
                sum[r][1] += second * weight[t * rows + r];
            }
        }
        for (int r = 0; r < rows; r++) memcpy(out + (size_t)r * width + i, sum[r], sizeof sum[r]);
    }
}

/* Turns scores into e to the (score - largest), those behind `length` into zeros; returns one over their sum. */
static float attend_soften(float *score, int length, int padded) {
    lanes sums = {0}, highest = sums + score[0];
    for (int t = 0; t + LANES <= length; t += LANES) {
        lanes part = pass_load(score + t, LANES);
        highest = pass_choose((whole)(part > highest), part, highest);
    }
    float most = score[0];
    for (int i = 0; i < LANES; i++) most = highest[i] > most ? highest[i] : most;
    for (int t = length / LANES * LANES; t < length; t++) most = score[t] > most ? score[t] : most;
    for (int t = 0; t < length; t += LANES) {
        lanes part = pass_exp(pass_load(score + t, LANES) - most);
        pass_store(score + t, part, LANES);
        if (t + LANES <= length) sums += part;
    }
    float sum = pass_sum(sums);
    for (int t = length / LANES * LANES; t < length; t++) sum += score[t];
    memset(score + length, 0, sizeof(float) * (padded - length));
    return 1.0f / sum;
}

/* `rows` and `kv_bits` are constants wherever this is inlined; queries beyond a->rows are zeros. */
INLINE void attend_tile(const ebb_attention *a, int rows, int kv_bits) {
    int dim = a->dim, width = ebb_value_width(dim), longest = 0;
    for (int r = 0; r < a->rows; r++) longest = a->length[r] > longest ? a->length[r] : longest;
    int pages = (longest + EBB_PAGE - 1) / EBB_PAGE;
    size_t stride = (size_t)pages * EBB_PAGE;
    float *score = a->scratch, *out = score + stride * rows, *query = out + (size_t)width * rows;
    float *weight = query + (size_t)dim * rows, inverse[EBB_TILE] = {0};
    float factor = 1.0f / sqrtf((float)dim);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < dim; i++) query[i * rows + r] = r < a->rows ? a->query[r][i] * factor : 0;
    for (int p = 0; p < pages; p++) {
        const uint8_t *keys = a->page[a->pages[p]] + a->keys;
        const uint8_t *ahead = p + 1 < pages ? a->page[a->pages[p + 1]] + a->keys : a->page[a->pages[0]] + a->values;
        attend_score(keys, ahead, rows, dim, kv_bits, query, score + (size_t)p * EBB_PAGE, stride);
    }
    for (int r = 0; r < rows; r++) {
        int length = r < a->rows ? a->length[r] : 0;
        if (length) inverse[r] = attend_soften(score + r * stride, length, (int)stride);
        else memset(score + r * stride, 0, sizeof(float) * stride);
    }
    memset(out, 0, sizeof(float) * width * rows);
    for (int p = 0; p < pages; p++) {
        const uint8_t *values = a->page[a->pages[p]] + a->values;
        const uint8_t *ahead = p + 1 < pages ? a->page[a->pages[p + 1]] + a->values : values;
        const float *scale = (const float *)(values + (size_t)width * EBB_PAGE);
        int tokens = longest - p * EBB_PAGE < EBB_PAGE ? longest - p * EBB_PAGE : EBB_PAGE;
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < rows; r++)
                weight[t * rows + r] = score[r * stride + p * EBB_PAGE + t] * (kv_bits == 8 ? scale[t] : 1);
        attend_mix(values, ahead, rows, width, kv_bits, tokens, weight, out);
    }
    for (int r = 0; r < a->rows; r++)
        for (int i = 0; i < dim; i++) a->out[r][i] = out[(size_t)r * width + i] * inverse[r];
}

static void pass_attend(const ebb_attention *a) {
    int wide = a->kv_bits == 16;
    if (a->rows == 1) wide ? attend_tile(a, 1, 16) : attend_tile(a, 1, 8);
    else if (a->rows == 2) wide ? attend_tile(a, 2, 16) : attend_tile(a, 2, 8);
    else if (a->rows <= 4) wide ? attend_tile(a, 4, 16) : attend_tile(a, 4, 8);
#if QUERIES == 8
    else wide ? attend_tile(a, 8, 16) : attend_tile(a, 8, 8);
#endif
}
