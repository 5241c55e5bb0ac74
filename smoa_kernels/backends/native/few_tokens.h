/* y = x W_effᵀ for few tokens, which packing W0 would not pay for. Each line of W0 is read once and becomes W_eff in
 * registers, a vector at a time. A row is multiplied by every token there. Of a column-major W0, as in dX, each line is
 * a column: multiples of columns are added up. */
#pragma once

#include "product.h"

enum {
    FEW = 8, /* tokens per pass over W0 */
    ROWS = 4, /* most rows of W0 side by side: they share the loads of x and A */
    SHORT_SUM = 256, /* rows that are added up by themselves, for exactness */
    NONE = 0, SOME, ALL, /* how many of some columns are inside the block of each of some rows */
    ADDED = 0, /* in place of a number of tokens: lines are added up */
};

typedef struct {
    layer l; /* W0 is row-major: the transposed layer if lines are added up */
    i64 tokens;
    factors factors;
    const float *B; /* s B, in panels of ROWS rows so that a panel's ranks share cache lines: (panels, rank, ROWS) */
    const int32_t *row_label, *col_label;
    i64 x_stride, y_stride;
    float *x, *y, *part; /* (tokens, stride), 0 beyond their width; `part` as y, a sum of a few rows */
    const half *dots_x; /* (1 + rank, dots_stride) */
    i64 dots_stride;
} few_job;

/* Multiplies LANES columns of some rows by all tokens: as W_eff, where a column is inside the block of a row, else as
 * W0. They begin at c, and `valid` of them exist; A points to column c, B to the first row, x and y to the first token.
 */
INLINE void few_columns(int dtype, int tokens, int rows, int inside, const few_job *j, i64 row, const float *B,
                        const float *A, const void *const *weight, i64 c, i64 valid, const float *x, float *y,
                        vf (*sums)[FEW]) {
    vi of_column = (vi){0} - 1; /* no block */
    memcpy(&of_column, j->col_label + c, valid < LANES ? (size_t)valid * sizeof *j->col_label : sizeof of_column);
    vf update[ROWS] = {{0}}, w[ROWS];
    for (i64 t = 0; inside && t < j->l.rank; t++) {
        vf a = load(A + t * j->factors.A_stride);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) update[i] += a * B[t * ROWS + i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        w[i] = widen(weight[i], c, valid, dtype);
        if (inside == ALL) w[i] += w[i] * update[i];
        if (inside == SOME) w[i] = select_label(of_column, j->row_label[row + i], w[i] + w[i] * update[i], w[i]);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) sums[i][t] += w[i] * load(x + t * j->x_stride + c);
    }
    for (i64 t = 0; tokens == ADDED && t < j->tokens; t++) {
        vf sum = w[0] * x[t * j->x_stride + row];
#pragma GCC unroll 4
        for (int i = 1; i < rows; i++) sum += w[i] * x[t * j->x_stride + row + i];
        store(y + t * j->y_stride + c, load(y + t * j->y_stride + c) + sum);
    }
}

/* Columns c to `to` of some rows. Prefetches the next rows: memory is the limit. */
INLINE void few_rows(int dtype, int tokens, int rows, const few_job *j, i64 row, i64 c, i64 to, const float *x,
                     float *y) {
    const layer *l = &j->l;
    const int32_t *label = j->row_label + row;
    /* The columns of the rows' blocks; `whole` is `end` if they are one block. */
    i64 first = l->contiguous ? l->col_offsets[label[0]] : 0;
    i64 end = l->contiguous ? l->col_offsets[label[rows - 1] + 1] : l->cols;
    i64 whole = l->contiguous && label[0] == label[rows - 1] ? end : 0;
    const float *A = j->factors.A + c, *B = j->B + row / ROWS * ROWS * l->rank + row % ROWS;
    const void *weight[ROWS];
    vf sums[ROWS][FEW];
    for (int i = 0; i < rows; i++) {
        weight[i] = element(l->weight, (row + i) * l->row_stride, dtype);
        for (int t = 0; t < tokens; t++) sums[i][t] = (vf){0};
    }
    for (; c + LANES <= to; c += LANES, A += LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) __builtin_prefetch(element(weight[i], c + rows * l->row_stride, dtype), 0, 2);
        /* With AVX2's 16 registers a third case slows the others. */
        if (REGISTERS == 32 && c >= first && c + LANES <= whole)
            few_columns(dtype, tokens, rows, ALL, j, row, B, A, weight, c, LANES, x, y, sums);
        else if (c < end && c + LANES > first)
            few_columns(dtype, tokens, rows, SOME, j, row, B, A, weight, c, LANES, x, y, sums);
        else
            few_columns(dtype, tokens, rows, NONE, j, row, B, A, weight, c, LANES, x, y, sums);
    }
    if (c < to) few_columns(dtype, tokens, rows, SOME, j, row, B, A, weight, c, to - c, x, y, sums);
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++) y[t * j->y_stride + row + i] = total(sums[i][t]);
}

/* The same for the rows from `row` to `end`, so many side by side that their sums fit into registers. */
INLINE void few_of_rows(int dtype, int tokens, const few_job *j, i64 row, i64 end, i64 col, i64 to, const float *x,
                        float *y) {
    const int rows = tokens * 4 <= REGISTERS / 2 ? 4 : tokens <= 6 || tokens * 2 <= REGISTERS / 2 ? 2 : 1;
    for (; row + rows <= end; row += rows) few_rows(dtype, tokens, rows, j, row, col, to, x, y);
    for (; row < end; row++) few_rows(dtype, tokens, 1, j, row, col, to, x, y);
}

/* Unrolled for each dtype of W0 and number of tokens, so that sums stay in registers. Not inlined, because GCC would
 * then keep the address of every token's x, and spill. */
#define CASE(dtype, n) case dtype * 16 + n: few_of_rows(dtype, n, j, row, end, col, to, x, y); break;
#define CASES(d) CASE(d, ADDED) \
    CASE(d, 1) CASE(d, 2) CASE(d, 3) CASE(d, 4) CASE(d, 5) CASE(d, 6) CASE(d, 7) CASE(d, 8)
static __attribute__((noinline)) void few_of(i64 tokens, const few_job *j, i64 row, i64 end, i64 col, i64 to,
                                             const float *x, float *y) {
    switch (j->l.dtype * 16 + tokens) { CASES(FLOAT32) CASES(BFLOAT16) CASES(FLOAT16) default: __builtin_trap(); }
}
#undef CASE
#undef CASES

/* A thread's part of y. */
static void few_part(void *it, i64 thread, i64 first, i64 end) {
    const few_job *j = it;
    (void)thread;
    for (i64 t = 0; t < j->tokens; t += FEW)
        few_of(least(FEW, j->tokens - t), j, first, end, 0, j->l.cols, j->x + t * j->x_stride, j->y + t * j->y_stride);
}

static void few_added(void *it, i64 thread, i64 first, i64 end) {
    const few_job *j = it;
    (void)thread;
    for (i64 row = 0; row < j->l.rows; row += SHORT_SUM) {
        few_of(ADDED, j, row, least(row + SHORT_SUM, j->l.rows), first, end, j->x, j->part);
        for (i64 t = 0; t < j->tokens; t++)
            for (i64 c = t * j->y_stride + first; c < t * j->y_stride + end; c += LANES) {
                store(j->y + c, load(j->y + c) + load(j->part + c));
                store(j->part + c, (vf){0});
            }
    }
}

#if HAS_TILES
/* For one token in bfloat16 and one block, without W_eff: y_i = ⟨w_i, x⟩ + s Σ_t B_it ⟨w_i, A_t ∘ x⟩ for row i. A_t ∘ x
 * is rounded to bfloat16; it is an update's part only. */
/* Rows and vectors that are multiplied together: their sums fill 25 of 32 registers. */
enum { DOT_ROWS = 5, VECTORS = 5 };

/* y (DOT_ROWS) += the products of rows and some of the vectors, `from` on, times s B; the first vector is x itself. The
 * lanes of y are added up once, after the last vector. */
TARGET_BF16 INLINE void dots_with(int vectors, const few_job *j, const half *const *row, i64 first, i64 from, vf *y) {
    const i64 stride = j->dots_stride, cols = j->l.cols;
    const half *x = j->dots_x + from * stride;
    const float *B = j->factors.B + first;
    __m512 sum[DOT_ROWS][VECTORS];
#pragma GCC unroll 5
    for (int t = 0; t < vectors; t++)
#pragma GCC unroll 5
        for (int i = 0; i < DOT_ROWS; i++) sum[i][t] = _mm512_setzero_ps();
    for (i64 c = 0; c < cols; c += TERMS) {
        __m512bh w[DOT_ROWS];
#pragma GCC unroll 5
        for (int i = 0; i < DOT_ROWS; i++)
            w[i] = (__m512bh)_mm512_maskz_loadu_epi16(first_halves(cols - c), row[i] + c);
#pragma GCC unroll 5
        for (int t = 0; t < vectors; t++)
#pragma GCC unroll 5
            for (int i = 0; i < DOT_ROWS; i++)
                sum[i][t] = _mm512_dpbf16_ps(sum[i][t], w[i], (__m512bh)_mm512_load_si512(x + t * stride + c));
    }
#pragma GCC unroll 5
    for (int t = 0; t < vectors; t++)
#pragma GCC unroll 5
        for (int i = 0; i < DOT_ROWS; i++)
            y[i] += (vf)sum[i][t] * (from + t ? B[(from + t - 1) * j->factors.B_stride + i] : 1);
}

#define CASE(n) case n: dots_with(n, j, row, first, from, y); break;
TARGET_BF16 static void token_dots(i64 n, const few_job *j, const half *const *row, i64 first, i64 from, vf *y) {
    switch (n) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) default: __builtin_trap(); }
}
#undef CASE

/* A thread's rows. */
static void dot_rows(void *it, i64 thread, i64 first, i64 end) {
    const few_job *j = it;
    i64 vectors = 1 + rank_of(&j->l, 0);
    (void)thread;
    for (; first < end; first += DOT_ROWS) {
        const half *row[DOT_ROWS];
        vf y[DOT_ROWS] = {{0}};
        for (i64 i = 0; i < DOT_ROWS; i++)
            row[i] = element(j->l.weight, least(first + i, end - 1) * j->l.row_stride, BFLOAT16);
        for (i64 t = 0; t < vectors; t += VECTORS) token_dots(least(VECTORS, vectors - t), j, row, first, t, y);
        for (i64 i = 0; i < least(DOT_ROWS, end - first); i++) j->y[first + i] = total(y[i]);
    }
}
#else
#define dot_rows few_part
#endif

/* y (tokens, rows) = x W_effᵀ + b. Returns the size of the workspace that it needs, in floats. */
static i64 few_product(product p) {
    arena a = p.workspace;
    int added = p.l.col_stride != 1;
    few_job job = {.l = added ? transposed(p.l) : p.l, .tokens = p.tokens};
    const layer *l = &job.l;
    int dots = HAS_TILES && has_bf16 && p.dtype == BFLOAT16 && p.tokens == 1 && l->blocks == 1 && !added;
    job.x_stride = round_up(p.l.cols, TERMS) + SKEW, job.y_stride = round_up(p.l.rows, TERMS) + SKEW;
    job.dots_stride = round_up(l->cols, TERMS) + TERMS;
    int32_t *row_label = take(&a, l->rows * 4), *col_label = take(&a, l->cols * 4);
    float *B = take(&a, l->rank * round_up(l->rows, ROWS) * 4);
    half *dots_x = take(&a, dots ? (1 + l->rank) * job.dots_stride * 2 : 0);
    job.row_label = row_label, job.col_label = col_label, job.B = B, job.factors = factors_of(&a, l, 0, l->scaling);
    job.x = take(&a, p.tokens * job.x_stride * 4), job.y = take(&a, p.tokens * job.y_stride * 4);
    job.part = take(&a, added ? p.tokens * job.y_stride * 4 : 0), job.dots_x = dots_x;
    if (!a.base) return floats_of(&a);
    for (i64 row = 0; row < l->rows && !dots; row += ROWS)
        for (i64 t = 0; t < l->rank; t++, B += ROWS)
            memcpy(B, job.factors.B + t * job.factors.B_stride + row, ROWS * sizeof *B);
    memset(job.x, 0, (size_t)(p.tokens * job.x_stride) * sizeof *job.x);
    memset(job.y, 0, (size_t)(p.tokens * job.y_stride) * sizeof *job.y);
    if (added) memcpy(job.part, job.y, (size_t)(p.tokens * job.y_stride) * sizeof *job.y);
    for (i64 t = 0; t < p.tokens; t++)
        widen_row(element(p.x, t * p.x_stride, p.dtype), p.dtype, p.l.cols, NULL, job.x + t * job.x_stride);
    for (i64 t = 0; t <= l->rank && dots; t++, dots_x += job.dots_stride)
        for (i64 c = 0; c < round_up(l->cols, TERMS); c += LANES) {
            vf x = load(job.x + c);
            narrow(dots_x, c, LANES, t ? x * load(job.factors.A + (t - 1) * job.factors.A_stride + c) : x, BFLOAT16);
        }
    write_labels(l->row_index, l->row_offsets, l->blocks, row_label);
    write_labels(l->col_index, l->col_offsets, l->blocks, col_label);
    if (added)
        in_parallel(few_added, &job, l->cols, LANES, p.threads);
    else
        in_parallel(dots ? dot_rows : few_part, &job, l->rows, ROWS, p.threads);
    finish_rows(job.y, job.y_stride, p.tokens, p.l.rows, p.bias, 0, p.y, p.y_stride, p.dtype);
    return floats_of(&a);
}
