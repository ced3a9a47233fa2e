/* One forward step: new tokens of any number of sequences in, logits out. Read `step` at the end first. */
#include <stdlib.h>
#include <string.h>
#include <math.h>

#include "cache.h"
#include "matrix.h"
#include "threads.h"

struct ebb_engine {
    const ebb_model *model;
    const ebb_kernels *kernels; /* of the step that runs */
    ebb_team *team;
    int threads;
    /* Buffers of a step, M = max_tokens. */
    float *stream;   /* [M, C] residual stream */
    float *normed;   /* [M, widest] a pass's output, on its way to become codes */
    float *qkv;      /* [M, (H + 2K) D] */
    float *mixed;    /* [M, H D] what attention returns */
    float *inner;    /* [M, 2F] gate and up */
    float *turn;     /* [M, D] cosines, then sines */
    float *scratch;  /* [threads, scratch_floats] of attention */
    ebb_row *row;    /* [M] the rows as codes */
    void *memory;    /* all of the above */
    size_t scratch_floats;
};

/* ---- memory --------------------------------------------------------------------------------------------------- */

static size_t room(size_t *total, size_t bytes) { /* offset of the next piece, aligned */
    size_t at = *total;
    *total += (bytes + 63) / 64 * 64;
    return at;
}

static int most(int a, int b) { return a > b ? a : b; }

ebb_engine *ebb_open(const ebb_model *model) {
    ebb_engine *e = calloc(1, sizeof *e);
    if (!e) return NULL;
    e->model = model;
    e->threads = model->threads;
    e->scratch_floats = ebb_attention_floats(model->head_dim, model->max_positions);
    size_t m = (size_t)most(model->max_tokens, model->max_outputs), total = 0;
    size_t mixed = (size_t)model->heads * model->head_dim, widest = (size_t)most(most(model->hidden, model->inner), (int)mixed);
    size_t qkv = mixed + 2 * (size_t)model->kv_heads * model->head_dim;
    size_t groups = (widest + EBB_GROUP - 1) / EBB_GROUP;
    size_t at[] = {
        room(&total, 4 * m * model->hidden), room(&total, 4 * m * widest), room(&total, 4 * m * qkv),
        room(&total, 4 * m * mixed), room(&total, 8 * m * model->inner), room(&total, 4 * m * model->head_dim),
        room(&total, 4 * (size_t)e->threads * e->scratch_floats),
        room(&total, m * sizeof(ebb_row)), room(&total, m * groups * sizeof(ebb_group)), room(&total, 2 * m * groups * EBB_GROUP)};
    uint8_t *memory = aligned_alloc(64, total);
    e->team = ebb_team_open(e->threads);
    e->memory = memory;
    if (!memory || !e->team) {
        ebb_close(e);
        return NULL;
    }
    memset(memory, 0, total);
    float **piece[] = {&e->stream, &e->normed, &e->qkv, &e->mixed, &e->inner, &e->turn, &e->scratch};
    for (size_t i = 0; i < sizeof piece / sizeof *piece; i++) *piece[i] = (float *)(memory + at[i]);
    e->row = (ebb_row *)(memory + at[7]);
    for (size_t j = 0; j < m; j++)
        e->row[j] = (ebb_row){(ebb_group *)(memory + at[8]) + j * groups, (uint16_t *)(memory + at[9]) + j * groups * EBB_GROUP};
    return e;
}

void ebb_close(ebb_engine *e) {
    if (!e) return;
    if (e->team) ebb_team_close(e->team);
    free(e->memory);
    free(e);
}

/* ---- the parts of a step; each is shared out over the threads ------------------------------------------------- */

typedef struct {
    ebb_engine *engine;
    const ebb_batch *batch;
} job;

#define SHARE(item, count) for (int item = thread; item < (count); item += threads)
#define BARRIER ebb_team_barrier(e->team, threads)

static void layer_of(ebb_engine *e, const ebb_batch *batch, int index, int thread, int threads) {
    const ebb_model *model = e->model;
    const ebb_kernels *kernels = e->kernels;
    const ebb_layer *layer = model->layer + index;
    int m = batch->tokens, width = model->hidden, inner = model->inner, mixed = model->heads * model->head_dim;
    SHARE(j, m) {
        kernels->norm(e->stream + (size_t)j * width, layer->norm_in, width, model->epsilon, e->normed + (size_t)j * width);
        ebb_encode(kernels, &layer->qkv, e->normed + (size_t)j * width, e->row[j]);
    }
    BARRIER;
    ebb_product(kernels, &layer->qkv, m, e->row, e->qkv, thread, threads);
    BARRIER;
    SHARE(unit, m * model->kv_heads) {
        int token = unit / model->kv_heads;
        float *turn = e->turn + (size_t)token * model->head_dim;
        ebb_remember(model, batch, index, token, unit % model->kv_heads, e->qkv + (size_t)token * layer->qkv.rows, turn);
    }
    BARRIER;
    float *scratch = e->scratch + thread * e->scratch_floats;
    SHARE(unit, (m + EBB_TILE - 1) / EBB_TILE * model->kv_heads) { /* tokens in turn, as later ones have more to look at */
        int first = unit / model->kv_heads * EBB_TILE, last = first + EBB_TILE < m ? first + EBB_TILE : m;
        ebb_look(kernels, model, batch, index, first, last, unit % model->kv_heads, e->qkv, e->mixed, scratch);
    }
    BARRIER;
    SHARE(j, m) ebb_encode(kernels, &layer->output, e->mixed + (size_t)j * mixed, e->row[j]);
    BARRIER;
    ebb_product(kernels, &layer->output, m, e->row, e->normed, thread, threads);
    BARRIER;
    SHARE(j, m) {
        float *stream = e->stream + (size_t)j * width, *normed = e->normed + (size_t)j * width;
        kernels->add(stream, normed, width);
        kernels->norm(stream, layer->norm_mid, width, model->epsilon, normed);
        ebb_encode(kernels, &layer->gate_up, normed, e->row[j]);
    }
    BARRIER;
    ebb_product(kernels, &layer->gate_up, m, e->row, e->inner, thread, threads);
    BARRIER;
    SHARE(j, m) {
        float *gate = e->inner + (size_t)j * 2 * inner;
        kernels->gate(gate, gate + inner, inner);
        ebb_encode(kernels, &layer->down, gate, e->row[j]);
    }
    BARRIER;
    ebb_product(kernels, &layer->down, m, e->row, e->normed, thread, threads);
    BARRIER;
    SHARE(j, m) kernels->add(e->stream + (size_t)j * width, e->normed + (size_t)j * width, width);
}

static void step(void *what, int thread, int threads) {
    ebb_engine *e = ((job *)what)->engine;
    const ebb_batch *batch = ((job *)what)->batch;
    const ebb_model *model = e->model;
    int width = model->hidden, dim = model->head_dim;
    SHARE(j, batch->tokens) {
        float *turn = e->turn + (size_t)j * dim;
        for (int i = 0; i < dim / 2; i++) {
            float angle = (float)batch->position[j] * model->frequency[i];
            turn[i] = cosf(angle);
            turn[dim / 2 + i] = sinf(angle);
        }
        ebb_embed(&model->embedding, batch->id[j], e->stream + (size_t)j * width);
    }
    for (int index = 0; index < model->layers; index++) layer_of(e, batch, index, thread, threads);
    BARRIER;
    SHARE(o, batch->outputs) {
        float *normed = e->normed + (size_t)o * width;
        e->kernels->norm(e->stream + (size_t)batch->output[o] * width, model->norm_out, width, model->epsilon, normed);
        if (batch->last_hidden) memcpy(batch->last_hidden + (size_t)o * width, normed, sizeof(float) * width);
        ebb_encode(e->kernels, &model->head, normed, e->row[o]);
    }
    BARRIER;
    if (batch->logits) ebb_product(e->kernels, &model->head, batch->outputs, e->row, batch->logits, thread, threads);
}

void ebb_step(ebb_engine *engine, const ebb_batch *batch) {
    job what = {engine, batch};
    engine->kernels = ebb_kernels_in_use();
    ebb_team_run(engine->team, batch->threads, step, &what);
}
