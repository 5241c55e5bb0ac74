/* dA and dB: a block's G = dYᵀ X, some rows at a time, contracted with W0 and the factors while it is in the cache. */
#pragma once

#include "adapter.h"
#include "threads.h"

typedef struct {
    const layer *l;
    i64 tokens, parts;
    matrix dy, x;
    const void *G;   /* where it is there already, stored as W0 is: block after block; else it is made, of floats */
    float *dA, *dB; /* (parts, rank, cols), (rows, rank) */
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
 * rank) is of these rows. */
INLINE void contract_kind(int stored, int of_G, const gradient_job *j, const void *G, float *H, i64 k, i64 first, i64 count,
                          const float *A, const float *B, float *dA, const piece *pieces, i64 some, void *line) {
    const layer *l = j->l;
    i64 rank = rank_of(l, k), most = l->rank, width = l->col_offsets[k + 1] - l->col_offsets[k];
    i64 step = l->col_stride;
    const i64 *rows = l->row_index + first, *cols = l->col_index + l->col_offsets[k];
    for (i64 top = 0; top < count; top += TOGETHER, rows += TOGETHER, B += TOGETHER * most) {
        i64 height = least(TOGETHER, count - top);
        memset(H + height * width, 0, (size_t)((TOGETHER - height) * width) * sizeof *H);
        for (i64 i = 0; i < height; i++) {
            const void *weight = number(l->weight, rows[i] * l->row_stride, stored), *ordered = line;
            if (l->contiguous && step == 1)
                ordered = number(weight, l->col_offsets[k], stored);
            else if (step == 1)
                gather_stored(weight, cols, width, pieces, some, stored, line);
            else
                for (i64 c = 0; c < width; c++) copy_number(line, c, weight, cols[c] * step, stored);
            i64 ahead = l->contiguous && top + ROWS_AHEAD + i < count ? ROWS_AHEAD * l->row_stride * bytes_of(stored) : 0;
            for (i64 c = 0; c < width; c += LANES) {
                __builtin_prefetch((const char *)number(ordered, c, stored) + ahead, 0, 3);
                narrow(H + i * width, c, width - c,
                       widened(G, (top + i) * width + c, width - c, of_G) *
                           (l->scaling * widened(ordered, c, width - c, stored)),
                       FLOAT32);
            }
        }
        for (i64 t = 0; t < rank; t += RANKS)
            if (t + RANKS <= rank)
                contract_ranks(RANKS, H, height, width, A + t * width, dA + t * width, B + t, j->dB + t, rows, most);
            else
                contract_ranks(1, H, height, width, A + t * width, dA + t * width, B + t, j->dB + t, rows, most);
    }
}

static void contract(const gradient_job *j, const void *G, float *H, i64 k, i64 first, i64 count, const float *A,
                     const float *B, float *dA, const piece *pieces, i64 some, void *line) {
#define CALL(stored)                                                                            \
    if (j->G)                                                                                   \
        contract_kind(stored, stored, j, G, H, k, first, count, A, B, dA, pieces, some, line);  \
    else                                                                                        \
        contract_kind(stored, FLOAT32, j, G, H, k, first, count, A, B, dA, pieces, some, line)
    WITH_KIND(j->l->stored, CALL)
#undef CALL
}

static i64 gradient_size(i64 tokens, i64 tallest, i64 widest, i64 slab, i64 rank) {
    return lines(slab * widest) + lines(TOGETHER * widest) + 2 * lines(rank * widest) + lines(rank * tallest) +
           lines(widest + PIECE) + pieces_size(widest) + product_size(by_thirds(tallest, tokens), slab, tokens, 0);
}

/* Some rows of block k, from `first` to `end`; `given` is their G where it is there already. */
static void block_gradient(const gradient_job *j, i64 k, i64 first, i64 end, const void *given, float *dA, float *workspace) {
    const layer *l = j->l;
    i64 col = l->col_offsets[k], width = l->col_offsets[k + 1] - col, rank = rank_of(l, k);
    const i64 *cols = l->col_index + col;
    int factors = (int)l->factors;
    if (first >= end || !width || rank < 1) return;
    float *G = workspace, *H = G + lines(j->slab * j->widest), *A = H + lines(TOGETHER * j->widest);
    float *sum = A + lines(rank * width), *B = sum + lines(rank * width), *line = B + lines(l->rank * j->tallest);
    float *rest = line + lines(width + PIECE);
    piece *pieces = (piece *)rest;
    i64 some = stored_pieces_of(cols, width, (int)l->stored, pieces);
    rest += pieces_size(width);
    for (i64 t = 0; t < rank; t++)
        for (i64 c = 0; c < width; c++) A[t * width + c] = one_of(l->A, t * l->A_rank + cols[c] * l->A_col, factors);
    for (i64 i = first; i < end; i++)
        for (i64 t = 0; t < rank; t++)
            B[(i - first) * l->rank + t] = one_of(l->B, l->row_index[i] * l->B_row + t * l->B_rank, factors);
    matrix dy = j->dy, x = j->x;
    if (!l->contiguous) dy.rows = l->row_index;
    if (!l->contiguous || x.keep) x.rows = l->col_index;
    for (i64 top = first, slab = given ? SLAB : j->slab; top < end; top += slab, B += slab * l->rank) {
        i64 count = least(slab, end - top);
        if (!given) product(j->thirds, dy, top, count, x, col, width, j->tokens, KC, NULL, G, width, 0, rest);
        const void *now = given ? number(given, (top - first) * width, (int)l->stored) : G;
        memset(sum, 0, (size_t)(rank * width) * sizeof *sum); /* of one slab: sums stay short */
        contract(j, now, H, k, top, count, A, B, sum, pieces, some, line);
        for (i64 t = 0; t < rank; t++)
            for (i64 c = 0; c < width; c++) dA[t * l->cols + cols[c]] += sum[t * width + c];
    }
}

static void gradient_part(void *it, i64 part) {
    gradient_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    float *dA = j->dA + part * l->rank * l->cols;
    float *workspace = j->workspace + part * gradient_size(j->tokens, j->tallest, j->widest, j->slab, l->rank);
    for (i64 k = 0, before = 0; k < l->blocks; k++) {
        i64 top = l->row_offsets[k], height = l->row_offsets[k + 1] - top, width = l->col_offsets[k + 1] - l->col_offsets[k];
        /* In whole groups, so that a row of dB is summed in the same order however many threads there are; where a block
         * has fewer than threads, others take the next block's. */
        i64 turn = (part + k) % j->parts;
        i64 first = share_of(height, TOGETHER, turn, j->parts), end = share_of(height, TOGETHER, turn + 1, j->parts);
        const void *given = j->G ? number(j->G, before + first * width, (int)l->stored) : NULL;
        block_gradient(j, k, top + first, top + end, given, dA, workspace);
        before += height * width;
    }
}

/* No more rows than a thread has of a block. */
static i64 slab_of(const layer *l, i64 threads) {
    i64 groups = (tallest_of(l) + TOGETHER - 1) / TOGETHER;
    return least(SLAB, (groups + threads - 1) / threads * TOGETHER);
}

/* Floats that smoa_gradient needs. */
i64 smoa_gradient_workspace(const layer *l, i64 tokens, i64 threads) {
    return threads * gradient_size(tokens, tallest_of(l), widest_of(l), slab_of(l, threads), l->rank) + 16;
}

/* dA (threads, rank, cols), still to be summed, and dB (rows, rank), zeros before: of dy (tokens, rows) and x (tokens,
 * cols) with contiguous rows, stored alike; of x some may be dropped, as in smoa_update. There is at least one token. Needs
 * indices. */
void smoa_gradient(const layer *l, i64 tokens, const void *dy, i64 dy_stride, const void *x, i64 x_stored, i64 x_stride,
                   const uint16_t *keep, float *dA, float *dB, float *workspace, i64 threads) {
    gradient_job job = {l, tokens, threads, matrix_of(dy, x_stored, 1, dy_stride),
                        some_of(x, x_stored, 1, x_stride, keep, l->cols), NULL, dA, dB, from_a_line(workspace),
                        tallest_of(l), widest_of(l), slab_of(l, threads), by_thirds(tallest_of(l), tokens)};
    in_parallel(gradient_part, &job, threads);
}

/* Sums of dA, of every thread, and of dB. */
static i64 dA_size(const layer *l, i64 threads) { return lines(threads * l->rank * l->cols); }
static i64 dB_size(const layer *l) { return lines(l->rows * l->rank); }

/* Floats that smoa_contract needs. */
i64 smoa_contract_workspace(const layer *l, i64 threads) {
    return dA_size(l, threads) + dB_size(l) + 16 + threads * gradient_size(0, tallest_of(l), widest_of(l), 0, l->rank);
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

/* dA (rank, cols) and dB (rows, rank), stored as the factors are, of G that is there, stored as W0 is: one block (its rows,
 * its columns) after another. W0's rows are contiguous. With `add`, the last call's G counts too: its sums are still in the
 * workspace. Needs indices. */
void smoa_contract(const layer *l, const void *G, i64 add, void *dA, void *dB, float *workspace, i64 threads) {
    float *sums = from_a_line(workspace), *dB_sums = sums + dA_size(l, threads), *rest = dB_sums + dB_size(l);
    if (!add) memset(sums, 0, (size_t)(rest - sums) * sizeof *sums);
    gradient_job job = {.l = l, .parts = threads, .G = G, .dA = sums, .dB = dB_sums, .workspace = rest,
                        .tallest = tallest_of(l), .widest = widest_of(l)};
    in_parallel(gradient_part, &job, threads);
    sum_parts(sums, threads, l->rank * l->cols, dA, (int)l->factors);
    sum_parts(dB_sums, 1, l->rows * l->rank, dB, (int)l->factors);
}
