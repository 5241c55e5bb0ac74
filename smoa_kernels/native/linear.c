/* SMoA's forward and backward in float32 on a CPU: GEMMs whose packing does the rest.
 *
 * A GEMM on a CPU copies its operands into panels before it multiplies them (Goto and van de Geijn 2008, "Anatomy of
 * High-Performance Matrix Multiplication"). What SMoA adds to a frozen layer is done in these copies, where it costs
 * next to nothing: a weight's panel is modulated (`modulate`), permuted columns are read in their order (`pack`).
 * Neither W_eff nor gathered activations are ever written to memory.
 *
 * Compiled once for each instruction set (hatch_build.py), which VECTOR_BYTES tells. No function allocates memory or
 * keeps anything between calls: panels lie in a workspace of the caller's. Sums run over the same terms in the same
 * order for every number of threads, but those of dA, which are cut where the rows of the threads asked for are, however
 * many a runtime starts.
 */
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include <stdint.h>
#include <string.h>
#include <dlfcn.h>
#include <immintrin.h>

typedef int64_t i64;
typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));

enum {
    LANES = VECTOR_BYTES / 4,
    /* A tile of the result is held in registers: 14 × 2 of 32 vectors, or 6 × 2 of 16; the others hold operands. */
    MR = VECTOR_BYTES == 64 ? 14 : 6,
    NR = 2 * LANES,
    /* Terms summed in registers before they are added to memory: short sums round little, long ones save additions. */
    KC = 384,
    /* Rows of the left panel (in the L2 cache) and of the right one (in the L3). */
    MC = MR * 12,
    NC = 2048,
    BESIDE = 4, /* columns modulated at a time, so that what is loaded of B serves them all */
    TRANSPOSED = 8, /* floats beyond the last panel that packing may write */
};

/* A matrix (rows, cols), its element (i, k) at data[rows[i] * row_stride + k * col_stride], one of the strides 1. `rows`
 * is NULL, in order, unless row_stride is 1. */
typedef struct {
    const float *data;
    i64 row_stride, col_stride;
    const i64 *rows;
} matrix;

/* Which block each row, or column, is in. */
typedef struct {
    const void *of;
    i64 wide; /* int32, not uint8 */
} labels;

static inline int32_t label(labels blocks, i64 i) {
    return blocks.wide ? ((const int32_t *)blocks.of)[i] : ((const uint8_t *)blocks.of)[i];
}

/* The adapter of a weight (rows, cols): block k has ranks[k] of at most `rank`, what A and B hold beyond is not read.
 * A (rank, cols) and B (rows, rank) have any strides, so that swapped they are those of the weight's transpose. */
typedef struct {
    const float *A, *B;
    i64 A_rank, A_col, B_row, B_rank, rank;
    labels row_block, col_block;
    const int32_t *ranks;
    float scaling;
} adapter;

/* Of block k, whatever `ranks` says. */
static inline i64 rank_of(const int32_t *ranks, i64 k, i64 most) { return ranks[k] < most ? ranks[k] : most; }

static i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* Floats in whole cache lines. */
static i64 lines(i64 count) { return (count + 15) / 16 * 16; }

static inline vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

#define INLINE static inline __attribute__((always_inline))

/* c (+)= Σ_k a_k b_kᵀ, a (rows, NR) tile of which (height, width) is there; a is (depth, MR), b is (depth, NR). */
INLINE void tile_of(int rows, i64 depth, const float *a, const float *b, float *c, i64 stride, i64 height, i64 width,
                    int add) {
    vf sum[MR][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vf){0};
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

/* Of the last rows no more are computed than some: of 128 tokens the last two are not worth fourteen. */
static void tile(i64 depth, const float *a, const float *b, float *c, i64 stride, i64 height, i64 width, int add) {
    if (height > MR / 2)
        tile_of(MR, depth, a, b, c, stride, height, width, add);
    else if (height > MR / 4)
        tile_of(MR / 2, depth, a, b, c, stride, height, width, add);
    else
        tile_of(MR / 4, depth, a, b, c, stride, height, width, add);
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

/* Panels of rows that are contiguous: transposed. */
static void pack_rows(matrix m, i64 first, i64 count, i64 k, i64 depth, int height, float *out) {
    for (i64 top = 0; top < count; top += height, out += depth * height) {
        int there = (int)least(height, count - top);
        const float *row[NR + 8];
        for (int i = 0; i < NR + 8; i++)
            row[i] = m.data + (first + top + least(i, there - 1)) * m.row_stride + k;
        i64 p = 0;
        /* Eight rows at a time; the last eight overlap where the height is no multiple. Of a panel lower than eight the
         * transposes reach into the next column, which is written after, or beyond the panel (TRANSPOSED). */
        for (; p + 8 <= depth; p += 8)
            for (int i = 0; i < height; i += 8) {
                int start = i + 8 > height && height >= 8 ? height - 8 : i;
                transpose(row + start, p, out + p * height + start, height);
            }
        for (; p < depth; p++)
            for (int i = 0; i < height; i++) out[p * height + i] = row[i][p];
    }
}

/* Panels of rows whose columns are contiguous, in the order of m.rows: a column is read once, for all panels. */
static void pack_columns(matrix m, i64 first, i64 count, i64 k, i64 depth, int height, float *out) {
    for (i64 p = 0; p < depth; p++) {
        const float *column = m.data + (k + p) * m.col_stride;
        for (i64 top = 0; top < count; top += height) {
            float *to = out + top * depth + p * height;
            i64 there = least(height, count - top);
            if (m.rows)
                for (i64 i = 0; i < there; i++) to[i] = column[m.rows[first + top + i]];
            else if (there == NR) { /* of a length known here: no call */
                store(to, load(column + first + top));
                store(to + LANES, load(column + first + top + LANES));
            } else
                memcpy(to, column + first + top, (size_t)there * 4);
        }
    }
}

/* Rows first to first + count, columns k to k + depth, as panels of `height` rows, each (depth, height). What lies below
 * the last row is anything: it is multiplied and not stored. */
static void pack(matrix m, i64 first, i64 count, i64 k, i64 depth, int height, float *out) {
    (m.col_stride == 1 && !m.rows ? pack_rows : pack_columns)(m, first, count, k, depth, height, out);
}

static inline vf chosen(vi where, vf yes, vf no) { return (vf)((where & (vi)yes) | (~where & (vi)no)); }

/* Some columns of a panel, of blocks of one rank; `factor` (rank, NR) is s B. */
INLINE void modulate_columns(int some, const adapter *m, i64 k, i64 rank, vi left, vi right, const float *factor,
                             float *panel) {
    const float *A = m->A + k * m->A_col;
    vf low[BESIDE] = {{0}}, high[BESIDE] = {{0}};
    for (i64 t = 0; t < rank; t++) {
        vf first = load(factor + t * NR), second = load(factor + t * NR + LANES);
#pragma GCC unroll 4
        for (int c = 0; c < some; c++) {
            float a = A[c * m->A_col + t * m->A_rank];
            low[c] += first * a;
            high[c] += second * a;
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < some; c++) {
        int32_t block = label(m->col_block, k + c);
        float *w = panel + c * NR;
        vf a = load(w), b = load(w + LANES);
        store(w, chosen(left == block, a + a * low[c], a));
        store(w + LANES, chosen(right == block, b + b * high[c], b));
    }
}

/* What `pack` made of W0's rows first to first + count becomes W_eff = W0 ∘ (1 + s Σ_t B[t] A[t]), where labels agree. */
static void modulate(const adapter *m, i64 first, i64 count, i64 k, i64 depth, float *panels, float *scratch) {
    for (i64 top = 0; top < count; top += NR, panels += depth * NR) {
        int32_t block[NR];
        for (i64 i = 0; i < NR; i++) {
            i64 row = first + top + least(i, count - top - 1);
            block[i] = label(m->row_block, row);
            for (i64 t = 0; t < m->rank; t++) scratch[t * NR + i] = m->scaling * m->B[row * m->B_row + t * m->B_rank];
        }
        vi left, right;
        memcpy(&left, block, sizeof left);
        memcpy(&right, block + LANES, sizeof right);
        for (i64 p = 0; p < depth;) {
            i64 rank = rank_of(m->ranks, label(m->col_block, k + p), m->rank);
            int alike = p + BESIDE <= depth;
            for (int c = 1; alike && c < BESIDE; c++)
                alike = rank_of(m->ranks, label(m->col_block, k + p + c), m->rank) == rank;
            if (alike)
                modulate_columns(BESIDE, m, k + p, rank, left, right, scratch, panels + p * NR);
            else
                modulate_columns(1, m, k + p, rank, left, right, scratch, panels + p * NR);
            p += alike ? BESIDE : 1;
        }
    }
}

static i64 right_size(i64 count, i64 depth) { return lines(least(NC, count + NR) * least(KC, depth) + TRANSPOSED); }

static i64 left_size(i64 depth) { return lines(MC * least(KC, depth) + TRANSPOSED); }

static i64 product_size(i64 b_count, i64 depth, i64 rank) {
    return right_size(b_count, depth) + left_size(depth) + lines(rank * NR);
}

/* y (rows of a, rows of b) = a bᵀ over `depth` columns, for some rows of each, or y plus that where `add`; b modulated
 * where `m` is given. */
static void product(matrix a, i64 a_first, i64 a_count, matrix b, i64 b_first, i64 b_count, i64 depth, const adapter *m,
                    float *y, i64 stride, int add, float *workspace) {
    float *right = workspace, *left = right + right_size(b_count, depth), *scratch = left + left_size(depth);
    for (i64 j = 0; j < b_count; j += NC)
        for (i64 k = 0; k < depth; k += KC) {
            i64 width = least(NC, b_count - j), deep = least(KC, depth - k);
            pack(b, b_first + j, width, k, deep, NR, right);
            if (m) modulate(m, b_first + j, width, k, deep, right, scratch);
            for (i64 i = 0; i < a_count; i += MC) {
                i64 height = least(MC, a_count - i);
                pack(a, a_first + i, height, k, deep, MR, left);
                for (i64 s = 0; s < width; s += NR)
                    for (i64 r = 0; r < height; r += MR)
                        tile(deep, left + r * deep, right + s * deep, y + (i + r) * stride + j + s, stride,
                             least(MR, height - r), least(NR, width - s), add || k > 0);
            }
        }
}

/* Threads: those of the OpenMP runtime that torch has loaded, so that no second pool competes with it. */
typedef struct {
    void (*run)(void *, i64);
    void *job;
    i64 next;
} team;

static void take(void *it) {
    team *t = it;
    t->run(t->job, __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED));
}

static void in_parallel(void (*run)(void *, i64), void *job, i64 parts) {
    typedef void (*starter)(void (*)(void *), void *, unsigned, unsigned);
    starter start = parts > 1 ? (starter)dlsym(RTLD_DEFAULT, "GOMP_parallel") : NULL;
    team t = {run, job, 0};
    if (start) start(take, &t, (unsigned)parts, 0);
    while (__atomic_load_n(&t.next, __ATOMIC_RELAXED) < parts) take(&t); /* a runtime may start fewer */
}

typedef struct {
    i64 tokens, rows, cols, parts, bands; /* bands of tokens, each for parts / bands threads */
    matrix x, weight;
    const adapter *m;
    float *y, *workspace;
    int add;
} linear_job;

/* Floats that smoa_linear needs. */
i64 smoa_linear_workspace(i64 rows, i64 cols, i64 rank, i64 threads) {
    return threads * product_size(rows, cols, rank) + 16;
}

static float *from_a_line(float *p) { return p + (16 - (uintptr_t)p / 4 % 16) % 16; }

/* Where part `part` of `parts` begins, in whole units. */
static i64 share_of(i64 all, i64 unit, i64 part, i64 parts) {
    return least(all, (all + unit - 1) / unit * part / parts * unit);
}

static void linear_part(void *it, i64 part) {
    linear_job *j = it;
    if (part >= j->parts) return;
    i64 sides = j->parts / j->bands, band = part / sides, side = part % sides;
    i64 top = share_of(j->tokens, MR, band, j->bands), height = share_of(j->tokens, MR, band + 1, j->bands) - top;
    i64 left = share_of(j->rows, NR, side, sides), width = share_of(j->rows, NR, side + 1, sides) - left;
    if (!height || !width) return;
    product(j->x, top, height, j->weight, left, width, j->cols, j->m, j->y + top * j->rows + left, j->rows, j->add,
            j->workspace + part * product_size(j->rows, j->cols, j->m ? j->m->rank : 0));
}

/* Every thread packs what it multiplies: of x `tokens / bands` rows, of W0 as many as `bands / parts` leaves it. */
static i64 bands_of(i64 tokens, i64 rows, i64 parts) {
    i64 best = 1;
    for (i64 bands = 2; bands <= parts; bands++)
        if (parts % bands == 0 && tokens / bands + rows * bands / parts < tokens / best + rows * best / parts) best = bands;
    return best;
}

/* y (tokens, rows) = x W_effᵀ, or y plus that where `add`: x (tokens, cols) with contiguous rows, W0 (rows, cols) in
 * either memory order; with W0 for W_eff where rank is 0. No dimension is 0. */
void smoa_linear(i64 tokens, i64 rows, i64 cols, const float *x, i64 x_stride, const float *weight, i64 row_stride,
                 i64 col_stride, const void *row_block, const void *col_block, i64 wide, const int32_t *ranks, i64 rank,
                 const float *A, i64 A_rank, i64 A_col, const float *B, i64 B_row, i64 B_rank, float scaling, float *y,
                 i64 add, float *workspace, i64 threads) {
    adapter m = {A, B, A_rank, A_col, B_row, B_rank, rank, {row_block, wide}, {col_block, wide}, ranks, scaling};
    linear_job job = {tokens, rows, cols, threads, bands_of(tokens, rows, threads), {x, x_stride, 1, NULL}, {weight, row_stride, col_stride, NULL},
                      rank ? &m : NULL, y, from_a_line(workspace), add != 0};
    in_parallel(linear_part, &job, threads);
}

typedef struct {
    i64 tokens, rows, cols, blocks, rank, parts;
    matrix dy, x, weight;
    const i64 *row_index, *col_index;
    const int32_t *row_offsets, *col_offsets, *ranks;
    const float *A, *B;
    float scaling, *dA, *dB; /* dA (parts, rank, cols), dB (rows, rank) */
    float *workspace;
    i64 widest, slab; /* columns of a block; rows of it whose G is held at a time */
} gradient_job;

enum {
    SLAB = 504,  /* of these rows at most, a multiple of both MR and TOGETHER */
    TOGETHER = 8 /* rows of H that are contracted at a time, so that sums stay in registers and are short */
};

/* dA_k += B_kᵀ H and dB_k = H A_kᵀ for some rows of block k: H = s G ∘ W0 is written over G, A and dA (ranks[k], width)
 * are in block order. */
static void contract(const gradient_job *j, float *H, i64 k, i64 first, i64 count, const float *A, float *dA) {
    i64 rank = rank_of(j->ranks, k, j->rank), width = j->col_offsets[k + 1] - j->col_offsets[k];
    i64 step = j->weight.col_stride;
    const i64 *rows = j->row_index + first, *cols = j->col_index + j->col_offsets[k];
    float scaling = j->scaling;
    for (i64 i = 0; i < count; i++) {
        const float *restrict weight = j->weight.data + rows[i] * j->weight.row_stride;
        float *restrict h = H + i * width;
        if (step == 1)
            for (i64 c = 0; c < width; c++) h[c] *= scaling * weight[cols[c]];
        else
            for (i64 c = 0; c < width; c++) h[c] *= scaling * weight[cols[c] * step];
    }
    for (i64 top = 0; top < count; top += TOGETHER)
        for (i64 t = 0; t < rank; t++) {
            int there = (int)least(TOGETHER, count - top);
            const float *h = H + top * width, *a = A + t * width;
            float *out = dA + t * width, b[TOGETHER] = {0}, sum[TOGETHER] = {0};
            for (int i = 0; i < there; i++) b[i] = j->B[rows[top + i] * j->rank + t];
            i64 c = 0;
            if (there == TOGETHER) {
                vf sums[TOGETHER] = {{0}};
                for (; c + LANES <= width; c += LANES) {
                    vf factor = load(a + c), added = {0};
#pragma GCC unroll 8
                    for (int i = 0; i < TOGETHER; i++) {
                        vf one = load(h + i * width + c);
                        sums[i] += one * factor;
                        added += one * b[i];
                    }
                    store(out + c, load(out + c) + added);
                }
                for (int i = 0; i < TOGETHER; i++)
                    for (int l = 0; l < LANES; l++) sum[i] += sums[i][l];
            }
            for (; c < width; c++) {
                float added = 0;
                for (int i = 0; i < there; i++) {
                    sum[i] += h[i * width + c] * a[c];
                    added += h[i * width + c] * b[i];
                }
                out[c] += added;
            }
            for (int i = 0; i < there; i++) j->dB[rows[top + i] * j->rank + t] = sum[i];
        }
}

static i64 gradient_size(i64 tokens, i64 widest, i64 slab, i64 rank) {
    return lines(slab * widest) + 2 * lines(rank * widest) + product_size(widest, tokens, 0);
}

/* Some rows of block k, from `first` to `end`. */
static void block_gradient(const gradient_job *j, i64 k, i64 first, i64 end, float *dA, float *workspace) {
    i64 col = j->col_offsets[k], width = j->col_offsets[k + 1] - col, rank = rank_of(j->ranks, k, j->rank);
    const i64 *cols = j->col_index + col;
    if (first >= end || !width || rank < 1) return;
    float *G = workspace, *A = G + lines(j->slab * j->widest), *sum = A + lines(rank * width);
    for (i64 t = 0; t < rank; t++)
        for (i64 c = 0; c < width; c++) {
            A[t * width + c] = j->A[t * j->cols + cols[c]];
            sum[t * width + c] = 0;
        }
    matrix dy = j->dy, x = j->x;
    dy.rows = j->row_index, x.rows = j->col_index;
    for (; first < end; first += j->slab) {
        i64 count = least(j->slab, end - first);
        product(dy, first, count, x, col, width, j->tokens, NULL, G, width, 0, sum + lines(rank * width));
        contract(j, G, k, first, count, A, sum);
    }
    for (i64 t = 0; t < rank; t++)
        for (i64 c = 0; c < width; c++) dA[t * j->cols + cols[c]] = sum[t * width + c];
}

static void gradient_part(void *it, i64 part) {
    gradient_job *j = it;
    if (part >= j->parts) return;
    float *dA = j->dA + part * j->rank * j->cols;
    float *workspace = j->workspace + part * gradient_size(j->tokens, j->widest, j->slab, j->rank);
    for (i64 k = 0; k < j->blocks; k++) {
        i64 top = j->row_offsets[k], height = j->row_offsets[k + 1] - top;
        /* In whole groups, so that a row of dB is summed in the same order however many threads there are; where a block
         * has fewer than threads, others take the next block's. */
        i64 turn = (part + k) % j->parts;
        i64 first = share_of(height, TOGETHER, turn, j->parts), end = share_of(height, TOGETHER, turn + 1, j->parts);
        block_gradient(j, k, top + first, top + end, dA, workspace);
    }
}

static i64 largest_of(const int32_t *offsets, i64 blocks) {
    i64 largest = 0;
    for (i64 k = 0; k < blocks; k++)
        if (offsets[k + 1] - offsets[k] > largest) largest = offsets[k + 1] - offsets[k];
    return largest;
}

/* No more rows than a thread has of a block. */
static i64 slab_of(const int32_t *row_offsets, i64 blocks, i64 threads) {
    i64 groups = (largest_of(row_offsets, blocks) + TOGETHER - 1) / TOGETHER;
    return least(SLAB, (groups + threads - 1) / threads * TOGETHER);
}

/* Floats that smoa_gradient needs. */
i64 smoa_gradient_workspace(i64 tokens, const int32_t *row_offsets, const int32_t *col_offsets, i64 blocks, i64 rank,
                            i64 threads) {
    i64 slab = slab_of(row_offsets, blocks, threads);
    return threads * gradient_size(tokens, largest_of(col_offsets, blocks), slab, rank) + 16;
}

/* dA (threads, rank, cols), still to be summed, and dB (rows, rank), zeros before: of dy (tokens, rows) and x (tokens,
 * cols) with contiguous rows, A and B contiguous. There is at least one token. */
void smoa_gradient(i64 tokens, i64 rows, i64 cols, const float *dy, i64 dy_stride, const float *x, i64 x_stride,
                   const float *weight, i64 row_stride, i64 col_stride, const i64 *row_index, const i64 *col_index,
                   const int32_t *row_offsets, const int32_t *col_offsets, i64 blocks, const int32_t *ranks, i64 rank,
                   const float *A, const float *B, float scaling, float *dA, float *dB, float *workspace, i64 threads) {
    gradient_job job = {tokens, rows, cols, blocks, rank, threads, {dy, 1, dy_stride, NULL}, {x, 1, x_stride, NULL},
                        {weight, row_stride, col_stride, NULL}, row_index, col_index, row_offsets, col_offsets, ranks,
                        A, B, scaling, dA, dB, from_a_line(workspace), largest_of(col_offsets, blocks),
                        slab_of(row_offsets, blocks, threads)};
    in_parallel(gradient_part, &job, threads);
}

/* Whether there are threads to be had: without, one thread does it all. */
int smoa_has_threads(void) { return dlsym(RTLD_DEFAULT, "GOMP_parallel") != NULL; }

/* Of which linear.c this was compiled. */
const char *smoa_source(void) { return SOURCE; }
