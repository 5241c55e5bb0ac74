/* Many weights of one shape, each with an adapter of its own: a loop over those that have pairs. */
#pragma once

#include "adapter.h"
#include "few_tokens.h"
#include "gradient.h"

/* Rows, or columns, of the weights: block k of expert e holds index[offsets[k]] to index[offsets[k + 1]], the steps of
 * both further on for each expert; without an index the coordinates are in order. */
typedef struct {
    i64 count;
    const void *index; /* int16, or int32 where `wide` */
    i64 wide, index_step;
    const int32_t *offsets;
    i64 offsets_step;
} side;

typedef struct {
    i64 count, blocks, rank;
    const int32_t *ends, *ranks; /* (count) pairs of the experts up to each, (blocks) */
    side rows, cols;
    const float *weight; /* (count, rows, cols), with the strides that follow */
    i64 weight_expert, weight_row, weight_col;
    const float *A; /* (count, rank, cols) */
    i64 A_expert, A_rank, A_col;
    const float *B; /* (count, rows, rank) */
    i64 B_expert, B_row, B_rank;
    double scaling;
} experts;

/* What one expert's blocks are made into; and what is left of the workspace. */
typedef struct {
    i64 *row_index, *col_index;
    int32_t *row_block, *col_block;
    float *rest;
} expanded;

static i64 expanded_size(const experts *e) { return lines(3 * (e->rows.count + e->cols.count)) + 16; }

static expanded expanded_in(const experts *e, float *workspace) {
    i64 *row_index = (i64 *)from_a_line(workspace), *col_index = row_index + e->rows.count;
    int32_t *row_block = (int32_t *)(col_index + e->cols.count);
    return (expanded){row_index, col_index, row_block, row_block + e->rows.count, workspace + expanded_size(e)};
}

static const int32_t *offsets_of(const side *s, i64 expert) { return s->offsets + expert * s->offsets_step; }

static int offsets_fit(const side *s, i64 expert, i64 blocks) {
    const int32_t *offsets = offsets_of(s, expert);
    int fit = offsets[0] == 0 && offsets[blocks] == s->count;
    for (i64 k = 0; k < blocks; k++) fit &= offsets[k] <= offsets[k + 1];
    return fit;
}

/* Write index and labels of one expert's rows or columns; whether each of these is in a block. Their offsets fit. */
static int expand(const side *s, i64 expert, i64 blocks, i64 *index, int32_t *block) {
    const int32_t *offsets = offsets_of(s, expert);
    i64 first = expert * s->index_step;
    for (i64 i = 0; i < s->count; i++) block[i] = -1;
    for (i64 k = 0; k < blocks; k++)
        for (i64 i = offsets[k]; i < offsets[k + 1]; i++) {
            i64 at = !s->index  ? i
                     : s->wide ? ((const int32_t *)s->index)[first + i]
                               : ((const int16_t *)s->index)[first + i];
            if (at < 0 || at >= s->count || block[at] >= 0) return 0;
            index[i] = at;
            block[at] = (int32_t)k;
        }
    return 1;
}

static int expand_both(const experts *e, i64 expert, i64 *last, expanded *into) {
    int known = *last >= 0, same_rows = known && !e->rows.index_step && !e->rows.offsets_step,
        same_cols = known && !e->cols.index_step && !e->cols.offsets_step;
    *last = expert;
    return (same_rows || expand(&e->rows, expert, e->blocks, into->row_index, into->row_block)) &&
           (same_cols || expand(&e->cols, expert, e->blocks, into->col_index, into->col_block));
}

/* Expert `i`'s layer, of which `now` has indices and labels; NULL: neither. */
static layer expert_of(const experts *e, i64 i, const expanded *now) {
    layer l = {.rows = e->rows.count, .cols = e->cols.count, .stored = FLOAT32, .row_stride = e->weight_row,
               .col_stride = e->weight_col, .weight = e->weight + i * e->weight_expert, .rank = e->rank, .factors = FLOAT32,
               .A_rank = e->A_rank, .A_col = e->A_col, .B_row = e->B_row, .B_rank = e->B_rank, .A = e->A + i * e->A_expert,
               .B = e->B + i * e->B_expert, .blocks = e->blocks, .contiguous = !e->rows.index, .ranks = e->ranks,
               .row_offsets = offsets_of(&e->rows, i), .col_offsets = offsets_of(&e->cols, i), .scaling = (float)e->scaling};
    if (now) {
        l.row_index = now->row_index, l.col_index = now->col_index;
        l.row_block = (labels){now->row_block, 1}, l.col_block = (labels){now->col_block, 1};
    }
    return l;
}

/* Whether a few pairs of one expert are multiplied as W0 is read. */
static int few_of(const experts *e, i64 pairs) {
    return e->weight_col == 1 && e->A_col == 1 && smoa_few_fit(pairs, e->rank);
}

/* Whether s B has a number that is not zero. */
static int updates(const layer *l) {
    for (i64 k = 0; k < l->blocks && l->scaling != 0; k++)
        for (i64 i = l->row_offsets[k]; i < l->row_offsets[k + 1]; i++)
            for (i64 t = 0; t < rank_of(l, k); t++)
                if (one_of(l->B, l->row_index[i] * l->B_row + t * l->B_rank, FLOAT32) != 0) return 1;
    return 0;
}

/* What a workspace is for: smoa_experts_linear_fit; smoa_experts_few_fit and smoa_experts_update_fit, which alone hold
 * all of a ΔW; or smoa_experts_gradient_fit. */
enum { LINEAR, UPDATE, GRADIENT };

/* Floats of one expert beside what its blocks are made into. */
static i64 expert_size(const experts *e, i64 stage, i64 expert, i64 tokens, i64 threads) {
    layer l = expert_of(e, expert, NULL);
    if (stage == GRADIENT)
        return (threads > 1 ? lines(threads * l.rank * l.cols) : 0) + smoa_gradient_workspace(&l, tokens, threads);
    i64 update = stage == UPDATE ? lines(tokens * l.rows) : 0;
    if (few_of(e, tokens)) return update + smoa_few_workspace(&l, threads);
    return update + (stage == UPDATE ? smoa_update_workspace : smoa_linear_workspace)(&l, tokens, threads);
}

/* Floats that the functions of a stage need; -1 where offsets or ends do not fit `pairs` and the weight. */
i64 smoa_experts_workspace(const experts *e, i64 stage, i64 pairs, i64 threads) {
    i64 most = 0, start = 0;
    for (i64 i = 0; i < e->count; start = e->ends[i++]) {
        i64 tokens = e->ends[i] - start;
        if (tokens < 0 || e->ends[i] > pairs) return -1;
        if (!tokens) continue;
        if (!offsets_fit(&e->rows, i, e->blocks) || !offsets_fit(&e->cols, i, e->blocks)) return -1;
        i64 needs = expert_size(e, stage, i, tokens, threads);
        most = needs > most ? needs : most;
    }
    return start == pairs ? expanded_size(e) + most : -1;
}

/* y (pairs, rows): row p is x_p W_effᵀ with the W_eff of the expert of pair p; x (pairs, cols) with contiguous rows.
 * Whether every row and column is in a block. */
i64 smoa_experts_linear_fit(const experts *e, const float *x, i64 x_stride, float *y, float *workspace, i64 threads) {
    expanded now = expanded_in(e, workspace);
    i64 start = 0, last = -1;
    for (i64 i = 0; i < e->count; start = e->ends[i++]) {
        i64 tokens = e->ends[i] - start;
        if (!tokens) continue;
        if (!expand_both(e, i, &last, &now)) return 0;
        layer l = expert_of(e, i, &now);
        const float *from = x + start * x_stride;
        float *to = y + start * l.rows;
        if (few_of(e, tokens))
            smoa_few(&l, tokens, from, x_stride, to, 0, now.rest, threads);
        else
            smoa_linear(&l, tokens, from, FLOAT32, x_stride, to, 0, now.rest, threads);
    }
    return 1;
}

/* y (pairs, rows) of the pairs of expert `i`, `first` to `end`, with x as above: x_p W_effᵀ of few pairs, 1 where that is
 * written. 0 where it is not: there are many pairs, or s B is zero, where y is to be the product without an adapter, which
 * others compute. -1 where a row or column is in no block. */
i64 smoa_experts_few_fit(const experts *e, i64 i, i64 first, i64 end, const float *x, i64 x_stride, float *y,
                         float *workspace, i64 threads) {
    expanded now = expanded_in(e, workspace);
    i64 last = -1;
    if (!few_of(e, end - first)) return 0;
    if (!expand_both(e, i, &last, &now)) return -1;
    layer l = expert_of(e, i, &now);
    if (!updates(&l)) return 0;
    smoa_few(&l, end - first, x + first * x_stride, x_stride, y + first * l.rows, 0, now.rest, threads);
    return 1;
}

/* The same pairs' y += x_p ΔWᵀ. Whether every row and column is in a block. */
i64 smoa_experts_update_fit(const experts *e, i64 i, i64 first, i64 end, const float *x, i64 x_stride, float *y,
                            float *workspace, i64 threads) {
    expanded now = expanded_in(e, workspace);
    i64 tokens = end - first, size = tokens * e->rows.count, last = -1;
    if (!expand_both(e, i, &last, &now)) return 0;
    const float *from = x + first * x_stride;
    float *to = y + first * e->rows.count, *update = now.rest, *rest = update + lines(size);
    layer l = expert_of(e, i, &now);
    if (few_of(e, tokens))
        smoa_few(&l, tokens, from, x_stride, update, 1, rest, threads);
    else
        smoa_update(&l, tokens, from, FLOAT32, x_stride, NULL, update, NULL, rest, threads);
    for (i64 p = 0; p < size; p++) to[p] += update[p];
    return 1;
}

/* dA (count, rank, cols) and dB (count, rows, rank), zeros before, of dy (pairs, rows) and x (pairs, cols) with
 * contiguous rows, A and B contiguous. Whether every row and column is in a block. */
i64 smoa_experts_gradient_fit(const experts *e, const float *dy, i64 dy_stride, const float *x, i64 x_stride, float *dA,
                              float *dB, float *workspace, i64 threads) {
    expanded now = expanded_in(e, workspace);
    i64 start = 0, last = -1, size = e->rank * e->cols.count;
    float *partial = now.rest, *rest = threads > 1 ? partial + lines(threads * size) : partial;
    for (i64 i = 0; i < e->count; start = e->ends[i++]) {
        i64 tokens = e->ends[i] - start;
        if (!tokens) continue;
        if (!expand_both(e, i, &last, &now)) return 0;
        float *sum = dA + i * size, *into = threads > 1 ? partial : sum;
        if (threads > 1) memset(partial, 0, (size_t)(threads * size) * sizeof *partial);
        layer l = expert_of(e, i, &now);
        smoa_gradient(&l, tokens, dy + start * dy_stride, dy_stride, x + start * x_stride, FLOAT32, x_stride, NULL, into,
                      dB + i * l.rows * l.rank, rest, threads);
        for (i64 t = 0; threads > 1 && t < threads; t++)
            for (i64 j = 0; j < size; j++) sum[j] += partial[t * size + j];
    }
    return 1;
}
