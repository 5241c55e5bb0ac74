/* Packing: a piece of an operand in the layout that a micro-kernel reads. What SMoA adds to a product is done here: a weight's panel
 * becomes W_eff or ΔW, permuted rows and columns are read in block order, dropped elements become 0, half types become float32. So
 * neither W_eff nor activations in another order are ever in memory as a whole.
 *
 * Panels of floats first, which PARTS cuts in three; then tiles of bfloat16, which are read, modulated and rounded as such.
 */
#pragma once

#include "microkernel.h"

enum {
    NC = NR * 4, /* rows of the right panels that are packed together */
    MC = MR * 147, /* of the left ones: 2058 with AVX-512, 882 with AVX2. A second left block has the right operand packed again. */
    SPILL = 8, /* floats beyond the last panel that packing may write */
    /* How far ahead packing prefetches, in floats along a row, or in columns: it reads short runs that are far apart. */
    AHEAD = 64,
    COLUMNS_AHEAD = 4,
    BESIDE = 4, /* rows, or columns, modulated at a time, so that what is loaded of a factor serves them all */
};

/* What a weight's panel becomes: W_eff = W0 ∘ (1 + s B A) where the labels of row and column agree; or, where `rows` and `cols` are
 * given, which are those of one block of `rank`, its ΔW = W0 ∘ s B A. */
typedef struct {
    const layer *l;
    i64 rank;
    const int32_t *row_label, *col_label;
    const i64 *rows, *cols;
} adapter;

static inline float factor_A(const layer *l, i64 t, i64 col) {
    return value_at(l->A, t * l->A_rank + col * l->A_col, (int)l->factor_dtype);
}

static inline float factor_B(const layer *l, i64 row, i64 t) {
    return value_at(l->B, row * l->B_row + t * l->B_rank, (int)l->factor_dtype);
}

/* to[t * apart + c] = A's columns `cols`, or those from `first` on; 0 beyond a column's own rank where there are labels. */
static void copy_A(const layer *l, const i64 *cols, i64 first, i64 width, i64 rank, const int32_t *label, float *to, i64 apart) {
    for (i64 t = 0; t < rank; t++)
        for (i64 c = 0; c < width; c++) {
            i64 col = cols ? cols[c] : first + c;
            to[t * apart + c] = !label || t < rank_of(l, label[col]) ? factor_A(l, t, col) : 0;
        }
}

/* to[t * apart + i] = s B's rows `rows`, or those from `first` on, likewise. */
static void copy_B(const layer *l, const i64 *rows, i64 first, i64 count, i64 rank, const int32_t *label, float *to, i64 apart) {
    for (i64 t = 0; t < rank; t++)
        for (i64 i = 0; i < count; i++) {
            i64 row = rows ? rows[i] : first + i;
            to[t * apart + i] = !label || t < rank_of(l, label[row]) ? (float)l->scaling * factor_B(l, row, t) : 0;
        }
}

/* to (8, 8) = the transpose of 8 floats at each of `rows`; rows of `to` are `stride` apart, the first written first. */
static inline void transpose(const float *const *rows, i64 at, float *to, i64 stride) {
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
        for (int upper = 0; upper < 2; upper++) {
            r[i + 2 * upper] = _mm256_shuffle_ps(t[i + upper], t[i + 2 + upper], 0x44);
            r[i + 2 * upper + 1] = _mm256_shuffle_ps(t[i + upper], t[i + 2 + upper], 0xee);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + (i + 4) * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
}

/* Of some rows whose terms are contiguous, where terms k to k + depth are: in place, or in `ordered`, (rows, KC + CHUNK), where they
 * have another order or dtype. */
static void read_rows(const operand *o, i64 first, i64 count, i64 k, i64 depth, const chunk *chunks, i64 some, float *ordered,
                      const float **row) {
    for (i64 i = 0; i < count; i++, ordered += KC + CHUNK) {
        i64 at = first + i;
        const void *from = element(o->data, (o->rows ? o->rows[at] : at) * o->row_stride + (o->cols ? 0 : k), o->dtype);
        row[i] = o->cols || o->dtype != FLOAT32 ? ordered : from;
        if (o->cols)
            gather(from, o->dtype, o->cols + k, depth, chunks, some, o->keep ? o->keep + at * o->keep_words : NULL, ordered);
        else if (row[i] == ordered)
            widen_row(from, depth, o->dtype, ordered);
    }
}

/* Panels of rows whose terms are contiguous: transposed. */
static void pack_rows(const operand *o, i64 first, i64 count, i64 k, i64 depth, int height, float *to) {
    float ordered[NR * (KC + CHUNK)];
    chunk chunks[KC];
    i64 some = o->cols ? chunks_of(o->cols + k, depth, o->dtype, chunks) : 0;
    int in_place = !o->cols && o->dtype == FLOAT32;
    for (i64 top = 0; top < count; top += height, to += depth * height) {
        i64 there = least(height, count - top), p = 0;
        const float *row[NR + 8];
        read_rows(o, first + top, there, k, depth, chunks, some, ordered, row);
        for (i64 i = there; i < NR + 8; i++) row[i] = row[there - 1];
        /* Eight rows at a time; the last eight overlap where the height is no multiple. Of a panel lower than eight the
         * transposes reach into the next column, which is written after, or beyond the panel (SPILL). */
        for (; p + 8 <= depth; p += 8)
            for (int i = 0; i < height; i += 8) {
                int start = i + 8 > height && height >= 8 ? height - 8 : i;
                if (in_place && p % 16 == 0)
                    for (int r = 0; r < 8; r++) __builtin_prefetch(row[start + r] + p + AHEAD);
                transpose(row + start, p, to + p * height + start, height);
            }
        for (; p < depth; p++)
            for (int i = 0; i < height; i++) to[p * height + i] = row[i][p];
    }
}

/* Panels of rows that are contiguous: a column is read once, put in order and widened, for all panels. */
static void pack_columns(const operand *o, i64 first, i64 count, i64 k, i64 depth, int height, float *to) {
    float line[MC + CHUNK];
    chunk chunks[MC];
    i64 some = o->rows ? chunks_of(o->rows + first, count, o->dtype, chunks) : 0;
    for (i64 p = 0; p < depth; p++) {
        i64 at = k + p, further = k + least(p + COLUMNS_AHEAD, depth - 1), start = o->rows ? 0 : first;
        const void *from = element(o->data, (o->cols ? o->cols[at] : at) * o->col_stride + start, o->dtype);
        const void *later = element(o->data, (o->cols ? o->cols[further] : further) * o->col_stride + start, o->dtype);
        const float *column = o->rows || o->dtype != FLOAT32 ? line : from;
        for (i64 i = 0; i < some; i++) __builtin_prefetch((const float *)later + chunks[i].at);
        for (i64 i = 0; i < count && !o->rows; i += 64 / bytes_of(o->dtype)) __builtin_prefetch(element(later, i, o->dtype));
        if (o->rows)
            gather(from, o->dtype, o->rows + first, count, chunks, some, o->keep ? o->keep + at * o->keep_words : NULL, line);
        else if (column == line)
            widen_row(from, count, o->dtype, line);
        for (i64 top = 0; top < count; top += height) {
            float *panel = to + top * depth + p * height;
            i64 there = least(height, count - top);
            /* Of a length known here: no call. */
            if (there == NR)
                memcpy(panel, column + top, NR * 4);
            else if (there == MR)
                memcpy(panel, column + top, MR * 4);
            else
                memcpy(panel, column + top, (size_t)there * 4);
        }
    }
}

/* Rows first to first + count, terms k to k + depth, as panels of `height` rows, each (depth, height). What lies below
 * the last row is anything: it is multiplied and not stored. */
static void pack_floats(const operand *o, i64 first, i64 count, i64 k, i64 depth, int height, float *to) {
    (o->col_stride == 1 && (o->cols || !o->rows) ? pack_rows : pack_columns)(o, first, count, k, depth, height, to);
}

/* Some columns of a panel, of blocks of one rank, become W_eff or ΔW. `factor` (rank, NR) is s B. */
INLINE void modulate_columns(int some, const adapter *m, i64 k, i64 rank, vi left, vi right, const float *factor, float *panel) {
    const layer *l = m->l;
    vf low[BESIDE] = {{0}}, high[BESIDE] = {{0}};
    i64 at[BESIDE];
    for (int c = 0; c < some; c++) at[c] = (m->cols ? m->cols[k + c] : k + c) * l->A_col;
    for (i64 t = 0; t < rank; t++) {
        vf first = load(factor + t * NR), second = load(factor + t * NR + LANES);
#pragma GCC unroll 4
        for (int c = 0; c < some; c++) {
            float a = ((const float *)l->A)[at[c] + t * l->A_rank];
            low[c] += first * a;
            high[c] += second * a;
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < some; c++) {
        float *w = panel + c * NR;
        vf a = load(w), b = load(w + LANES);
        if (!m->cols) {
            int32_t block = m->col_label[k + c];
            low[c] = select_label(left, block, a + a * low[c], a);
            high[c] = select_label(right, block, b + b * high[c], b);
        }
        store(w, m->cols ? a * low[c] : low[c]);
        store(w + LANES, m->cols ? b * high[c] : high[c]);
    }
}

static i64 rank_at(const adapter *m, i64 col) { return m->cols ? m->rank : rank_of(m->l, m->col_label[col]); }

/* The blocks of some columns, as bits: block k sets bit k % 64, so two blocks may share one. A weight of one block gives 1. */
static inline uint64_t blocks_of(const adapter *m, i64 col, int some) {
    uint64_t found = m->cols ? 1 : 0;
    for (int c = 0; !m->cols && c < some; c++) found |= (uint64_t)1 << m->col_label[col + c] % 64;
    return found;
}

/* Right panels of the weight's rows first to first + count become W_eff, or ΔW of one block; the factors are float32. */
static void modulate(const adapter *m, i64 first, i64 count, i64 k, i64 depth, float *panels, float *factor) {
    const layer *l = m->l;
    for (i64 top = 0; top < count; top += NR, panels += depth * NR) {
        int32_t block[NR] = {0};
        uint64_t there = m->rows ? 1 : 0; /* blocks of these rows: columns of no such block stay as they are */
        for (i64 i = 0; i < NR; i++) {
            i64 at = first + top + least(i, count - top - 1), row = m->rows ? m->rows[at] : at;
            if (!m->rows) there |= (uint64_t)1 << (block[i] = m->row_label[at]) % 64;
            for (i64 t = 0; t < m->rank; t++)
                factor[t * NR + i] = (float)l->scaling * ((const float *)l->B)[row * l->B_row + t * l->B_rank];
        }
        vi left, right;
        memcpy(&left, block, sizeof left);
        memcpy(&right, block + LANES, sizeof right);
        for (i64 p = 0; p < depth;) {
            i64 rank = rank_at(m, k + p);
            int alike = p + BESIDE <= depth;
            for (int c = 1; alike && c < BESIDE; c++) alike = rank_at(m, k + p + c) == rank;
            if (!(there & blocks_of(m, k + p, alike ? BESIDE : 1)))
                ;
            else if (alike)
                modulate_columns(BESIDE, m, k + p, rank, left, right, factor, panels + p * NR);
            else
                modulate_columns(1, m, k + p, rank, left, right, factor, panels + p * NR);
            p += alike ? BESIDE : 1;
        }
    }
}

#if HAS_TILES
/* The three bfloat16 parts of two vectors, as 16 pairs of terms, TERMS / 2 apart. Their sum is exact and
 * nothing overflows: the first part is truncated; the remainder is below its last bit, and is rounded to the second; the third is the
 * rest. Infinity becomes NaN, for the second part is infinity less itself. */
INLINE void cut(vf low, vf high, half *to) {
    const vu upper = (vu){0} + 0xffff0000;
    vu first = (vu)low & upper, second = (vu)high & upper;
    _mm512_store_si512(to, (__m512i)(first >> 16 | second));
    low -= (vf)first, high -= (vf)second;
    first = ((vu)low + 0x8000) & upper, second = ((vu)high + 0x8000) & upper;
    _mm512_store_si512(to + PART, (__m512i)(first >> 16 | second));
    low -= (vf)first, high -= (vf)second;
    _mm512_store_si512(to + 2 * PART, (__m512i)((vu)low >> 16 | ((vu)high & upper))); /* tiny ones have lower bits */
}

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

/* Term p of a panel's 16 columns; 0 where there are no more terms. */
INLINE vf term_or_zero(const float *panel, i64 p, i64 depth, i64 column) {
    return p < depth ? load(panel + p * PANEL + column) : (vf){0};
}

/* Panels of floats (depth, PANEL) as right ones of PARTS. */
static void cut_panels(i64 count, i64 depth, const float *panel, half *to) {
    for (i64 top = 0; top < count; top += PANEL, panel += depth * PANEL)
        for (i64 k = 0; k < depth; k += TERMS, to += STEP)
            for (i64 p = k; p < k + SIDE; p++)
                for (int q = 0; q < 2; q++)
                    cut(term_or_zero(panel, p, depth, q * SIDE), term_or_zero(panel, p + SIDE, depth, q * SIDE),
                        to + q * TILE + (p - k) * TERMS);
}

/* Right tiles become left ones. */
static void turn_tiles(i64 tiles, half *tile) {
    for (__m512i r[SIDE]; tiles > 0; tiles--, tile += TILE) {
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) r[i] = _mm512_load_si512(tile + i * TERMS);
        transpose_lines(r);
        store_lines(r, tile);
    }
}

/* Rows whose terms are contiguous as left panels of PARTS, in which they lie as they are. */
static void cut_rows(const operand *o, i64 first, i64 count, i64 k, i64 depth, half *to) {
    float ordered[PANEL * (KC + CHUNK)];
    chunk chunks[KC];
    i64 some = o->cols ? chunks_of(o->cols + k, depth, o->dtype, chunks) : 0;
    for (i64 top = 0; top < count; top += PANEL) {
        i64 there = least(PANEL, count - top);
        const float *row[PANEL];
        read_rows(o, first + top, there, k, depth, chunks, some, ordered, row);
        for (i64 p = 0; p < depth; p += TERMS, to += STEP)
            for (i64 i = 0; i < there; i++) {
                const float *from = row[i] + p;
                __builtin_prefetch(from + AHEAD);
                __builtin_prefetch(from + AHEAD + SIDE);
                cut((vf)_mm512_maskz_loadu_ps(first_lanes(depth - p), from),
                    (vf)_mm512_maskz_loadu_ps(first_lanes(depth - p - SIDE), from + SIDE), to + i * TERMS);
            }
    }
}
#else
#define cut_panels(count, depth, panel, to) ((void)(panel))
#define turn_tiles(tiles, tile) ((void)(tile))
#define cut_rows(o, first, count, k, depth, to) ((void)(to))
#endif

/* Floats of scratch that pack_right, and pack_left, need. */
static i64 scratch_size(int format, i64 depth, i64 rank) {
    return (format == PARTS ? round_up(NC * least(KC, depth) + SPILL, 16) : 0) + round_up(rank * NR, 16);
}

/* Right panels of FLOATS or PARTS: rows first to first + count, terms k to k + depth; modulated, while they are in the cache, where `m`
 * is given. */
static void pack_right(int format, const operand *o, const adapter *m, i64 first, i64 count, i64 k, i64 depth, float *to,
                       float *scratch) {
    float *factor = scratch + scratch_size(format, depth, 0);
    for (i64 top = 0; top < count; top += NC) {
        i64 some = least(NC, count - top);
        float *panels = format == PARTS ? scratch : to + top * depth;
        pack_floats(o, first + top, some, k, depth, NR, panels);
        if (m) modulate(m, first + top, some, k, depth, panels, factor);
        if (format == PARTS) cut_panels(some, depth, panels, (half *)(to + top * row_size(PARTS, depth)));
    }
}

/* Left panels of FLOATS or PARTS. */
static void pack_left(int format, const operand *o, i64 first, i64 count, i64 k, i64 depth, float *to, float *scratch) {
    if (format == FLOATS)
        pack_floats(o, first, count, k, depth, MR, to);
    else if (o->col_stride == 1 && (o->cols || !o->rows))
        cut_rows(o, first, count, k, depth, (half *)to);
    else
        for (i64 top = 0; top < count; top += NC) {
            i64 some = least(NC, count - top);
            half *tiles = (half *)(to + top * row_size(PARTS, depth));
            pack_floats(o, first + top, some, k, depth, NR, scratch);
            cut_panels(some, depth, scratch, tiles);
            turn_tiles(round_up(some, NR) / NR * (row_size(PARTS, depth) / 8), tiles);
        }
}
