/* Keys and values of tokens that have been seen, in pages of 32 tokens that sequences may share. */
#ifndef EBB_CACHE_H
#define EBB_CACHE_H

#include "kernels.h"

/* Turns the queries and the key of one key head of one token to its position, and keeps key and value in its page.
 * qkv [(H + 2K) D] is the token's row; turn [D] its cosines, then its sines. */
void ebb_remember(const ebb_model *model, const ebb_batch *batch, int layer, int token, int head, float *qkv, const float *turn);

/* Lets the queries of tokens first .. last - 1 that belong to one key head look at what their sequences have kept.
 * qkv [M, (H + 2K) D], mixed [M, H D], scratch: ebb_attention_floats of the longest sequence. */
void ebb_look(const ebb_kernels *kernels, const ebb_model *model, const ebb_batch *batch, int layer, int first, int last,
              int head, const float *qkv, float *mixed, float *scratch);

#endif
