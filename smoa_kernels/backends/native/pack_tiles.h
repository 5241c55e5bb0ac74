/* Packing in tiles (microkernel.h): SPLIT3 from float32; PAIRS from bfloat16, whose bits are moved unchanged, or from panels of floats
 * where a weight is modulated or the operand is column-major.
 *
 * A row-major operand is copied to left tiles, and transposed to right tiles. To put terms in block order, lines of right tiles are
 * picked, each of which is two terms of 16 rows; another transpose makes left tiles. In gradients a column-major operand becomes right tiles by
 * interleaving two terms, and left tiles by another transpose.
 */
#pragma once

#include "pack.h"

/* Whether tiles are rows of the operand as they lie. */
static inline int is_plain(const operand *o) { return o->row_major && !o->cols && !o->keep; }

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

/* Writes 16 numbers in three bfloat16, STEP apart, whose sum is exact: pairs of `low` and `high`. The first is the number truncated, so that it
 * cannot overflow; the second is the remainder rounded; the third is the rest. Infinity becomes NaN, since its second part is infinity minus
 * infinity. */
INLINE void write_parts(vf low, vf high, half *to) {
    const vu upper = (vu){0} + 0xffff0000;
    vu first = (vu)low & upper, second = (vu)high & upper;
    _mm512_store_si512(to, (__m512i)(first >> 16 | second));
    low -= (vf)first, high -= (vf)second;
    first = ((vu)low + 0x8000) & upper, second = ((vu)high + 0x8000) & upper;
    _mm512_store_si512(to + STEP, (__m512i)(first >> 16 | second));
    low -= (vf)first, high -= (vf)second;
    _mm512_store_si512(to + 2 * STEP, (__m512i)((vu)low >> 16 | ((vu)high & upper))); /* masked: tiny numbers have lower bits too */
}

/* Term p of 16 rows of a panel; 0 beyond the last term. */
INLINE vf term_or_zero(const float *panel, i64 p, i64 depth, i64 column) {
    return p < depth ? load(panel + p * PANEL + column) : (vf){0};
}

/* Packs panels of floats (depth, PANEL), rows from `first` on and terms from k on, in right tiles; `apart` lies between panels. PAIRS: rounded
 * by the modulation's thresholds; what is not modulated is bfloat16 and stays. The two terms of a pair are neighbours in PAIRS, and half a step
 * apart in SPLIT3, so that rows can be packed in left tiles without a permutation. */
static void tiles_of_floats(int format, const adapter *m, i64 first, i64 count, i64 k, i64 depth, const float *panel, half *to, i64 apart) {
    static const uint32_t lane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    i64 beside = format == PAIRS ? 1 : SIDE, step = format == PAIRS ? STEP : 3 * STEP;
    uint32_t place = m ? (uint32_t)m->place : 0, row_step = m ? (uint32_t)m->row_step : 0, col_step = m ? (uint32_t)m->col_step : 0;
    vu lanes;
    memcpy(&lanes, lane, sizeof lanes);
    for (i64 top = 0; top < count; top += PANEL, panel += depth * PANEL, to += apart)
        for (int q = 0; q < 2; q++) {
            vu start = (lanes + (uint32_t)(first + top + q * SIDE)) * row_step + place;
            for (i64 line = 0; line < round_up(depth, TERMS) / 2; line++) {
                i64 p = format == PAIRS ? 2 * line : line / SIDE * TERMS + line % SIDE;
                vf low = term_or_zero(panel, p, depth, q * SIDE), high = term_or_zero(panel, p + beside, depth, q * SIDE);
                half *at = to + line / SIDE * step + q * TILE + line % SIDE * TERMS;
                vu threshold = start + (uint32_t)(k + p) * col_step;
                if (format == SPLIT3)
                    write_parts(low, high, at);
                else
                    _mm512_store_si512(at, (__m512i)(rounded_by(threshold & 0xffff, low) >> 16 | rounded_by((threshold + col_step) & 0xffff, high)));
            }
        }
}

/* Packs a row-major operand in left panels of SPLIT3, in their own order. */
static void split_rows(const operand *o, i64 first, i64 count, i64 k, i64 depth, half *to) {
    float ordered[PANEL * KC];
    for (i64 top = 0; top < count; top += PANEL) {
        i64 valid = least(PANEL, count - top);
        const float *row[PANEL];
        read_rows(o, first + top, valid, k, depth, ordered, row);
        for (i64 p = 0; p < depth; p += TERMS, to += 3 * STEP)
            for (i64 i = 0; i < valid; i++) {
                const float *from = row[i] + p;
                __builtin_prefetch(from + AHEAD);
                __builtin_prefetch(from + AHEAD + SIDE);
                write_parts(widen(from, 0, depth - p, FLOAT32), widen(from, SIDE, depth - p - SIDE, FLOAT32), to + i * TERMS);
            }
    }
}

static inline __mmask32 first_halves(i64 count) {
    return count < TERMS ? ((__mmask32)1 << greatest(0, count)) - 1 : ~(__mmask32)0;
}

/* Applies a token's mask to 32 elements from `at` on: a dropped element becomes 0, or NaN if it is Inf or NaN. */
INLINE __m512i drop(__m512i values, const uint16_t *keep, i64 at) {
    uint32_t bits = *(const mask_bits *)(keep + at / 16);
    __m512i all = _mm512_set1_epi16(0x7f80);
    __mmask32 lost = _mm512_mask_cmpeq_epi16_mask(~bits, _mm512_and_si512(values, all), all);
    return _mm512_mask_mov_epi16(_mm512_maskz_mov_epi16(bits, values), lost, _mm512_set1_epi16(0x7fff));
}

/* Interleaves the lower, or upper, halves of two vectors to a line of pairs. */
INLINE __m512i pairs_in(__m512i first, __m512i second, int upper) {
    static const uint16_t order[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i at = _mm512_add_epi16(_mm512_loadu_si512(order), _mm512_set1_epi16((short)(16 * upper)));
    return _mm512_permutex2var_epi16(first, at, second);
}

/* Packs up to SIDE rows of a row-major operand in left or right tiles, a step apart; missing rows and terms become 0.
 * Prefetches four steps ahead: a group reads more rows at a time than the hardware prefetcher follows. */
INLINE void tile_group(int as_left, const half *const *row, i64 count, i64 width, half *to) {
    for (i64 c = 0; c < width; c += TERMS, to += STEP) {
        __m512i r[SIDE];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            r[i] = _mm512_setzero_si512();
            if (i >= count) continue;
            __builtin_prefetch(row[i] + c + 4 * TERMS);
            r[i] = _mm512_maskz_loadu_epi16(first_halves(width - c), row[i] + c);
        }
        if (!as_left) transpose_lines(r);
        store_lines(r, to);
    }
}

/* Packs rows first to first + count of a plain operand, terms k to k + depth, in left or right panels. */
static void tile_rows(const operand *o, i64 first, i64 count, i64 k, i64 depth, int as_left, half *to) {
    i64 deep = round_up(depth, TERMS);
    for (i64 i = 0; i < count; i += SIDE) {
        const half *row[SIDE];
        for (i64 r = 0; r < least(SIDE, count - i); r++)
            row[r] = (const half *)o->data + (o->rows ? o->rows[first + i + r] : first + i + r) * o->row_stride + o->start + k;
        half *tiles = to + i / PANEL * PANEL * deep + i % PANEL * TERMS;
        as_left ? tile_group(1, row, count - i, depth, tiles) : tile_group(0, row, count - i, depth, tiles);
    }
}

/* Packs one step of a right panel from a column-major operand: `count` rows, up to 32, from c on, and terms from `first` on, of which `valid` exist.
 * Prefetches the next panel, since rows are too far apart for the hardware prefetcher. */
INLINE void pair_terms(const operand *o, i64 first, i64 valid, i64 c, i64 count, half *to) {
    const half *from = (const half *)o->data + first * o->col_stride + c;
    __mmask32 inside = first_halves(count);
    for (i64 t = 0; t < TERMS; t += 2, to += TERMS) {
        __m512i two[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            two[i] = _mm512_maskz_loadu_epi16(t + i < valid ? inside : 0, from + (t + i) * o->col_stride);
            __builtin_prefetch(from + (t + i) * o->col_stride + PANEL);
            if (o->keep && t + i < valid) two[i] = drop(two[i], keep_of(o, first + t + i), c);
        }
        _mm512_store_si512(to, pairs_in(two[0], two[1], 0));
        _mm512_store_si512(to + TILE, pairs_in(two[0], two[1], 1));
    }
}
#else
#define transpose_tiles(tiles, tile) ((void)(tile))
#define tiles_of_floats(format, m, first, count, k, depth, panel, to, apart) ((void)(to))
#define split_rows(o, first, count, k, depth, to) ((void)(to))
#define tile_rows(o, first, count, k, depth, as_left, to) ((void)(to))
#endif

/* Floats of scratch that packing takes. */
static i64 scratch_size(int format) { return format == FLOATS ? 0 : NC * KC + SPILL; }

/* Packs right panels: rows first to first + count, terms k to k + depth. If `m` is given, modulates them while they are in the cache.
 * `scratch` has `scratch_size` floats. */
static void pack_right(int format, const operand *o, const adapter *m, i64 first, i64 count, i64 k, i64 depth, float *to, float *scratch) {
    if (format == PAIRS && !m && is_plain(o)) {
        tile_rows(o, first, count, k, depth, 0, (half *)to);
        return;
    }
    for (i64 top = 0; top < count; top += NC)
        for (i64 p = 0, deep; p < depth; p += deep) {
            i64 rows = least(NC, count - top);
            deep = format == FLOATS ? depth : least(KC, depth - p);
            i64 size = row_size(format, depth);
            float *panels = format == FLOATS ? to + top * depth : scratch;
            half *tiles = (half *)(to + top * size) + p * PANEL;
            pack_floats(o, first + top, rows, k + p, deep, NR, panels);
            if (m) modulate(m, first + top, rows, k + p, deep, panels);
            if (format != FLOATS) tiles_of_floats(format, m, first + top, rows, k + p, deep, panels, tiles, 2 * PANEL * size);
        }
}

/* The same for left panels. */
static void pack_left(int format, const operand *o, i64 first, i64 count, i64 k, i64 depth, float *to, float *scratch) {
    if (format == FLOATS)
        pack_floats(o, first, count, k, depth, MR, to);
    else if (format == PAIRS && is_plain(o))
        tile_rows(o, first, count, k, depth, 1, (half *)to);
    else if (format == SPLIT3 && o->row_major)
        split_rows(o, first, count, k, depth, (half *)to);
    else {
        pack_right(format, o, NULL, first, count, k, depth, to, scratch);
        transpose_tiles(round_up(count, PANEL) * row_size(format, depth) * 2 / TILE, (half *)to);
    }
}
