/* SMoA's forward and backward in float32 on a CPU: GEMMs whose packing does the rest.
 *
 * A GEMM on a CPU copies its operands into panels before it multiplies them (Goto and van de Geijn 2008, "Anatomy of
 * High-Performance Matrix Multiplication"). What SMoA adds to a frozen layer is done in these copies, where it costs
 * next to nothing: a weight's panel is modulated (`modulate`), permuted columns are read in their order (`pack`,
 * panels.h). Neither W_eff nor gathered activations are ever written to memory.
 *
 * Compiled once for each instruction set (hatch_build.py), which VECTOR_BYTES tells. No function allocates memory or
 * keeps anything between calls: panels lie in a workspace of the caller's. Sums run over the same terms in the same
 * order for every number of threads, but those of dA, which are cut where the rows of the threads asked for are, however
 * many a runtime starts.
 */
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include <dlfcn.h>

#include "panels.h"

enum { BESIDE = 4 /* columns modulated at a time, so that what is loaded of B serves them all */ };

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

static i64 product_size(i64 a_count, i64 depth, i64 rank) {
    return right_size(depth) + left_size(a_count, depth) + lines(rank * NR);
}

/* y (rows of a, rows of b) = a bᵀ over `depth` columns, for some rows of each, or y plus that where `add`; b modulated
 * where `m` is given. */
static void product(matrix a, i64 a_first, i64 a_count, matrix b, i64 b_first, i64 b_count, i64 depth, const adapter *m,
                    float *y, i64 stride, int add, float *workspace) {
    float *right = workspace, *left = right + right_size(depth), *scratch = left + left_size(a_count, depth);
    for (i64 i = 0; i < a_count; i += MC)
        for (i64 k = 0; k < depth; k += KC) {
            i64 height = least(MC, a_count - i), deep = least(KC, depth - k);
            pack(a, a_first + i, height, k, deep, MR, left);
            for (i64 j = 0; j < b_count; j += NC) {
                i64 width = least(NC, b_count - j), last = j + NC >= b_count;
                pack(b, b_first + j, width, k, deep, NR, right);
                if (m) modulate(m, b_first + j, width, k, deep, right, scratch);
                i64 next = last ? 0 : j + NC, after = last ? k + KC : k, further = least(KC, depth - after);
                for (i64 r = 0; r < height; r += MR) {
                    if (further > 0) ask_for(b, b_first + next, least(NC, b_count - next), after, further, r, height);
                    for (i64 s = 0; s < width; s += NR)
                        tile(deep, left + r * deep, right + s * deep, y + (i + r) * stride + j + s, stride,
                             least(MR, height - r), least(NR, width - s), add || k > 0);
                }
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
i64 smoa_linear_workspace(i64 tokens, i64 cols, i64 rank, i64 threads) {
    return threads * product_size(tokens, cols, rank) + 16;
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
            j->workspace + part * product_size(j->tokens, j->cols, j->m ? j->m->rank : 0));
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
    /* Rows of H that are contracted at a time, with so many ranks of the factors: they stay in the L1 cache, sums stay in
     * registers and are short. */
    TOGETHER = 4,
    RANKS = 2,
};

/* dA[t] += Σ_i B[i][t] h[i], dB[i][t] = Σ_c h[i][c] A[t][c] for `height` rows h (height, width) and some ranks t, whose
 * rows of A and dA are `width` apart; B[i] and dB[i] are at rows[i] * stride. */
INLINE void contract_ranks(int some, const float *h, i64 height, i64 width, const float *A, float *dA, const float *B,
                           float *dB, const i64 *rows, i64 stride) {
    float b[RANKS][TOGETHER] = {{0}}, sum[RANKS][TOGETHER] = {{0}};
    for (int t = 0; t < some; t++)
        for (int i = 0; i < height; i++) b[t][i] = B[rows[i] * stride + t];
    i64 c = 0;
    if (height == TOGETHER) {
        vf sums[RANKS][TOGETHER] = {{{0}}};
        for (; c + LANES <= width; c += LANES) {
            vf one[TOGETHER];
#pragma GCC unroll 4
            for (int i = 0; i < TOGETHER; i++) one[i] = load(h + i * width + c);
#pragma GCC unroll 2
            for (int t = 0; t < some; t++) {
                vf factor = load(A + t * width + c), added = {0};
#pragma GCC unroll 4
                for (int i = 0; i < TOGETHER; i++) {
                    sums[t][i] += one[i] * factor;
                    added += one[i] * b[t][i];
                }
                store(dA + t * width + c, load(dA + t * width + c) + added);
            }
        }
        for (int t = 0; t < some; t++)
            for (int i = 0; i < TOGETHER; i++)
                for (int l = 0; l < LANES; l++) sum[t][i] += sums[t][i][l];
    }
    for (; c < width; c++)
        for (int t = 0; t < some; t++) {
            float added = 0;
            for (int i = 0; i < height; i++) {
                sum[t][i] += h[i * width + c] * A[t * width + c];
                added += h[i * width + c] * b[t][i];
            }
            dA[t * width + c] += added;
        }
    for (int t = 0; t < some; t++)
        for (int i = 0; i < height; i++) dB[rows[i] * stride + t] = sum[t][i];
}

/* dA_k += B_kᵀ H and dB_k = H A_kᵀ for some rows of block k: H = s G ∘ W0 is written over G, A and dA (ranks[k], width)
 * are in block order, as is a row of W0 in `line`. */
static void contract(const gradient_job *j, float *H, i64 k, i64 first, i64 count, const float *A, float *dA,
                     const piece *pieces, i64 some, float *restrict line) {
    i64 rank = rank_of(j->ranks, k, j->rank), width = j->col_offsets[k + 1] - j->col_offsets[k];
    i64 step = j->weight.col_stride;
    const i64 *rows = j->row_index + first, *cols = j->col_index + j->col_offsets[k];
    float scaling = j->scaling;
    for (i64 top = 0; top < count; top += TOGETHER, rows += TOGETHER) {
        i64 height = least(TOGETHER, count - top);
        float *group = H + top * width;
        for (i64 i = 0; i < height; i++) {
            const float *weight = j->weight.data + rows[i] * j->weight.row_stride;
            float *restrict h = group + i * width;
            if (step == 1)
                gather(weight, cols, width, pieces, some, line);
            else
                for (i64 c = 0; c < width; c++) line[c] = weight[cols[c] * step];
            for (i64 c = 0; c < width; c++) h[c] *= scaling * line[c];
        }
        for (i64 t = 0; t < rank; t += RANKS)
            if (t + RANKS <= rank)
                contract_ranks(RANKS, group, height, width, A + t * width, dA + t * width, j->B + t, j->dB + t, rows,
                               j->rank);
            else
                contract_ranks(1, group, height, width, A + t * width, dA + t * width, j->B + t, j->dB + t, rows,
                               j->rank);
    }
}

/* Floats that the pieces of so many columns take. */
static i64 pieces_size(i64 count) { return lines(count * (i64)(sizeof(piece) / sizeof(float))); }

static i64 gradient_size(i64 tokens, i64 widest, i64 slab, i64 rank) {
    return lines(slab * widest) + 2 * lines(rank * widest) + lines(widest + LANES) + pieces_size(widest) +
           product_size(slab, tokens, 0);
}

/* Some rows of block k, from `first` to `end`. */
static void block_gradient(const gradient_job *j, i64 k, i64 first, i64 end, float *dA, float *workspace) {
    i64 col = j->col_offsets[k], width = j->col_offsets[k + 1] - col, rank = rank_of(j->ranks, k, j->rank);
    const i64 *cols = j->col_index + col;
    if (first >= end || !width || rank < 1) return;
    float *G = workspace, *A = G + lines(j->slab * j->widest), *sum = A + lines(rank * width);
    float *line = sum + lines(rank * width), *rest = line + lines(width + LANES);
    piece *pieces = (piece *)rest;
    i64 some = pieces_of(cols, width, pieces);
    rest += pieces_size(width);
    for (i64 t = 0; t < rank; t++)
        for (i64 c = 0; c < width; c++) {
            A[t * width + c] = j->A[t * j->cols + cols[c]];
            sum[t * width + c] = 0;
        }
    matrix dy = j->dy, x = j->x;
    dy.rows = j->row_index, x.rows = j->col_index;
    for (; first < end; first += j->slab) {
        i64 count = least(j->slab, end - first);
        product(dy, first, count, x, col, width, j->tokens, NULL, G, width, 0, rest);
        contract(j, G, k, first, count, A, sum, pieces, some, line);
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

static int labelled(labels of, i64 count, i64 blocks) {
    int found = 1;
    for (i64 i = 0; i < count; i++) found &= label(of, i) >= 0 && label(of, i) < blocks;
    return found;
}

/* Whether every row and column is of one of the blocks: what smoa_linear takes for granted. */
i64 smoa_labels_fit(i64 rows, i64 cols, const void *row_block, const void *col_block, i64 wide, i64 blocks) {
    return labelled((labels){row_block, wide}, rows, blocks) && labelled((labels){col_block, wide}, cols, blocks);
}

static int indexed(const i64 *index, const int32_t *offsets, i64 count, i64 blocks) {
    int found = offsets[0] == 0 && offsets[blocks] == count;
    for (i64 k = 0; k < blocks; k++) found &= offsets[k] <= offsets[k + 1];
    for (i64 i = 0; i < count; i++) found &= index[i] >= 0 && index[i] < count;
    return found;
}

/* Whether the blocks share all rows and all columns: what smoa_gradient takes for granted. */
i64 smoa_indices_fit(i64 rows, i64 cols, const i64 *row_index, const i64 *col_index, const int32_t *row_offsets,
                     const int32_t *col_offsets, i64 blocks) {
    return indexed(row_index, row_offsets, rows, blocks) && indexed(col_index, col_offsets, cols, blocks);
}

/* Whether there are threads to be had: without, one thread does it all. */
int smoa_has_threads(void) { return dlsym(RTLD_DEFAULT, "GOMP_parallel") != NULL; }

/* Of which linear.c this was compiled. */
const char *smoa_source(void) { return SOURCE; }
