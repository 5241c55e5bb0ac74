/* SMoA by its definition (arXiv 2605.21147), in float64 and scalar loops.
 *
 * An oracle for tests. It is written to be obviously right, not fast, and shares no code with smoa_kernels.
 * All arrays are dense and row-major. N = out_features, C = in_features, K = num_blocks, T = tokens,
 * q = min(N, C), rho = max_rank. Every function returns an smoa_status; after an error the outputs are
 * unspecified. No function allocates memory.
 */
#ifndef SMOA_REF_H
#define SMOA_REF_H

#include <stdint.h>

typedef enum {
    SMOA_OK = 0,
    SMOA_NULL = 1,       /* a pointer that may not be null is null */
    SMOA_SIZE = 2,       /* a negative size, a granule or a number of blocks below 1 */
    SMOA_LABEL = 3,      /* a block label outside [0, K) */
    SMOA_RANK = 4,       /* a block's rank outside [0, rho] */
    SMOA_ORDER = 5,      /* an order that is not a permutation of 0 .. m-1 */
    SMOA_NOT_FINITE = 6  /* a spectral score that is NaN or infinite, so there is no order */
} smoa_status;

/* The frozen weight and its adapter, in the layer's own coordinates ("packed form"). Column j of A belongs to the
 * factor of column j's block, row i of B to the factor of row i's block. Entries with t >= the block's rank are
 * padding: they are never read, and their gradient is exactly 0. A block may have rows only, columns only, or
 * neither. */
typedef struct {
    int64_t out_features, in_features, num_blocks, max_rank;
    const double *weight;      /* (N, C) */
    const double *a;           /* (rho, C) */
    const double *b;           /* (N, rho) */
    const int64_t *row_block;  /* (N) */
    const int64_t *col_block;  /* (C) */
    const int64_t *ranks;      /* (K) */
    double scaling;
} smoa_layer;

/* Spectral centroids of the m granules of one side's n coordinates, and their stable ascending order.
 *
 * A granule is g adjacent coordinates, from i g to (i + 1) g, that stay together. There are m = ceil(n / g) granules;
 * the last one is short if g does not divide n. With g = 1 each coordinate is a granule.
 * basis (n, q) is U for the rows or V for the columns; sigma (q); score (m); order (m). A granule whose
 * energy is exactly zero scores 0. */
smoa_status smoa_spectral_order(int64_t n, int64_t granule, int64_t q, const double *basis, const double *sigma,
                                double *score, int64_t *order);

/* Labels (n) of the K contiguous chunks of an order (m) of granules, with the cuts of torch.tensor_split. The order of
 * contiguous blocks is 0, 1, .. m-1; that of random blocks is any permutation. */
smoa_status smoa_block_labels(int64_t n, int64_t granule, int64_t num_blocks, const int64_t *order,
                              int64_t *labels);

/* delta (N, C). */
smoa_status smoa_delta_weight(const smoa_layer *layer, double *delta);

/* y (T, N) = x W0' + bias + (x o multiplier) delta'. bias (N) may be null. multiplier (T, C) is the scaled
 * dropout mask; null means no dropout. */
smoa_status smoa_forward(const smoa_layer *layer, int64_t tokens, const double *x, const double *bias,
                         const double *multiplier, double *y);

/* Gradients of sum(dy o y): dx (T, C), da (rho, C), db (N, rho), from dy (T, N). */
smoa_status smoa_backward(const smoa_layer *layer, int64_t tokens, const double *x, const double *multiplier,
                          const double *dy, double *dx, double *da, double *db);

#endif
