/* Micro-kernels: C (+)= left rightᵀ of packed panels, one for each instruction set.
 *
 *   format   left panel        right panel       instructions                      for
 *   FLOATS   MR rows           NR rows           FMA of AVX2, AVX-512 or NEON      every dtype, widened
 *   PAIRS    32 rows of tiles  32 rows of tiles  AMX, or vdpbf16ps of AVX512-BF16  bfloat16
 *   SPLIT3   the same, thrice  the same, thrice  AMX                               float32, as a sum of three bfloat16
 *
 * A panel of FLOATS is (depth, rows). One of PAIRS is (steps, 2 tiles), one of SPLIT3 (steps, 3, 2 tiles). A step is 32
 * terms; a tile has 16 rows of them, 1 KiB of bfloat16. A line of a left tile is one row. A line of a right tile is one
 * pair of terms of all 16 rows: the transpose of the left tile in units of 32 bits. An instruction set that multiplies
 * differently needs a format here, and a packing.
 */
#pragma once

#include "operand.h"

enum { FLOATS, PAIRS, SPLIT3 };

enum {
    /* A tile of C fills 14 × 2 of 32 vector registers, or 6 × 2 of 16; operands take the others. */
    MR = REGISTERS == 32 ? 14 : 6,
    NR = 2 * LANES,
    HIGH = MR > NR ? MR : NR, /* most rows of a panel of floats */
    KC = 512, /* terms that are packed and summed in registers at a time */
    SIDE = 16, /* rows of a tile */
    TERMS = 32,
    TILE = SIDE * TERMS,
    PANEL = 2 * SIDE, /* rows of a panel of tiles */
    STEP = 2 * TILE,
};

static inline i64 left_height(int format) { return format == FLOATS ? MR : PANEL; }
static inline i64 right_height(int format) { return format == FLOATS ? NR : PANEL; }

/* Floats per row of a panel: a term takes one in FLOATS, a half in PAIRS, three halves in SPLIT3. */
static inline i64 row_size(int format, i64 depth) {
    return format == FLOATS ? depth : round_up(depth, TERMS) / 2 * (format == SPLIT3 ? 3 : 1);
}

/* sums (rows, PANEL) (+)= Σ_k a_k b_kᵀ with a (depth, MR) and b (depth, NR). */
INLINE void fma_tile(int rows, i64 depth, const float *a, const float *b, int add, float *sums) {
    vf sum[MR][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vf){0};
#pragma GCC unroll 4
    for (i64 k = 0; k < depth; k++, a += MR, b += NR) {
        vf left = load(b), right = load(b + LANES);
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            sum[i][0] += left * a[i];
            sum[i][1] += right * a[i];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int q = 0; q < 2; q++) {
            float *to = sums + i * PANEL + q * LANES;
            store(to, add ? sum[i][q] + load(to) : sum[i][q]);
        }
}

/* Sums `terms` at a time in registers. Computes MR, MR / 2 or MR / 4 rows: the last panel may be low. Not inlined,
 * because GCC would then keep the sums in memory. */
static __attribute__((noinline)) void fma_panel(i64 terms, i64 depth, const float *a, const float *b, i64 rows,
                                                float *sums) {
    i64 k = 0;
    do { /* once without terms, too: the sums are 0 then */
        i64 deep = least(terms, depth - k);
        if (rows > MR / 2)
            fma_tile(MR, deep, a + k * MR, b + k * NR, k > 0, sums);
        else if (rows > MR / 4)
            fma_tile(MR / 2, deep, a + k * MR, b + k * NR, k > 0, sums);
        else
            fma_tile(MR / 4, deep, a + k * MR, b + k * NR, k > 0, sums);
        k += terms;
    } while (k < depth);
}

/* Whether to multiply by AVX512-BF16, and AMX: set by `smoa_about`, before threads run. */
static int has_bf16, has_amx;

/* Packing tiles and vdpbf16ps take vectors of 512 bits; every processor with AMX has these. */
#if VECTOR_BYTES == 64 && (__GNUC__ >= 11 || __clang_major__ >= 13)
#define HAS_TILES 1
/* The compiler uses these instructions only through their intrinsics, so other code in such a function runs on any
 * processor. */
#define TARGET_BF16 __attribute__((target("amx-tile,amx-bf16,avx512bf16")))

/* Sets the size of this thread's tiles, which must be released before the thread ends its work. The sizes are a
 * constant because GCC before the fix of its bug 114098 (12.4) believes that only 8 bytes are read, and may leave the
 * others unwritten. */
TARGET_BF16 static void use_tiles(void) {
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } sizes = {.palette = 1, .bytes = {[0 ... 7] = 64}, .rows = {[0 ... 7] = SIDE}};
    _tile_loadconfig(&sizes);
}

/* Clears the four tiles of C, (PANEL, PANEL). GCC does not know that a tile load reads memory, and might move earlier
 * stores behind it. */
TARGET_BF16 static inline void zero_sums(void) {
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

TARGET_BF16 static inline void store_sums(float *to) {
    _tile_stored(0, to, PANEL * 4);
    _tile_stored(1, to + SIDE, PANEL * 4);
    _tile_stored(2, to + SIDE * PANEL, PANEL * 4);
    _tile_stored(3, to + SIDE * PANEL + SIDE, PANEL * 4);
}

enum { DOTS_ROWS = SIDE / 2 };

/* C (DOTS_ROWS, PANEL) = left rightᵀ over `steps` steps by vdpbf16ps. With 16 independent sums no addition waits for
 * the last one to the same sum, and each broadcast of a left pair feeds two products. */
TARGET_BF16 static __attribute__((noinline)) void dots(i64 steps, const half *left, const half *right, float *c) {
    __m512 sum[DOTS_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < DOTS_ROWS; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (; steps > 0; steps--, left += STEP, right += STEP)
        for (int p = 0; p < SIDE; p++) {
            __m512bh low = (__m512bh)_mm512_load_si512(right + p * TERMS);
            __m512bh high = (__m512bh)_mm512_load_si512(right + TILE + p * TERMS);
#pragma GCC unroll 8
            for (int i = 0; i < DOTS_ROWS; i++) {
                int32_t pair;
                memcpy(&pair, left + i * TERMS + 2 * p, sizeof pair);
                sum[i][0] = _mm512_dpbf16_ps(sum[i][0], low, (__m512bh)_mm512_set1_epi32(pair));
                sum[i][1] = _mm512_dpbf16_ps(sum[i][1], high, (__m512bh)_mm512_set1_epi32(pair));
            }
        }
#pragma GCC unroll 8
    for (int i = 0; i < DOTS_ROWS; i++, c += PANEL) _mm512_store_ps(c, sum[i][0]), _mm512_store_ps(c + SIDE, sum[i][1]);
}

TARGET_BF16 static inline void load_left(const half *from) {
    _tile_loadd(4, from, 64);
    _tile_loadd(5, from + TILE, 64);
}

TARGET_BF16 static inline void load_right(const half *from) {
    _tile_loadd(6, from, 64);
    _tile_loadd(7, from + TILE, 64);
}

/* `both`: the second left tile has rows too. */
TARGET_BF16 static inline void add_products(int both) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!both) return;
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* Six of the nine products of the parts of SPLIT3; the other three are below float32's own rounding. The smallest come
 * first. Each product keeps one operand of the last one. */
TARGET_BF16 static inline void add_split_products(const half *left, const half *right) {
    load_left(left + 2 * STEP);
    load_right(right);
    add_products(1);
    load_left(left + STEP);
    add_products(1);
    load_right(right + STEP);
    add_products(1);
    load_left(left);
    add_products(1);
    load_right(right + 2 * STEP);
    add_products(1);
    load_right(right);
    add_products(1);
}

/* sums (PANEL, PANEL) = left rightᵀ of two panels, of which the first `rows` left rows exist. */
TARGET_BF16 static void tile_panel(int format, i64 depth, const half *left, const half *right, i64 rows, float *sums) {
    for (i64 i = 0; i < rows && !has_amx; i += DOTS_ROWS)
        dots(ceil_div(depth, TERMS), left + i * TERMS, right, sums + i * PANEL);
    if (!has_amx) return;
    zero_sums();
    i64 step = format == SPLIT3 ? 3 * STEP : STEP;
    for (i64 k = 0; k < depth; k += TERMS, left += step, right += step)
        if (format == SPLIT3)
            add_split_products(left, right);
        else
            load_left(left), load_right(right), add_products(rows > SIDE);
    store_sums(sums);
}

TARGET_BF16 static void release_tiles(void) { _tile_release(); }
#else
#define HAS_TILES 0
#define use_tiles() ((void)0)
#define release_tiles() ((void)0)
#define tile_panel(format, depth, left, right, rows, sums) ((void)0)
#endif

_Static_assert(NR == 2 * LANES && HIGH <= PANEL && PANEL % NR == 0, "buffers have PANEL spare rows");
_Static_assert(!HAS_TILES || NR == PANEL, "tiles are packed from panels of floats");
