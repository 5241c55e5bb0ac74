/* What a product reads: a weight with its adapter, and matrices in any of three dtypes, strides, orders, some elements dropped.
 *
 * All sums are float32. Elements are widened where they are packed and rounded once, to the nearest, where they are written.
 */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef int64_t i64;
typedef uint16_t half; /* the bits of a bfloat16 or float16 */
typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));

enum { LANES = VECTOR_BYTES / 4, FLOAT32 = 0, BFLOAT16, FLOAT16 };

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 greatest(i64 a, i64 b) { return a > b ? a : b; }
static inline i64 ceil_div(i64 count, i64 unit) { return (count + unit - 1) / unit; }
static inline i64 round_up(i64 count, i64 unit) { return ceil_div(count, unit) * unit; }

/* 16-bit words that hold a bit for each of so many elements. */
static inline i64 words(i64 count) { return ceil_div(count, 16); }

/* A part of the workspace, in whole cache lines. A layout is written once, as calls of `take`: with `base` NULL they only count. */
typedef struct {
    char *base;
    i64 bytes;
} arena;

static void *take(arena *a, i64 bytes) {
    void *found = a->base ? a->base + a->bytes : NULL;
    a->bytes += round_up(bytes, 64);
    return found;
}

static arena workspace_of(float *p) { return (arena){p ? (char *)p + -(uintptr_t)p % 64 : NULL, 0}; }

static i64 floats_of(const arena *a) { return a->bytes / 4 + 16; }

/* A frozen weight W0 (rows, cols) and its adapter; Python writes it (library.py). A (rank, cols) and B (rows, rank) may have any
 * strides. Block k uses ranks[k] of `rank`; its rows are row_index[row_offsets[k]] to row_index[row_offsets[k + 1]], its columns as
 * many. Where blocks are `contiguous`, indices count up from 0. The transposed layer is the same struct, its sides swapped. */
typedef struct {
    i64 rows, cols, dtype, row_stride, col_stride;
    const void *weight;
    i64 rank, factor_dtype, A_rank, A_col, B_row, B_rank;
    const void *A, *B;
    i64 blocks, contiguous;
    const int32_t *ranks;
    const i64 *row_index, *col_index;
    const int32_t *row_offsets, *col_offsets;
    double scaling;
} layer;

/* The layer of W_effᵀ, whose product is dX. */
static layer transposed(layer l) {
    return (layer){l.cols, l.rows, l.dtype, l.col_stride, l.row_stride, l.weight, l.rank, l.factor_dtype, l.B_rank, l.B_row, l.A_col, l.A_rank,
                   l.B, l.A, l.blocks, l.contiguous, l.ranks, l.col_index, l.row_index, l.col_offsets, l.row_offsets, l.scaling};
}

/* What a function is asked to do; Python writes it (library.py). Masks have a bit for each element of x, or of dX, of a row in
 * whole words of 16, and one word more behind the last. Matrices have contiguous rows. */
typedef struct {
    layer layer;
    i64 path, algorithm; /* FEW_TOKENS, FLOAT or TILES_PATH; MERGED, SPLIT or UPDATE */
    i64 tokens, dtype;   /* of x, dY, y and bias */
    const void *x, *dy;
    i64 x_stride, dy_stride;
    const uint16_t *keep; /* what dropout leaves of x; NULL: all */
    const void *bias;     /* or NULL */
    void *y, *dA, *dB;
    float *workspace; /* NULL: only the floats that are needed of it are counted, and returned */
    i64 threads;
} call;

enum { FEW_TOKENS, FLOAT, TILES_PATH };
enum { MERGED, SPLIT, UPDATE /* y += x ΔWᵀ */ };

static inline i64 height_of(const layer *l, i64 k) { return l->row_offsets[k + 1] - l->row_offsets[k]; }
static inline i64 width_of(const layer *l, i64 k) { return l->col_offsets[k + 1] - l->col_offsets[k]; }

/* Of block k, whatever `ranks` says. */
static inline i64 rank_of(const layer *l, i64 k) { return greatest(0, least(l->ranks[k], l->rank)); }

static i64 tallest_of(const layer *l) {
    i64 most = 0;
    for (i64 k = 0; k < l->blocks; k++) most = greatest(most, height_of(l, k));
    return most;
}

static i64 widest_of(const layer *l) {
    i64 most = 0;
    for (i64 k = 0; k < l->blocks; k++) most = greatest(most, width_of(l, k));
    return most;
}

/* The block of each row, or column. */
static void write_labels(const i64 *index, const int32_t *offsets, i64 blocks, int32_t *label) {
    for (i64 k = 0; k < blocks; k++)
        for (i64 i = offsets[k]; i < offsets[k + 1]; i++) label[index[i]] = (int32_t)k;
}

/* A matrix (rows, terms) to be multiplied; its element (i, k) is number rows[i] * row_stride + cols[k] * col_stride of `data`. One
 * stride is 1. An index that is NULL counts up. Where `keep` is given some elements are dropped: a bit for each along the stride of
 * 1, `keep_words` words of 16 bits for each step of the other. */
typedef struct {
    const void *data;
    int dtype;
    i64 row_stride, col_stride;
    const i64 *rows, *cols;
    const uint16_t *keep;
    i64 keep_words;
} operand;

static operand operand_of(const void *data, i64 dtype, i64 row_stride, i64 col_stride) {
    return (operand){.data = data, .dtype = (int)dtype, .row_stride = row_stride, .col_stride = col_stride};
}

static operand masked(operand o, const uint16_t *keep, i64 width) {
    o.keep = keep, o.keep_words = words(width);
    return o;
}

static operand weight_of(const layer *l) { return operand_of(l->weight, l->dtype, l->row_stride, l->col_stride); }

/* CALL(dtype) with a dtype that the compiler knows. */
#define WITH_DTYPE(dtype, CALL)               \
    switch (dtype) {                          \
        case FLOAT32: CALL(FLOAT32); break;   \
        case BFLOAT16: CALL(BFLOAT16); break; \
        case FLOAT16: CALL(FLOAT16); break;   \
    }

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

static inline i64 bytes_of(i64 dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* The address of element `at`. */
static inline const void *element(const void *data, i64 at, i64 dtype) { return (const char *)data + at * bytes_of(dtype); }

/* Element `at` as float32. */
INLINE float value_at(const void *data, i64 at, int dtype) {
    if (dtype == FLOAT32) return ((const float *)data)[at];
    half bits = ((const half *)data)[at];
    if (dtype == FLOAT16) return _cvtsh_ss(bits);
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* The sum of a vector's numbers. */
static inline float total(vf v) {
#if VECTOR_BYTES == 64
    return _mm512_reduce_add_ps((__m512)v);
#else
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
}

/* `yes` where a label is k, else `no`. */
INLINE vf select_label(vi labels, int32_t k, vf yes, vf no) {
#if VECTOR_BYTES == 64
    return (vf)_mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask((__m512i)labels, _mm512_set1_epi32(k)), (__m512)no, (__m512)yes);
#else
    return (vf)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)(labels == k));
#endif
}

/* As bfloat16 in the upper half of each lane; NaN stays NaN. */
INLINE vu rounded(vf value) {
    vu bits = (vu)value, up = bits + 0x7fff + (bits >> 16 & 1);
#if VECTOR_BYTES == 64
    __mmask16 none = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
    return (vu)_mm512_mask_or_epi32((__m512i)up, none, (__m512i)bits, _mm512_set1_epi32(0x7fc00000));
#else
    return (vu)_mm256_blendv_ps((__m256)(bits | 0x7fc00000), (__m256)up, (__m256)(value == value));
#endif
}

INLINE vf widen_all(const void *from, int dtype) {
    if (dtype == FLOAT32) return load(from);
#if VECTOR_BYTES == 64
    __m256i found = _mm256_loadu_si256(from);
    return dtype == FLOAT16 ? (vf)_mm512_cvtph_ps(found) : (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(found), 16);
#else
    __m128i found = _mm_loadu_si128(from);
    return dtype == FLOAT16 ? (vf)_mm256_cvtph_ps(found) : (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(found), 16);
#endif
}

/* LANES elements from `at` on as float32, of which `count` are there: others are not read, but 0. */
INLINE vf widen(const void *data, i64 at, i64 count, int dtype) {
    if (count >= LANES) return widen_all(element(data, at, dtype), dtype);
    float some[LANES] = {0};
    if (count > 0) memcpy(some, element(data, at, dtype), (size_t)(count * bytes_of(dtype)));
    return widen_all(some, dtype);
}

INLINE void narrow_all(void *to, vf value, int dtype) {
    vu upper = rounded(value) >> 16;
#if VECTOR_BYTES == 64
    if (dtype == BFLOAT16) _mm256_storeu_si256(to, _mm512_cvtepi32_epi16((__m512i)upper));
    if (dtype == FLOAT16) _mm256_storeu_si256(to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#else
    __m128i low = _mm256_castsi256_si128((__m256i)upper), high = _mm256_extracti128_si256((__m256i)upper, 1);
    if (dtype == BFLOAT16) _mm_storeu_si128(to, _mm_packus_epi32(low, high));
    if (dtype == FLOAT16) _mm_storeu_si128(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#endif
    if (dtype == FLOAT32) store(to, value);
}

/* Write the first `count` of LANES numbers, rounded, from element `at` on. */
INLINE void narrow(void *data, i64 at, i64 count, vf value, int dtype) {
    char *first = (char *)data + at * bytes_of(dtype), some[VECTOR_BYTES];
    narrow_all(count >= LANES ? first : some, value, dtype);
    if (count < LANES) memcpy(first, some, (size_t)(count * bytes_of(dtype)));
}

static void widen_row(const void *from, i64 count, int dtype, float *to) {
#define CALL(dtype) \
    for (i64 c = 0; c < count; c += LANES) narrow(to, c, count - c, widen(from, c, count - c, dtype), FLOAT32)
    WITH_DTYPE(dtype, CALL)
#undef CALL
}

/* Of CHUNK floats from `at` on, those with a bit in `taken`: coordinates of a block that lie in one cache line are moved together. */
typedef struct {
    i64 at, taken;
} chunk;

enum { CHUNK = 16 };

/* index[0] to index[count - 1] as chunks, no more than coordinates; 0 where they lie too far apart, or there is no AVX-512: then they
 * are moved one by one. */
static i64 chunks_of(const i64 *index, i64 count, int dtype, chunk *chunks) {
    i64 some = 0, last = -1;
    for (i64 i = 0; i < count && VECTOR_BYTES == 64 && dtype == FLOAT32; last = index[i++]) {
        i64 at = index[i] / CHUNK * CHUNK, bit = (i64)1 << index[i] % CHUNK;
        if (some && index[i] > last && chunks[some - 1].at == at)
            chunks[some - 1].taken |= bit;
        else if (3 * some < count)
            chunks[some++] = (chunk){at, bit};
        else
            return 0;
    }
    return some;
}

/* 1, or 0 for what is dropped: a factor, so that a dropped Inf or NaN becomes NaN. */
static inline float kept(const uint16_t *keep, i64 at) { return (float)(keep[at / 16] >> at % 16 & 1); }

/* to = the elements at `count` coordinates as float32, 0 where `keep` has no bit; up to CHUNK floats more are written. */
static void gather(const void *from, int dtype, const i64 *index, i64 count, const chunk *chunks, i64 some, const uint16_t *keep,
                   float *to) {
#if VECTOR_BYTES == 64
    for (i64 i = 0; i < some; i++) { /* masked: what is not taken may lie beyond the matrix */
        __mmask16 taken = (__mmask16)chunks[i].taken;
        __m512 found = _mm512_maskz_loadu_ps(taken, (const float *)from + chunks[i].at);
        if (keep) found = _mm512_mul_ps(found, _mm512_maskz_mov_ps(keep[chunks[i].at / 16], _mm512_set1_ps(1)));
        _mm512_storeu_ps(to, _mm512_maskz_compress_ps(taken, found));
        to += __builtin_popcountll((unsigned long long)taken);
    }
#else
    (void)chunks;
#endif
    if (some) return;
#define CALL(dtype)                                                                                    \
    for (i64 i = 0; i < count && !keep; i++) to[i] = value_at(from, index[i], dtype);                  \
    for (i64 i = 0; i < count && keep; i++) to[i] = value_at(from, index[i], dtype) * kept(keep, index[i])
    WITH_DTYPE(dtype, CALL)
#undef CALL
}

/* The reverse: elements of `to` = from, of which up to CHUNK floats more are read, 0 where `keep` has no bit. */
static void scatter(const float *from, const i64 *index, i64 count, const chunk *chunks, i64 some, const uint16_t *keep, float *to) {
#if VECTOR_BYTES == 64
    for (i64 i = 0; i < some; i++) {
        __mmask16 taken = (__mmask16)chunks[i].taken;
        __m512 found = _mm512_maskz_expand_ps(taken, _mm512_loadu_ps(from));
        if (keep) found = _mm512_mul_ps(found, _mm512_maskz_mov_ps(keep[chunks[i].at / 16], _mm512_set1_ps(1)));
        _mm512_mask_storeu_ps(to + chunks[i].at, taken, found);
        from += __builtin_popcountll((unsigned long long)taken);
    }
#else
    (void)chunks;
#endif
    for (i64 i = 0; i < count && !some; i++) to[index[i]] = keep ? from[i] * kept(keep, index[i]) : from[i];
}
