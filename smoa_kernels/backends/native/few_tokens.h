/* y = x W_effᵀ for few tokens, which packing W0 would not pay for. Each row of W0 is read once, becomes W_eff in registers, a vector at a
 * time, and is multiplied by every token there. */
#pragma once

#include "product.h"

enum {
    FEW = 8,  /* tokens per pass over W0 */
    ROWS = 4, /* most rows of W0 side by side: they share the loads of x and A */
};

typedef struct {
    const layer *l;
    i64 tokens;
    factors factors;
    const int32_t *row_label, *col_label;
    i64 x_stride;
    float *x, *y; /* (tokens, x_stride), 0 beyond cols; (tokens, rows) */
} few_job;

/* Multiplies LANES columns of some rows by all tokens, as W_eff, or as W0 if none is `inside` a block of the rows. They begin at c, and
 * `valid` of them exist; x points to column c. */
INLINE void few_columns(int dtype, int tokens, int rows, int inside, const few_job *j, i64 row, const void *const *weight, i64 c, i64 valid,
                        const float *x, vf (*sums)[FEW]) {
    vi of_column = (vi){0} - 1; /* no block */
    memcpy(&of_column, j->col_label + c, valid < LANES ? (size_t)valid * sizeof *j->col_label : sizeof of_column);
    vf update[ROWS] = {{0}};
    const float *A = j->factors.A + c, *B = j->factors.B + row;
    for (i64 t = 0; inside && t < j->l->rank; t++, B += j->factors.B_stride) {
        vf a = load(A + t * j->factors.A_stride);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) update[i] += a * B[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        vf w = widen(weight[i], c, valid, dtype);
        if (inside) w = select_label(of_column, j->row_label[row + i], w + w * update[i], w);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) sums[i][t] += w * load(x + t * j->x_stride);
    }
}

/* y[token, row + i] for some tokens and some rows. Prefetches the next rows: memory is the limit. */
INLINE void few_rows(int dtype, int tokens, int rows, const few_job *j, const float *x, i64 row, float *y) {
    const layer *l = j->l;
    i64 cols = l->cols, c = 0, first = 0, end = cols; /* the columns of the rows' blocks */
    if (l->contiguous) first = l->col_offsets[j->row_label[row]], end = l->col_offsets[j->row_label[row + rows - 1] + 1];
    const void *weight[ROWS];
    vf sums[ROWS][FEW];
    for (int i = 0; i < rows; i++) {
        weight[i] = element(l->weight, (row + i) * l->row_stride, dtype);
        for (int t = 0; t < tokens; t++) sums[i][t] = (vf){0};
    }
    for (; c + LANES <= cols; c += LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) __builtin_prefetch(element(weight[i], c + rows * l->row_stride, dtype), 0, 2);
        if (c < end && c + LANES > first)
            few_columns(dtype, tokens, rows, 1, j, row, weight, c, LANES, x + c, sums);
        else
            few_columns(dtype, tokens, rows, 0, j, row, weight, c, LANES, x + c, sums);
    }
    if (c < cols) few_columns(dtype, tokens, rows, 1, j, row, weight, c, cols - c, x + c, sums);
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++) y[t * l->rows + row + i] = total(sums[i][t]);
}

/* Rows side by side whose sums fit into registers. */
INLINE int rows_of(i64 tokens) { return tokens * 4 <= LANES ? 4 : tokens <= 6 || tokens * 2 <= LANES ? 2 : 1; }

/* The same for the rows from `row` to `end`. */
INLINE void few_of_rows(int dtype, int tokens, const few_job *j, const float *x, i64 row, i64 end, float *y) {
    const int rows = rows_of(tokens);
    for (; row + rows <= end; row += rows) few_rows(dtype, tokens, rows, j, x, row, y);
    for (; row < end; row++) few_rows(dtype, tokens, 1, j, x, row, y);
}

/* One function per dtype of W0, unrolled for each number of tokens, so that sums stay in registers. */
#define CASE(dtype, tokens) \
    case tokens: few_of_rows(dtype, tokens, j, x, row, end, y); break;
#define FUNCTION(dtype)                                                                                                                \
    static __attribute__((noinline)) void few_of_##dtype(i64 tokens, const few_job *j, const float *x, i64 row, i64 end, float *y) {   \
        switch (tokens) {                                                                                                 \
            CASE(dtype, 1) CASE(dtype, 2) CASE(dtype, 3) CASE(dtype, 4) CASE(dtype, 5) CASE(dtype, 6) CASE(dtype, 7) CASE(dtype, 8) \
        }                                                                                                                 \
    }
FUNCTION(FLOAT32)
FUNCTION(BFLOAT16)
FUNCTION(FLOAT16)
#undef CASE
#undef FUNCTION

/* A thread's rows. */
static void few_part(void *it, i64 thread, i64 row, i64 end) {
    (void)thread;
    const few_job *j = it;
    for (i64 token = 0; token < j->tokens; token += FEW)
        (j->l->dtype == FLOAT32 ? few_of_FLOAT32 : j->l->dtype == BFLOAT16 ? few_of_BFLOAT16 : few_of_FLOAT16)(
            least(FEW, j->tokens - token), j, j->x + token * j->x_stride, row, end, j->y + token * j->l->rows);
}

/* y (tokens, rows) = x W_effᵀ + b; W0 is row-major. Returns the size of the workspace that it needs, in floats. */
static i64 few_product(product p) {
    const layer *l = &p.l;
    arena a = p.workspace;
    few_job job = {.l = l, .tokens = p.tokens, .x_stride = round_up(l->cols, LANES) + SKEW};
    int32_t *row_label = take(&a, l->rows * 4), *col_label = take(&a, l->cols * 4);
    job.row_label = row_label, job.col_label = col_label, job.factors = factors_of(&a, l, 0, l->scaling);
    job.x = take(&a, p.tokens * job.x_stride * 4), job.y = take(&a, p.tokens * l->rows * 4);
    if (!a.base) return floats_of(&a);
    memset(job.x, 0, (size_t)(p.tokens * job.x_stride) * sizeof *job.x);
    for (i64 t = 0; t < p.tokens; t++)
        widen_row(p.x, p.dtype, t * p.x_stride, l->cols, NULL, job.x + t * job.x_stride);
    write_labels(l->row_index, l->row_offsets, l->blocks, row_label);
    write_labels(l->col_index, l->col_offsets, l->blocks, col_label);
    in_parallel(few_part, &job, l->rows, ROWS, p.threads);
    finish_rows(job.y, l->rows, p.tokens, l->rows, p.bias, 0, p.y, p.y_stride, p.dtype);
    return floats_of(&a);
}
