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
    i64 tokens, threads;
    factors factors;
    const int32_t *col_label;
    i64 x_stride;
    float *x, *y; /* (tokens, x_stride), 0 beyond cols; (tokens, rows) */
} few_job;

/* Turns LANES columns of some rows of block k into W_eff and multiplies them by all tokens. They begin at c, and `valid` of them exist;
 * `rank` is 0 if none is the block's. x points to column c, B to each row. */
INLINE void few_columns(int dtype, int tokens, int rows, const few_job *j, i64 k, i64 rank, const void *const *weight, i64 c,
                        i64 valid, const float *x, const float *const *B, vf (*sums)[FEW]) {
    vi labels = (vi){0} - 1; /* no block */
    memcpy(&labels, j->col_label + c, valid < LANES ? (size_t)valid * sizeof *j->col_label : sizeof labels);
    vf update[ROWS] = {{0}};
    const float *A = j->factors.A + c;
    for (i64 t = 0; t < rank; t++) {
        vf a = load(A + t * j->factors.A_stride);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) update[i] += a * B[i][t * j->factors.B_stride];
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        vf w = widen(weight[i], c, valid, dtype);
        w = select_label(labels, (int32_t)k, w + w * update[i], w);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) sums[i][t] += w * load(x + t * j->x_stride);
    }
}

/* y[token, index[i]] for some tokens and some rows of block k.
 * Prefetches the rows `next`: rows lie far apart, and memory is the limit. */
INLINE void few_rows(int dtype, int tokens, int rows, const few_job *j, const float *x, i64 k, const i64 *index, const i64 *next,
                     float *y) {
    const layer *l = j->l;
    i64 rank = rank_of(l, k), cols = l->cols, c = 0;
    i64 first = l->contiguous ? l->col_offsets[k] : 0, end = l->contiguous ? l->col_offsets[k + 1] : cols; /* the block's columns */
    const void *weight[ROWS];
    const char *ahead[ROWS];
    const float *B[ROWS];
    vf sums[ROWS][FEW];
    for (int i = 0; i < rows; i++) {
        B[i] = j->factors.B + index[i];
        weight[i] = element(l->weight, index[i] * l->row_stride, dtype);
        ahead[i] = element(l->weight, next[i] * l->row_stride, dtype);
        for (int t = 0; t < tokens; t++) sums[i][t] = (vf){0};
    }
    for (; c + LANES <= cols; c += LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) __builtin_prefetch(ahead[i] + c * bytes_of(dtype), 0, 2);
        few_columns(dtype, tokens, rows, j, k, c < end && c + LANES > first ? rank : 0, weight, c, LANES, x + c, B, sums);
    }
    if (c < cols) few_columns(dtype, tokens, rows, j, k, rank, weight, c, cols - c, x + c, B, sums);
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++) y[t * l->rows + index[i]] = total(sums[i][t]);
}

/* Rows side by side whose sums fit into registers. */
INLINE int rows_of(i64 tokens) { return tokens * 4 <= LANES ? 4 : tokens <= 6 || tokens * 2 <= LANES ? 2 : 1; }

/* The same for rows index[first] to index[end - 1]. */
INLINE void few_of_block(int dtype, int tokens, const few_job *j, const float *x, i64 k, const i64 *index, i64 first, i64 end,
                         float *y) {
    const int rows = rows_of(tokens);
    for (; first + rows <= end; first += rows)
        few_rows(dtype, tokens, rows, j, x, k, index + first, index + (first + 2 * rows <= end ? first + rows : first), y);
    for (; first < end; first++)
        few_rows(dtype, tokens, 1, j, x, k, index + first, index + least(first + 1, end - 1), y);
}

/* One function per dtype of W0, unrolled for each number of tokens, so that sums stay in registers. */
#define CASE(dtype, tokens) \
    case tokens: few_of_block(dtype, tokens, j, x, k, index, first, end, y); break;
#define FUNCTION(dtype)                                                                                                   \
    static __attribute__((noinline)) void few_of_##dtype(i64 tokens, const few_job *j, const float *x, i64 k,             \
                                                         const i64 *index, i64 first, i64 end, float *y) {                \
        switch (tokens) {                                                                                                 \
            CASE(dtype, 1) CASE(dtype, 2) CASE(dtype, 3) CASE(dtype, 4) CASE(dtype, 5) CASE(dtype, 6) CASE(dtype, 7) CASE(dtype, 8) \
        }                                                                                                                 \
    }
FUNCTION(FLOAT32)
FUNCTION(BFLOAT16)
FUNCTION(FLOAT16)
#undef CASE
#undef FUNCTION

/* A thread's rows of each block. */
static void few_part(void *it, i64 thread, i64 first, i64 end) {
    const few_job *j = it;
    const layer *l = j->l;
    for (i64 token = 0; token < j->tokens; token += FEW)
        for (i64 k = 0; k < l->blocks; k++) {
            first = share_of(height_of(l, k), ROWS, thread, j->threads), end = share_of(height_of(l, k), ROWS, thread + 1, j->threads);
            (l->dtype == FLOAT32 ? few_of_FLOAT32 : l->dtype == BFLOAT16 ? few_of_BFLOAT16 : few_of_FLOAT16)(
                least(FEW, j->tokens - token), j, j->x + token * j->x_stride, k, l->row_index + l->row_offsets[k], first, end,
                j->y + token * l->rows);
        }
}

/* y (tokens, rows) = x W_effᵀ + b; W0 has contiguous rows. Returns the size of the workspace that it needs, in floats. */
static i64 few_product(product p) {
    const layer *l = &p.l;
    arena a = p.workspace;
    few_job job = {.l = l, .tokens = p.tokens, .threads = p.threads, .x_stride = round_up(l->cols, LANES) + SKEW};
    int32_t *label = take(&a, l->cols * 4);
    job.col_label = label, job.factors = factors_of(&a, l, 0, l->scaling);
    job.x = take(&a, p.tokens * job.x_stride * 4), job.y = take(&a, p.tokens * l->rows * 4);
    if (!a.base) return floats_of(&a);
    memset(job.x, 0, (size_t)(p.tokens * job.x_stride) * sizeof *job.x);
    for (i64 t = 0; t < p.tokens; t++)
        widen_row(p.x, p.dtype, t * p.x_stride, l->cols, NULL, job.x + t * job.x_stride);
    write_labels(l->col_index, l->col_offsets, l->blocks, label);
    in_parallel(few_part, &job, p.threads, 1, p.threads);
    finish_rows(job.y, 0, p.tokens, l->rows, p.bias, 0, p.y, p.dtype);
    return floats_of(&a);
}
