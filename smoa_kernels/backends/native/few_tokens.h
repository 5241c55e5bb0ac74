/* y = x W_effᵀ for few tokens, which packing W0 would not pay for. Each row of W0 is read once, becomes W_eff in
 * registers, a vector at a time, and is multiplied by every token there. */
#pragma once

#include "product.h"

enum {
    FEW = 8, /* tokens per pass over W0 */
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

/* Multiplies LANES columns of some rows by all tokens: as W_eff, where a column is inside the block of a row, else as
 * W0. They begin at c, and `valid` of them exist; A and x point to column c, B and row_label to the first row. */
INLINE void few_columns(int dtype, int tokens, int rows, int inside, const few_job *j, const int32_t *row_label,
                        const float *B, const float *A, const void *const *weight, i64 c, i64 valid, const float *x,
                        vf (*sums)[FEW]) {
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
    /* The columns of the rows' blocks; `whole` is `end` if they are one block. */
    i64 cols = l->cols, c = 0, first = l->contiguous ? l->col_offsets[label[0]] : 0;
    i64 end = l->contiguous ? l->col_offsets[label[rows - 1] + 1] : cols;
    i64 whole = l->contiguous && label[0] == label[rows - 1] ? end : 0;
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
        /* With AVX2's 16 registers a third case slows the others. */
        if (VECTOR_BYTES == 64 && c >= first && c + LANES <= whole)
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

/* Unrolled for each dtype of W0 and number of tokens, so that sums stay in registers. Not inlined, because GCC would
 * then keep the address of every token's x, and spill. */
#define CASE(dtype, n) case dtype * 16 + n: few_of_rows(dtype, n, j, x, row, end, y); break;
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

#if HAS_TILES
/* For one token in bfloat16, without W_eff: y_i = ⟨w_i, x⟩ + s Σ_t B_it ⟨w_i, A_t ∘ x⟩ for row i. A_t ∘ x is rounded to
 * bfloat16; it is an update's part only. */
enum { TRIPLE = 3, VECTORS = 9 };

typedef struct {
    const layer *l;
    i64 stride;
    const half *x; /* (blocks, 1 + rank, stride): x, then A_t ∘ x, which is 0 outside the block */
    float *y;
} dot_job;

typedef float row_sums[VECTORS];

/* sums = the products of some rows and vectors. */
TARGET_BF16 INLINE void dots_with(int vectors, const half *const *row, const half *x, i64 stride, i64 cols,
                                  row_sums *sums) {
    __m512 sum[TRIPLE][VECTORS];
#pragma GCC unroll 9
    for (int t = 0; t < vectors; t++)
#pragma GCC unroll 3
        for (int i = 0; i < TRIPLE; i++) sum[i][t] = _mm512_setzero_ps();
    for (i64 c = 0; c < cols; c += TERMS) {
        __m512bh w[TRIPLE];
#pragma GCC unroll 3
        for (int i = 0; i < TRIPLE; i++)
            w[i] = (__m512bh)_mm512_maskz_loadu_epi16(first_halves(cols - c), row[i] + c);
#pragma GCC unroll 9
        for (int t = 0; t < vectors; t++)
#pragma GCC unroll 3
            for (int i = 0; i < TRIPLE; i++)
                sum[i][t] = _mm512_dpbf16_ps(sum[i][t], w[i], (__m512bh)_mm512_load_si512(x + t * stride + c));
    }
#pragma GCC unroll 9
    for (int t = 0; t < vectors; t++)
#pragma GCC unroll 3
        for (int i = 0; i < TRIPLE; i++) sums[i][t] = total((vf)sum[i][t]);
}

#define CASE(n) case n: dots_with(n, row, x, stride, cols, sums); break;
TARGET_BF16 static void token_dots(i64 n, const half *const *row, const half *x, i64 stride, i64 cols,
                                   row_sums *sums) {
    switch (n) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) default: __builtin_trap(); }
}
#undef CASE

/* A thread's rows, in block order. */
static void dot_rows(void *it, i64 thread, i64 from, i64 to) {
    const dot_job *j = it;
    const layer *l = j->l;
    (void)thread;
    for (i64 k = 0; k < l->blocks; k++)
        for (i64 n = greatest(from, l->row_offsets[k]), end = least(to, l->row_offsets[k + 1]); n < end; n += TRIPLE) {
            i64 vectors, row_at[TRIPLE];
            const half *row[TRIPLE], *x = j->x + k * (l->rank + 1) * j->stride;
            for (i64 i = 0; i < TRIPLE; i++) {
                row_at[i] = l->row_index[least(n + i, end - 1)];
                row[i] = element(l->weight, row_at[i] * l->row_stride, BFLOAT16);
            }
            for (i64 t = 0; t <= rank_of(l, k); t += vectors) {
                row_sums sums[TRIPLE];
                vectors = least(VECTORS, rank_of(l, k) + 1 - t);
                token_dots(vectors, row, x + t * j->stride, j->stride, l->cols, sums);
                for (i64 i = 0; i < least(TRIPLE, end - n); i++) {
                    float sum = t ? j->y[row_at[i]] : sums[i][0];
                    for (i64 v = !t, b = row_at[i] * l->B_row + (t - 1) * l->B_rank; v < vectors; v++)
                        sum += (float)l->scaling * value_at(l->B, b + v * l->B_rank, (int)l->factor_dtype) * sums[i][v];
                    j->y[row_at[i]] = sum;
                }
            }
        }
}

static i64 dot_product(product p) {
    const layer *l = &p.l;
    arena a = p.workspace;
    dot_job j = {.l = l, .stride = round_up(l->cols, TERMS) + TERMS};
    half *x = take(&a, l->blocks * (l->rank + 1) * j.stride * 2);
    int32_t *label = take(&a, j.stride * 4);
    j.x = x, j.y = take(&a, l->rows * 4);
    if (!a.base) return floats_of(&a);
    write_labels(l->col_index, l->col_offsets, l->blocks, label);
    for (i64 k = 0; k < l->blocks; k++)
        for (i64 t = -1; t < l->rank; t++, x += j.stride)
            for (i64 c = 0; c < j.stride; c += LANES) {
                vf value = widen(p.x, c, l->cols - c, BFLOAT16), factor = {0};
                vi labels;
                memcpy(&labels, label + c, sizeof labels);
                for (i64 i = 0; i < least(LANES, l->cols - c) && t >= 0; i++)
                    factor[i] = value_at(l->A, t * l->A_rank + (c + i) * l->A_col, (int)l->factor_dtype);
                if (t >= 0) value = select_label(labels, (int32_t)k, value * factor, (vf){0});
                narrow(x, c, LANES, value, BFLOAT16);
            }
    in_parallel(dot_rows, &j, l->rows, 1, p.threads);
    finish_rows(j.y, l->rows, 1, l->rows, p.bias, 0, p.y, p.y_stride, BFLOAT16);
    return floats_of(&a);
}
#else
static i64 dot_product(product p) { return (void)p, 0; }
#endif

/* y (tokens, rows) = x W_effᵀ + b; W0 is row-major. Returns the size of the workspace that it needs, in floats. */
static i64 few_product(product p) {
    const layer *l = &p.l;
    /* In contiguous blocks W_eff is made of a part of the columns only. */
    if (has_bf16 && p.dtype == BFLOAT16 && p.tokens == 1 && !(l->contiguous && l->blocks > 1)) return dot_product(p);
    arena a = p.workspace;
    few_job job = {.l = l, .tokens = p.tokens, .x_stride = round_up(l->cols, LANES) + SKEW};
    int32_t *row_label = take(&a, l->rows * 4), *col_label = take(&a, l->cols * 4);
    float *B = take(&a, l->rank * round_up(l->rows, ROWS) * 4);
    job.row_label = row_label, job.col_label = col_label, job.B = B, job.factors = factors_of(&a, l, 0, l->scaling);
    job.x = take(&a, p.tokens * job.x_stride * 4), job.y = take(&a, p.tokens * l->rows * 4);
    if (!a.base) return floats_of(&a);
    for (i64 row = 0; row < l->rows; row += ROWS)
        for (i64 t = 0; t < l->rank; t++, B += ROWS)
            memcpy(B, job.factors.B + t * job.factors.B_stride + row, ROWS * sizeof *B);
    memset(job.x, 0, (size_t)(p.tokens * job.x_stride) * sizeof *job.x);
    for (i64 t = 0; t < p.tokens; t++)
        widen_row(element(p.x, t * p.x_stride, p.dtype), p.dtype, l->cols, NULL, job.x + t * job.x_stride);
    write_labels(l->row_index, l->row_offsets, l->blocks, row_label);
    write_labels(l->col_index, l->col_offsets, l->blocks, col_label);
    in_parallel(few_part, &job, l->rows, ROWS, p.threads);
    finish_rows(job.y, l->rows, p.tokens, l->rows, p.bias, 0, p.y, p.y_stride, p.dtype);
    return floats_of(&a);
}
