/* What a GEMM on a CPU is made of: panels, copied as the processor reads them, and tiles that are multiplied from them.
 *
 * Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication". Nothing here knows of adapters.
 */
#pragma once

#include "stored.h"

enum {
    /* A tile of the result is held in registers: 14 × 2 of 32 vectors, or 6 × 2 of 16; the others hold operands. */
    MR = VECTOR_BYTES == 64 ? 14 : 6,
    NR = 2 * LANES,
    /* Terms summed in registers before they are added to memory: short sums round little, long ones save additions. */
    KC = 384,
    /* Of so many where the left matrix has fewer rows than FEW_ROWS. MKL's sums are about as short there, so that others
     * err by up to 2.4 of their budget; they cost up to 8 % of a GEMM of many rows, of few the packing takes the time. */
    SHORT = 64,
    FEW_ROWS = 16,
    /* Rows of the left panel, which stays for all of the right matrix (in the L3 cache, or of few tokens the L2), and of
     * the right one, which is packed, modulated and multiplied while it is in the L2. 14 * 147 is just above 2048: a
     * second left panel, of few rows, would have all of the right matrix packed again. */
    MC = MR * 147,
    NC = NR * 4,
    TRANSPOSED = 8, /* floats beyond the last panel that packing may write */
    /* So many floats along a row, or columns, before it reads them packing asks the memory for them: they are short runs
     * far apart, which no processor sees coming. */
    AHEAD = 64,
    COLUMNS_AHEAD = 4,
};

/* A matrix (rows, cols), its element (i, k) number rows[i] * row_stride + cols[k] * col_stride of `data`, which is `stored`
 * so, one of the strides 1; NULL is in order. `rows` without `cols` asks for a row_stride of 1. Of a matrix with that,
 * columns contiguous, some elements may be dropped: `keep` has a bit for each, and `kept` words of 16 for each column.
 * Packing widens half types. */
typedef struct {
    const void *data;
    int stored;
    i64 row_stride, col_stride;
    const i64 *rows, *cols;
    const uint16_t *keep;
    i64 kept;
} matrix;

static matrix matrix_of(const void *data, i64 stored, i64 row_stride, i64 col_stride) {
    return (matrix){.data = data, .stored = (int)stored, .row_stride = row_stride, .col_stride = col_stride};
}

/* A matrix of which `keep`, where it is not NULL, drops some of each `width` that are contiguous. */
static matrix some_of(const void *data, i64 stored, i64 row_stride, i64 col_stride, const uint16_t *keep, i64 width) {
    matrix m = matrix_of(data, stored, row_stride, col_stride);
    m.keep = keep, m.kept = words(width);
    return m;
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

/* c (+)= Σ_k a_k b_kᵀ, a (rows, NR) tile of which (height, width) is there; a is (depth, MR), b is (depth, NR). */
INLINE void tile_of(int rows, i64 depth, const float *a, const float *b, float *c, i64 stride, i64 height, i64 width,
                    int add) {
    vf sum[MR][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vf){0};
    for (int i = 0; add && i < height; i++) { /* no longer in a cache; there when the sums are */
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
    float part[MR * NR];
    int whole = height == rows && width == NR;
    float *to = whole ? c : part;
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
            for (i64 j = 0; j < width; j++) c[i * stride + j] = part[i * NR + j] + (add ? c[i * stride + j] : 0);
}

/* Of the last rows no more are computed than some: of 128 tokens the last two are not worth fourteen. A function of its
 * own: inlined where registers are scarce it would keep sums in memory. */
static __attribute__((noinline)) void tile(i64 depth, const float *a, const float *b, float *c, i64 stride, i64 height, i64 width,
                                           int add) {
    if (height > MR / 2)
        tile_of(MR, depth, a, b, c, stride, height, width, add);
    else if (height > MR / 4)
        tile_of(MR / 2, depth, a, b, c, stride, height, width, add);
    else
        tile_of(MR / 4, depth, a, b, c, stride, height, width, add);
}

/* How many terms are summed in registers where the left matrix has so many rows, those of all threads together. */
static i64 terms_of(i64 rows) { return rows < FEW_ROWS ? SHORT : KC; }

/* A tile, `terms` of its sums' terms at a time. */
INLINE void tile_by(i64 terms, i64 depth, const float *a, const float *b, float *c, i64 stride, i64 height, i64 width, int add) {
    for (i64 k = 0; k < depth; k += terms)
        tile(least(terms, depth - k), a + k * MR, b + k * NR, c, stride, height, width, add || k > 0);
}

/* out (8, 8) = the transpose of 8 floats at each of `rows`; rows of `out` are `stride` apart, the first written first. */
static inline void transpose(const float *const *rows, i64 at, float *out, i64 stride) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(rows[i] + at);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            r[i + 2 * half] = _mm256_shuffle_ps(t[i + half], t[i + 2 + half], 0x44);
            r[i + 2 * half + 1] = _mm256_shuffle_ps(t[i + half], t[i + 2 + half], 0xee);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + i * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + (i + 4) * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
}

/* Panels of rows that are contiguous: transposed; their columns are put in order before, and half types widened, in a
 * buffer. */
static void pack_rows(matrix m, i64 first, i64 count, i64 k, i64 depth, int height, float *out) {
    float ordered[NR * (KC + PIECE)];
    piece pieces[KC];
    i64 some = m.cols ? stored_pieces_of(m.cols + k, depth, m.stored, pieces) : 0;
    int as_it_lies = !m.cols && m.stored == FLOAT32;
    for (i64 top = 0; top < count; top += height, out += depth * height) {
        int there = (int)least(height, count - top);
        const float *row[NR + 8];
        for (int i = 0; i < NR + 8; i++) {
            i64 at = first + top + least(i, there - 1);
            const void *from = number(m.data, (m.rows ? m.rows[at] : at) * m.row_stride + (m.cols ? 0 : k), m.stored);
            float *to = ordered + least(i, there - 1) * (KC + PIECE);
            if (i < there && m.cols) gather_floats(from, m.cols + k, depth, pieces, some, NULL, m.stored, to);
            if (i < there && !m.cols && !as_it_lies) widen(from, depth, m.stored, to);
            row[i] = as_it_lies ? from : to;
        }
        i64 p = 0;
        /* Eight rows at a time; the last eight overlap where the height is no multiple. Of a panel lower than eight the
         * transposes reach into the next column, which is written after, or beyond the panel (TRANSPOSED). */
        for (; p + 8 <= depth; p += 8)
            for (int i = 0; i < height; i += 8) {
                int start = i + 8 > height && height >= 8 ? height - 8 : i;
                if (as_it_lies && p % 16 == 0)
                    for (int l = 0; l < 8; l++) __builtin_prefetch(row[start + l] + p + AHEAD);
                transpose(row + start, p, out + p * height + start, height);
            }
        for (; p < depth; p++)
            for (int i = 0; i < height; i++) out[p * height + i] = row[i][p];
    }
}

/* Panels of rows whose columns are contiguous, in the order of m.rows: a column is read once, and widened, for all panels. */
static void pack_columns(matrix m, i64 first, i64 count, i64 k, i64 depth, int height, float *out) {
    float line[MC + PIECE];
    piece pieces[MC];
    i64 some = m.rows ? stored_pieces_of(m.rows + first, count, m.stored, pieces) : 0;
    for (i64 p = 0; p < depth; p++) {
        i64 at = k + p, further = k + least(p + COLUMNS_AHEAD, depth - 1), start = m.rows ? 0 : first;
        const void *from = number(m.data, (m.cols ? m.cols[at] : at) * m.col_stride + start, m.stored);
        const void *later = number(m.data, (m.cols ? m.cols[further] : further) * m.col_stride + start, m.stored);
        const float *column = m.rows || m.stored != FLOAT32 ? line : from;
        for (i64 i = 0; i < some; i++) __builtin_prefetch(number(later, pieces[i].at, m.stored));
        for (i64 i = 0; i < count && !m.rows; i += 64 / bytes_of(m.stored)) __builtin_prefetch(number(later, i, m.stored));
        if (m.rows)
            gather_floats(from, m.rows + first, count, pieces, some, m.keep ? m.keep + at * m.kept : NULL, m.stored, line);
        else if (column == line)
            widen(from, count, m.stored, line);
        for (i64 top = 0; top < count; top += height) {
            float *to = out + top * depth + p * height;
            i64 there = least(height, count - top);
            /* Of a length known here: no call. */
            if (there == NR)
                memcpy(to, column + top, NR * 4);
            else if (there == MR)
                memcpy(to, column + top, MR * 4);
            else
                memcpy(to, column + top, (size_t)there * 4);
        }
    }
}

/* Rows first to first + count, columns k to k + depth, as panels of `height` rows, each (depth, height). What lies below
 * the last row is anything: it is multiplied and not stored. */
static void pack(matrix m, i64 first, i64 count, i64 k, i64 depth, int height, float *out) {
    (m.col_stride == 1 && (m.cols || !m.rows) ? pack_rows : pack_columns)(m, first, count, k, depth, height, out);
}

/* Ask the memory, which is idle while tiles are computed, for what `pack` will read: what belongs to the `next` of
 * `height` rows of the left panel that are multiplied next. */
static void ask_for(matrix m, i64 first, i64 count, i64 k, i64 depth, i64 row, i64 next, i64 height) {
    if (m.rows || m.cols) return; /* activations, just written or read; blocks, of which little is asked at a time */
    int along = m.col_stride == 1;
    const void *data = number(m.data, first * m.row_stride + k * m.col_stride, m.stored);
    i64 runs = along ? count : depth, length = along ? depth : count, stride = along ? m.row_stride : m.col_stride;
    for (i64 run = runs * row / height; run < runs * least(height, row + next) / height; run++)
        for (i64 i = 0; i < length; i += 64 / bytes_of(m.stored))
            __builtin_prefetch(number(data, run * stride + i, m.stored), 0, 2);
}
