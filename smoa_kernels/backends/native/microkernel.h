/* Micro-kernels: C (+)= left rightᵀ of packed panels, one for each instruction set. `multiply`, at the end, chooses among them.
 *
 *   format   left panel        right panel       instructions                      for
 *   FLOATS   MR rows           NR rows           FMA of AVX2 or AVX-512            every dtype, widened
 *   PAIRS    32 rows of tiles  32 rows of tiles  AMX, or vdpbf16ps of AVX512-BF16  bfloat16
 *   SPLIT3   the same, thrice  the same, thrice  AMX                               float32: each number is the sum of three bfloat16
 *
 * A panel of FLOATS is (depth, rows). One of PAIRS is (steps, 2 tiles), one of SPLIT3 (steps, 3, 2 tiles). A step is 32 terms; a tile has 16
 * rows of them, 1 KiB of bfloat16. A line of a left tile is one row. A line of a right tile is one pair of terms of all 16 rows: the
 * transpose of the left tile in units of 32 bits. An instruction set that multiplies differently needs a format here, and a packing.
 */
#pragma once

#include "operand.h"

enum { FLOATS, PAIRS, SPLIT3 };

enum {
    /* A tile of C fills 14 × 2 of 32 vector registers, or 6 × 2 of 16; operands take the others. */
    MR = VECTOR_BYTES == 64 ? 14 : 6,
    NR = 2 * LANES,
    KC = 384, /* terms that are packed and summed in registers at a time */
    SIDE = 16, /* rows of a tile */
    TERMS = 32,
    TILE = SIDE * TERMS,
    PANEL = 2 * SIDE, /* rows of a panel of tiles */
    STEP = 2 * TILE,
};

static inline i64 left_height(int format) { return format == FLOATS ? MR : PANEL; }

/* Floats per row of a panel: a term takes one in FLOATS, a half in PAIRS, three halves in SPLIT3. */
static inline i64 row_size(int format, i64 depth) {
    return format == FLOATS ? depth : round_up(depth, TERMS) / 2 * (format == SPLIT3 ? 3 : 1);
}

/* c (+)= Σ_k a_k b_kᵀ with a (depth, MR) and b (depth, NR): a tile (rows, NR), of which (height, width) is stored. */
INLINE void fma_tile(int rows, i64 depth, const float *a, const float *b, float *c, i64 stride, i64 height, i64 width, int add) {
    vf sum[MR][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vf){0};
    for (int i = 0; add && i < height; i++) { /* c has left the cache: fetch it while the sums are made */
        __builtin_prefetch(c + i * stride, 1);
        __builtin_prefetch(c + i * stride + LANES, 1);
    }
#pragma GCC unroll 4
    for (i64 k = 0; k < depth; k++, a += MR, b += NR) {
        vf left = load(b), right = load(b + LANES);
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            sum[i][0] += left * a[i];
            sum[i][1] += right * a[i];
        }
    }
    float sums[MR * NR];
    int whole = height == rows && width == NR;
    float *to = whole ? c : sums;
    i64 step = whole ? stride : NR;
    if (whole && add)
        for (int i = 0; i < rows; i++) {
            sum[i][0] += load(c + i * stride);
            sum[i][1] += load(c + i * stride + LANES);
        }
    for (int i = 0; i < rows; i++) {
        store(to + i * step, sum[i][0]);
        store(to + i * step + LANES, sum[i][1]);
    }
    if (!whole)
        for (i64 i = 0; i < height; i++)
            for (i64 j = 0; j < width; j++) c[i * stride + j] = sums[i * NR + j] + (add ? c[i * stride + j] : 0);
}

/* Computes MR, MR / 2 or MR / 4 rows: the last panel may be low. Not inlined, because GCC would then keep the sums in memory. */
static __attribute__((noinline)) void fma_panel(i64 depth, const float *a, const float *b, float *c, i64 stride, i64 height, i64 width,
                                                int add) {
    if (height > MR / 2)
        fma_tile(MR, depth, a, b, c, stride, height, width, add);
    else if (height > MR / 4)
        fma_tile(MR / 2, depth, a, b, c, stride, height, width, add);
    else
        fma_tile(MR / 4, depth, a, b, c, stride, height, width, add);
}

/* Packing tiles and vdpbf16ps take vectors of 512 bits; every processor with AMX has these. */
#if VECTOR_BYTES == 64 && (__GNUC__ >= 11 || __clang_major__ >= 13)
#define HAS_TILES 1
#include <cpuid.h>
#include <stdlib.h>
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The compiler uses these instructions only through their intrinsics, so other code in such a function runs on any processor. */
#define TARGET_BF16 __attribute__((target("amx-tile,amx-bf16,avx512bf16")))

/* Whether ONEDNN_MAX_CPU_ISA, by which a user limits torch's GEMMs, allows one of these instruction sets. */
static int is_wanted(const char *const *names) {
    const char *limit = getenv("ONEDNN_MAX_CPU_ISA");
    if (!limit || !*limit || !strcasecmp(limit, "ALL") || !strcasecmp(limit, "DEFAULT")) return 1;
    for (; *names; names++)
        for (const char *at = limit; *at; at++)
            if (!strncasecmp(at, *names, strlen(*names))) return 1;
    return 0;
}

static __attribute__((noinline)) int find_bf16(void) {
    static const char *const names[] = {"BF16", "FP16", "AMX", "AVX10", NULL};
    return __builtin_cpu_supports("avx512bf16") && is_wanted(names);
}

static __attribute__((noinline)) int find_amx(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 }; /* Linux grants AMX on request only */
    static const char *const names[] = {"AMX", NULL};
    unsigned a, b, c, d;
    __cpuid_count(7, 0, a, b, c, d);
    int has = (d >> 22 & 1) && (d >> 24 & 1); /* AMX-BF16, AMX-TILE */
    return has && find_bf16() && is_wanted(names) && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

/* Whether this process may use AVX512-BF16, or AMX; asked once, when the library is loaded. */
#define FOUND_ONCE(find)                                       \
    static int found = -1;                                     \
    if (__builtin_expect(found < 0, 0)) found = find();        \
    return found;
static int has_bf16(void) { FOUND_ONCE(find_bf16) }
static int has_amx(void) { FOUND_ONCE(find_amx) }

/* Sets the size of this thread's tiles; `end_tiles` must follow before the thread ends its work. The sizes are a constant because GCC before
 * the fix of its bug 114098 (12.4) believes that only 8 bytes are read, and may leave the others unwritten. */
TARGET_BF16 static void use_tiles(void) {
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } sizes = {.palette = 1, .bytes = {[0 ... 7] = 64}, .rows = {[0 ... 7] = SIDE}};
    _tile_loadconfig(&sizes);
}

TARGET_BF16 static void release_tiles(void) { _tile_release(); }

static void begin_tiles(int format) {
    if (format != FLOATS && has_amx()) use_tiles();
}

static void end_tiles(int format) {
    if (format != FLOATS && has_amx()) release_tiles();
}

/* Before tiles are loaded: GCC does not know that a tile load reads memory, and might move earlier stores behind it. */
#define WRITTEN __asm__ volatile("" ::: "memory")

/* Clears the four tiles of C, (PANEL, PANEL). */
TARGET_BF16 static inline void zero_sums(void) {
    WRITTEN;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

TARGET_BF16 static inline void load_sums(const float *from, i64 stride) {
    WRITTEN;
    _tile_loadd(0, from, stride * 4);
    _tile_loadd(1, from + SIDE, stride * 4);
    _tile_loadd(2, from + SIDE * stride, stride * 4);
    _tile_loadd(3, from + SIDE * stride + SIDE, stride * 4);
}

TARGET_BF16 static inline void store_sums(float *to, i64 stride) {
    _tile_stored(0, to, stride * 4);
    _tile_stored(1, to + SIDE, stride * 4);
    _tile_stored(2, to + SIDE * stride, stride * 4);
    _tile_stored(3, to + SIDE * stride + SIDE, stride * 4);
}

/* C (rows, columns * SIDE) (+)= left rightᵀ over `steps` steps by vdpbf16ps: SIDE rows by one right tile, or SIDE / 2 rows by two. With SIDE
 * independent sums no addition waits for the last one to the same sum. */
TARGET_BF16 INLINE void dots_of(int rows, int columns, i64 steps, const half *left, const half *right, int add, float *c, i64 stride) {
    __m512 sum[SIDE][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
        for (int q = 0; q < columns; q++) sum[i][q] = add ? _mm512_load_ps(c + i * stride + q * SIDE) : _mm512_setzero_ps();
    for (; steps > 0; steps--, left += STEP, right += STEP)
        for (int p = 0; p < SIDE; p++) {
            __m512bh line[2];
            for (int q = 0; q < columns; q++) line[q] = (__m512bh)_mm512_load_si512(right + q * TILE + p * TERMS);
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++) {
                int32_t pair;
                memcpy(&pair, left + i * TERMS + 2 * p, sizeof pair);
                for (int q = 0; q < columns; q++)
                    sum[i][q] = _mm512_dpbf16_ps(sum[i][q], line[q], (__m512bh)_mm512_set1_epi32(pair));
            }
        }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
        for (int q = 0; q < columns; q++) _mm512_store_ps(c + i * stride + q * SIDE, sum[i][q]);
}

/* With two right tiles each broadcast of a left pair feeds two products; with one, Zen 5 would wait for loads. */
TARGET_BF16 static __attribute__((noinline)) void dots(int two, i64 steps, const half *left, const half *right, int add, float *c,
                                                       i64 stride) {
    if (two)
        dots_of(SIDE / 2, 2, steps, left, right, add, c, stride);
    else
        dots_of(SIDE, 1, steps, left, right, add, c, stride);
}

TARGET_BF16 static inline void load_left(const half *from) {
    _tile_loadd(4, from, 64);
    _tile_loadd(5, from + TILE, 64);
}

TARGET_BF16 static inline void load_right(const half *from) {
    _tile_loadd(6, from, 64);
    _tile_loadd(7, from + TILE, 64);
}

TARGET_BF16 static inline void add_products(void) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* C (rows, columns) (+)= left rightᵀ of two panels of PAIRS. C has room for (PANEL, PANEL); the rest of it may be overwritten. */
TARGET_BF16 static inline void pairs_panel(i64 steps, const half *left, const half *right, float *c, i64 stride, i64 rows,
                                           i64 columns, int add) {
    if (!has_amx()) {
        int two = columns > SIDE; /* right tiles */
        for (i64 i = 0; i < rows; i += two ? SIDE / 2 : SIDE)
            dots(two, steps, left + i / SIDE * TILE + i % SIDE * TERMS, right, add, c + i * stride, stride);
        return;
    }
    if (add)
        load_sums(c, stride);
    else
        zero_sums();
    for (; steps > 0; steps--, left += STEP, right += STEP) {
        load_left(left);
        load_right(right);
        add_products();
    }
    store_sums(c, stride);
}

static inline __mmask16 first_lanes(i64 count) {
    return count < SIDE ? (__mmask16)((1 << greatest(0, count)) - 1) : (__mmask16)~0;
}

/* Sums (PANEL, PANEL) of which some rows are not yet written to C. */
typedef struct {
    const float *from;
    float *to;
    i64 stride, rows; /* rows: still to be written */
    __mmask16 valid[2], added[2];
} sums_to_write;

INLINE void add_to_c(sums_to_write *s, i64 count) {
    for (i64 i = least(count, s->rows); i > 0; i--, s->rows--, s->from += PANEL, s->to += s->stride)
        for (int q = 0; q < 2; q++) {
            float *to = s->to + q * SIDE;
            __builtin_prefetch(to + 6 * s->stride, 1);
            __m512 before = _mm512_maskz_loadu_ps(s->added[q], to);
            _mm512_mask_storeu_ps(to, s->valid[q], _mm512_add_ps(before, _mm512_load_ps(s->from + q * SIDE)));
        }
}

/* C (rows, columns) (+)= left rightᵀ of one left panel of SPLIT3 and several right ones. Six of the nine products of their parts are added;
 * the other three are below float32's own rounding. The sums of one panel are written while the next one is multiplied. */
TARGET_BF16 static void split_panels(i64 steps, const half *left, const half *right, float *c, i64 stride, i64 rows, i64 columns, int add) {
    _Alignas(64) float sums[PANEL * PANEL];
    i64 together = steps > 1 ? ceil_div(PANEL, steps - 1) : 0;
    sums_to_write last = {.rows = 0};
    for (i64 j = 0; j < columns; j += PANEL) {
        const half *a = left;
        zero_sums();
        /* The smallest products come first. Each product keeps one operand of the last one. */
        for (i64 k = 0; k < steps; k++, a += 3 * STEP, right += 3 * STEP) {
            load_left(a + 2 * STEP);
            load_right(right);
            add_products();
            load_left(a + STEP);
            add_products();
            load_right(right + STEP);
            add_products();
            load_left(a);
            add_products();
            load_right(right + 2 * STEP);
            add_products();
            load_right(right);
            add_products();
            if (k) add_to_c(&last, together); /* not in step 0: the sums were just stored, and loads would wait */
        }
        add_to_c(&last, PANEL);
        store_sums(sums, PANEL);
        __mmask16 first = first_lanes(columns - j), second = first_lanes(columns - j - SIDE);
        last = (sums_to_write){sums, c + j, stride, rows, {first, second}, {add ? first : 0, add ? second : 0}};
    }
    add_to_c(&last, PANEL);
}
#else
#define HAS_TILES 0
static int has_bf16(void) { return 0; }
static int has_amx(void) { return 0; }
#define begin_tiles(format) ((void)(format))
#define end_tiles(format) ((void)(format))
#endif

/* C (rows, columns) (+)= left rightᵀ of one left panel, `rows` of whose rows are stored, and consecutive right panels. */
static void multiply(int format, i64 depth, const float *left, const float *right, float *c, i64 stride, i64 rows, i64 columns, int add) {
#if HAS_TILES
    i64 steps = ceil_div(depth, TERMS);
    if (format == SPLIT3) split_panels(steps, (const half *)left, (const half *)right, c, stride, rows, columns, add);
    for (i64 j = 0; j < columns && format == PAIRS; j += PANEL)
        pairs_panel(steps, (const half *)left, (const half *)right + j * steps * TERMS, c + j, stride, rows, least(PANEL, columns - j), add);
#endif
    for (i64 j = 0; j < columns && format == FLOATS; j += NR)
        fma_panel(depth, left, right + j * depth, c + j, stride, rows, least(NR, columns - j), add);
}
