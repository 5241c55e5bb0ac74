/* Epilogues: what becomes of a finished piece of C. y takes a bias and is rounded once; its rows, or columns, go where they belong; or C
 * is a block's G = dYᵀ x, of which H = s G ∘ W0 is made at once and contracted with the factors: dA += Bᵀ H, dB += H Aᵀ.
 *
 * Sums of dA and dB are float32 and padded: columns, or rows, of each block to a multiple of PANEL, ranks to one of LANES. They lie as
 *
 *   dA (ranks, columns in block order)     dB (rows in block order, ranks)     A (columns, ranks)     B (rows, ranks)
 */
#pragma once

#include "gemm.h"

enum {
    GROUP = VECTOR_BYTES == 64 ? 16 : 8, /* rows of H that are contracted together */
    SPAN = 128, /* columns of it that are summed in registers: short sums round little */
    RANKS = VECTOR_BYTES == 64 ? 8 : 4, /* of dA that are summed together, in registers */
    ROWS_AHEAD = 16, /* so many rows of a contiguous block before it reads them a pass asks the memory for them */
    /* In gradient_sums' dA rows are so much further apart: a multiple of 4 KB would have all of them share a set of the L1 cache. */
    SKEW = 16,
};

/* Write rows of y: of sums that are float32, plus a bias unless it is NULL, or plus what is there of y where `add`. */
static void finish_rows(const float *sums, i64 first, i64 end, i64 cols, const void *bias, int add, void *y, int dtype) {
    for (i64 t = first; t < end; t++)
        for (i64 c = 0; c < cols; c += LANES) {
            vf value = widen(sums + t * cols, c, cols - c, FLOAT32);
#define CALL(dtype)                                                      \
    if (bias) value += widen(bias, c, cols - c, dtype);                  \
    if (add) value += widen(y, t * cols + c, cols - c, dtype);           \
    narrow(y, t * cols + c, cols - c, value, dtype)
            WITH_DTYPE(dtype, CALL)
#undef CALL
        }
}

/* What the gradients of the factors are summed in, and the factors as they are contracted. */
typedef struct {
    const layer *l;
    i64 parts, ranks, wide, tall; /* padded */
    float *dA, *dB, *A;
} gradient_sums;

/* Where block k begins in block order, padded. */
static i64 padded_before(const int32_t *offsets, i64 k) {
    i64 before = 0;
    for (i64 b = 0; b < k; b++) before += round_up(offsets[b + 1] - offsets[b], PANEL);
    return before;
}

static gradient_sums sums_in(arena *a, const layer *l, i64 parts) {
    gradient_sums s = {.l = l, .parts = parts, .ranks = round_up(greatest(1, l->rank), LANES)};
    s.wide = padded_before(l->col_offsets, l->blocks) + SKEW, s.tall = padded_before(l->row_offsets, l->blocks);
    s.dA = take(a, parts * s.ranks * s.wide * 4), s.dB = take(a, s.tall * s.ranks * 4), s.A = take(a, s.wide * s.ranks * 4);
    return s;
}

static void begin_sums(const gradient_sums *s) {
    const layer *l = s->l;
    memset(s->dA, 0, (size_t)(s->parts * s->ranks * s->wide) * sizeof *s->dA);
    memset(s->dB, 0, (size_t)(s->tall * s->ranks) * sizeof *s->dB);
    memset(s->A, 0, (size_t)(s->wide * s->ranks) * sizeof *s->A);
    for (i64 k = 0, at = 0; k < l->blocks; at += round_up(width_of(l, k), PANEL), k++)
        for (i64 t = 0; t < rank_of(l, k); t++)
            for (i64 c = 0; c < width_of(l, k); c++)
                s->A[(at + c) * s->ranks + t] = factor_A(l, t, l->col_index[l->col_offsets[k] + c]);
}

/* Write the first `count` of LANES sums to elements `index`, `step` apart, stored as the factors are. */
static void write_sums(vf sums, void *to, i64 at, const i64 *index, i64 step, i64 count, int dtype) {
    char line[VECTOR_BYTES];
#define CALL(dtype) narrow_all(line, sums, dtype)
    WITH_DTYPE(dtype, CALL)
#undef CALL
    for (i64 i = 0; i < least(count, LANES); i++)
        memcpy((char *)to + (at + (index ? index[i] : i) * step) * bytes_of(dtype), line + i * bytes_of(dtype), (size_t)bytes_of(dtype));
}

/* Write dA and dB, laid out as a dense A and B of the layer, or where it is `swapped`, of its transpose. */
static void end_sums(const gradient_sums *s, void *dA, void *dB, int swapped) {
    const layer *l = s->l;
    int dtype = (int)l->factor_dtype;
    i64 A_rank = swapped ? 1 : l->cols, A_col = swapped ? l->rank : 1, B_row = swapped ? 1 : l->rank, B_rank = swapped ? l->rows : 1;
    for (i64 k = 0; k < l->blocks; k++) {
        const i64 *rows = l->row_index + l->row_offsets[k], *cols = l->col_index + l->col_offsets[k];
        const float *of_rows = s->dB + padded_before(l->row_offsets, k) * s->ranks, *of_cols = s->dA + padded_before(l->col_offsets, k);
        for (i64 i = 0; i < height_of(l, k); i++)
            for (i64 t = 0; t < l->rank; t += LANES)
                write_sums(widen(of_rows + i * s->ranks, t, rank_of(l, k) - t, FLOAT32), dB, rows[i] * B_row + t * B_rank, NULL, B_rank,
                           l->rank - t, dtype);
        for (i64 t = 0; t < l->rank; t++)
            for (i64 c = 0; c < width_of(l, k); c += LANES) {
                vf sum = {0};
                for (i64 part = 0; part < s->parts && t < rank_of(l, k); part++) sum += load(of_cols + (part * s->ranks + t) * s->wide + c);
                write_sums(sum, dA, t * A_rank, cols + c, A_col, width_of(l, k) - c, dtype);
            }
    }
}

/* B of some rows of block k, (rows, ranks), 0 beyond its rank and below the last row up to a multiple of GROUP. */
static void copy_B_rows(const gradient_sums *s, i64 k, const i64 *rows, i64 count, float *to) {
    memset(to, 0, (size_t)(round_up(count, GROUP) * s->ranks) * sizeof *to);
    for (i64 i = 0; i < count; i++)
        for (i64 t = 0; t < rank_of(s->l, k); t++) to[i * s->ranks + t] = factor_B(s->l, rows[i], t);
}

/* A row of H = scale G ∘ W0, 0 behind `width` up to a multiple of PANEL. */
INLINE void H_row(const float *G, const void *W0, int dtype, float scale, i64 width, float *H) {
    i64 c = 0;
    for (; c < width; c += LANES)
        store(H + c, widen(G, c, width - c, FLOAT32) * (scale * widen(W0, c, width - c, dtype)));
    for (; c < round_up(width, PANEL); c += LANES) store(H + c, (vf){0});
}

/* dB (GROUP rows) += H A, dA += Bᵀ H over some columns, a multiple of PANEL: H (GROUP, columns), rows `apart`; of A, B and dB
 * `ranks` lie side by side, of dA `wide` columns. */
static __attribute__((noinline)) void contract(i64 rank, i64 ranks, const float *H, i64 apart, i64 columns, const float *A,
                                               const float *B, float *dA, i64 wide, float *dB) {
    for (i64 t = 0; t < rank; t += LANES)
        for (i64 first = 0; first < columns; first += SPAN) {
            vf sum[GROUP];
            const float *a = A + first * ranks + t;
#pragma GCC unroll 16
            for (int i = 0; i < GROUP; i++) sum[i] = (vf){0};
            for (i64 c = first; c < least(columns, first + SPAN); c++, a += ranks) {
                vf line = load(a);
#pragma GCC unroll 16
                for (int i = 0; i < GROUP; i++) sum[i] += line * H[i * apart + c];
            }
#pragma GCC unroll 16
            for (int i = 0; i < GROUP; i++) store(dB + i * ranks + t, load(dB + i * ranks + t) + sum[i]);
        }
    for (i64 t = 0; t < rank; t += RANKS)
        for (i64 c = 0; c < columns; c += 2 * LANES) {
            vf sum[RANKS][2];
#pragma GCC unroll 8
            for (int r = 0; r < RANKS; r++) sum[r][0] = sum[r][1] = (vf){0};
            for (int i = 0; i < GROUP; i++) {
                vf low = load(H + i * apart + c), high = load(H + i * apart + c + LANES);
#pragma GCC unroll 8
                for (int r = 0; r < RANKS; r++) {
                    float b = B[i * ranks + t + r];
                    sum[r][0] += low * b;
                    sum[r][1] += high * b;
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < RANKS; r++) {
                float *to = dA + (t + r) * wide + c;
                store(to, load(to) + sum[r][0]);
                store(to + LANES, load(to + LANES) + sum[r][1]);
            }
        }
}

#if HAS_TILES
/* C (rows of W0, PANEL tokens), rounded once with these rows' bias, unless it is NULL, as columns of y: each where it belongs, or in
 * order. */
TILES static void write_columns(const float *C, const i64 *rows, i64 in_order, const half *bias, i64 count, half *to) {
    for (i64 i = 0; i < count; i++) {
        vf own = {0};
        if (bias) own += value_at(bias, rows[i], BFLOAT16);
        _mm512_storeu_si512(to + (in_order ? i : rows[i]) * PANEL,
                            narrowed(load(C + i * PANEL) + own, load(C + i * PANEL + SIDE) + own));
    }
}

/* Rows of `to`, `stride` apart, from columns that are PANEL tokens side by side, SIDE of them read; without what `keep` drops. */
TILES static void rows_of_columns(const half *columns, i64 tokens, i64 cols, const uint16_t *keep, half *to, i64 stride) {
    for (i64 c = 0; c < cols; c += TERMS) {
        __mmask32 there = first_halves(cols - c);
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) r[i] = paired(columns + (c + 2 * i) * PANEL, PANEL);
        transpose_lines(r);
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            if (i >= tokens) continue;
            if (keep) r[i] = drop(r[i], keep + i * words(cols), c);
            _mm512_mask_storeu_epi16(to + i * stride + c, there, r[i]);
        }
    }
}
#endif
