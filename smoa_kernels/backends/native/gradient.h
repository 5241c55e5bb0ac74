/* dA and dB: a block's G = dYᵀ X, some rows at a time, contracted with W0 and the factors while it is in the cache. */
#pragma once

#include "adapter.h"
#include "threads.h"

typedef struct {
    i64 tokens, rows, cols, blocks, rank, parts, contiguous;
    matrix dy, x;
    const void *weight;
    i64 row_stride, col_stride;
    int stored, factors; /* W0, A and B */
    const void *G;       /* where it is there already, stored as W0 is: block after block; else it is made, of floats */
    const i64 *row_index, *col_index;
    const int32_t *row_offsets, *col_offsets, *ranks;
    const void *A, *B;
    float scaling, *dA, *dB; /* dA (parts, rank, cols), dB (rows, rank) */
    float *workspace;
    i64 tallest, widest, slab; /* rows and columns of a block; rows of it whose G is held at a time */
    int thirds;
} gradient_job;

enum {
    SLAB = 512, /* of these rows at most, a multiple of both NR and TOGETHER, whose part of dA is summed by itself */
    /* Rows of H that are contracted at a time, with so many ranks of the factors: they stay in the L1 cache, sums stay in
     * registers and are short. */
    TOGETHER = 4,
    RANKS = 2,
};

/* dA[t] += Σ_i B[i][t] h[i], dB[i][t] += Σ_c h[i][c] A[t][c] for `height` rows h (TOGETHER, width), zeros below them, and
 * some ranks t, whose rows of A and dA are `width` apart, of B `stride`; dB[i] is at rows[i] * stride. */
INLINE void contract_ranks(int some, const float *h, i64 height, i64 width, const float *A, float *dA, const float *B,
                           float *dB, const i64 *rows, i64 stride) {
    float b[RANKS][TOGETHER] = {{0}}, sum[RANKS][TOGETHER] = {{0}};
    vf sums[RANKS][TOGETHER] = {{{0}}};
    for (int t = 0; t < some; t++)
        for (int i = 0; i < height; i++) b[t][i] = B[i * stride + t];
    i64 c = 0;
    for (; c + LANES <= width; c += LANES) {
        vf one[TOGETHER];
#pragma GCC unroll 4
        for (int i = 0; i < TOGETHER; i++) one[i] = load(h + i * width + c);
#pragma GCC unroll 2
        for (int t = 0; t < some; t++) {
            vf factor = load(A + t * width + c), added = {0};
#pragma GCC unroll 4
            for (int i = 0; i < TOGETHER; i++) {
                sums[t][i] += one[i] * factor;
                added += one[i] * b[t][i];
            }
            store(dA + t * width + c, load(dA + t * width + c) + added);
        }
    }
    for (int t = 0; t < some; t++)
        for (int i = 0; i < TOGETHER; i++)
            for (int l = 0; l < LANES; l++) sum[t][i] += sums[t][i][l];
    for (; c < width; c++)
        for (int t = 0; t < some; t++) {
            float added = 0;
            for (int i = 0; i < height; i++) {
                sum[t][i] += h[i * width + c] * A[t * width + c];
                added += h[i * width + c] * b[t][i];
            }
            dA[t * width + c] += added;
        }
    for (int t = 0; t < some; t++)
        for (int i = 0; i < height; i++) dB[rows[i] * stride + t] += sum[t][i];
}

/* dA_k += B_kᵀ H and dB_k += H A_kᵀ for some rows of block k, H = s G ∘ W0, of which TOGETHER rows are held in `H`: A
 * and dA (ranks[k], width) are in block order, as is a row of W0 in `line`, which contiguous blocks do not need; B (rows,
 * j->rank) is of these rows. */
INLINE void contract_kind(int stored, int of_G, const gradient_job *j, const void *G, float *H, i64 k, i64 first, i64 count,
                          const float *A, const float *B, float *dA, const piece *pieces, i64 some, void *line) {
    i64 rank = rank_of(j->ranks, k, j->rank), width = j->col_offsets[k + 1] - j->col_offsets[k];
    i64 step = j->col_stride;
    const i64 *rows = j->row_index + first, *cols = j->col_index + j->col_offsets[k];
    for (i64 top = 0; top < count; top += TOGETHER, rows += TOGETHER, B += TOGETHER * j->rank) {
        i64 height = least(TOGETHER, count - top);
        memset(H + height * width, 0, (size_t)((TOGETHER - height) * width) * sizeof *H);
        for (i64 i = 0; i < height; i++) {
            const void *weight = number(j->weight, rows[i] * j->row_stride, stored), *ordered = line;
            if (j->contiguous && step == 1)
                ordered = number(weight, j->col_offsets[k], stored);
            else if (step == 1)
                gather_stored(weight, cols, width, pieces, some, stored, line);
            else
                for (i64 c = 0; c < width; c++) copy_number(line, c, weight, cols[c] * step, stored);
            i64 ahead = j->contiguous && top + ROWS_AHEAD + i < count ? ROWS_AHEAD * j->row_stride * bytes_of(stored) : 0;
            for (i64 c = 0; c < width; c += LANES) {
                __builtin_prefetch((const char *)number(ordered, c, stored) + ahead, 0, 3);
                narrow(H + i * width, c, width - c,
                       widened(G, (top + i) * width + c, width - c, of_G) *
                           (j->scaling * widened(ordered, c, width - c, stored)),
                       FLOAT32);
            }
        }
        for (i64 t = 0; t < rank; t += RANKS)
            if (t + RANKS <= rank)
                contract_ranks(RANKS, H, height, width, A + t * width, dA + t * width, B + t, j->dB + t, rows, j->rank);
            else
                contract_ranks(1, H, height, width, A + t * width, dA + t * width, B + t, j->dB + t, rows, j->rank);
    }
}

static void contract(const gradient_job *j, const void *G, float *H, i64 k, i64 first, i64 count, const float *A,
                     const float *B, float *dA, const piece *pieces, i64 some, void *line) {
#define CALL(stored)                                                                            \
    if (j->G)                                                                                   \
        contract_kind(stored, stored, j, G, H, k, first, count, A, B, dA, pieces, some, line);  \
    else                                                                                        \
        contract_kind(stored, FLOAT32, j, G, H, k, first, count, A, B, dA, pieces, some, line)
    WITH_KIND(j->stored, CALL)
#undef CALL
}

static i64 gradient_size(i64 tokens, i64 tallest, i64 widest, i64 slab, i64 rank) {
    return lines(slab * widest) + lines(TOGETHER * widest) + 2 * lines(rank * widest) + lines(rank * tallest) +
           lines(widest + PIECE) + pieces_size(widest) + product_size(by_thirds(tallest, tokens), slab, tokens, 0);
}

/* Some rows of block k, from `first` to `end`; `given` is their G where it is there already. */
static void block_gradient(const gradient_job *j, i64 k, i64 first, i64 end, const void *given, float *dA, float *workspace) {
    i64 col = j->col_offsets[k], width = j->col_offsets[k + 1] - col, rank = rank_of(j->ranks, k, j->rank);
    const i64 *cols = j->col_index + col;
    if (first >= end || !width || rank < 1) return;
    float *G = workspace, *H = G + lines(j->slab * j->widest), *A = H + lines(TOGETHER * j->widest), *sum = A + lines(rank * width);
    float *B = sum + lines(rank * width), *line = B + lines(j->rank * j->tallest), *rest = line + lines(width + PIECE);
    piece *pieces = (piece *)rest;
    i64 some = stored_pieces_of(cols, width, j->stored, pieces);
    rest += pieces_size(width);
    for (i64 t = 0; t < rank; t++)
        for (i64 c = 0; c < width; c++) A[t * width + c] = one_of(j->A, t * j->cols + cols[c], j->factors);
    for (i64 i = first; i < end; i++)
        for (i64 t = 0; t < rank; t++) B[(i - first) * j->rank + t] = one_of(j->B, j->row_index[i] * j->rank + t, j->factors);
    matrix dy = j->dy, x = j->x;
    if (!j->contiguous) dy.rows = j->row_index;
    if (!j->contiguous || x.keep) x.rows = j->col_index;
    for (i64 top = first, slab = given ? SLAB : j->slab; top < end; top += slab, B += slab * j->rank) {
        i64 count = least(slab, end - top);
        if (!given) product(j->thirds, dy, top, count, x, col, width, j->tokens, KC, NULL, G, width, 0, rest);
        const void *now = given ? number(given, (top - first) * width, j->stored) : G;
        memset(sum, 0, (size_t)(rank * width) * sizeof *sum); /* of one slab: sums stay short */
        contract(j, now, H, k, top, count, A, B, sum, pieces, some, line);
        for (i64 t = 0; t < rank; t++)
            for (i64 c = 0; c < width; c++) dA[t * j->cols + cols[c]] += sum[t * width + c];
    }
}

static void gradient_part(void *it, i64 part) {
    gradient_job *j = it;
    if (part >= j->parts) return;
    float *dA = j->dA + part * j->rank * j->cols;
    float *workspace = j->workspace + part * gradient_size(j->tokens, j->tallest, j->widest, j->slab, j->rank);
    for (i64 k = 0, before = 0; k < j->blocks; k++) {
        i64 top = j->row_offsets[k], height = j->row_offsets[k + 1] - top, width = j->col_offsets[k + 1] - j->col_offsets[k];
        /* In whole groups, so that a row of dB is summed in the same order however many threads there are; where a block
         * has fewer than threads, others take the next block's. */
        i64 turn = (part + k) % j->parts;
        i64 first = share_of(height, TOGETHER, turn, j->parts), end = share_of(height, TOGETHER, turn + 1, j->parts);
        const void *given = j->G ? number(j->G, before + first * width, j->stored) : NULL;
        block_gradient(j, k, top + first, top + end, given, dA, workspace);
        before += height * width;
    }
}

/* No more rows than a thread has of a block. */
static i64 slab_of(const int32_t *row_offsets, i64 blocks, i64 threads) {
    i64 groups = (largest_of(row_offsets, blocks) + TOGETHER - 1) / TOGETHER;
    return least(SLAB, (groups + threads - 1) / threads * TOGETHER);
}

/* Floats that smoa_gradient needs. */
i64 smoa_gradient_workspace(i64 tokens, const int32_t *row_offsets, const int32_t *col_offsets, i64 blocks, i64 rank,
                            i64 threads) {
    i64 slab = slab_of(row_offsets, blocks, threads);
    return threads * gradient_size(tokens, largest_of(row_offsets, blocks), largest_of(col_offsets, blocks), slab, rank) + 16;
}

/* dA (threads, rank, cols), still to be summed, and dB (rows, rank), zeros before: of dy (tokens, rows) and x (tokens,
 * cols) with contiguous rows, A and B contiguous; of x some may be dropped, as in smoa_update. dY is stored as x is, W0
 * as it may be. There is at least one token. Where blocks are `contiguous`, indices count up from 0: what they would order is read where it lies. */
void smoa_gradient(i64 tokens, i64 rows, i64 cols, const void *dy, i64 dy_stride, const void *x, i64 x_stored, i64 x_stride,
                   const uint16_t *keep, const void *weight, i64 stored, i64 row_stride, i64 col_stride, const i64 *row_index, const i64 *col_index,
                   const int32_t *row_offsets, const int32_t *col_offsets, i64 blocks, i64 contiguous, const int32_t *ranks, i64 rank,
                   const float *A, const float *B, float scaling, float *dA, float *dB, float *workspace, i64 threads) {
    gradient_job job = {tokens, rows, cols, blocks, rank, threads, contiguous, matrix_of(dy, x_stored, 1, dy_stride),
                        some_of(x, x_stored, 1, x_stride, keep, cols), weight, row_stride, col_stride, (int)stored, FLOAT32, NULL,
                        row_index, col_index, row_offsets, col_offsets, ranks, A, B, scaling, dA, dB,
                        from_a_line(workspace), largest_of(row_offsets, blocks), largest_of(col_offsets, blocks),
                        slab_of(row_offsets, blocks, threads), by_thirds(largest_of(row_offsets, blocks), tokens)};
    in_parallel(gradient_part, &job, threads);
}

/* Sums of dA, of every thread, and of dB. */
static i64 dA_size(i64 cols, i64 rank, i64 threads) { return lines(threads * rank * cols); }
static i64 dB_size(i64 rows, i64 rank) { return lines(rows * rank); }

/* Floats that smoa_contract needs. */
i64 smoa_contract_workspace(i64 rows, i64 cols, const int32_t *row_offsets, const int32_t *col_offsets, i64 blocks,
                            i64 rank, i64 threads) {
    return dA_size(cols, rank, threads) + dB_size(rows, rank) + 16 +
           threads * gradient_size(0, largest_of(row_offsets, blocks), largest_of(col_offsets, blocks), 0, rank);
}

/* to = the sum of `parts` vectors that lie one after another. */
static void sum_parts(const float *from, i64 parts, i64 count, void *to, int stored) {
    for (i64 c = 0; c < count; c += LANES) {
        vf sum = {0};
        for (i64 part = 0; part < parts; part++) sum += widened(from + part * count, c, count - c, FLOAT32);
#define CALL(stored) narrow(to, c, count - c, sum, stored)
        WITH_KIND(stored, CALL)
#undef CALL
    }
}

/* dA (rank, cols) and dB (rows, rank), as `factors` are stored, of G that is there, one block (its rows, its columns)
 * after another: G and W0, its rows contiguous, are `stored` alike. With `add`, the last call's G counts too: its sums
 * are still in the workspace. */
void smoa_contract(i64 rows, i64 cols, const void *G, const void *weight, i64 row_stride, i64 stored, const i64 *row_index,
                   const i64 *col_index, const int32_t *row_offsets, const int32_t *col_offsets, i64 blocks,
                   i64 contiguous, const int32_t *ranks, i64 rank, const void *A, const void *B, i64 factors,
                   float scaling, i64 add, void *dA, void *dB, float *workspace, i64 threads) {
    float *sums = from_a_line(workspace), *dB_sums = sums + dA_size(cols, rank, threads), *rest = dB_sums + dB_size(rows, rank);
    if (!add) memset(sums, 0, (size_t)(rest - sums) * sizeof *sums);
    gradient_job job = {0, rows, cols, blocks, rank, threads, contiguous, {0}, {0}, weight, row_stride, 1, (int)stored,
                        (int)factors, G, row_index, col_index, row_offsets, col_offsets, ranks, A, B, scaling, sums,
                        dB_sums, rest, largest_of(row_offsets, blocks), largest_of(col_offsets, blocks), 0, 0};
    in_parallel(gradient_part, &job, threads);
    sum_parts(sums, threads, rank * cols, dA, (int)factors);
    sum_parts(dB_sums, 1, rows * rank, dB, (int)factors);
}
