/* Runs every function of the oracle once on heap arrays of exactly the stated sizes, so that a build with
 * -fsanitize=address,undefined sees any access outside them. The case has uneven ranks, one of them zero, an empty
 * block (3), a block without columns (2), and a short last granule. Exits with the first status that is not SMOA_OK. */
#include <stddef.h>
#include <stdlib.h>

#include "smoa_ref.h"

enum { N = 5, C = 7, Q = 5, K = 4, RHO = 3, T = 2, G = 2, M = 4 };

/* The sanitizer puts a guard right behind the last entry of malloc's memory. */
static void *allocate(size_t count, size_t size)
{
    void *memory = malloc(count * size);
    if (!memory)
        abort();
    return memory;
}

static double *filled(size_t count)
{
    double *values = allocate(count, sizeof *values);
    for (size_t index = 0; index < count; index++)
        values[index] = 0.1 * (double)(index % 11) - 0.4;
    return values;
}

static int64_t *copied(const int64_t *source, size_t count)
{
    int64_t *values = allocate(count, sizeof *values);
    for (size_t index = 0; index < count; index++)
        values[index] = source[index];
    return values;
}

int main(void)
{
    const int64_t row_labels[N] = {0, 2, 1, 0, 1}, col_labels[C] = {1, 0, 0, 1, 0, 1, 0};
    const int64_t block_ranks[K] = {RHO, 0, 2, 1};
    double *weight = filled(N * C), *a = filled(RHO * C), *b = filled(N * RHO), *bias = filled(N);
    double *x = filled(T * C), *multiplier = filled(T * C), *dy = filled(T * N);
    double *y = filled(T * N), *delta = filled(N * C);
    double *dx = filled(T * C), *da = filled(RHO * C), *db = filled(N * RHO);
    double *basis = filled(C * Q), *sigma = filled(Q), *score = filled(M);
    int64_t *order = copied(col_labels, M), *labels = copied(col_labels, C);
    int64_t *row_block = copied(row_labels, N), *col_block = copied(col_labels, C);
    int64_t *ranks = copied(block_ranks, K);
    const smoa_layer layer = {N, C, K, RHO, weight, a, b, row_block, col_block, ranks, 0.5};

    int status = smoa_spectral_order(C, G, Q, basis, sigma, score, order);
    status = status ? status : (int)smoa_block_labels(C, G, K, order, labels);
    status = status ? status : (int)smoa_delta_weight(&layer, delta);
    status = status ? status : (int)smoa_forward(&layer, T, x, NULL, NULL, y);
    status = status ? status : (int)smoa_forward(&layer, T, x, bias, multiplier, y);
    status = status ? status : (int)smoa_backward(&layer, T, x, NULL, dy, dx, da, db);
    status = status ? status : (int)smoa_backward(&layer, T, x, multiplier, dy, dx, da, db);

    void *owned[] = {weight, a,  b,  bias,  x,     multiplier, dy,     y,         delta,     dx,
                     da,     db, basis, sigma, score, order,      labels, row_block, col_block, ranks};
    for (size_t index = 0; index < sizeof owned / sizeof *owned; index++)
        free(owned[index]);
    return status;
}
