/* Operands of a product: a weight with its adapter, and matrices of three dtypes.
 *
 * All sums are float32. Elements are widened when they are packed, and rounded once, to nearest, when they are written.
 */
#pragma once

#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef int64_t i64;
typedef uint16_t half; /* the bits of a bfloat16 or float16 */
typedef uint32_t mask_bits __attribute__((aligned(2), may_alias)); /* two words of a mask */
typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t vl __attribute__((vector_size(VECTOR_BYTES)));
typedef half vh __attribute__((vector_size(VECTOR_BYTES / 2)));

enum { LANES = VECTOR_BYTES / 4, REGISTERS = VECTOR_BYTES == 32 ? 16 : 32, FLOAT32 = 0, BFLOAT16, FLOAT16 };

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 greatest(i64 a, i64 b) { return a > b ? a : b; }
static inline i64 ceil_div(i64 count, i64 unit) { return (count + unit - 1) / unit; }
static inline i64 round_up(i64 count, i64 unit) { return ceil_div(count, unit) * unit; }

/* 16-bit words that hold one bit for each of `count` elements. */
static inline i64 words(i64 count) { return ceil_div(count, 16); }

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
enum { GAP = 128 };
#else
enum { GAP = 0 };
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

/* The workspace, or a part of it, given out in whole cache lines. With `base` NULL `take` only counts bytes, so one
 * list of `take` calls serves both to size the workspace and to lay it out. Under AddressSanitizer nothing may touch
 * the gaps between its pieces. */
typedef struct {
    char *base;
    i64 bytes;
} arena;

static void *take(arena *a, i64 bytes) {
    char *found = a->base ? a->base + a->bytes : NULL;
    a->bytes += round_up(bytes, 64) + GAP;
    if (found) {
        ASAN_UNPOISON_MEMORY_REGION(found, (size_t)bytes);
        ASAN_POISON_MEMORY_REGION(found + bytes, (size_t)(a->base + a->bytes - found - bytes));
    }
    return found;
}

static arena workspace_of(float *p) { return (arena){p ? (char *)p + -(uintptr_t)p % 64 : NULL, 0}; }

static i64 floats_of(const arena *a) { return a->bytes / 4 + 16; }

/* A frozen weight W0 (rows, cols) and its adapter; library.py fills it. A (rank, cols) and B (rows, rank) may have any
 * strides. Block k uses the first ranks[k] of `rank` ranks; its rows are row_index[row_offsets[k]] to
 * row_index[row_offsets[k + 1] - 1], its columns in the same way. If blocks are `contiguous`, indices count up from 0.
 * The transposed layer is the same struct with its sides swapped. */
typedef struct {
    i64 rows, cols, dtype, row_stride, col_stride;
    i64 place, row_step, col_step; /* thresholds of W_eff (definition/thresholds.py): the first, and steps */
    const void *weight;
    i64 rank, factor_dtype, A_rank, A_col, B_row, B_rank;
    const void *A, *B;
    i64 blocks, contiguous;
    const int32_t *ranks;
    const i64 *row_index, *col_index;
    const int32_t *row_offsets, *col_offsets;
    double scaling;
} layer;

/* The layer with W_effᵀ: its forward is dX. */
static layer transposed(layer l) {
    return (layer){l.cols, l.rows, l.dtype, l.col_stride, l.row_stride, l.place, l.col_step, l.row_step, l.weight,
                   l.rank, l.factor_dtype, l.B_rank, l.B_row, l.A_col, l.A_rank, l.B, l.A, l.blocks, l.contiguous,
                   l.ranks, l.col_index, l.row_index, l.col_offsets, l.row_offsets, l.scaling};
}

/* The arguments of a function; library.py fills it. Matrices are row-major. A mask has a bit for each element of x or
 * dX: each row in whole 16-bit words, and one word more after the last. */
typedef struct {
    layer layer;
    i64 path, algorithm; /* FEW_TOKENS, FLOAT or TILES_PATH; MERGED or SPLIT */
    i64 tokens, dtype; /* dtype: of x, dY, y and bias */
    const void *x, *dy;
    i64 x_stride, dy_stride, y_stride;
    const uint16_t *keep; /* dropout's mask of x; NULL: no dropout */
    const void *bias; /* or NULL */
    void *y, *dA, *dB;
    float *workspace; /* NULL: only return how many floats it must have */
    i64 threads;
    i64 seed, threshold, column_offset; /* of a mask that is drawn */
    /* Layers of one shape, whose tokens are pairs of a token and an expert. `layer`, x, dy and results are the first
     * one's; the steps say how many elements further on those of the next one are. */
    i64 experts; /* 0: one layer, and nothing below is read */
    const int32_t *ends; /* where each expert's pairs end */
    i64 few; /* experts of up to so many pairs take FEW_TOKENS, the others `path` */
    const void *row_index, *col_index; /* in place of the layer's; NULL: contiguous blocks */
    i64 row_bytes, col_bytes; /* of a number in these: 2 or 4 */
    i64 row_step, col_step, row_offsets_step, col_offsets_step, weight_step, A_step, B_step;
} call;

enum { FEW_TOKENS, FLOAT, TILES_PATH };
enum { MERGED, SPLIT };

static inline i64 height_of(const layer *l, i64 k) { return l->row_offsets[k + 1] - l->row_offsets[k]; }
static inline i64 width_of(const layer *l, i64 k) { return l->col_offsets[k + 1] - l->col_offsets[k]; }

/* The rank of block k, clamped to 0 and `rank`. */
static inline i64 rank_of(const layer *l, i64 k) { return greatest(0, least(l->ranks[k], l->rank)); }

/* The size of the largest block. */
static i64 longest_of(const int32_t *offsets, i64 blocks) {
    i64 most = 0;
    for (i64 k = 0; k < blocks; k++) most = greatest(most, offsets[k + 1] - offsets[k]);
    return most;
}

static i64 tallest_of(const layer *l) { return longest_of(l->row_offsets, l->blocks); }
static i64 widest_of(const layer *l) { return longest_of(l->col_offsets, l->blocks); }

/* label = the block of each row, or column. */
static void write_labels(const i64 *index, const int32_t *offsets, i64 blocks, int32_t *label) {
    for (i64 k = 0; k < blocks; k++)
        for (i64 i = offsets[k]; i < offsets[k + 1]; i++) label[index[i]] = (int32_t)k;
}

/* A matrix (rows, terms) to be multiplied. Its lines in memory are rows, or if not `row_major` columns, `stride`
 * elements apart. */
typedef struct {
    const void *data;
    int dtype, row_major;
    i64 stride;
} operand;

static operand weight_of(const layer *l) {
    int row_major = l->col_stride == 1;
    return (operand){l->weight, (int)l->dtype, row_major, row_major ? l->row_stride : l->col_stride};
}

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

static inline i64 bytes_of(i64 dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* The address of element `at`; of an element of a line. */
static inline const void *element(const void *data, i64 at, i64 dtype) {
    return (const char *)data + at * bytes_of(dtype);
}
static inline const void *element_of(const operand *o, i64 line, i64 at) {
    return element(o->data, line * o->stride + at, o->dtype);
}

#ifdef __aarch64__
INLINE float float16_value(half bits) { return vgetq_lane_f32(vcvt_f32_f16((float16x4_t)vdup_n_u16(bits)), 0); }
#else
INLINE float float16_value(half bits) { return _cvtsh_ss(bits); }
#endif

/* Element `at` as float32. */
INLINE float value_at(const void *data, i64 at, int dtype) {
    if (dtype == FLOAT32) return ((const float *)data)[at];
    half bits = ((const half *)data)[at];
    if (dtype == FLOAT16) return float16_value(bits);
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* What differs between AVX-512, AVX2 and NEON: half types to float32; float32 to float16, to nearest; the product of
 * each 64-bit lane's lower half and a number; the sum of all numbers. */
#if VECTOR_BYTES == 64
INLINE vf from_float16(vh v) { return (vf)_mm512_cvtph_ps((__m256i)v); }
INLINE vf from_bfloat16(vh v) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16); }
INLINE vh to_float16(vf v) { return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
INLINE vl product_of_lower(vl v, uint32_t by) { return (vl)_mm512_mul_epu32((__m512i)v, _mm512_set1_epi64(by)); }
INLINE float total(vf v) { return _mm512_reduce_add_ps((__m512)v); }
#elif VECTOR_BYTES == 32
INLINE vf from_float16(vh v) { return (vf)_mm256_cvtph_ps((__m128i)v); }
INLINE vf from_bfloat16(vh v) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16); }
INLINE vh to_float16(vf v) { return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
INLINE vl product_of_lower(vl v, uint32_t by) { return (vl)_mm256_mul_epu32((__m256i)v, _mm256_set1_epi64x(by)); }
INLINE float total(vf v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
INLINE vf from_float16(vh v) { return (vf)vcvt_f32_f16((float16x4_t)v); }
INLINE vf from_bfloat16(vh v) { return (vf)(vmovl_u16((uint16x4_t)v) << 16); }
INLINE vh to_float16(vf v) { return (vh)vcvt_f16_f32((float32x4_t)v); }
INLINE vl product_of_lower(vl v, uint32_t by) { return (vl)vmull_n_u32(vmovn_u64((uint64x2_t)v), by); }
INLINE float total(vf v) { return vaddvq_f32((float32x4_t)v); }
#endif

/* `yes` where a label is k, else `no`. */
INLINE vf select_label(vi labels, int32_t k, vf yes, vf no) {
    vi same = labels == k;
    return (vf)(((vi)yes & same) | ((vi)no & ~same));
}

/* Rounded to bfloat16 by thresholds below 2^16, in the upper half of each lane; NaN stays NaN. */
INLINE vu rounded_by(vu threshold, vf value) {
    vu bits = (vu)value, number = (vu)(value == value);
    return ((((bits + threshold) & number) | ((bits | 0x7fc00000) & ~number))) & 0xffff0000;
}

/* To nearest. */
INLINE vu rounded(vf value) { return rounded_by(0x7fff + ((vu)value >> 16 & 1), value); }

INLINE vf widen_all(const void *from, int dtype) {
    if (dtype == FLOAT32) return load(from);
    vh found;
    memcpy(&found, from, sizeof found);
    return dtype == FLOAT16 ? from_float16(found) : from_bfloat16(found);
}

/* LANES elements from `at` on as float32. Only `count` exist; the others are not read and become 0. */
INLINE vf widen(const void *data, i64 at, i64 count, int dtype) {
    if (count >= LANES) return widen_all(element(data, at, dtype), dtype);
    float line[LANES] = {0};
    if (count > 0) memcpy(line, element(data, at, dtype), (size_t)(count * bytes_of(dtype)));
    return widen_all(line, dtype);
}

/* Rounds the first `count` of LANES numbers and writes them from element `at` on. */
INLINE void narrow(void *data, i64 at, i64 count, vf value, int dtype) {
    char *first = (char *)data + at * bytes_of(dtype), line[VECTOR_BYTES];
    void *to = count >= LANES ? first : line;
    vh halves = dtype == FLOAT16 ? to_float16(value) : __builtin_convertvector(rounded(value) >> 16, vh);
    if (dtype == FLOAT32)
        store(to, value);
    else
        memcpy(to, &halves, sizeof halves);
    if (count < LANES) memcpy(first, line, (size_t)(count * bytes_of(dtype)));
}

/* 1 for a kept element, 0 for a dropped one. A factor, not a selection: a dropped Inf or NaN becomes NaN. */
static inline float kept(const uint16_t *keep, uint64_t at) {
    return (float)(int)(((const mask_bits *)keep)[at / 32] >> at % 32 & 1);
}

/* The same for LANES elements from `at` on. */
INLINE vf all_kept(const uint16_t *keep, i64 at) {
    static const int32_t bit[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    const vf one = (vf){0} + 1;
    uint32_t bits = *(const mask_bits *)(keep + at / 16);
    vi lanes;
    memcpy(&lanes, bit, sizeof lanes);
    return (vf)((vi)one & ((((vi){0} + (int32_t)(bits >> at % 16)) & lanes) != 0));
}

/* to = `count` elements as float32, times their mask. */
static void widen_row(const void *from, int dtype, i64 count, const uint16_t *keep, float *to) {
    for (i64 c = 0; c < count; c += LANES) {
        vf found = widen(from, c, count - c, dtype);
        narrow(to, c, count - c, keep ? found * all_kept(keep, c) : found, FLOAT32);
    }
}

/* The same for elements at `count` > 0 coordinates. */
static void gather(const void *from, int dtype, const i64 *index, i64 count, const uint16_t *keep, float *to) {
    i64 line = 64 / bytes_of(dtype), end = least(index[count - 1], index[0] + count * line); /* it mostly ascends */
    for (i64 i = index[0]; i < end; i += line) __builtin_prefetch(element(from, i, dtype));
#pragma GCC unroll 8
    for (i64 i = 0; i < count && keep; i++) to[i] = value_at(from, index[i], dtype) * kept(keep, (uint64_t)index[i]);
#pragma GCC unroll 8
    for (i64 i = 0; i < count && !keep; i++) to[i] = value_at(from, index[i], dtype);
}
