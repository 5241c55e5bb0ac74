/* y = x W_effᵀ for few tokens, which packing W0 would not pay for. Each row of W0 is read once, becomes W_eff in registers, a vector at a
 * time, and is multiplied by every token there. */
#pragma once

#include "product.h"

enum {
    FEW = 8,  /* tokens per pass over W0 */
    ROWS = 4, /* most rows of W0 side by side: they share the loads of x and A */
    NONE = 0, SOME, ALL, /* how many of some columns are inside the block of each of some rows */
};

typedef struct {
    const layer *l;
    i64 tokens;
    factors factors;
    const float *B; /* s B, in panels of ROWS rows so that a panel's ranks share cache lines: (panels, rank, ROWS) */
    const int32_t *row_label, *col_label;
    i64 x_stride;
    float *x, *y; /* (tokens, x_stride), 0 beyond cols; (tokens, rows) */
} few_job;

/* Multiplies LANES columns of some rows by all tokens: as W_eff, where a column is inside the block of a row, else as W0. They begin at c, and
 * `valid` of them exist; A and x point to column c, B and row_label to the first row. */
INLINE void few_columns(int dtype, int tokens, int rows, int inside, const few_job *j, const int32_t *row_label, const float *B, const float *A,
                        const void *const *weight, i64 c, i64 valid, const float *x, vf (*sums)[FEW]) {
    vi of_column = (vi){0} - 1; /* no block */
    memcpy(&of_column, j->col_label + c, valid < LANES ? (size_t)valid * sizeof *j->col_label : sizeof of_column);
    vf update[ROWS] = {{0}};
    for (i64 t = 0; inside && t < j->l->rank; t++) {
        vf a = load(A + t * j->factors.A_stride);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) update[i] += a * B[t * ROWS + i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        vf w = widen(weight[i], c, valid, dtype);
        if (inside) w = inside == ALL ? w + w * update[i] : select_label(of_column, row_label[i], w + w * update[i], w);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) sums[i][t] += w * load(x + t * j->x_stride);
    }
}

/* y[token, row + i] for some tokens and some rows. Prefetches the next rows: memory is the limit. */
INLINE void few_rows(int dtype, int tokens, int rows, const few_job *j, const float *x, i64 row, float *y) {
    const layer *l = j->l;
    const int32_t *label = j->row_label + row;
    i64 cols = l->cols, c = 0, first = 0, end = cols, whole = 0; /* the columns of the rows' blocks; `whole` is `end` if they are one block */
    if (l->contiguous) first = l->col_offsets[label[0]], end = l->col_offsets[label[rows - 1] + 1], whole = label[0] == label[rows - 1] ? end : 0;
    const float *A = j->factors.A, *B = j->B + row / ROWS * ROWS * l->rank + row % ROWS;
    const void *weight[ROWS];
    vf sums[ROWS][FEW];
    for (int i = 0; i < rows; i++) {
        weight[i] = element(l->weight, (row + i) * l->row_stride, dtype);
        for (int t = 0; t < tokens; t++) sums[i][t] = (vf){0};
    }
    for (; c + LANES <= cols; c += LANES, A += LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) __builtin_prefetch(element(weight[i], c + rows * l->row_stride, dtype), 0, 2);
        if (VECTOR_BYTES == 64 && c >= first && c + LANES <= whole) /* with AVX2's 16 registers a third case slows the others */
            few_columns(dtype, tokens, rows, ALL, j, label, B, A, weight, c, LANES, x + c, sums);
        else if (c < end && c + LANES > first)
            few_columns(dtype, tokens, rows, SOME, j, label, B, A, weight, c, LANES, x + c, sums);
        else
            few_columns(dtype, tokens, rows, NONE, j, label, B, A, weight, c, LANES, x + c, sums);
    }
    if (c < cols) few_columns(dtype, tokens, rows, SOME, j, label, B, A, weight, c, cols - c, x + c, sums);
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++) y[t * l->rows + row + i] = total(sums[i][t]);
}

/* The same for the rows from `row` to `end`, so many side by side that their sums fit into registers. */
INLINE void few_of_rows(int dtype, int tokens, const few_job *j, const float *x, i64 row, i64 end, float *y) {
    const int rows = tokens * 4 <= LANES ? 4 : tokens <= 6 || tokens * 2 <= LANES ? 2 : 1;
    for (; row + rows <= end; row += rows) few_rows(dtype, tokens, rows, j, x, row, y);
    for (; row < end; row++) few_rows(dtype, tokens, 1, j, x, row, y);
}

/* Unrolled for each dtype of W0 and number of tokens, so that sums stay in registers. Not inlined, because GCC would then keep the address of
 * every token's x, and spill. */
#define CASE(dtype, tokens) \
    case dtype * 16 + tokens: few_of_rows(dtype, tokens, j, x, row, end, y); break;
#define CASES(d) CASE(d, 1) CASE(d, 2) CASE(d, 3) CASE(d, 4) CASE(d, 5) CASE(d, 6) CASE(d, 7) CASE(d, 8)
static __attribute__((noinline)) void few_of(i64 tokens, const few_job *j, const float *x, i64 row, i64 end, float *y) {
    switch (j->l->dtype * 16 + tokens) { CASES(FLOAT32) CASES(BFLOAT16) CASES(FLOAT16) default: __builtin_trap(); }
}
#undef CASE
#undef CASES

/* A thread's rows. */
static void few_part(void *it, i64 thread, i64 row, i64 end) {
    const few_job *j = it;
    (void)thread;
    for (i64 token = 0; token < j->tokens; token += FEW)
        few_of(least(FEW, j->tokens - token), j, j->x + token * j->x_stride, row, end, j->y + token * j->l->rows);
}

/* y (tokens, rows) = x W_effᵀ + b; W0 is row-major. Returns the size of the workspace that it needs, in floats. */
static i64 few_product(product p) {
    const layer *l = &p.l;
    arena a = p.workspace;
    few_job job = {.l = l, .tokens = p.tokens, .x_stride = round_up(l->cols, LANES) + SKEW};
    int32_t *row_label = take(&a, l->rows * 4), *col_label = take(&a, l->cols * 4);
    float *B = take(&a, l->rank * round_up(l->rows, ROWS) * 4);
    job.row_label = row_label, job.col_label = col_label, job.B = B, job.factors = factors_of(&a, l, 0, l->scaling);
    job.x = take(&a, p.tokens * job.x_stride * 4), job.y = take(&a, p.tokens * l->rows * 4);
    if (!a.base) return floats_of(&a);
    for (i64 row = 0; row < l->rows; row += ROWS)
        for (i64 t = 0; t < l->rank; t++, B += ROWS) memcpy(B, job.factors.B + t * job.factors.B_stride + row, ROWS * sizeof *B);
    memset(job.x, 0, (size_t)(p.tokens * job.x_stride) * sizeof *job.x);
    for (i64 t = 0; t < p.tokens; t++)
        widen_row(element(p.x, t * p.x_stride, p.dtype), p.dtype, l->cols, NULL, job.x + t * job.x_stride);
    write_labels(l->row_index, l->row_offsets, l->blocks, row_label);
    write_labels(l->col_index, l->col_offsets, l->blocks, col_label);
    in_parallel(few_part, &job, l->rows, ROWS, p.threads);
    finish_rows(job.y, l->rows, p.tokens, l->rows, p.bias, 0, p.y, p.y_stride, p.dtype);
    return floats_of(&a);
}
