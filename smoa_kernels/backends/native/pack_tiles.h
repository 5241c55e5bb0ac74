/* Packing in tiles (microkernel.h): PAIRS from bfloat16, SPLIT3 from panels of floats.
 *
 * PAIRS moves the bits of tokens unchanged, and modulates a weight in vectors as it lies in memory. A row-major operand
 * is copied to left tiles, and transposed to right ones. A column-major operand becomes right tiles by interleaving two
 * terms, and left tiles by another transpose.
 */
#pragma once

#include "pack.h"

#if HAS_TILES
/* Transposes r as 16 rows of 16 numbers of 32 bits. */
INLINE void transpose_lines(__m512i *r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) { /* r[4 g + j] is rows 4 g to 4 g + 3 of columns j, 4 + j, 8 + j, 12 + j */
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
        r[12 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
    }
}

INLINE void store_lines(const __m512i *r, half *to) {
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * TERMS, r[i]);
}

/* Transposes right tiles to left ones, or the reverse. */
static void transpose_tiles(i64 tiles, half *tile) {
    for (__m512i r[SIDE]; tiles > 0; tiles--, tile += TILE) {
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) r[i] = _mm512_load_si512(tile + i * TERMS);
        transpose_lines(r);
        store_lines(r, tile);
    }
}

/* Writes 16 numbers in three bfloat16, STEP apart, whose sum is exact: pairs of `low` and `high`. The first is the
 * number truncated, so that it cannot overflow; the second is the remainder rounded; the third is the rest. Infinity
 * becomes NaN, since its second part is infinity minus infinity. */
INLINE void write_parts(vf low, vf high, half *to) {
    const vu upper = (vu){0} + 0xffff0000;
    vu first = (vu)low & upper, second = (vu)high & upper;
    _mm512_store_si512(to, (__m512i)(first >> 16 | second));
    low -= (vf)first, high -= (vf)second;
    first = ((vu)low + 0x8000) & upper, second = ((vu)high + 0x8000) & upper;
    _mm512_store_si512(to + STEP, (__m512i)(first >> 16 | second));
    low -= (vf)first, high -= (vf)second;
    _mm512_store_si512(to + 2 * STEP,
                       (__m512i)((vu)low >> 16 | ((vu)high & upper))); /* masked: tiny numbers have lower bits too */
}

/* Term p of 16 rows of a panel; 0 beyond the last term. */
INLINE vf term_or_zero(const float *panel, i64 p, i64 depth, i64 column) {
    return p < depth ? load(panel + p * PANEL + column) : (vf){0};
}

/* Packs panels of floats (depth, PANEL) in right panels of SPLIT3. The two terms of a pair are half a step apart. */
static void split_floats(i64 count, i64 depth, const float *panel, half *to) {
    for (i64 top = 0; top < count; top += PANEL, panel += depth * PANEL)
        for (i64 k = 0; k < depth; k += TERMS, to += 3 * STEP)
            for (i64 p = k; p < k + SIDE; p++)
                for (int q = 0; q < 2; q++)
                    write_parts(term_or_zero(panel, p, depth, q * SIDE), term_or_zero(panel, p + SIDE, depth, q * SIDE),
                                to + q * TILE + (p - k) * TERMS);
}

static inline __mmask32 first_halves(i64 count) {
    return count < TERMS ? ((__mmask32)1 << greatest(0, count)) - 1 : ~(__mmask32)0;
}

/* Interleaves the lower, or upper, halves of two vectors to a line of pairs. */
INLINE __m512i pairs_in(__m512i first, __m512i second, int upper) {
    static const uint16_t order[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i at = _mm512_add_epi16(_mm512_loadu_si512(order), _mm512_set1_epi16((short)(16 * upper)));
    return _mm512_permutex2var_epi16(first, at, second);
}

/* The adapter as it modulates lines of memory: the weight's rows, or if it is column-major its columns. */
static adapter along_lines(const adapter *m, int row_major) {
    adapter t = {m->rank,     m->B_stride, m->A_stride, m->place,     m->col_step,
                 m->row_step, m->B,        m->A,        m->col_label, m->row_label};
    return row_major ? *m : t;
}

/* Turns 32 elements from `col` on of BESIDE lines from `row` on into W_eff or ΔW, rounded by thresholds. */
INLINE void modulate_lines(const adapter *m, i64 row, i64 col, __m512i *line) {
    static const uint32_t lane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static const uint16_t upper[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const vi merged = (vi){0} - (m->row_label != NULL); /* all bits, or none */
    const float *A = m->A + col, *B = m->B + row;
    __mmask16 inside[BESIDE][2];
    int any = 0;
#pragma GCC unroll 4
    for (int i = 0; i < BESIDE; i++)
        for (int q = 0; q < 2; q++) {
            inside[i][q] = 0xffff;
            if (m->row_label)
                inside[i][q] = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(m->col_label + col + q * SIDE),
                                                       _mm512_set1_epi32(m->row_label[row + i]));
            any |= inside[i][q];
        }
    if (!any) return;
    vf update[BESIDE][2] = {{{0}}};
    for (i64 t = 0; t < m->rank; t++, A += m->A_stride, B += m->B_stride)
#pragma GCC unroll 4
        for (int i = 0; i < BESIDE; i++) update[i][0] += B[i] * load(A), update[i][1] += B[i] * load(A + SIDE);
    vu place = (vu)_mm512_loadu_si512(lane) * (uint32_t)m->col_step +
               (uint32_t)(m->place + row * m->row_step + col * m->col_step);
#pragma GCC unroll 4
    for (int i = 0; i < BESIDE; i++, place += (uint32_t)m->row_step) {
        __m512i changed[2];
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++) {
            __m256i part = q ? _mm512_extracti64x4_epi64(line[i], 1) : _mm512_extracti64x4_epi64(line[i], 0);
            vf w = from_bfloat16((vh)part);
            vu threshold = (place + (uint32_t)(q * SIDE * m->col_step)) & 0xffff;
            changed[q] = (__m512i)rounded_by(threshold, (vf)((vi)w & merged) + w * update[i][q]);
            changed[q] = _mm512_mask_mov_epi32((__m512i)w, inside[i][q], changed[q]);
        }
        line[i] = _mm512_permutex2var_epi16(changed[0], _mm512_loadu_si512(upper), changed[1]);
    }
}

/* Packs rows first to first + count of a row-major operand, terms k to k + depth, in left or right panels; missing rows
 * and terms become 0. Prefetches four steps ahead: a group reads more rows at a time than the hardware prefetcher
 * follows. */
INLINE void tile_rows(int as_left, const operand *o, const adapter *m, i64 first, i64 count, i64 k, i64 depth,
                      half *to) {
    i64 deep = round_up(depth, TERMS);
    for (i64 i = 0; i < count; i += SIDE) {
        const half *row[SIDE];
        for (i64 r = 0; r < least(SIDE, count - i); r++) row[r] = element_of(o, first + i + r, k);
        half *tile = to + i / PANEL * PANEL * deep + i % PANEL * TERMS;
        for (i64 c = 0; c < depth; c += TERMS, tile += STEP) {
            __m512i r[SIDE];
#pragma GCC unroll 16
            for (int n = 0; n < SIDE; n++) {
                r[n] = _mm512_setzero_si512();
                if (i + n >= count) continue;
                __builtin_prefetch(row[n] + c + 4 * TERMS);
                r[n] = _mm512_maskz_loadu_epi16(first_halves(depth - c), row[n] + c);
            }
#pragma GCC unroll 4
            for (int n = 0; n < SIDE && m; n += BESIDE) modulate_lines(m, first + i + n, k + c, r + n);
            if (!as_left) transpose_lines(r);
            store_lines(r, tile);
        }
    }
}

/* Packs one step of a right panel from a column-major operand: `count` rows, up to 32, from c on, and terms from
 * `first` on, of which `valid` exist. Prefetches the next panel, since rows are too far apart for the hardware
 * prefetcher. */
INLINE void pair_terms(const operand *o, const adapter *m, i64 first, i64 valid, i64 c, i64 count, half *to) {
    const half *from = element_of(o, first, c);
    __mmask32 inside = first_halves(count);
    for (i64 t = 0; t < TERMS; t += BESIDE) {
        __m512i line[BESIDE];
#pragma GCC unroll 4
        for (int i = 0; i < BESIDE; i++) {
            line[i] = _mm512_maskz_loadu_epi16(t + i < valid ? inside : 0, from + (t + i) * o->stride);
            __builtin_prefetch(from + (t + i) * o->stride + PANEL);
        }
        if (m) modulate_lines(m, first + t, c, line);
#pragma GCC unroll 2
        for (int i = 0; i < BESIDE; i += 2, to += TERMS) {
            _mm512_store_si512(to, pairs_in(line[i], line[i + 1], 0));
            _mm512_store_si512(to + TILE, pairs_in(line[i], line[i + 1], 1));
        }
    }
}

/* Packs an operand in PAIRS: a weight, which `m` modulates, or tokens. */
static void pack_pairs(int as_left, const operand *o, const adapter *m, i64 first, i64 count, i64 k, i64 depth,
                       half *to) {
    adapter along = m ? along_lines(m, o->row_major) : (adapter){0};
    m = m ? &along : NULL;
    if (o->row_major)
        as_left ? tile_rows(1, o, m, first, count, k, depth, to) : tile_rows(0, o, m, first, count, k, depth, to);
    for (i64 top = 0; top < count && !o->row_major; top += PANEL)
        for (i64 p = 0; p < depth; p += TERMS, to += STEP) {
            pair_terms(o, m, k + p, depth - p, first + top, count - top, to);
            if (as_left) transpose_tiles(2, to);
        }
}

#else
#define transpose_tiles(tiles, tile) ((void)(tile))
#define split_floats(count, depth, panel, to) ((void)(to))
#define pack_pairs(as_left, o, m, first, count, k, depth, to) ((void)(to))
#endif

/* Packs right panels: rows first to first + count, terms k to k + depth. If `m` is given, modulates them while they are
 * in the cache. `scratch` has NC * KC + SPILL floats. */
static void pack_right(int format, const operand *o, const adapter *m, i64 first, i64 count, i64 k, i64 depth,
                       float *to, float *scratch) {
    if (format == PAIRS) {
        pack_pairs(0, o, m, first, count, k, depth, (half *)to);
        return;
    }
    for (i64 top = 0; top < count; top += NC) {
        i64 rows = least(NC, count - top);
        float *at = to + top * row_size(format, depth), *panels = format == FLOATS ? at : scratch;
        pack_floats(o, first + top, rows, k, depth, NR, panels);
        if (m) modulate(m, first + top, rows, k, depth, panels);
        if (format == SPLIT3) split_floats(rows, depth, panels, (half *)at);
    }
}

/* The same for left panels. */
static void pack_left(int format, const operand *o, i64 first, i64 count, i64 k, i64 depth, float *to, float *scratch) {
    if (format == FLOATS)
        pack_floats(o, first, count, k, depth, MR, to);
    else if (format == PAIRS)
        pack_pairs(1, o, NULL, first, count, k, depth, (half *)to);
    else {
        pack_right(SPLIT3, o, NULL, first, count, k, depth, to, scratch);
        transpose_tiles(round_up(count, PANEL) * row_size(SPLIT3, depth) * 2 / TILE, (half *)to);
    }
}
