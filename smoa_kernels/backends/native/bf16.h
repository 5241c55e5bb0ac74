/* What bfloat16 GEMMs are made of (tiles.h): a layer, and how its activations become tiles.
 *
 * Sixteen tokens of activations, whose columns are the terms, become pairs by a transpose; then a line holds two columns of
 * all 16 tokens, and to put columns in block order is to pick halves of lines. Rows of W0 get that order the same way,
 * and are rows again by another transpose.
 */
#pragma once

#include "gradient.h"
#include "passes.h"
#include "tiles.h"

#if HAS_TILES
/* A layer and what is computed of it; stages share their room in the workspace. */
typedef struct {
    const layer *l; /* its A and B contiguous */
    i64 tokens, parts; /* tokens of a band */
    const half *x, *dy, *weight; /* with contiguous rows */
    i64 x_stride, dy_stride;
    const half *bias; /* or NULL */
    const uint16_t *keep; /* of x for ΔW; NULL: all */
    i64 tallest, widest;
    half *y, *dx;
    void *dA, *dB;
    /* In the workspace. Forward: x as right tiles in block order, all of it and what is kept of it for ΔW, and columns of
     * the last tokens of y. */
    half *all, *kept, *last;
    i64 in_place; /* whether W0's rows are no copies */
    /* dA and dB: dY as left tiles, or as pairs, and x as right tiles, in block order, whose terms are tokens; A as lines of
     * SIDE ranks of a column in float32, or as right tiles; each part's dA, and dB of rows in block order, in float32. */
    half *dy_terms, *x_terms;
    void *A_lines;
    float *sums, *row_sums;
    /* dX: dY as left tiles and labels. Where it is masked also dY as right tiles (`blocked`) and `columns` of dY ΔW. */
    half *left, *blocked, *columns;
    int32_t *row_block, *col_block;
    float *workspace; /* each part's own */
} bf16_job;

static bf16_job bf16_job_of(const layer *l, const uint16_t *keep, i64 threads) {
    return (bf16_job){.l = l, .parts = threads, .weight = l->weight, .keep = keep, .tallest = tallest_of(l),
                      .widest = widest_of(l)};
}

static i64 greatest(i64 a, i64 b) { return a > b ? a : b; }

static i64 up(i64 count, i64 unit) { return (count + unit - 1) / unit; }

/* Takes floats, in whole cache lines, from where `at` is, which moves on. */
static void *taken(float **at, i64 bytes) {
    void *found = *at;
    *at += lines((bytes + 3) / 4);
    return found;
}

/* Tokens that are in a workspace at a time, so many quarters of those whose x or dY takes half of W0's memory, or of 1024: of
 * more the copies would take more memory, of fewer W0 would be prepared more often. */
static i64 bf16_band(const layer *l, i64 quarters) {
    i64 fit = up((l->rows + l->cols) * quarters, 16 * PAIR) * PAIR;
    return greatest(fit, 256 * quarters);
}

enum { IN_TILES = -1, IN_PAIRS = -2 }; /* as the distance between rows: left tiles, or what right ones are */

/* One of add_products' products: so many rows and columns, up to PAIR each, count. Of `next` those lines are asked for that
 * are the turn of its rows, from `first` on. */
TILES static inline void add_product(i64 rows, i64 columns, i64 depth, const half *a, i64 stride, const half *b, i64 run,
                                     int add, float *sums, const half *next, i64 first) {
    i64 below = rows > SIDE ? depth * TILE : 0, beside = columns > SIDE ? run * TILE : 0;
    if (!amx_allowed()) {
        dots *const wide = stride == IN_TILES ? wide_dots_of_tiles : stride == IN_PAIRS ? wide_dots_of_pairs : wide_dots_of_rows;
        dots *const one = stride == IN_TILES ? dots_of_tiles : stride == IN_PAIRS ? dots_of_pairs : dots_of_rows;
        i64 height = beside || stride >= 0 ? SIDE / 2 : SIDE, tile = stride < 0 ? below : SIDE * stride;
        i64 row = stride == IN_TILES ? TERMS : stride == IN_PAIRS ? 2 : stride;
        for (i64 i = 0; i < rows; i += height) {
            i64 turn = (first + i) / height * ASKED;
            const half *ask = next && stride == IN_TILES && turn < PAIR ? next + turn * depth * TERMS : NULL;
            (beside ? wide : one)(depth, a + i / SIDE * tile + i % SIDE * row, stride, b, beside, add, sums + i * PAIR, PAIR,
                                  SIDE, ask);
        }
        return;
    }
    if (add)
        load_sums(sums);
    else
        zero_sums();
    for (; depth > 0; depth--, a += TILE, b += TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(5, a + below, 64);
        _tile_loadd(7, b + beside, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    store_sums(sums);
}

/* sums (rows, columns) = left right, or plus that where `add`, over `depth` tiles, in products (PAIR, PAIR), one below or one
 * beside the other; what stands in a product beyond rows and columns is nobody's. The left are IN_TILES or,
 * which AMX does not take, IN_PAIRS or rows `stride` apart. The right's runs are `run` tiles apart. `next` is what the right
 * will be next, two runs of `depth` tiles, or NULL: while left tiles are multiplied, but not by AMX, the caches get as much of it
 * as there are rows for, all of it with 128. */
TILES static void add_products(i64 rows, i64 columns, i64 depth, const half *left, i64 stride, const half *right, i64 run,
                               int add, float *sums, const half *next) {
    i64 apart = stride < 0 ? depth * TERMS : stride;
    for (i64 i = 0; i < rows; i += PAIR)
        for (i64 c = 0; c < columns; c += PAIR, sums += PAIR * PAIR)
            add_product(least(PAIR, rows - i), least(PAIR, columns - c), depth, left + i * apart, stride,
                        right + c * run * TERMS, run, add, sums, next, i);
}

/* Where row `row` of left tiles, `depth` of them a run, has its terms from `term` on, a multiple of TERMS. */
static inline half *terms_at(half *tiles, i64 depth, i64 row, i64 term) {
    return tiles + (row / SIDE * depth + term / TERMS) * TILE + row % SIDE * TERMS;
}

/* SIDE rows at most, or none, and as many that are read next, which the memory is asked for meanwhile. */
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

/* As left tiles: `width` numbers of each row, and 0 behind them. A tile is written at once: its rows lie side by side,
 * those of a matrix do not. */
static void copy_rows(const some_rows *from, i64 width, half *to) {
    for (i64 c = 0; c < width; c += TERMS, to += TILE) {
        __mmask32 there = first_of(width - c);
        for (i64 i = 0; i < from->count; i++) {
            __builtin_prefetch(from->next[i] + c);
            _mm512_store_si512(to + i * TERMS, _mm512_maskz_loadu_epi16(there, from->rows[i] + c));
        }
    }
}

/* A line of pairs: one of `first`, one of `second`, and so on, of their lower halves or the upper ones. */
INLINE __m512i pairs_in(__m512i first, __m512i second, int upper) {
    static const uint16_t order[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i at = _mm512_add_epi16(_mm512_loadu_si512(order), _mm512_set1_epi16((short)(16 * upper)));
    return _mm512_permutex2var_epi16(first, at, second);
}

INLINE __m512i paired(__m256i first, __m256i second) {
    return pairs_in(_mm512_castsi256_si512(first), _mm512_castsi256_si512(second), 0);
}

/* 32 numbers: those of `low`, then those of `high`. */
TILES static inline __m512i both_narrowed(vf low, vf high) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

/* 16 of 32 numbers, the lower or the upper ones. */
#define HALF_WIDENED(values, upper) \
    ((vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(values, upper)), 16))

/* Columns as pairs of SIDE rows, or tokens, those that are not there 0: tiles of up(cols, TERMS). What `keep` has no bit for is
 * dropped; NULL drops nothing. */
TILES static void pairs_of(const some_rows *from, i64 cols, const uint16_t *keep, half *out) {
    for (i64 c = 0; c < cols; c += TERMS) {
        __mmask32 there = first_of(cols - c);
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            r[i] = _mm512_setzero_si512();
            if (i >= from->count) continue;
            __builtin_prefetch(from->next[i] + c);
            r[i] = _mm512_maskz_loadu_epi16(there, from->rows[i] + c);
            if (keep) r[i] = kept_halves(r[i], keep + i * words(cols), c, exponent_of(BFLOAT16));
        }
        transpose_lines(r);
        store_lines(r, out + c * SIDE);
    }
}

/* Columns `one` and `other` of `pairs` as a pair. */
INLINE __m512i pair_of(const half *pairs, i64 one, i64 other) {
    /* Of two lines, for each token, where its halves are that are taken: both of one column, lower or upper. */
    static const uint32_t each[] = {0x00000, 0x20002, 0x40004, 0x60006, 0x80008, 0xa000a, 0xc000c, 0xe000e,
                                    0x100010, 0x120012, 0x140014, 0x160016, 0x180018, 0x1a001a, 0x1c001c, 0x1e001e};
    static const uint32_t upper[2][2] = {{0x200000, 0x210000}, {0x200001, 0x210001}};
    __m512i order = _mm512_add_epi32(_mm512_loadu_si512(each), _mm512_set1_epi32((int)upper[one & 1][other & 1]));
    return _mm512_permutex2var_epi16(_mm512_load_si512(pairs + (one & ~(i64)1) * SIDE), order,
                                     _mm512_load_si512(pairs + (other & ~(i64)1) * SIDE));
}

/* Of `count` columns in the order of `index` the pair from c on; there may be one, or none. */
INLINE __m512i pair_at(const half *pairs, const i64 *index, i64 c, i64 count) {
    if (__builtin_expect(c + 1 < count, 1)) return pair_of(pairs, index[c], index[c + 1]);
    return c < count ? _mm512_maskz_mov_epi16(0x55555555, pair_of(pairs, index[c], index[c])) : _mm512_setzero_si512();
}

/* Columns of `pairs`, in the order of `index`, as right tiles: pairs again. */
static void pick_pairs(const half *pairs, const i64 *index, i64 count, half *out) {
    for (i64 c = 0; c < up(count, TERMS) * TERMS; c += 2, out += TERMS) _mm512_store_si512(out, pair_at(pairs, index, c, count));
}

/* The same as left tiles, `step` apart: rows again. */
static void pick_rows(const half *pairs, const i64 *index, i64 count, half *out, i64 step) {
    for (i64 c = 0; c < count; c += TERMS, out += step) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) r[i] = pair_at(pairs, index, c + 2 * i, count);
        transpose_lines(r);
        store_lines(r, out);
    }
}

/* Two right tiles, one `beside` the other, whose terms are tokens: PAIR of them, of which some are there, others 0, of up to
 * TERMS columns from c on, without what `keep` drops. */
INLINE void tiles_of_tokens(const half *from, i64 stride, i64 tokens, i64 c, i64 count, const uint16_t *keep, i64 kept,
                            half *to, i64 beside) {
    __mmask32 there = first_of(count);
    for (i64 t = 0; t < PAIR; t += 2, to += TERMS) {
        __m512i two[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            two[i] = _mm512_maskz_loadu_epi16(t + i < tokens ? there : 0, from + (t + i) * stride + c);
            __builtin_prefetch(from + (t + i) * stride + c + 4 * TERMS); /* too far apart to be foreseen */
            if (keep && t + i < tokens) two[i] = kept_halves(two[i], keep + (t + i) * kept, c, exponent_of(BFLOAT16));
        }
        _mm512_store_si512(to, pairs_in(two[0], two[1], 0));
        _mm512_store_si512(to + beside, pairs_in(two[0], two[1], 1));
    }
}

/* Columns of PAIR tokens, a line each: up(cols, TERMS) TERMS lines. */
TILES static void columns_of(const half *from, i64 stride, i64 tokens, i64 cols, const uint16_t *keep, half *out) {
    _Alignas(64) half tiles[2 * TILE];
    for (i64 c = 0; c < cols; c += TERMS) {
        tiles_of_tokens(from, stride, tokens, c, cols - c, keep, words(cols), tiles, TILE);
        for (int upper = 0; upper < 2; upper++, out += TILE) {
            __m512i r[16];
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++) r[i] = _mm512_load_si512(tiles + upper * TILE + i * TERMS);
            transpose_lines(r);
            store_lines(r, out);
        }
    }
}

/* The reverse: rows of `to`, `stride` apart, from columns that are PAIR tokens side by side, SIDE of them read; without
 * what `keep` drops. */
TILES static void rows_from(const half *columns, i64 tokens, i64 cols, const uint16_t *keep, half *to, i64 stride) {
    for (i64 c = 0; c < cols; c += TERMS) {
        __mmask32 there = first_of(cols - c);
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            const half *two = columns + (c + 2 * i) * PAIR;
            r[i] = paired(_mm256_loadu_si256((const void *)two), _mm256_loadu_si256((const void *)(two + PAIR)));
        }
        transpose_lines(r);
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            if (i >= tokens) continue;
            if (keep) r[i] = kept_halves(r[i], keep + i * words(cols), c, exponent_of(BFLOAT16));
            _mm512_mask_storeu_epi16(to + i * stride + c, there, r[i]);
        }
    }
}

/* Ask the memory, while tiles are multiplied, for a share of some rows, `width` numbers each, that are read next. */
static void ask_for_rows(const half *from, i64 stride, i64 count, i64 width, i64 part, i64 parts) {
    for (i64 i = count * part / parts; i < count * (part + 1) / parts; i++)
        for (i64 c = 0; c < width; c += TERMS) __builtin_prefetch(from + i * stride + c, 0, 2);
}
#endif

/* Whether this can run here, and whether by AMX. */
i64 smoa_bf16_fit(void) { return dots_allowed(); }
i64 smoa_amx_fit(void) { return amx_allowed(); }
