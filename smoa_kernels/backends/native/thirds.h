/* float32 GEMMs by AMX, which multiplies bfloat16: each number is cut into three thirds of its 24 bits, whose sum it is.
 *
 * To cut is exact, and no number overflows: of the first third lower bits are cleared, the second one is rounded, which
 * can only be smaller, and the last is what is left. Six of the nine products of thirds are summed, in
 * float32. The others are less than float32's own rounding as a rule, and of either sign, as last thirds are. What is not
 * finite gives NaN: infinity less itself is in its second third. Where there is no AMX, panels are multiplied as floats.
 */
#pragma once

#include "tiles.h"

/* Whether a product of so many rows of the left matrix and so many terms is computed so. Of fewer rows to cut the right
 * matrix takes as long as it saves. */
static int by_thirds(i64 rows, i64 depth) { return rows >= 96 && depth >= 32 && amx_allowed(); }

/* Rows of a left panel; the most of the left matrix, and of the right one, that are prepared together: a right panel
 * stays in the L2 cache. */
static i64 left_height(int thirds) { return thirds ? NR : MR; }
static i64 left_most(int thirds) { return thirds ? 2048 : MC; }
static i64 right_most(int thirds) { return thirds ? 2 * NC : NC; }

/* Floats that one row of a panel takes. */
static i64 row_size(int thirds, i64 depth) { return thirds ? (depth + 31) / 32 * 48 : depth; }

/* Floats of panels that are yet to be cut. */
static i64 uncut_size(int thirds, i64 depth) { return thirds ? lines(NC * least(KC, depth) + TRANSPOSED) : 0; }

static i64 right_size(int thirds, i64 depth) {
    return lines(right_most(thirds) * row_size(thirds, least(KC, depth)) + TRANSPOSED);
}

static i64 left_size(int thirds, i64 count, i64 depth) {
    i64 rows = least(left_most(thirds), count + left_height(thirds));
    return lines(rows * row_size(thirds, least(KC, depth)) + TRANSPOSED);
}

#if HAS_TILES
enum { ROWS_SOON = 6, THIRD = 2 * TILE, STEP = 3 * THIRD /* of a panel, PAIR rows: TERMS terms of each row */ };

/* Thirds of 16 pairs of terms, each TERMS / 2 apart; those of one number are `apart` from each other. */
INLINE void cut(vf low, vf high, half *out, i64 apart) {
    const vu upper = (vu){0} + 0xffff0000;
    vu first = (vu)low & upper, second = (vu)high & upper;
    _mm512_store_si512(out, (__m512i)(first >> 16 | second));
    low -= (vf)first, high -= (vf)second;
    first = ((vu)low + 0x8000) & upper, second = ((vu)high + 0x8000) & upper;
    _mm512_store_si512(out + apart, (__m512i)(first >> 16 | second));
    low -= (vf)first, high -= (vf)second;
    _mm512_store_si512(out + 2 * apart, (__m512i)((vu)low >> 16 | ((vu)high & upper))); /* tiny ones have lower bits */
}

INLINE __mmask16 first_floats(i64 count) {
    return count < SIDE ? (__mmask16)((1 << (count < 0 ? 0 : count)) - 1) : (__mmask16)~0;
}

/* Up to SIDE numbers, of which some are there: others are not read, but 0. */
INLINE vf floats_there(const float *from, i64 there) { return (vf)_mm512_maskz_loadu_ps(first_floats(there), from); }

/* Row p of a panel of PAIR columns, of which `depth` rows are there; others are 0. */
INLINE vf row_or_zero(const float *panel, i64 p, i64 depth, i64 column) {
    return p < depth ? load(panel + p * PAIR + column) : (vf){0};
}

/* Panels (depth, PAIR) as right tiles. */
static void cut_panels(i64 count, i64 depth, const float *panel, half *out) {
    for (i64 top = 0; top < count; top += PAIR, panel += depth * PAIR)
        for (i64 k = 0; k < depth; k += TERMS, out += STEP)
            for (i64 p = k; p < k + SIDE; p++)
                for (int q = 0; q < 2; q++)
                    cut(row_or_zero(panel, p, depth, q * SIDE), row_or_zero(panel, p + SIDE, depth, q * SIDE),
                        out + q * TILE + (p - k) * TERMS, THIRD);
}

/* Right tiles become left ones: each the transpose of its lines. */
static void turn_tiles(i64 tiles, half *tile) {
    for (__m512i r[SIDE]; tiles > 0; tiles--, tile += TILE) {
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) r[i] = _mm512_load_si512(tile + i * TERMS);
        transpose_lines(r);
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) _mm512_store_si512(tile + i * TERMS, r[i]);
    }
}

/* Rows of floats that are contiguous as left tiles, in which they lie as they are. */
static void cut_rows(matrix m, i64 first, i64 count, i64 k, i64 depth, half *out) {
    for (i64 top = 0; top < count; top += PAIR)
        for (i64 p = 0; p < depth; p += TERMS, out += STEP)
            for (i64 i = 0; i < least(PAIR, count - top); i++) {
                const float *row = (const float *)m.data + (first + top + i) * m.row_stride + k + p;
                __builtin_prefetch(row + AHEAD);
                __builtin_prefetch(row + AHEAD + SIDE);
                cut(floats_there(row, depth - p), floats_there(row + SIDE, depth - p - SIDE), out + i * TERMS, THIRD);
            }
}

/* Sums (PAIR, PAIR) on their way to the result, a part of which is to be added. */
typedef struct {
    const float *from;
    float *to;
    i64 stride, rows; /* rows are left */
    __mmask16 first, second, added_first, added_second;
} sums_to_write;

INLINE void write_rows(sums_to_write *s, i64 count) {
    for (i64 i = least(count, s->rows); i > 0; i--, s->rows--, s->from += PAIR, s->to += s->stride) {
        __builtin_prefetch(s->to + ROWS_SOON * s->stride, 1);
        __builtin_prefetch(s->to + ROWS_SOON * s->stride + SIDE, 1);
        __m512 first = _mm512_maskz_loadu_ps(s->added_first, s->to);
        __m512 second = _mm512_maskz_loadu_ps(s->added_second, s->to + SIDE);
        _mm512_mask_storeu_ps(s->to, s->first, _mm512_add_ps(first, _mm512_load_ps(s->from)));
        _mm512_mask_storeu_ps(s->to + SIDE, s->second, _mm512_add_ps(second, _mm512_load_ps(s->from + SIDE)));
    }
}

/* A third of a panel, two tiles that lie one after another: the upper and the lower, the first columns and the next. */
TILES static inline void load_left(const half *from) {
    _tile_loadd(4, from, 64);
    _tile_loadd(5, from + TILE, 64);
}

TILES static inline void load_right(const half *from) {
    _tile_loadd(6, from, 64);
    _tile_loadd(7, from + TILE, 64);
}

TILES static inline void add_thirds(void) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* c (height, width) (+)= Σ_k a_k b_kᵀ, a a left panel, b right ones, one after another. The sums of one are written while
 * the next one is multiplied. */
TILES static void multiply_thirds(i64 depth, const half *a, const half *b, float *c, i64 stride, i64 height, i64 width,
                                int add) {
    float sums[PAIR * PAIR] __attribute__((aligned(64)));
    i64 steps = (depth + TERMS - 1) / TERMS, together = steps > 1 ? (PAIR + steps - 2) / (steps - 1) : 0;
    sums_to_write last = {.rows = 0};
    for (i64 s = 0; s < width; s += PAIR) {
        const half *left = a;
        zero_sums();
        /* The smallest products first; from one to the next one operand stays. */
        for (i64 k = 0; k < steps; k++, left += STEP, b += STEP) {
            load_left(left + 2 * THIRD);
            load_right(b);
            add_thirds();
            load_left(left + THIRD);
            add_thirds();
            load_right(b + THIRD);
            add_thirds();
            load_left(left);
            add_thirds();
            load_right(b + 2 * THIRD);
            add_thirds();
            load_right(b);
            add_thirds();
            if (k) write_rows(&last, together); /* what was just stored is not there at once */
        }
        write_rows(&last, PAIR);
        store_sums(sums);
        __mmask16 first = first_floats(width - s), second = first_floats(width - s - SIDE);
        last = (sums_to_write){sums, c + s, stride, height, first, second, add ? first : 0, add ? second : 0};
    }
    write_rows(&last, PAIR);
}

static void begin_product(int thirds) {
    if (thirds) use_tiles();
}

static void end_product(int thirds) {
    if (thirds) release_tiles();
}
#else
#define cut_panels(count, depth, panel, out) ((void)(panel))
#define turn_tiles(tiles, tile) ((void)(tile))
#define cut_rows(m, first, count, k, depth, out) ((void)(out))
#define multiply_thirds(depth, a, b, c, stride, height, width, add) ((void)(c))
#define begin_product(thirds) ((void)(thirds))
#define end_product(thirds) ((void)(thirds))
typedef uint16_t half;
#endif

/* Of a left matrix, which names no columns, what `multiply` reads; of contiguous rows of floats `uncut` is not needed. */
static void prepare_left(int thirds, matrix m, i64 first, i64 count, i64 k, i64 depth, float *uncut, float *out) {
    if (!thirds)
        pack(m, first, count, k, depth, MR, out);
    else if (m.col_stride == 1 && !m.rows && m.stored == FLOAT32)
        cut_rows(m, first, count, k, depth, (half *)out);
    else
        for (i64 top = 0; top < count; top += NC) {
            i64 some = least(NC, count - top);
            half *tiles = (half *)(out + top * row_size(1, depth));
            pack(m, first + top, some, k, depth, NR, uncut);
            cut_panels(some, depth, uncut, tiles);
            turn_tiles(whole(some, NR) / NR * (row_size(1, depth) / 8), tiles);
        }
}

/* c (height, width) (+)= a bᵀ of a left panel, some of whose rows are there, and right ones, one after another, `terms` of
 * the sums' terms at a time. */
static void multiply(int thirds, i64 terms, i64 depth, const float *a, const float *b, float *c, i64 stride, i64 height,
                     i64 width, int add) {
    height = least(left_height(thirds), height);
    if (thirds)
        multiply_thirds(depth, (const half *)a, (const half *)b, c, stride, height, width, add);
    else
        for (i64 s = 0; s < width; s += NR)
            tile_by(terms, depth, a, b + s * depth, c + s, stride, height, least(NR, width - s), add);
}
