/* Tiles of bfloat16: which processors multiply them, what a product of them is, and how lines become columns.
 *
 * A left tile (16 rows, 32 terms) is multiplied by a right one (32 terms, 16 columns), both 1 KiB of bfloat16, and added in
 * float32. A left tile's rows lie in memory as a matrix with contiguous rows has them. In a right tile two terms of a
 * column lie side by side, a pair, and the pairs of 16 columns in one line. A line is 32 halves. A processor with AMX does
 * this in one instruction; one that has AVX512-BF16 alone, as AMD's Zen 4 and 5, multiplies a line by one row's pair at a time.
 */
#pragma once

#include "panels.h"

#if VECTOR_BYTES == 64 && (__GNUC__ >= 11 || __clang_major__ >= 13)
#define HAS_TILES 1
#include <cpuid.h>
#include <stdlib.h>
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t half;

enum {
    SIDE = 16, /* rows of a tile */
    TERMS = 32,
    TILE = SIDE * TERMS, /* numbers in a left or a right one */
    PAIR = 2 * SIDE,     /* rows and columns of a product, four tiles, and tokens that are prepared together */
    ASKED = 2,           /* lines that are asked for ahead while rows are multiplied by a tile */
};

/* A compiler writes AMX's instructions only where they are named: on a processor without AMX the rest of a function runs. */
#define TILES __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512vbmi2")))

/* Whether torch's GEMMs may use one of these, which oneDNN asks the environment. */
static int is_wanted(const char *const *names) {
    const char *limit = getenv("ONEDNN_MAX_CPU_ISA");
    if (!limit || !*limit || !strcasecmp(limit, "ALL") || !strcasecmp(limit, "DEFAULT")) return 1;
    for (; *names; names++)
        for (const char *at = limit; *at; at++)
            if (!strncasecmp(at, *names, strlen(*names))) return 1;
    return 0;
}

static __attribute__((noinline)) int find_dots(void) {
    static const char *const names[] = {"BF16", "FP16", "AMX", "AVX10", NULL};
    return __builtin_cpu_supports("avx512bf16") && moves_halves() && is_wanted(names);
}

static __attribute__((noinline)) int find_amx(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 }; /* Linux asks to be asked */
    static const char *const names[] = {"AMX", NULL};
    unsigned a, b, c, d;
    __cpuid_count(7, 0, a, b, c, d);
    int has = (d >> 22 & 1) && (d >> 24 & 1); /* AMX-BF16, AMX-TILE */
    return has && find_dots() && is_wanted(names) && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

/* What is found once: when the library is loaded (library.py). */
#define FOUND_ONCE(find)                                                                       \
    static int found = -1;                                                                     \
    if (__builtin_expect(found < 0, 0)) found = find();                                        \
    return found;

/* Whether this processor adds products of pairs, and whether it has AMX too; and system and user let this process use it. */
static int dots_allowed(void) { FOUND_ONCE(find_dots) }
static int amx_allowed(void) { FOUND_ONCE(find_amx) }

/* Tells this thread's tiles their size. Before a thread is given back, `_tile_release`. The sizes are a constant: a GCC
 * without the mend of its bug 114098 (12.4 has it) takes only 8 bytes for read, and may not write those behind them. */
TILES static void use_tiles(void) {
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } sizes = {.palette = 1, .bytes = {[0 ... 7] = 64}, .rows = {[0 ... 7] = SIDE}};
    _tile_loadconfig(&sizes);
}

/* Around a thread's products. */
static void begin_tiles(void) {
    if (amx_allowed()) use_tiles();
}

TILES static void release_tiles(void) { _tile_release(); }

static void end_tiles(void) {
    if (amx_allowed()) release_tiles();
}

/* Before tiles are loaded: GCC does not know that this reads memory, so what was written might be written later. */
#define WRITTEN __asm__ volatile("" ::: "memory")

/* Four tiles, (PAIR, PAIR), are summed: 0 and 1 are the upper ones. */
TILES static inline void zero_sums(void) {
    WRITTEN;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

TILES static inline void load_sums(const float *from) {
    WRITTEN;
    _tile_loadd(0, from, PAIR * 4);
    _tile_loadd(1, from + SIDE, PAIR * 4);
    _tile_loadd(2, from + SIDE * PAIR, PAIR * 4);
    _tile_loadd(3, from + SIDE * PAIR + SIDE, PAIR * 4);
}

TILES static inline void store_sums(float *to) {
    _tile_stored(0, to, PAIR * 4);
    _tile_stored(1, to + SIDE, PAIR * 4);
    _tile_stored(2, to + SIDE * PAIR, PAIR * 4);
    _tile_stored(3, to + SIDE * PAIR + SIDE, PAIR * 4);
}

/* sums (rows; columns, SIDE) = left right, or plus that where `add`, over `depth` tiles of each: up to SIDE rows of the left,
 * `stride` apart, by one or two runs of the right. A row's next pair lies `pair` after, its next TERMS `step`. Of the runs
 * the second begins `beside` after the first. Sums of rows are `apart`, those of the second run `next` after. From `ask` on,
 * unless it is NULL, the memory is asked for ASKED lines meanwhile for each tile. There are always SIDE sums, so that
 * none is added to again before it is there: of half as many rows by one run each has two, of every other pair. */
TILES INLINE void dots_of(int rows, int columns, i64 depth, const half *left, i64 stride, i64 pair, i64 step,
                          const half *right, i64 beside, int add, float *sums, i64 apart, i64 next, const half *ask) {
    __m512 sum[SIDE][2];
    const int chains = SIDE / rows / columns, each = columns * chains; /* sums of a row */
    /* Rows as they lie are asked for: the next ones, where few tokens read them once, or what follows. */
    i64 ahead = columns == 1 ? rows * stride : 2 * TERMS;
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < each; c++)
            sum[i][c] = add && c < columns ? _mm512_load_ps(sums + i * apart + c * next) : _mm512_setzero_ps();
    for (; depth > 0; depth--, left += step) {
        for (int q = 0; q < ASKED && ask; q++, ask += TERMS) __builtin_prefetch(ask);
#pragma GCC unroll 16
        for (int i = 0; i < rows && step == TERMS; i++) __builtin_prefetch(left + i * stride + ahead);
        for (int p = 0; p < SIDE; p += chains, right += chains * TERMS) {
            __m512bh line[2];
            for (int c = 0; c < each; c++) line[c] = (__m512bh)_mm512_load_si512(right + c * (chains > 1 ? TERMS : beside));
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++)
                for (int c = 0; c < each; c++) {
                    int32_t one;
                    memcpy(&one, left + i * stride + (p + c % chains) * pair, sizeof one);
                    sum[i][c] = _mm512_dpbf16_ps(sum[i][c], line[c], (__m512bh)_mm512_set1_epi32(one));
                }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        if (chains > 1) sum[i][0] += sum[i][1];
        for (int c = 0; c < columns; c++) _mm512_store_ps(sums + i * apart + c * next, sum[i][c]);
    }
}

/* A tile of sums; and two, half as high: Zen 5 multiplies two lines a cycle and reads as many, so that it would wait for one
 * to be read for each product of a single tile. The left are tiles, rows `stride` apart, or what a right tile is. Of rows
 * always eight: rows 4 KB apart lie in one set of the L1 cache, which holds 12 lines on Zen 5 and 8 on Zen 4. Functions of
 * their own: within another sums would be kept in memory. */
typedef void dots(i64 depth, const half *left, i64 stride, const half *right, i64 beside, int add, float *sums, i64 apart,
                  i64 next, const half *ask);
#define DOTS(name, rows, columns, stride_of, pair, step)                                                                     \
    TILES static __attribute__((noinline)) void name(i64 depth, const half *left, i64 stride, const half *right, i64 beside, \
                                                     int add, float *sums, i64 apart, i64 next, const half *ask) {           \
        (void)stride, (void)beside, (void)next;                                                                              \
        dots_of(rows, columns, depth, left, stride_of, pair, step, right, beside, add, sums, apart, next, ask);              \
    }
DOTS(dots_of_tiles, SIDE, 1, TERMS, 2, TILE)
DOTS(wide_dots_of_tiles, SIDE / 2, 2, TERMS, 2, TILE)
DOTS(dots_of_rows, SIDE / 2, 1, stride, 2, TERMS)
DOTS(wide_dots_of_rows, SIDE / 2, 2, stride, 2, TERMS)
DOTS(dots_of_pairs, SIDE, 1, 2, TERMS, TILE)
DOTS(wide_dots_of_pairs, SIDE / 2, 2, 2, TERMS, TILE)
#undef DOTS

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

INLINE void store_lines(const __m512i *r, half *to) {
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * TERMS, r[i]);
}
#else
#define HAS_TILES 0
static int dots_allowed(void) { return 0; }
static int amx_allowed(void) { return 0; }
#endif
