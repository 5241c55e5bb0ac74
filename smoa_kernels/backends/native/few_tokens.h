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

/* Floats from one row to the next of those that are read side by side. Rows of 1024 or 2048 numbers would all lie in the
 * same few sets of the L1 cache, and drive each other out of it. */
static i64 apart(i64 cols) { return lines(cols) + 16; }

/* s B of some rows, rows of W0 or what they are multiplied by, A, x. */
static i64 few_size(i64 rank, i64 cols) { return lines(rank * ROWS) + (MOST_PLAIN + rank + FEW) * apart(cols); }

/* Rows of so many columns, `apart`. */
static void put_apart(i64 count, i64 cols, const float *from, i64 stride, float *to) {
    for (i64 i = 0; i < count; i++) memcpy(to + i * apart(cols), from + i * stride, (size_t)cols * sizeof *to);
}

/* y[token, rows[i]] of some tokens and some rows of block k, whose columns lie in `own`; `factor` (rank, some) is to hold
 * s B, and behind it rows of W0 that are not stored as float32. The memory is asked for the rows `next`: rows lie far
 * apart, and are multiplied as fast as they come. */
INLINE void few_rows(int tokens, int some, const few_job *j, const float *x, const float *A, i64 k, range own, const i64 *rows,
                     const i64 *next, float *y, float *factor) {
    const layer *l = j->l;
    const range all = needed(j, own);
    i64 rank = rank_of(l, k), c = all.first, cols = l->cols, stride = apart(cols);
    const float *weight[ROWS];
    const char *ahead[ROWS];
    float sum[ROWS][FEW] = {{0}};
    vf sums[ROWS][FEW];
    for (int i = 0; i < some; i++) {
        const void *from = number(l->weight, rows[i] * l->row_stride, j->stored);
        float *line = factor + lines(l->rank * ROWS) + i * stride;
        if (j->stored != FLOAT32) widen(from, cols, j->stored, line);
        weight[i] = j->stored == FLOAT32 ? from : line;
        ahead[i] = number(l->weight, next[i] * l->row_stride, j->stored);
        for (int t = 0; t < tokens; t++) sums[i][t] = (vf){0};
        for (i64 t = 0; t < rank; t++) factor[t * some + i] = l->scaling * j->B[rows[i] * l->B_row + t * l->B_rank];
    }
    for (; c + LANES <= cols && c < all.end; c += LANES) {
        vi labels;
        memcpy(&labels, j->col_block + c, sizeof labels);
        vf update[ROWS] = {{0}};
        for (i64 t = 0; t < rank && c < own.end && c + LANES > own.first; t++) {
            vf a = load(A + t * stride + c);
#pragma GCC unroll 4
            for (int i = 0; i < some; i++) update[i] += a * factor[t * some + i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < some; i++) {
            __builtin_prefetch(ahead[i] + c * bytes_of(j->stored), 0, 2);
            vf w = load(weight[i] + c), plain = j->alone ? (vf){0} : w;
            w = chosen(labels, (int32_t)k, plain + w * update[i], plain);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) sums[i][t] += w * load(x + t * stride + c);
        }
    }
    for (int i = 0; i < some; i++)
        for (int t = 0; t < tokens; t++) sum[i][t] = total(sums[i][t]);
    for (; c < all.end; c++)
        for (int i = 0; i < some; i++) {
            float update = 0, w = j->alone ? 0 : weight[i][c];
            for (i64 t = 0; t < rank; t++) update += A[t * stride + c] * factor[t * some + i];
            if (j->col_block[c] == k) w += weight[i][c] * update;
            for (int t = 0; t < tokens; t++) sum[i][t] += w * x[t * stride + c];
        }
    for (int i = 0; i < some; i++)
        for (int t = 0; t < tokens; t++) y[t * l->rows + rows[i]] = sum[i][t];
}

/* Rows side by side whose sums registers hold. */
INLINE int rows_of(i64 tokens) { return tokens * 4 <= LANES ? 4 : tokens * 2 <= LANES ? 2 : 1; }

/* sum[i][t] += `there` columns from c on of row i of W0, `stored` as it is, times those of x[t]; no more than LANES. */
INLINE void plain_columns(int stored, int tokens, int some, const void *const *weight, i64 c, i64 there, const float *x,
                          i64 stride, vf (*sum)[MOST_PLAIN]) {
    vf w[PLAIN];
#pragma GCC unroll 4
    for (int i = 0; i < some; i++) w[i] = widened(weight[i], c, there, stored);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) {
        vf at = load(x + t * stride + c);
#pragma GCC unroll 4
        for (int i = 0; i < some; i++) sum[i][t] += w[i] * at;
    }
}

/* sums[i * tokens + t] = row i of W0 times x[t], whose rows are `stride` apart, in whole vectors; the memory is asked for
 * rows `ahead`. */
INLINE void plain_rows(int stored, int tokens, int some, const void *const *weight, const void *const *ahead, i64 cols,
                       const float *x, i64 stride, float *sums) {
    vf sum[PLAIN][MOST_PLAIN];
    i64 c = 0;
    for (int i = 0; i < some; i++)
        for (int t = 0; t < tokens; t++) sum[i][t] = (vf){0};
    for (; c + LANES <= cols; c += LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < some; i++) __builtin_prefetch(number(ahead[i], c, stored), 0, 2);
        plain_columns(stored, tokens, some, weight, c, LANES, x, stride, sum);
    }
    if (c < cols) plain_columns(stored, tokens, some, weight, c, cols - c, x, stride, sum);
    for (int i = 0; i < some; i++)
        for (int t = 0; t < tokens; t++) sums[i * tokens + t] = total(sum[i][t]);
}

static void plain(int stored, i64 tokens, int some, const void *const *weight, const void *const *ahead, i64 cols,
                  const float *x, i64 stride, float *sums) {
#define CASE(kind, tokens)                                                         \
    case kind * FEW + tokens:                                                      \
        if (some == 1)                                                             \
            plain_rows(kind, tokens, 1, weight, ahead, cols, x, stride, sums);     \
        else                                                                       \
            plain_rows(kind, tokens, PLAIN, weight, ahead, cols, x, stride, sums); \
        break;
#define CASES(kind) CASE(kind, 1) CASE(kind, 2) CASE(kind, 3) CASE(kind, 4) CASE(kind, 5)
    switch (stored * FEW + tokens) { CASES(FLOAT32) CASES(BFLOAT16) CASES(FLOAT16) }
#undef CASES
#undef CASE
}

/* out = x ∘ A in the columns of block k, which lie in `own`, and 0 between them. */
static void modulated(const float *x, const float *A, const int32_t *col_block, int32_t k, range own, float *out) {
    for (i64 c = own.first; c < own.end; c++) out[c] = col_block[c] == k ? x[c] * A[c] : 0;
}

/* How many rows `plain_block` multiplies by W0. */
static i64 plain_count(const few_job *j, i64 tokens, i64 rank) { return tokens * (rank + !j->alone); }

/* The same of block k by x W0ᵀ + Σ_t s B_t (x ∘ A_t) W0ᵀ: so many tokens and ranks cost less than W_eff in registers. */
static void plain_block(const few_job *j, i64 tokens, i64 rank, const float *x, i64 k, range own, const i64 *rows,
                        i64 first, i64 end, float *y, float *lines_of) {
    const layer *l = j->l;
    i64 stride = apart(l->cols), all = plain_count(j, tokens, rank), before = j->alone ? 0 : tokens;
    range used = needed(j, own);
    memset(lines_of, 0, (size_t)(MOST_PLAIN * stride) * sizeof *lines_of);
    for (i64 i = 0; i < tokens; i++) {
        if (before) memcpy(lines_of + i * stride, x + i * j->x_stride, (size_t)l->cols * sizeof *x);
        for (i64 t = 0; t < rank; t++)
            modulated(x + i * j->x_stride, j->A + t * l->A_rank, j->col_block, (int32_t)k, own,
                      lines_of + (before + t * tokens + i) * stride);
    }
    while (first < end) {
        int some = first + PLAIN <= end ? PLAIN : 1;
        const void *weight[PLAIN], *ahead[PLAIN];
        float sums[PLAIN * MOST_PLAIN];
        for (int i = 0; i < some; i++) {
            weight[i] = number(l->weight, rows[first + i] * l->row_stride + used.first, j->stored);
            ahead[i] = number(l->weight, rows[least(first + some + i, end - 1)] * l->row_stride + used.first, j->stored);
        }
        plain(j->stored, all, some, weight, ahead, used.end - used.first, lines_of + used.first, stride, sums);
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
INLINE void few_of_block(int tokens, const few_job *j, const float *x, const float *A, i64 k, range own, const i64 *rows,
                         i64 first, i64 end, float *y, float *factor) {
    const int side = rows_of(tokens);
    for (; first + side <= end; first += side)
        few_rows(tokens, side, j, x, A, k, own, rows + first, rows + (first + 2 * side <= end ? first + side : first), y, factor);
    for (; first < end; first++) few_rows(tokens, 1, j, x, A, k, own, rows + first, rows + least(first + 1, end - 1), y, factor);
}

static void few_part(void *it, i64 part) {
    few_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    float *factor = j->workspace + part * few_size(l->rank, l->cols);
    float *A = factor + lines(l->rank * ROWS) + MOST_PLAIN * apart(l->cols), *some_x = A + l->rank * apart(l->cols);
    put_apart(l->rank, l->cols, j->A, l->A_rank, A);
    for (i64 token = 0; token < j->tokens; token += FEW) {
        const float *x = j->x + token * j->x_stride;
        put_apart(least(FEW, j->tokens - token), l->cols, x, j->x_stride, some_x);
        float *y = j->y + token * l->rows;
        for (i64 k = 0; k < l->blocks; k++) {
            const i64 *rows = l->row_index + l->row_offsets[k];
            i64 count = l->row_offsets[k + 1] - l->row_offsets[k];
            i64 first = share_of(count, ROWS, part, j->parts), end = share_of(count, ROWS, part + 1, j->parts);
            i64 rank = rank_of(l, k), tokens = least(FEW, j->tokens - token);
            range own = range_of(j, k);
            if (j->alone && (rank <= 0 || own.end == 0)) {
                for (i64 t = 0; t < tokens; t++)
                    for (i64 i = first; i < end; i++) y[t * l->rows + rows[i]] = 0;
                continue;
            }
            if (rank >= 0 && plain_count(j, tokens, rank) <= MOST_PLAIN) {
                plain_block(j, tokens, rank, x, k, own, rows, first, end, y, factor + lines(l->rank * ROWS));
                continue;
            }
            switch (tokens) {
#define CASE(tokens)                                                  \
    case tokens:                                                      \
        few_of_block(tokens, j, some_x, A, k, own, rows, first, end, y, factor); \
        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
            }
        }
    }
}

/* Whether W_eff is made in registers faster than it is packed, measured at 1024² and 2048²: A, of so many ranks, is read
 * again for every few rows. */
i64 smoa_few_fit(i64 tokens, i64 rank) {
    i64 rows = rows_of(tokens);
    return tokens <= FEW && rank <= (VECTOR_BYTES == 64 ? rows : 4) * rows;
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
