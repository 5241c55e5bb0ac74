/* Packing for PAIRS: tiles of bfloat16 (microkernel.h) of matrices in bfloat16.
 *
 * Rows whose terms are contiguous are left tiles as they lie, and right tiles by a transpose. In a right tile a line is two terms of 16
 * rows, so to put terms in block order is to pick lines; another transpose makes left tiles of them. Rows that are themselves
 * contiguous, two terms of which are interleaved, are right tiles, and left ones by a transpose.
 */
#pragma once

#include "pack.h"

#if HAS_TILES
static inline __mmask32 first_halves(i64 count) {
    return count < TERMS ? ((__mmask32)1 << greatest(0, count)) - 1 : ~(__mmask32)0;
}

/* 32 numbers: those of `low`, then those of `high`. */
TILES static inline __m512i narrowed(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

/* 16 of 32 numbers, the lower or the upper ones. */
#define HALF_WIDENED(values, upper) \
    ((vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(values, upper)), 16))

/* 32 of a token's elements from `at` on; 0 where `keep` has no bit, NaN where what is dropped is not finite. */
INLINE __m512i drop(__m512i values, const uint16_t *keep, i64 at) {
    uint32_t bits;
    memcpy(&bits, keep + at / 16, sizeof bits);
    __m512i all = _mm512_set1_epi16(0x7f80);
    __mmask32 lost = _mm512_mask_cmpeq_epi16_mask(~bits, _mm512_and_si512(values, all), all);
    return _mm512_mask_mov_epi16(_mm512_maskz_mov_epi16(bits, values), lost, _mm512_set1_epi16(0x7fff));
}

/* A line of pairs: one of `first`, one of `second`, and so on, of their lower halves or the upper ones. */
INLINE __m512i pairs_in(__m512i first, __m512i second, int upper) {
    static const uint16_t order[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i at = _mm512_add_epi16(_mm512_loadu_si512(order), _mm512_set1_epi16((short)(16 * upper)));
    return _mm512_permutex2var_epi16(first, at, second);
}

/* 16 halves at `two` and as many `apart` further on, as a line of pairs. */
INLINE __m512i paired(const half *two, i64 apart) {
    return pairs_in(_mm512_castsi256_si512(_mm256_loadu_si256((const void *)two)),
                    _mm512_castsi256_si512(_mm256_loadu_si256((const void *)(two + apart))), 0);
}

/* to (SIDE rows, TERMS terms), a left tile, = the transpose of (TERMS, SIDE) halves, `apart` from row to row. */
static void transpose_halves(const half *from, i64 apart, half *to) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) r[i] = paired(from + 2 * i * apart, apart);
    transpose_lines(r);
    store_lines(r, to);
}

/* Up to SIDE rows, and as many that are read next, which the memory is asked for meanwhile. */
typedef struct {
    i64 count;
    const half *rows[SIDE], *next[SIDE];
} some_rows;

/* The first of `left` rows, `stride` apart, those of `index` unless that is NULL. */
static some_rows rows_at(const half *from, i64 stride, const i64 *index, i64 left) {
    some_rows some = {.count = least(SIDE, left)};
    for (i64 i = 0; i < some.count; i++) {
        i64 next = least(i + SIDE, left - 1);
        some.rows[i] = from + (index ? index[i] : i) * stride, some.next[i] = from + (index ? index[next] : next) * stride;
    }
    return some;
}

/* As left tiles: `width` terms of each row, and 0 behind them. */
static void copy_rows(const some_rows *from, i64 width, half *to) {
    for (i64 c = 0; c < width; c += TERMS, to += TILE) {
        __mmask32 there = first_halves(width - c);
        for (i64 i = 0; i < from->count; i++) {
            __builtin_prefetch(from->next[i] + c);
            _mm512_store_si512(to + i * TERMS, _mm512_maskz_loadu_epi16(there, from->rows[i] + c));
        }
    }
}

/* As right tiles: the same, rows that are not there 0, without what `keep` drops. */
TILES static void pair_rows(const some_rows *from, i64 width, const uint16_t *keep, half *to) {
    for (i64 c = 0; c < width; c += TERMS) {
        __mmask32 there = first_halves(width - c);
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            r[i] = _mm512_setzero_si512();
            if (i >= from->count) continue;
            __builtin_prefetch(from->next[i] + c);
            r[i] = _mm512_maskz_loadu_epi16(there, from->rows[i] + c);
            if (keep) r[i] = drop(r[i], keep + i * words(width), c);
        }
        transpose_lines(r);
        store_lines(r, to + c * SIDE);
    }
}

/* Terms `one` and `other` of right tiles as a line of pairs. */
INLINE __m512i pick_pair(const half *tiles, i64 one, i64 other) {
    /* Of two lines, for each row, where its halves are that are taken: both of one term, lower or upper. */
    static const uint32_t each[] = {0x00000, 0x20002, 0x40004, 0x60006, 0x80008, 0xa000a, 0xc000c, 0xe000e,
                                    0x100010, 0x120012, 0x140014, 0x160016, 0x180018, 0x1a001a, 0x1c001c, 0x1e001e};
    static const uint32_t upper[2][2] = {{0x200000, 0x210000}, {0x200001, 0x210001}};
    __m512i order = _mm512_add_epi32(_mm512_loadu_si512(each), _mm512_set1_epi32((int)upper[one & 1][other & 1]));
    return _mm512_permutex2var_epi16(_mm512_load_si512(tiles + (one & ~(i64)1) * SIDE), order,
                                     _mm512_load_si512(tiles + (other & ~(i64)1) * SIDE));
}

/* Of `count` terms in the order of `index` the pair from c on; there may be one, or none. */
INLINE __m512i pair_at(const half *tiles, const i64 *index, i64 c, i64 count) {
    if (__builtin_expect(c + 1 < count, 1)) return pick_pair(tiles, index[c], index[c + 1]);
    return c < count ? _mm512_maskz_mov_epi16(0x55555555, pick_pair(tiles, index[c], index[c])) : _mm512_setzero_si512();
}

/* Terms of right tiles, in the order of `index`, as right tiles. */
static void pick_right(const half *tiles, const i64 *index, i64 count, half *to) {
    for (i64 c = 0; c < round_up(count, TERMS); c += 2, to += TERMS) _mm512_store_si512(to, pair_at(tiles, index, c, count));
}

/* The same as left ones. */
static void pick_left(const half *tiles, const i64 *index, i64 count, half *to) {
    for (i64 c = 0; c < count; c += TERMS, to += TILE) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) r[i] = pair_at(tiles, index, c + 2 * i, count);
        transpose_lines(r);
        store_lines(r, to);
    }
}

/* Rows of a matrix (…, width) with contiguous terms, `left` at most, as tiles of SIDE rows: as left ones, or as right ones without what
 * `keep` drops. Terms of `index`, `count` of them, are picked; NULL: all. `scratch` has room for right tiles of one SIDE. */
static void tile_rows(const half *from, i64 stride, const i64 *rows, i64 height, i64 left, i64 width, const i64 *index, i64 count,
                      int as_left, const uint16_t *keep, half *scratch, half *to) {
    for (i64 i = 0; i < height; i += SIDE, to += round_up(index ? count : width, TERMS) * SIDE) {
        some_rows some = rows_at(rows ? from : from + i * stride, stride, rows ? rows + i : NULL, left - i);
        some.count = least(some.count, height - i);
        if (as_left && !index) {
            copy_rows(&some, width, to);
            continue;
        }
        pair_rows(&some, width, keep ? keep + i * words(width) : NULL, index ? scratch : to);
        if (index) (as_left ? pick_left : pick_right)(scratch, index, count, to);
    }
}

/* Two right tiles, one `beside` the other, from TERMS rows of `from`, which are the terms: rows from `there` on
 * are 0. The tiles' rows are up to 32 columns from c on, without what `keep` drops. */
INLINE void pair_terms(const half *from, i64 stride, i64 there, i64 c, i64 count, const uint16_t *keep, i64 keep_words, half *to,
                       i64 beside) {
    __mmask32 inside = first_halves(count);
    for (i64 t = 0; t < TERMS; t += 2, to += TERMS) {
        __m512i two[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            two[i] = _mm512_maskz_loadu_epi16(t + i < there ? inside : 0, from + (t + i) * stride + c);
            __builtin_prefetch(from + (t + i) * stride + c + 4 * TERMS); /* too far apart to be foreseen */
            if (keep && t + i < there) two[i] = drop(two[i], keep + (t + i) * keep_words, c);
        }
        _mm512_store_si512(to, pairs_in(two[0], two[1], 0));
        _mm512_store_si512(to + beside, pairs_in(two[0], two[1], 1));
    }
}

/* Columns of TERMS rows, a line each: a left tile's rows, whose terms are rows of `from`. */
TILES static void lines_of_columns(const half *from, i64 stride, i64 there, i64 width, const uint16_t *keep, half *to) {
    _Alignas(64) half tiles[2 * TILE];
    for (i64 c = 0; c < width; c += TERMS, to += 2 * TILE) {
        pair_terms(from, stride, there, c, width - c, keep, words(width), tiles, TILE);
        for (int upper = 0; upper < 2; upper++) {
            __m512i r[16];
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++) r[i] = _mm512_load_si512(tiles + upper * TILE + i * TERMS);
            transpose_lines(r);
            store_lines(r, to + upper * TILE);
        }
    }
}

/* update (BESIDE, 32) = the products of two factors: 32 of the one, `apart` from rank to rank, and BESIDE of the other. */
INLINE void update_of(i64 rank, const float *A, i64 apart, const float *B, i64 B_apart, vf (*update)[2]) {
    for (i64 t = 0; t < rank; t++, A += apart, B += B_apart)
#pragma GCC unroll 4
        for (int r = 0; r < BESIDE; r++) update[r][0] += B[r] * load(A), update[r][1] += B[r] * load(A + SIDE);
}

/* Left tiles of ΔW for up to SIDE rows of block k, made of W0's tiles that overlap the block's columns; other blocks' columns are 0.
 * A's first column is that of the first tile. */
TILES static void delta_left(const layer *l, i64 k, const i64 *rows, i64 count, const half *W0, const float *A, float *B, half *to) {
    i64 left = l->col_offsets[k] % TERMS, end = left + width_of(l, k), apart = round_up(end, TERMS), rank = rank_of(l, k);
    copy_B(l, rows, 0, count, rank, NULL, B, SIDE);
    for (i64 c = 0; c < end; c += TERMS, W0 += TILE, to += TILE) {
        __mmask32 own = first_halves(end - c) & (c < left ? ~first_halves(left - c) : ~(__mmask32)0);
        for (i64 i = 0; i < count; i += BESIDE) {
            vf update[BESIDE][2] = {{{0}}};
            update_of(rank, A + c, apart, B + i, SIDE, update);
#pragma GCC unroll 4
            for (int r = 0; r < BESIDE; r++) {
                if (i + r >= count) continue;
                __m512i w = _mm512_load_si512(W0 + (i + r) * TERMS);
                w = narrowed(HALF_WIDENED(w, 0) * update[r][0], HALF_WIDENED(w, 1) * update[r][1]);
                _mm512_store_si512(to + (i + r) * TERMS, _mm512_maskz_mov_epi16(own, w));
            }
        }
    }
}

/* The same of a transposed layer, whose W0 has contiguous columns: of up to PANEL rows, a few terms at a time, which are W0's rows as
 * they lie. A and B have room for BESIDE, and PANEL, of each rank. */
TILES static void delta_transposed(const layer *l, i64 k, const i64 *rows, i64 count, float *A, float *B, half *to) {
    i64 left = l->col_offsets[k] % TERMS, end = left + width_of(l, k), rank = rank_of(l, k), below = round_up(end, TERMS) * SIDE;
    const i64 *cols = l->col_index + l->col_offsets[k] - left;
    copy_B(l, rows, 0, count, rank, NULL, B, PANEL);
    for (i64 n = 0; n < end; n += TERMS, to += TILE) {
        _Alignas(64) half block[TERMS * PANEL] = {0};
        for (i64 i = greatest(n, left); i < least(end, n + TERMS); i += BESIDE) {
            i64 some = least(BESIDE, least(end, n + TERMS) - i);
            vf update[BESIDE][2] = {{{0}}};
            copy_A(l, cols + i, 0, some, rank, NULL, A, BESIDE);
            update_of(rank, B, PANEL, A, BESIDE, update);
            for (i64 r = 0; r < some; r++) {
                _Alignas(64) half line[PANEL] = {0};
                const half *from = (const half *)l->weight + cols[i + r] * l->col_stride;
                for (i64 c = 0; c < count; c++) line[c] = from[rows[c]];
                __m512i w = _mm512_load_si512(line);
                w = narrowed(HALF_WIDENED(w, 0) * update[r][0], HALF_WIDENED(w, 1) * update[r][1]);
                _mm512_store_si512(block + (i + r - n) * PANEL, w);
            }
        }
        transpose_halves(block, PANEL, to);
        transpose_halves(block + SIDE, PANEL, to + below);
    }
}

/* Rows `left` to `left + width` of a transposed layer's W0, which has contiguous columns, as right tiles; W_eff's where labels of rows are
 * given. A (rank, cols and BESIDE more) and B (rank, apart), s B of these rows, are 0 beyond a block's own rank. */
TILES static void weight_right(const layer *l, i64 left, i64 width, const int32_t *row_label, const int32_t *col_label, const float *A,
                               const float *B, i64 apart, half *to) {
    i64 deep = ceil_div(l->cols, TERMS), stride = l->col_stride, rank = l->rank, cols = l->cols;
    for (i64 n = 0; n < deep * TERMS; n += BESIDE) {
        const half *term = (const half *)l->weight + n * stride + left;
        __m512i block[BESIDE];
        for (int i = 0; i < BESIDE; i++) block[i] = _mm512_set1_epi32(row_label && n + i < cols ? col_label[n + i] : -2);
        half *line = to + n / TERMS * TILE + n % TERMS * SIDE;
        for (i64 c = 0; c < width; c += PANEL, line += 2 * deep * TILE) {
            __mmask32 inside = first_halves(width - c), own[BESIDE], any = 0;
            __m512i found[BESIDE], one = _mm512_set1_epi32(-1), other = one;
            if (row_label) one = _mm512_loadu_si512(row_label + left + c), other = _mm512_loadu_si512(row_label + left + c + SIDE);
#pragma GCC unroll 4
            for (int i = 0; i < BESIDE; i++) {
                __builtin_prefetch(term + (2 * BESIDE + i) * stride + c); /* too far apart to be foreseen */
                own[i] = (__mmask32)_mm512_cmpeq_epi32_mask(other, block[i]) << SIDE | _mm512_cmpeq_epi32_mask(one, block[i]);
                any |= own[i] &= inside;
                found[i] = _mm512_maskz_loadu_epi16(n + i < cols ? inside : 0, term + i * stride + c);
            }
            if (any) {
                vf update[BESIDE][2] = {{{0}}};
                update_of(rank, B + c, apart, A + n, cols + BESIDE, update);
#pragma GCC unroll 4
                for (int i = 0; i < BESIDE; i++) {
                    vf low = HALF_WIDENED(found[i], 0), high = HALF_WIDENED(found[i], 1);
                    __m512i changed = narrowed(low + low * update[i][0], high + high * update[i][1]);
                    found[i] = _mm512_mask_mov_epi16(found[i], own[i], changed);
                }
            }
#pragma GCC unroll 2
            for (int upper = 0; upper < 2; upper++) {
                _mm512_store_si512(line + upper * deep * TILE, pairs_in(found[0], found[1], upper));
                _mm512_store_si512(line + upper * deep * TILE + TERMS, pairs_in(found[2], found[3], upper));
            }
        }
    }
}
#endif
