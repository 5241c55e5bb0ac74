/* Packing: copies a piece of an operand to the layout that a micro-kernel reads. SMoA's own work is done meanwhile: a
 * weight's panel becomes W_eff or ΔW, half types become float32. So W_eff is never in memory as a whole.
 *
 * This file packs panels of floats. pack_tiles.h packs these, or bfloat16 directly, in tiles.
 */
#pragma once

#include "microkernel.h"

enum {
    NC = NR * 4, /* right rows that are packed together */
    MC = MR *
        147, /* left rows: 2058, or 882 with AVX2. For more of them the right operand is packed again. */
    SPILL = 8, /* floats beyond the last panel that packing may write */
    /* Packing reads short runs that are far apart, so it prefetches: so many floats of a row ahead, or columns. */
    AHEAD = 64,
    COLUMNS_AHEAD = 4,
    BESIDE = 4, /* rows, or columns, modulated at a time: they share the loads of a factor */
    /* Floats added to the stride of a factor: at a multiple of 4 KB all its rows would share one set of the L1 cache.
     */
    SKEW = 16,
};

/* Where block k begins in padded block order, in which each block takes whole panels. */
static i64 padded_before(const int32_t *offsets, i64 k) {
    i64 before = 0;
    for (i64 b = 0; b < k; b++) before += round_up(offsets[b + 1] - offsets[b], PANEL);
    return before;
}

/* A layer's factors in float32: A (rank, columns) and s B (rank, rows), in memory's order or in padded block order.
 * They are 0 beyond a block's own rank, in the padding, and in one more panel at the end. */
typedef struct {
    i64 A_stride, B_stride;
    float *A, *B;
} factors;

/* Copies A, or for the transposed layer B, times `scale`. */
static void pack_factor(const layer *l, int in_blocks, float scale, float *to, i64 stride) {
    memset(to, 0, (size_t)(l->rank * stride) * sizeof *to);
    for (i64 k = 0; k < l->blocks; k++) {
        const i64 *cols = l->col_index + l->col_offsets[k];
        float *block = in_blocks ? to + padded_before(l->col_offsets, k) : to;
        for (i64 t = 0; t < rank_of(l, k); t++)
            for (i64 c = 0; c < width_of(l, k); c++)
                block[t * stride + (in_blocks ? c : cols[c])] =
                    scale * value_at(l->A, t * l->A_rank + cols[c] * l->A_col, (int)l->factor_dtype);
    }
}

static factors factors_of(arena *a, const layer *l, int in_blocks, double scaling) {
    layer other = transposed(*l);
    factors f = {.A_stride = (in_blocks ? padded_before(l->col_offsets, l->blocks) : l->cols) + PANEL + SKEW,
                 .B_stride = (in_blocks ? padded_before(l->row_offsets, l->blocks) : l->rows) + PANEL + SKEW};
    f.A = take(a, l->rank * f.A_stride * 4), f.B = take(a, l->rank * f.B_stride * 4);
    if (a->base)
        pack_factor(l, in_blocks, 1, f.A, f.A_stride), pack_factor(&other, in_blocks, (float)scaling, f.B, f.B_stride);
    return f;
}

/* How a weight is modulated. With labels: to W_eff = W0 ∘ (1 + s B A) where the labels of row and column agree, which
 * bfloat16 rounds by thresholds. Without labels: to one block's ΔW = W0 ∘ s B A, rounded to nearest. A and s B begin
 * where the operand does. */
typedef struct {
    i64 rank, A_stride, B_stride, place, row_step, col_step;
    const float *A, *B;
    const int32_t *row_label, *col_label; /* one panel longer than the side */
} adapter;

/* The modulation that turns block k of W0 into ΔW. */
static adapter adapter_of_block(const layer *l, const factors *f, i64 k) {
    return (adapter){.rank = rank_of(l, k),
                     .A_stride = f->A_stride,
                     .B_stride = f->B_stride,
                     .place = 0x8000,
                     .A = f->A + padded_before(l->col_offsets, k),
                     .B = f->B + padded_before(l->row_offsets, k)};
}

/* to (8, 8) = the transpose of 8 floats at each of `rows`; rows of `to` are `stride` apart and written in order, which
 * matters if they overlap: where MR < 8. */
#ifdef __aarch64__
INLINE void transpose_4(const float *const *rows, i64 at, float *to, i64 stride) {
    float32x4_t r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) r[i] = vld1q_f32(rows[i] + at);
    float32x4_t even = vzip1q_f32(r[0], r[2]), odd = vzip1q_f32(r[1], r[3]);
    vst1q_f32(to, vzip1q_f32(even, odd)), vst1q_f32(to + stride, vzip2q_f32(even, odd));
    even = vzip2q_f32(r[0], r[2]), odd = vzip2q_f32(r[1], r[3]);
    vst1q_f32(to + 2 * stride, vzip1q_f32(even, odd)), vst1q_f32(to + 3 * stride, vzip2q_f32(even, odd));
}

static inline void transpose(const float *const *rows, i64 at, float *to, i64 stride) {
    for (int j = 0; j < 8; j += 4)
        for (int i = 0; i < 8; i += 4) transpose_4(rows + i, at + j, to + j * stride + i, stride);
}
#else
static inline void transpose(const float *const *rows, i64 at, float *to, i64 stride) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(rows[i] + at);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int upper = 0; upper < 2; upper++) {
            r[i + 2 * upper] = _mm256_shuffle_ps(t[i + upper], t[i + 2 + upper], 0x44);
            r[i + 2 * upper + 1] = _mm256_shuffle_ps(t[i + upper], t[i + 2 + upper], 0xee);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + (i + 4) * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
}
#endif

/* row = where terms k to k + depth of some rows lie, in a row-major operand: in place, or widened in `wide` (rows, KC).
 */
static void read_rows(const operand *o, i64 first, i64 count, i64 k, i64 depth, float *wide, const float **row) {
    for (i64 i = 0; i < count; i++, wide += KC) {
        row[i] = o->dtype == FLOAT32 ? element_of(o, first + i, k) : wide;
        if (row[i] == wide) widen_row(element_of(o, first + i, k), o->dtype, depth, NULL, wide);
    }
}

/* Panels of a row-major operand: transposes them, KC terms at a time. */
static void pack_rows(const operand *o, i64 first, i64 count, i64 k, i64 depth, int height, float *to) {
    float wide[HIGH * KC];
    for (i64 top = 0, terms; top < count; top += height)
        for (i64 start = 0; start < depth; start += terms, to += terms * height) {
            i64 valid = least(height, count - top), p = 0;
            const float *row[HIGH + 8];
            terms = least(KC, depth - start);
            read_rows(o, first + top, valid, k + start, terms, wide, row);
            for (i64 i = valid; i < HIGH + 8; i++) row[i] = row[valid - 1];
            /* Eight rows at a time; the last eight overlap others if 8 does not divide the height. In a panel lower
             * than eight a transpose also writes to the next column, which is overwritten later, or beyond the panel
             * (SPILL). */
            for (; p + 8 <= terms; p += 8)
                for (int i = 0; i < height; i += 8) {
                    int low = i + 8 > height && height >= 8 ? height - 8 : i;
                    if (o->dtype == FLOAT32 && p % 16 == 0)
                        for (int r = 0; r < 8; r++) __builtin_prefetch(row[low + r] + p + AHEAD);
                    transpose(row + low, p, to + p * height + low, height);
                }
            for (; p < terms; p++)
                for (int i = 0; i < height; i++) to[p * height + i] = row[i][p];
        }
}

/* Panels of a column-major operand: each column is read and widened once for all panels. */
static void pack_columns(const operand *o, i64 first, i64 count, i64 k, i64 depth, int height, float *to) {
    float line[MC];
    for (i64 p = 0; p < depth; p++) {
        const void *later = element_of(o, k + least(p + COLUMNS_AHEAD, depth - 1), first);
        const float *column = o->dtype == FLOAT32 ? element_of(o, k + p, first) : line;
        for (i64 i = 0; i < count; i += 64 / bytes_of(o->dtype)) __builtin_prefetch(element(later, i, o->dtype));
        if (column == line) widen_row(element_of(o, k + p, first), o->dtype, count, NULL, line);
        for (i64 top = 0; top < count; top += height) {
            float *panel = to + top * depth + p * height;
            i64 valid = least(height, count - top);
            /* With a constant length memcpy is inlined. */
            if (valid == NR)
                memcpy(panel, column + top, NR * 4);
            else if (valid == MR)
                memcpy(panel, column + top, MR * 4);
            else {
                memcpy(panel, column + top, (size_t)valid * 4);
                memset(panel + valid, 0, (size_t)(height - valid) * 4);
            }
        }
    }
}

/* Packs rows first to first + count, terms k to k + depth, in panels (depth, height). After the last row come other
 * rows or zeros: they are multiplied, but their products are not stored. (What was in memory might be denormal numbers,
 * which are slow.) */
static void pack_floats(const operand *o, i64 first, i64 count, i64 k, i64 depth, int height, float *to) {
    (o->row_major ? pack_rows : pack_columns)(o, first, count, k, depth, height, to);
}

/* Turns `count` terms from `col` on of a panel into W_eff or ΔW. `labels` are the rows' blocks, all 0 without labels.
 */
INLINE void modulate_terms(int count, const adapter *m, i64 row, i64 col, const vi *labels, float *panel) {
    vf update[BESIDE][2] = {{{0}}};
    const vi merged = (vi){0} - (m->col_label != NULL); /* all bits, or none */
    const float *A = m->A + col, *B = m->B + row;
    for (i64 t = 0; t < m->rank; t++, A += m->A_stride, B += m->B_stride)
#pragma GCC unroll 4
        for (int c = 0; c < count; c++) update[c][0] += load(B) * A[c], update[c][1] += load(B + LANES) * A[c];
#pragma GCC unroll 4
    for (int c = 0; c < count; c++) {
        int32_t label = m->col_label ? m->col_label[col + c] : 0;
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++, panel += LANES) {
            vf w = load(panel);
            store(panel, select_label(labels[q], label, (vf)((vi)w & merged) + w * update[c][q], w));
        }
    }
}

/* The set of labels as bits. Block k sets bit k % 64, so two blocks may share a bit. */
static inline uint64_t blocks_of(const int32_t *label, i64 count) {
    uint64_t found = 0;
    for (i64 i = 0; i < count; i++) found |= (uint64_t)1 << label[i] % 64;
    return found;
}

/* Turns right panels (depth, NR) of the weight, rows first to first + count, terms k to k + depth, into W_eff or ΔW. */
static void modulate(const adapter *m, i64 first, i64 count, i64 k, i64 depth, float *panels) {
    for (i64 top = 0; top < count; top += NR, panels += depth * NR) {
        i64 row = first + top;
        vi labels[2] = {{0}};
        uint64_t blocks = 0; /* of these rows; columns of other blocks are left alone */
        if (m->row_label) {
            memcpy(labels, m->row_label + row, sizeof labels);
            blocks = blocks_of(m->row_label + row, least(NR, count - top));
        }
        for (i64 p = 0, terms; p < depth; p += terms) {
            terms = p + BESIDE > depth ? 1 : BESIDE;
            if (m->col_label && !(blocks & blocks_of(m->col_label + k + p, terms))) continue;
            if (terms == BESIDE)
                modulate_terms(BESIDE, m, row, k + p, labels, panels + p * NR);
            else
                modulate_terms(1, m, row, k + p, labels, panels + p * NR);
        }
    }
}
