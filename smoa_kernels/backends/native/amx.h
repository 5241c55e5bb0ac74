/* What bfloat16 GEMMs by AMX are made of: tiles, and how activations are brought into their form.
 *
 * A processor with AMX multiplies a left tile (16 rows, 32 terms) by a right one (32 terms, 16 columns), both 1 KiB of
 * bfloat16, and adds in float32. A left tile's rows lie in memory as a matrix with contiguous rows has them. In a right
 * tile two terms of a column lie side by side, a pair, and the pairs of 16 columns in one line. Sixteen tokens of
 * activations, whose columns are the terms, become such pairs by a transpose; then a line holds two columns of all 16
 * tokens, and to put columns in a block's order is to pick halves of lines.
 */
#pragma once

#include "gradient.h"
#include "passes.h"

#if VECTOR_BYTES == 64 && (__GNUC__ >= 11 || __clang_major__ >= 13)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t half;

enum {
    SIDE = 16, /* rows of a tile */
    TERMS = 32,
    TILE = SIDE * TERMS, /* numbers in a left or a right one */
    PAIR = 2 * SIDE,     /* rows and columns of a product, four tiles, and tokens that are prepared together */
};

/* A layer and what is computed of it; stages share their room in the workspace. */
typedef struct {
    i64 tokens, rows, cols, blocks, rank, parts, contiguous;
    const half *x, *dy, *weight; /* with contiguous rows */
    i64 x_stride, dy_stride, stride;
    const uint16_t *keep; /* of x for ΔW; NULL: all */
    const i64 *row_index, *col_index;
    const int32_t *row_offsets, *col_offsets, *ranks;
    change_job change; /* ΔW's: A (rank, cols) and B (rows, rank), contiguous */
    const half *A, *B; /* the same in `terms` times the ranks */
    i64 terms, tallest, widest;
    half *y, *dx;
    void *dA, *dB;
    /* In the workspace. Forward: x as right tiles, in its order and in block order, and columns of y. */
    half *all, *blocked, *columns;
    i64 lies; /* whether a block's x lies in `all` */
    /* dA and dB: dY as left tiles and x as right tiles, in block order, whose terms are tokens; A as right tiles of SIDE
     * ranks; each part's dA. */
    half *dy_terms, *x_terms, *A_tiles;
    float *sums;
    /* dX: dY as left tiles and labels. Where it is masked also dY as right tiles (`blocked`) and `columns` of dY ΔW. */
    half *left;
    int32_t *row_block, *col_block;
    float *workspace; /* each part's own */
} amx_job;

static amx_job amx_job_of(i64 tokens, i64 rows, i64 cols, const void *weight, i64 stride, const uint16_t *keep,
                          const i64 *row_index, const i64 *col_index, const int32_t *row_offsets,
                          const int32_t *col_offsets, i64 blocks, i64 contiguous, const int32_t *ranks, i64 rank,
                          const void *A, const void *B, i64 factors, float scaling, i64 threads) {
    amx_job job = {.tokens = tokens, .rows = rows, .cols = cols, .blocks = blocks, .rank = rank, .parts = threads,
                   .contiguous = contiguous, .weight = weight, .stride = stride, .keep = keep, .row_index = row_index,
                   .col_index = col_index, .row_offsets = row_offsets, .col_offsets = col_offsets, .ranks = ranks,
                   .tallest = largest_of(row_offsets, blocks), .widest = largest_of(col_offsets, blocks)};
    job.change = (change_job){.kind = BFLOAT16, .A = A, .B = B, .factors = (int)factors, .A_rank = cols, .A_col = 1,
                              .B_row = rank, .B_rank = 1, .rank = rank, .scaling = scaling, .ranks = ranks};
    return job;
}

static i64 up(i64 count, i64 unit) { return (count + unit - 1) / unit; }

/* Takes floats, in whole cache lines, from where `at` is, which moves on. */
static void *taken(float **at, i64 bytes) {
    void *found = *at;
    *at += lines((bytes + 3) / 4);
    return found;
}

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512vbmi2")))

/* Whether this processor has AMX, and the system lets this process use it: Linux asks to be asked, once. */
static int amx_allowed(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    static int allowed = -1; /* two threads find the same */
    if (allowed < 0) {
        unsigned a, b, c, d;
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        int has = (d >> 22 & 1) && (d >> 24 & 1); /* AMX-BF16, AMX-TILE */
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
        has = has && (a >> 5 & 1) && moves_halves(); /* AVX512-BF16 */
        allowed = has && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }
    return allowed;
}

/* Tells this thread's tiles their size. Before a thread is given back, `_tile_release`. The sizes are a constant: a GCC
 * without the mend of its bug 114098 (12.4 has it) takes only 8 bytes for read, and may not write those behind them. */
AMX static void use_tiles(void) {
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } sizes = {.palette = 1, .bytes = {[0 ... 7] = 64}, .rows = {[0 ... 7] = SIDE}};
    _tile_loadconfig(&sizes);
}

/* Before tiles are loaded: GCC does not know that this reads memory, so what was written might be written later. */
#define WRITTEN __asm__ volatile("" ::: "memory")

/* Four tiles, (PAIR, PAIR), are summed: 0 and 1 are the upper ones. */
AMX static inline void zero_sums(void) {
    WRITTEN;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* They += left right: rows of the left `stride` apart, `depth` right tiles of SIDE columns, then those of the next. */
AMX static inline void add_product(i64 depth, const half *left, i64 stride, const half *right, i64 next) {
    for (i64 k = 0; k < depth; k++) {
        _tile_loadd(4, left + k * TERMS, stride * 2);
        _tile_loadd(6, right + k * TILE, 64);
        _tile_loadd(5, left + SIDE * stride + k * TERMS, stride * 2);
        _tile_loadd(7, right + next + k * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

AMX static inline void load_sums(const float *from) {
    WRITTEN;
    _tile_loadd(0, from, PAIR * 4);
    _tile_loadd(1, from + SIDE, PAIR * 4);
    _tile_loadd(2, from + SIDE * PAIR, PAIR * 4);
    _tile_loadd(3, from + SIDE * PAIR + SIDE, PAIR * 4);
}

AMX static inline void store_sums(float *to) {
    _tile_stored(0, to, PAIR * 4);
    _tile_stored(1, to + SIDE, PAIR * 4);
    _tile_stored(2, to + SIDE * PAIR, PAIR * 4);
    _tile_stored(3, to + SIDE * PAIR + SIDE, PAIR * 4);
}

/* Halves from one row of a left operand to the next: an odd number of cache lines, so that a tile's rows fall into
 * different sets of the cache. */
static i64 apart(i64 terms) { return (up(terms, TERMS) | 1) * TERMS; }

/* r = the transpose of its 16 rows of 16 numbers of 32 bits. */
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

/* A line of pairs: one of `low`, one of `high`, and so on. */
INLINE __m512i paired(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

AMX static inline __m256i narrowed(vf value) { return (__m256i)_mm512_cvtneps_pbh((__m512)value); }

/* 32 numbers: those of `low`, then those of `high`. */
AMX static inline __m512i both_narrowed(vf low, vf high) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

/* 16 of 32 numbers, the lower or the upper ones. */
#define HALF_WIDENED(values, upper) \
    ((vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(values, upper)), 16))

/* Columns as pairs of SIDE tokens, of which some are there, others 0: tiles of up(cols, TERMS). What `keep` has no bit for
 * is dropped; NULL drops nothing. */
AMX static void pairs_of(const half *from, i64 stride, i64 tokens, i64 cols, const uint16_t *keep, half *out) {
    for (i64 c = 0; c < cols; c += TERMS) {
        __mmask32 there = first_of(cols - c);
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            r[i] = i < tokens ? _mm512_maskz_loadu_epi16(there, from + i * stride + c) : _mm512_setzero_si512();
            if (keep && i < tokens) r[i] = kept_halves(r[i], keep + i * words(cols), c, exponent_of(BFLOAT16));
        }
        transpose_lines(r);
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) _mm512_store_si512(out + c * SIDE + i * TERMS, r[i]);
    }
}

/* Column c, of 16 tokens, in the lower half of each 32 bits. */
INLINE __m512i column_of(const half *pairs, i64 c) {
    __m512i line = _mm512_load_si512(pairs + c / 2 * TERMS);
    return _mm512_srl_epi32(line, _mm_cvtsi32_si128((int)(c % 2 * 16)));
}

/* Some columns of `pairs` as pairs, in the order of `index`. */
static void pick_pairs(const half *pairs, const i64 *index, i64 count, half *out) {
    __m512i low = _mm512_set1_epi32(0xffff);
    for (i64 c = 0; c < up(count, TERMS) * TERMS; c += 2, out += TERMS) {
        __m512i first = c < count ? _mm512_and_si512(column_of(pairs, index[c]), low) : _mm512_setzero_si512();
        __m512i second = c + 1 < count ? column_of(pairs, index[c + 1]) : _mm512_setzero_si512();
        _mm512_store_si512(out, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
}

/* One row of a left tile, or a column whose terms are tokens: PAIR tokens of column c, SIDE of them at `pairs`. */
INLINE __m512i tokens_of(const half *pairs, i64 next, i64 c) {
    __m256i first = _mm512_cvtepi32_epi16(column_of(pairs, c)), second = _mm512_cvtepi32_epi16(column_of(pairs + next, c));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

/* The reverse: rows of `to`, `stride` apart, from columns that are SIDE tokens side by side; without what `keep` drops. */
AMX static void rows_from(const half *columns, i64 tokens, i64 cols, const uint16_t *keep, half *to, i64 stride) {
    for (i64 c = 0; c < cols; c += TERMS) {
        __mmask32 there = first_of(cols - c);
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            const half *two = columns + (c + 2 * i) * SIDE;
            r[i] = paired(_mm256_loadu_si256((const void *)two), _mm256_loadu_si256((const void *)(two + SIDE)));
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
static void ask_for_rows(const half *from, i64 stride, const i64 *rows, i64 count, i64 width, i64 part, i64 parts) {
    for (i64 i = count * part / parts; i < count * (part + 1) / parts; i++)
        for (i64 c = 0; c < width; c += TERMS) __builtin_prefetch(from + (rows ? rows[i] : i) * stride + c, 0, 2);
}
#else
#define HAS_AMX 0
static int amx_allowed(void) { return 0; }
#endif

/* Whether bfloat16 GEMMs by AMX can run here. */
i64 smoa_amx_fit(void) { return amx_allowed(); }
