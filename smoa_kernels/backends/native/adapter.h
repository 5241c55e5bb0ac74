/* What makes a GEMM SMoA's: a packed panel of W0 becomes W_eff or ΔW before it is multiplied. */
#pragma once

#include "layer.h"
#include "thirds.h"

enum { BESIDE = 4 /* columns modulated at a time, so that what is loaded of B serves them all */ };

/* What a panel of a layer's weight becomes. The panel is of all of W0, whose rows and columns have labels; or of one block of
 * `rank`, its `rows` and `cols` of W0. */
typedef struct {
    const layer *l;
    const float *A, *B;
    i64 rank;
    const i64 *rows, *cols;
} adapter;

static matrix weight_of(const layer *l) { return matrix_of(l->weight, l->stored, l->row_stride, l->col_stride); }

static adapter adapter_of(const layer *l) { return (adapter){l, l->A, l->B, l->rank, NULL, NULL}; }

/* Some columns of a panel, of blocks of one rank: W0 ∘ (1 + s B A) where labels agree, or, of one block, W0 ∘ s B A.
 * `factor` (rank, NR) is s B. */
INLINE void modulate_columns(int some, const adapter *m, i64 k, i64 rank, vi left, vi right, const float *factor,
                             float *panel) {
    const float *A[BESIDE];
    vf low[BESIDE] = {{0}}, high[BESIDE] = {{0}};
    for (int c = 0; c < some; c++) A[c] = m->A + (m->cols ? m->cols[k + c] : k + c) * m->l->A_col;
    for (i64 t = 0; t < rank; t++) {
        vf first = load(factor + t * NR), second = load(factor + t * NR + LANES);
#pragma GCC unroll 4
        for (int c = 0; c < some; c++) {
            float a = A[c][t * m->l->A_rank];
            low[c] += first * a;
            high[c] += second * a;
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < some; c++) {
        float *w = panel + c * NR;
        vf a = load(w), b = load(w + LANES);
        if (!m->cols) {
            int32_t block = label(m->l->col_block, k + c);
            low[c] = chosen(left, block, a + a * low[c], a);
            high[c] = chosen(right, block, b + b * high[c], b);
        }
        store(w, m->cols ? a * low[c] : low[c]);
        store(w + LANES, m->cols ? b * high[c] : high[c]);
    }
}

static i64 rank_at(const adapter *m, i64 col) {
    return m->cols ? m->rank : rank_of(m->l, label(m->l->col_block, col));
}

/* The blocks of some columns, a bit for each; other blocks may share it. Of a weight that is one block: any. */
static inline uint64_t blocks_of(const adapter *m, i64 col, int some) {
    uint64_t found = m->cols ? 1 : 0;
    for (int c = 0; !m->cols && c < some; c++) found |= (uint64_t)1 << label(m->l->col_block, col + c) % 64;
    return found;
}

/* What `pack` made of the weight's rows first to first + count becomes W_eff, or ΔW of one block. */
static void modulate(const adapter *m, i64 first, i64 count, i64 k, i64 depth, float *panels, float *scratch) {
    for (i64 top = 0; top < count; top += NR, panels += depth * NR) {
        int32_t block[NR] = {0};
        uint64_t there = m->rows ? 1 : 0; /* blocks of these rows: columns of no such block stay as they are */
        for (i64 i = 0; i < NR; i++) {
            i64 at = first + top + least(i, count - top - 1);
            const float *B = m->B + (m->rows ? m->rows[at] : at) * m->l->B_row;
            if (!m->rows) there |= (uint64_t)1 << (block[i] = label(m->l->row_block, at)) % 64;
            for (i64 t = 0; t < m->rank; t++) scratch[t * NR + i] = m->l->scaling * B[t * m->l->B_rank];
        }
        vi left, right;
        memcpy(&left, block, sizeof left);
        memcpy(&right, block + LANES, sizeof right);
        for (i64 p = 0; p < depth;) {
            i64 rank = rank_at(m, k + p);
            int alike = p + BESIDE <= depth;
            for (int c = 1; alike && c < BESIDE; c++) alike = rank_at(m, k + p + c) == rank;
            if (!(there & blocks_of(m, k + p, alike ? BESIDE : 1)))
                ;
            else if (alike)
                modulate_columns(BESIDE, m, k + p, rank, left, right, scratch, panels + p * NR);
            else
                modulate_columns(1, m, k + p, rank, left, right, scratch, panels + p * NR);
            p += alike ? BESIDE : 1;
        }
    }
}

/* Floats that prepare_right needs. */
static i64 prepare_size(int thirds, i64 depth, i64 rank) { return uncut_size(thirds, depth) + lines(rank * NR); }

/* Of rows first to first + count of a right matrix, columns k to k + depth, what `multiply` reads; modulated, while they
 * are in the cache, where `m` is given. */
static void prepare_right(int thirds, matrix b, const adapter *m, i64 first, i64 count, i64 k, i64 depth,
                          float *out, float *workspace) {
    float *scratch = workspace + uncut_size(thirds, depth);
    for (i64 top = 0; top < count; top += NC) {
        i64 some = least(NC, count - top);
        float *panels = thirds ? workspace : out + top * depth;
        pack(b, first + top, some, k, depth, NR, panels);
        if (m) modulate(m, first + top, some, k, depth, panels, scratch);
        if (thirds) cut_panels(some, depth, panels, (half *)(out + top * row_size(1, depth)));
    }
}

static i64 product_size(int thirds, i64 a_count, i64 depth, i64 rank) {
    return right_size(thirds, depth) + left_size(thirds, a_count, depth) + prepare_size(thirds, depth, rank);
}

/* y (rows of a, rows of b) = a bᵀ over `depth` columns, `terms` of them at a time, for some rows of each, or y plus that
 * where `add`; b modulated where `m` is given. */
static void product(int thirds, matrix a, i64 a_first, i64 a_count, matrix b, i64 b_first, i64 b_count,
                    i64 depth, i64 terms, const adapter *m, float *y, i64 stride, int add, float *workspace) {
    float *right = workspace, *left = right + right_size(thirds, depth), *rest = left + left_size(thirds, a_count, depth);
    i64 most = left_most(thirds), together = right_most(thirds), high = left_height(thirds);
    begin_product(thirds);
    for (i64 i = 0; i < a_count; i += most)
        for (i64 k = 0; k < depth; k += KC) {
            i64 height = least(most, a_count - i), deep = least(KC, depth - k), size = row_size(thirds, deep);
            prepare_left(thirds, a, a_first + i, height, k, deep, rest, left);
            for (i64 j = 0; j < b_count; j += together) {
                i64 width = least(together, b_count - j), last = j + together >= b_count;
                prepare_right(thirds, b, m, b_first + j, width, k, deep, right, rest);
                i64 next = last ? 0 : j + together, after = last ? k + KC : k, further = least(KC, depth - after);
                for (i64 r = 0; r < height; r += high) {
                    if (further > 0)
                        ask_for(b, b_first + next, least(together, b_count - next), after, further, r, high, height);
                    multiply(thirds, terms, deep, left + r * size, right, y + (i + r) * stride + j, stride, height - r,
                             width, add || k > 0);
                }
            }
        }
    end_product(thirds);
}
