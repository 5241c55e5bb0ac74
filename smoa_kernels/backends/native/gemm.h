/* The blocked loop: C (+)= left rightᵀ, as Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008) have it.
 *
 * Every product of a layer and its gradients is a call of `gemm`. What differs is
 *
 *   operand.h      what is read: a matrix in any of three dtypes and either memory order, its rows or terms in the order of an index,
 *                  some of its elements dropped;
 *   pack.h         how a piece of it becomes panels; a weight is modulated on the way (W0 ∘ (1 + s B A), or W0 ∘ s B A);
 *   pack_tiles.h   the same for bfloat16 tiles;
 *   microkernel.h  what multiplies panels: FMA, vdpbf16ps or AMX;
 *   epilogue.h     what becomes of a finished panel of C: bias and one rounding, another order, or the contraction with A and B.
 *
 * Two files call it: product.h multiplies in float32 (formats FLOATS and PARTS), bfloat16.h in bfloat16 (PAIRS).
 *
 * So a bfloat16 backward on AMX is two calls of bfloat16.h. dX = dY W_eff is `tokens_by_columns`: dY becomes left tiles (`pack_dy`); each thread
 * takes columns of W0, which `weight_right` reads, modulates and interleaves to right tiles that stay in the L2 cache; `pairs_panel`
 * multiplies 32 tokens by 32 of them in four tiles of C, over all terms; `write_rows_of_dx` rounds C, once. dA and dB are
 * `tiles_gradient`: the terms of a block's G = dYᵀ x are tokens, so `pack_terms` transposes both; `pairs_panel` makes 32 × 32 of G;
 * `contract_panel` makes H = s G ∘ W0 of that at once, and adds Bᵀ H to dA and H Aᵀ to dB.
 *
 * AVX10 would be another way to multiply the same tiles: a branch beside `has_amx()` in `pairs_panel`, and its name in `find_bf16`. A
 * processor with tiles of another shape asks for a format of its own, and a packing.
 *
 * No function allocates memory or keeps anything between calls. Sums run over the same terms in the same order for every number of
 * threads, but those of dA (of dB, where W0 is stored by columns), which are cut where the threads' rows are.
 */
#pragma once

#include "pack_tiles.h"

/* Threads of the OpenMP runtime that torch has loaded, so that no second pool competes. Weak, so NULL where there is none. */
void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));

typedef struct {
    void (*run)(void *, i64);
    void *job;
    i64 parts, next;
} team;

static void run_next(void *it) {
    team *t = it;
    i64 part = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
    if (part < t->parts) t->run(t->job, part);
}

static void in_parallel(void (*run)(void *, i64), void *job, i64 parts) {
    team t = {run, job, parts, 0};
    if (parts > 1 && GOMP_parallel) GOMP_parallel(run_next, &t, (unsigned)parts, 0);
    while (__atomic_load_n(&t.next, __ATOMIC_RELAXED) < parts) run_next(&t); /* a runtime may start fewer */
}

/* Where part `part` of `parts` begins, in whole units. */
static i64 share_of(i64 all, i64 unit, i64 part, i64 parts) { return least(all, ceil_div(all, unit) * part / parts * unit); }

/* A matrix product. Its operands are packed here, but for PAIRS, whose tiles others have packed. */
typedef struct gemm gemm_job;
struct gemm {
    int format;
    i64 depth, terms; /* how many terms there are, and how many are summed in registers */
    operand left, right;
    const adapter *adapter; /* of the right operand, or NULL */
    const half *left_tiles, *right_tiles;
    i64 left_rows, right_rows; /* that are packed together */
    float *C;                  /* of FLOATS and PARTS the result; of PAIRS room for a panel, (PANEL, right_rows) */
    i64 stride;
    int add;
    /* PAIRS alone, for rows i and columns j. `begin` writes first sums to C and returns 1, or returns 0; it may be NULL. `epilogue` takes
     * the finished panel. */
    int (*begin)(const gemm_job *, i64 i, i64 height, i64 j, i64 width);
    void (*epilogue)(const gemm_job *, i64 i, i64 height, i64 j, i64 width);
    void *context;
};

/* Floats that packing takes of a product of so many rows of the left operand. */
static i64 gemm_size(int format, i64 left_count, i64 right_rows, i64 depth, i64 rank) {
    i64 deep = row_size(format, block_depth(format, depth)), high = left_height(format);
    return round_up(least(round_up(MC, high), round_up(left_count, high)) * deep + SPILL, 16) + round_up(right_rows * deep + SPILL, 16) +
           scratch_size(format, depth, rank);
}

/* Rows of a right panel that are packed together: they stay in the L2 cache. */
static i64 right_rows_of(int format) { return format == PARTS ? 2 * NC : NC; }

/* Multiplies some rows of the left operand by some of the right one. C begins at the first of both. PAIRS ignores `i_first` and
 * `j_first`: its pointers to tiles are at the first row already. */
static void gemm(const gemm_job *g, i64 i_first, i64 i_count, i64 j_first, i64 j_count, float *workspace) {
    int f = g->format;
    i64 high = left_height(f), most = f == PAIRS ? g->left_rows : f == PARTS ? 2048 : MC, kc = block_depth(f, g->depth);
    float *left = workspace, *right = left + (f == PAIRS ? 0 : round_up(least(most, round_up(i_count, high)) * row_size(f, kc) + SPILL, 16));
    float *scratch = right + (f == PAIRS ? 0 : round_up(g->right_rows * row_size(f, kc) + SPILL, 16));
    begin_tiles(f);
    for (i64 i = 0; i < i_count; i += most) {
        i64 height = least(most, i_count - i), k = 0;
        do {
            i64 deep = least(kc, g->depth - k), size = row_size(f, deep);
            const float *a = f == PAIRS ? (const float *)g->left_tiles + i * size : left;
            if (f != PAIRS) pack_left(f, &g->left, i_first + i, height, k, deep, left, scratch);
            for (i64 j = 0; j < j_count; j += g->right_rows) {
                i64 width = least(g->right_rows, j_count - j);
                const float *b = f == PAIRS ? (const float *)g->right_tiles + j * size : right;
                if (f != PAIRS) pack_right(f, &g->right, g->adapter, j_first + j, width, k, deep, right, scratch);
                for (i64 r = 0; r < height; r += high) {
                    i64 some = least(high, height - r);
                    if (f == PAIRS) {
                        int add = g->begin && g->begin(g, i + r, some, j, width);
                        multiply(f, 0, deep, a + r * size, b, g->C, g->stride, some, width, add);
                        g->epilogue(g, i + r, some, j, width);
                        continue;
                    }
                    multiply(f, g->terms, deep, a + r * size, b, g->C + (i + r) * g->stride + j, g->stride, some, width,
                             g->add || k > 0);
                }
            }
            k += kc;
        } while (k < g->depth);
    }
    end_tiles(f);
}
