/* What every function is told of a layer: its frozen weight, and the adapter. Python writes it (layer.py). */
#pragma once

#include "stored.h"

/* Which block each row, or column, is in. */
typedef struct {
    const void *of;
    i64 wide; /* int32, not uint8 */
} labels;

static inline int32_t label(labels blocks, i64 i) {
    return blocks.wide ? ((const int32_t *)blocks.of)[i] : ((const uint8_t *)blocks.of)[i];
}

/* W0 (rows, cols), A (rank, cols) and B (rows, rank), stored as `stored` and `factors` say, with any strides: swapped they
 * are those of the transpose. Block k has ranks[k] of `rank`, what A and B hold beyond is not read; its rows are
 * row_index[row_offsets[k]] to row_index[row_offsets[k + 1]], its columns as many. Where blocks are `contiguous`, indices count
 * up from 0. A function says which of indices and labels it needs; others are NULL. */
typedef struct {
    i64 rows, cols, stored, row_stride, col_stride;
    const void *weight;
    i64 rank, factors, A_rank, A_col, B_row, B_rank;
    const void *A, *B;
    i64 blocks, contiguous;
    const int32_t *ranks;
    const i64 *row_index, *col_index;
    const int32_t *row_offsets, *col_offsets;
    labels row_block, col_block;
    float scaling;
} layer;

/* Of block k, whatever `ranks` says. */
static inline i64 rank_of(const layer *l, i64 k) { return l->ranks[k] < l->rank ? l->ranks[k] : l->rank; }

static i64 largest_of(const int32_t *offsets, i64 blocks) {
    i64 largest = 0;
    for (i64 k = 0; k < blocks; k++)
        if (offsets[k + 1] - offsets[k] > largest) largest = offsets[k + 1] - offsets[k];
    return largest;
}

/* Of the rows, and columns, of a block. */
static i64 tallest_of(const layer *l) { return largest_of(l->row_offsets, l->blocks); }
static i64 widest_of(const layer *l) { return largest_of(l->col_offsets, l->blocks); }
