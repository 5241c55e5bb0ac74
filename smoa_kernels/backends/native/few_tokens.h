/* y = x W_effᵀ for a few tokens, which do not pay for packing W0: some rows of it are read once, become W_eff in registers, a vector at a
 * time, and are multiplied by every token there. */
#pragma once

#include "product.h"

enum {
    FEW = 8,  /* tokens for which W0 is read at a time */
    ROWS = 4, /* of it at most side by side, so that what is loaded of x and A serves them all */
};

typedef struct {
    const layer *l;
    i64 tokens, parts, x_stride;
    const float *x, *A, *B;
    const int32_t *col_block;
    float *y, *workspace;
} few_job;

/* The columns between which all of a block lie. */
typedef struct {
    i64 first, end;
} range;

static range range_of(const layer *l, i64 k) {
    range own = {l->cols, 0};
    for (i64 c = l->col_offsets[k]; c < l->col_offsets[k + 1]; c++)
        own = (range){least(own.first, l->col_index[c]), greatest(own.end, l->col_index[c] + 1)};
    return own;
}

/* Floats of some rows, interleaved: LANES columns of each, one row after another, then the next columns, 0 behind the last. So
 * what is read together lies together. Rows of 1024 or 2048 numbers side by side would all lie in the same few sets of the L1
 * cache, and drive each other out of it. */
static i64 interleaved(i64 count, i64 cols) { return round_up(count * round_up(cols, LANES), 16); }

static void interleave(i64 count, i64 cols, const float *from, i64 stride, float *to) {
    for (i64 c = 0; c < cols; c += LANES)
        for (i64 i = 0; i < count; i++, to += LANES) store(to, widen(from + i * stride, c, cols - c, FLOAT32));
}

/* s B of some rows, A and x. */
static i64 few_size(i64 rank, i64 cols) {
    return round_up(rank * ROWS, 16) + interleaved(rank, cols) + interleaved(FEW, cols);
}

/* LANES columns of some rows of block k from c on, of which some are there, become W_eff and are multiplied by all
 * tokens; `rank` is 0 where none of them is the block's. x, A and `factor`, s B (rank, some), begin where these do. */
INLINE void few_columns(int dtype, int tokens, int some, const few_job *j, i64 k, i64 rank, const void *const *weight, i64 c,
                        i64 there, const float *x, const float *A, const float *factor, vf (*sums)[FEW]) {
    vi labels = (vi){0} - 1; /* of no block */
    memcpy(&labels, j->col_block + c, there < LANES ? (size_t)there * sizeof *j->col_block : sizeof labels);
    vf update[ROWS] = {{0}};
    for (i64 t = 0; t < rank; t++) {
        vf a = load(A + t * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < some; i++) update[i] += a * factor[t * some + i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < some; i++) {
        vf w = widen(weight[i], c, there, dtype);
        w = select_label(labels, (int32_t)k, w + w * update[i], w);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) sums[i][t] += w * load(x + t * LANES);
    }
}

/* y[token, rows[i]] of some tokens and some rows of block k, whose columns lie in `own`; x and A are interleaved, `factor` is to
 * hold s B. The memory is asked for the rows `next`: rows lie far apart, and are multiplied as fast as they come. */
INLINE void few_rows(int dtype, int tokens, int some, const few_job *j, const float *x, const float *A, i64 k, range own,
                     const i64 *rows, const i64 *next, float *y, float *factor) {
    const layer *l = j->l;
    i64 rank = rank_of(l, k), cols = l->cols, c = 0;
    const void *weight[ROWS];
    const char *ahead[ROWS];
    vf sums[ROWS][FEW];
    for (int i = 0; i < some; i++) {
        weight[i] = element(l->weight, rows[i] * l->row_stride, dtype);
        ahead[i] = element(l->weight, next[i] * l->row_stride, dtype);
        for (int t = 0; t < tokens; t++) sums[i][t] = (vf){0};
        for (i64 t = 0; t < rank; t++) factor[t * some + i] = (float)l->scaling * j->B[rows[i] * l->B_row + t * l->B_rank];
    }
    for (; c + LANES <= cols; c += LANES, x += tokens * LANES, A += l->rank * LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < some; i++) __builtin_prefetch(ahead[i] + c * bytes_of(dtype), 0, 2);
        i64 ranks = c < own.end && c + LANES > own.first ? rank : 0;
        few_columns(dtype, tokens, some, j, k, ranks, weight, c, LANES, x, A, factor, sums);
    }
    if (c < cols) few_columns(dtype, tokens, some, j, k, rank, weight, c, cols - c, x, A, factor, sums);
    for (int i = 0; i < some; i++)
        for (int t = 0; t < tokens; t++) y[t * l->rows + rows[i]] = total(sums[i][t]);
}

/* Rows side by side whose sums registers hold. */
INLINE int rows_of(i64 tokens) { return tokens * 4 <= LANES ? 4 : tokens <= 6 || tokens * 2 <= LANES ? 2 : 1; }

/* Of rows[first] to rows[end - 1]. */
INLINE void few_of_block(int dtype, int tokens, const few_job *j, const float *x, const float *A, i64 k, range own,
                         const i64 *rows, i64 first, i64 end, float *y, float *factor) {
    const int side = rows_of(tokens);
    for (; first + side <= end; first += side)
        few_rows(dtype, tokens, side, j, x, A, k, own, rows + first, rows + (first + 2 * side <= end ? first + side : first), y,
                 factor);
    for (; first < end; first++)
        few_rows(dtype, tokens, 1, j, x, A, k, own, rows + first, rows + least(first + 1, end - 1), y, factor);
}

/* A function for each dtype of W0, in which sums stay in registers. */
#define DTYPE(dtype)                                                                                                       \
    static __attribute__((noinline)) void few_of_##dtype(i64 tokens, const few_job *j, const float *x, const float *A,    \
                                                        i64 k, range own, const i64 *rows, i64 first, i64 end, float *y, \
                                                        float *factor) {                                                 \
        switch (tokens) { CASES(dtype) }                                                                                  \
    }
#define CASE(dtype, tokens)                                                        \
    case tokens:                                                                  \
        few_of_block(dtype, tokens, j, x, A, k, own, rows, first, end, y, factor); \
        break;
#define CASES(dtype)                                                       \
    CASE(dtype, 1) CASE(dtype, 2) CASE(dtype, 3) CASE(dtype, 4) CASE(dtype, 5) \
    CASE(dtype, 6) CASE(dtype, 7) CASE(dtype, 8)
DTYPE(FLOAT32)
DTYPE(BFLOAT16)
DTYPE(FLOAT16)
#undef DTYPE
#undef CASES
#undef CASE

static void few_part(void *it, i64 part) {
    few_job *j = it;
    const layer *l = j->l;
    float *factor = j->workspace + part * few_size(l->rank, l->cols), *A = factor + round_up(l->rank * ROWS, 16);
    float *some_x = A + interleaved(l->rank, l->cols);
    interleave(l->rank, l->cols, j->A, l->A_rank, A);
    for (i64 token = 0; token < j->tokens; token += FEW) {
        const float *x = j->x + token * j->x_stride;
        i64 tokens = least(FEW, j->tokens - token);
        interleave(tokens, l->cols, x, j->x_stride, some_x);
        float *y = j->y + token * l->rows;
        for (i64 k = 0; k < l->blocks; k++) {
            const i64 *rows = l->row_index + l->row_offsets[k];
            i64 count = height_of(l, k);
            i64 first = share_of(count, ROWS, part, j->parts), end = share_of(count, ROWS, part + 1, j->parts);
            range own = range_of(l, k);
#define CALL(dtype) few_of_##dtype(tokens, j, some_x, A, k, own, rows, first, end, y, factor)
            WITH_DTYPE(l->dtype, CALL)
#undef CALL
        }
    }
}

/* y (tokens, rows) = x W_effᵀ + b; W0 has contiguous rows. Returns the floats that it needs of the workspace. */
static i64 few_product(const product *p) {
    const layer *l = &p->l;
    arena a = p->rest;
    float *x = take(&a, p->tokens * l->cols * 4), *y = take(&a, p->tokens * l->rows * 4);
    int32_t *label = take(&a, l->cols * 4);
    few_job job = {l, p->tokens, p->parts, l->cols, x, l->A, l->B, label, y, take(&a, p->parts * few_size(l->rank, l->cols) * 4)};
    if (!a.base) return floats_of(&a);
    for (i64 t = 0; t < p->tokens; t++)
        widen_row(element(p->x, t * p->x_stride, p->dtype), l->cols, p->dtype, x + t * l->cols);
    write_labels(l->col_index, l->col_offsets, l->blocks, label);
    in_parallel(few_part, &job, p->parts);
    finish_rows(y, 0, p->tokens, l->rows, p->bias, 0, p->y, p->dtype);
    return floats_of(&a);
}
