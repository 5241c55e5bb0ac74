/* y = x W_effᵀ, or x ΔWᵀ, for a few tokens, which do not pay for packing W0: some rows of it are read once, become W_eff
 * or ΔW in registers, a vector at a time, and are multiplied by every token there. */
#pragma once

#include "adapter.h"
#include "threads.h"

enum {
    FEW = 8,  /* tokens for which W0 is read at a time */
    ROWS = 4, /* of it at most side by side, so that what is loaded of x and A serves them all */
    /* Rows side by side of W0 that is multiplied as it is, and by how many tokens at most, those times ranks included. */
    PLAIN = VECTOR_BYTES == 64 ? 4 : 2,
    MOST_PLAIN = 5,
};

typedef struct {
    const layer *l;
    i64 tokens, parts, x_stride;
    const float *x, *A, *B;
    const int32_t *col_block;
    float *y, *workspace;
    int stored, alone; /* of W0; whether it is ΔW that is multiplied */
} few_job;

/* The columns between which all of a block lie. */
typedef struct {
    i64 first, end;
} range;

static range range_of(const few_job *j, i64 k) {
    range own = {j->l->cols, 0};
    for (i64 c = 0; c < j->l->cols; c++)
        if (j->col_block[c] == k) own = (range){least(own.first, c), c + 1};
    return own;
}

/* The columns by which rows are multiplied whose block lies in `own`: in ΔW all others are zero. */
static inline range needed(const few_job *j, range own) {
    return j->alone ? (range){own.first / LANES * LANES, own.end} : (range){0, j->l->cols};
}

/* Floats of some rows, interleaved: LANES columns of each, one row after another, then the next columns, 0 behind the last. So
 * what is read together lies together. Rows of 1024 or 2048 numbers side by side would all lie in the same few sets of the L1
 * cache, and drive each other out of it. */
static i64 interleaved(i64 count, i64 cols) { return lines(count * ((cols + LANES - 1) / LANES * LANES)); }

static void interleave(i64 count, i64 cols, const float *from, i64 stride, float *to) {
    for (i64 c = 0; c < cols; c += LANES)
        for (i64 i = 0; i < count; i++, to += LANES) store(to, widened(from + i * stride, c, cols - c, FLOAT32));
}

/* s B of some rows; what W0 is multiplied by as it is, or A and x. */
static i64 few_size(i64 rank, i64 cols) {
    return lines(rank * ROWS) + interleaved(MOST_PLAIN, cols) + interleaved(rank, cols) + interleaved(FEW, cols);
}

/* LANES columns of some rows of block k from c on, of which some are there, become W_eff or ΔW and are multiplied by all
 * tokens; `rank` is 0 where none of them is the block's. x, A and `factor`, s B (rank, some), begin where these do. */
INLINE void few_columns(int stored, int tokens, int some, const few_job *j, i64 k, i64 rank, const void *const *weight, i64 c,
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
        vf w = widened(weight[i], c, there, stored), plain = j->alone ? (vf){0} : w;
        w = chosen(labels, (int32_t)k, plain + w * update[i], plain);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) sums[i][t] += w * load(x + t * LANES);
    }
}

/* y[token, rows[i]] of some tokens and some rows of block k, whose columns lie in `own`; x and A are interleaved, `factor` is to
 * hold s B. The memory is asked for the rows `next`: rows lie far apart, and are multiplied as fast as they come. */
INLINE void few_rows(int stored, int tokens, int some, const few_job *j, const float *x, const float *A, i64 k, range own,
                     const i64 *rows, const i64 *next, float *y, float *factor) {
    const layer *l = j->l;
    const range all = needed(j, own);
    i64 rank = rank_of(l, k), cols = least(l->cols, all.end), c = all.first;
    const void *weight[ROWS];
    const char *ahead[ROWS];
    vf sums[ROWS][FEW];
    for (int i = 0; i < some; i++) {
        weight[i] = number(l->weight, rows[i] * l->row_stride, stored);
        ahead[i] = number(l->weight, next[i] * l->row_stride, stored);
        for (int t = 0; t < tokens; t++) sums[i][t] = (vf){0};
        for (i64 t = 0; t < rank; t++) factor[t * some + i] = l->scaling * j->B[rows[i] * l->B_row + t * l->B_rank];
    }
    x += c * tokens, A += c * l->rank;
    for (; c + LANES <= cols; c += LANES, x += tokens * LANES, A += l->rank * LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < some; i++) __builtin_prefetch(ahead[i] + c * bytes_of(stored), 0, 2);
        i64 ranks = c < own.end && c + LANES > own.first ? rank : 0;
        few_columns(stored, tokens, some, j, k, ranks, weight, c, LANES, x, A, factor, sums);
    }
    if (c < cols) few_columns(stored, tokens, some, j, k, rank, weight, c, cols - c, x, A, factor, sums);
    for (int i = 0; i < some; i++)
        for (int t = 0; t < tokens; t++) y[t * l->rows + rows[i]] = total(sums[i][t]);
}

/* Rows side by side whose sums registers hold. */
INLINE int rows_of(i64 tokens) { return tokens * 4 <= LANES ? 4 : tokens <= 6 || tokens * 2 <= LANES ? 2 : 1; }

/* sum[i][t] += `there` columns from c on of row i of W0, `stored` as it is, times those of x[t], which begin there; no more than
 * LANES. */
INLINE void plain_columns(int stored, int tokens, int some, const void *const *weight, i64 c, i64 there, const float *x,
                          vf (*sum)[MOST_PLAIN]) {
    vf w[PLAIN];
#pragma GCC unroll 4
    for (int i = 0; i < some; i++) w[i] = widened(weight[i], c, there, stored);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) {
        vf at = load(x + t * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < some; i++) sum[i][t] += w[i] * at;
    }
}

/* sums[i * tokens + t] = row i of W0 times x[t], interleaved; the memory is asked for rows `ahead`. */
INLINE void plain_rows(int stored, int tokens, int some, const void *const *weight, const void *const *ahead, i64 cols,
                       const float *x, float *sums) {
    vf sum[PLAIN][MOST_PLAIN];
    i64 c = 0;
    for (int i = 0; i < some; i++)
        for (int t = 0; t < tokens; t++) sum[i][t] = (vf){0};
    for (; c + LANES <= cols; c += LANES, x += tokens * LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < some; i++) __builtin_prefetch(number(ahead[i], c, stored), 0, 2);
        plain_columns(stored, tokens, some, weight, c, LANES, x, sum);
    }
    if (c < cols) plain_columns(stored, tokens, some, weight, c, cols - c, x, sum);
    for (int i = 0; i < some; i++)
        for (int t = 0; t < tokens; t++) sums[i * tokens + t] = total(sum[i][t]);
}

static void plain(int stored, i64 tokens, int some, const void *const *weight, const void *const *ahead, i64 cols,
                  const float *x, float *sums) {
#define CASE(kind, tokens)                                                 \
    case kind * FEW + tokens:                                              \
        if (some == 1)                                                     \
            plain_rows(kind, tokens, 1, weight, ahead, cols, x, sums);     \
        else                                                               \
            plain_rows(kind, tokens, PLAIN, weight, ahead, cols, x, sums); \
        break;
#define CASES(kind) CASE(kind, 1) CASE(kind, 2) CASE(kind, 3) CASE(kind, 4) CASE(kind, 5)
    switch (stored * FEW + tokens) { CASES(FLOAT32) CASES(BFLOAT16) CASES(FLOAT16) }
#undef CASES
#undef CASE
}

/* x ∘ A of one vector of columns: of block k's, and 0 between them. */
INLINE vf modulated(const few_job *j, const float *x, i64 k, i64 t, i64 c) {
    i64 there = j->l->cols - c;
    vi labels = {0};
    memcpy(&labels, j->col_block + c, (size_t)least(LANES, there) * sizeof *j->col_block);
    vf a = widened(j->A + t * j->l->A_rank, c, there, FLOAT32);
    return chosen(labels, (int32_t)k, widened(x, c, there, FLOAT32) * a, (vf){0});
}

/* How many rows `plain_block` multiplies by W0. */
static i64 plain_count(const few_job *j, i64 tokens, i64 rank) { return tokens * (rank + !j->alone); }

/* The same of block k by x W0ᵀ + Σ_t s B_t (x ∘ A_t) W0ᵀ: so many tokens and ranks cost less than W_eff in registers. */
static void plain_block(const few_job *j, i64 tokens, i64 rank, const float *x, i64 k, range own, const i64 *rows,
                        i64 first, i64 end, float *y, float *factors) {
    const layer *l = j->l;
    i64 all = plain_count(j, tokens, rank), before = j->alone ? 0 : tokens;
    range used = needed(j, own);
    float *to = factors;
    for (i64 c = used.first; c < used.end; c += LANES) {
        for (i64 i = 0; i < before; i++, to += LANES) store(to, widened(x + i * j->x_stride, c, l->cols - c, FLOAT32));
        for (i64 t = 0; t < rank; t++)
            for (i64 i = 0; i < tokens; i++, to += LANES) store(to, modulated(j, x + i * j->x_stride, k, t, c));
    }
    while (first < end) {
        int some = first + PLAIN <= end ? PLAIN : 1;
        const void *weight[PLAIN], *ahead[PLAIN];
        float sums[PLAIN * MOST_PLAIN];
        for (int i = 0; i < some; i++) {
            weight[i] = number(l->weight, rows[first + i] * l->row_stride + used.first, j->stored);
            ahead[i] = number(l->weight, rows[least(first + some + i, end - 1)] * l->row_stride + used.first, j->stored);
        }
        plain(j->stored, all, some, weight, ahead, used.end - used.first, factors, sums);
        for (int i = 0; i < some; i++, first++)
            for (i64 token = 0; token < tokens; token++) {
                float update = 0, base = before ? sums[i * all + token] : 0;
                for (i64 t = 0; t < rank; t++)
                    update += sums[i * all + before + t * tokens + token] * j->B[rows[first] * l->B_row + t * l->B_rank];
                y[token * l->rows + rows[first]] = base + l->scaling * update;
            }
    }
}

/* Of rows[first] to rows[end - 1]. */
INLINE void few_of_block(int stored, int tokens, const few_job *j, const float *x, const float *A, i64 k, range own,
                         const i64 *rows, i64 first, i64 end, float *y, float *factor) {
    const int side = rows_of(tokens);
    for (; first + side <= end; first += side)
        few_rows(stored, tokens, side, j, x, A, k, own, rows + first, rows + (first + 2 * side <= end ? first + side : first), y,
                 factor);
    for (; first < end; first++)
        few_rows(stored, tokens, 1, j, x, A, k, own, rows + first, rows + least(first + 1, end - 1), y, factor);
}

/* Those of W0 as it is stored; a function for each kind, in which sums stay in registers. */
#define KIND(kind)                                                                                                       \
    static __attribute__((noinline)) void few_of_##kind(i64 tokens, const few_job *j, const float *x, const float *A,    \
                                                        i64 k, range own, const i64 *rows, i64 first, i64 end, float *y, \
                                                        float *factor) {                                                 \
        switch (tokens) { CASES(kind) }                                                                                  \
    }
#define CASE(kind, tokens)                                                        \
    case tokens:                                                                  \
        few_of_block(kind, tokens, j, x, A, k, own, rows, first, end, y, factor); \
        break;
#define CASES(kind)                                                       \
    CASE(kind, 1) CASE(kind, 2) CASE(kind, 3) CASE(kind, 4) CASE(kind, 5) \
    CASE(kind, 6) CASE(kind, 7) CASE(kind, 8)
KIND(FLOAT32)
KIND(BFLOAT16)
KIND(FLOAT16)
#undef KIND
#undef CASES
#undef CASE

static void few_part(void *it, i64 part) {
    few_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    float *factor = j->workspace + part * few_size(l->rank, l->cols), *factors = factor + lines(l->rank * ROWS);
    float *A = factors + interleaved(MOST_PLAIN, l->cols), *some_x = A + interleaved(l->rank, l->cols);
    interleave(l->rank, l->cols, j->A, l->A_rank, A);
    for (i64 token = 0; token < j->tokens; token += FEW) {
        const float *x = j->x + token * j->x_stride;
        i64 tokens = least(FEW, j->tokens - token);
        interleave(tokens, l->cols, x, j->x_stride, some_x);
        float *y = j->y + token * l->rows;
        for (i64 k = 0; k < l->blocks; k++) {
            const i64 *rows = l->row_index + l->row_offsets[k];
            i64 count = l->row_offsets[k + 1] - l->row_offsets[k], rank = rank_of(l, k);
            i64 first = share_of(count, ROWS, part, j->parts), end = share_of(count, ROWS, part + 1, j->parts);
            range own = range_of(j, k);
            if (j->alone && (rank <= 0 || own.end == 0)) {
                for (i64 t = 0; t < tokens; t++)
                    for (i64 i = first; i < end; i++) y[t * l->rows + rows[i]] = 0;
                continue;
            }
            if (rank >= 0 && plain_count(j, tokens, rank) <= MOST_PLAIN) {
                plain_block(j, tokens, rank, x, k, own, rows, first, end, y, factors);
                continue;
            }
#define CALL(kind) few_of_##kind(tokens, j, some_x, A, k, own, rows, first, end, y, factor)
            WITH_KIND(j->stored, CALL)
#undef CALL
        }
    }
}

/* Whether W_eff is made in registers faster than it is packed, measured at 1024² and 2048²: A, of so many ranks, is read
 * again for every few rows. (More tokens with AVX-512 were measured when their rows lay apart.) */
i64 smoa_few_fit(i64 tokens, i64 rank) {
    i64 most = tokens <= 4 ? 16 : VECTOR_BYTES == 64 ? 4 : 8;
    return tokens <= FEW && rank <= most;
}

/* Floats that smoa_few needs. */
i64 smoa_few_workspace(const layer *l, i64 threads) { return threads * few_size(l->rank, l->cols) + 16; }

/* y (tokens, rows) = x W_effᵀ, or x ΔWᵀ where `alone`: x, W0 and A with contiguous rows, x and the factors float32. Needs
 * `row_index` and its offsets, and labels of columns, which are wide. */
void smoa_few(const layer *l, i64 tokens, const float *x, i64 x_stride, float *y, i64 alone, float *workspace, i64 threads) {
    few_job job = {l, tokens, threads, x_stride, x, l->A, l->B, l->col_block.of, y, from_a_line(workspace),
                   (int)l->stored, alone != 0};
    in_parallel(few_part, &job, threads);
}
