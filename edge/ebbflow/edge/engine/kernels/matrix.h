/* Products with packed matrices. */
#ifndef EBB_MATRIX_H
#define EBB_MATRIX_H

#include "kernels.h"

/* Brings one row of activations into the form that the matrix wants. */
void ebb_encode(const ebb_kernels *kernels, const ebb_matrix *matrix, const float *x, ebb_row row);

/* out [m, rows] = m encoded rows times the matrix; this is the part of one thread. */
void ebb_product(const ebb_kernels *kernels, const ebb_matrix *matrix, int m, const ebb_row *row, float *out, int thread,
                 int threads);

/* One row of the matrix itself, as float32. */
void ebb_embed(const ebb_matrix *matrix, int id, float *x);

#endif
