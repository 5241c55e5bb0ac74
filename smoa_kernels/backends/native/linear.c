/* SMoA's forward and backward in float32 on a CPU: GEMMs whose packing does the rest.
 *
 * A GEMM on a CPU copies its operands into panels before it multiplies them (Goto and van de Geijn 2008, "Anatomy of
 * High-Performance Matrix Multiplication"). What SMoA adds to a frozen layer is done in these copies, where it costs
 * next to nothing: a weight's panel is modulated (`modulate`, adapter.h), permuted columns are read in their order and
 * some dropped (`pack`, panels.h). Neither W_eff nor gathered activations are ever written to memory. Beside y here there
 * are ΔW's own product (update.h) and the factors' gradients (gradient.h). AMX multiplies panels where there is one
 * (thirds.h). bfloat16 has code of its own where the processor multiplies it (bf16_linear.h).
 *
 * Compiled once for each instruction set (hatch_build.py), which VECTOR_BYTES tells. No function allocates memory or
 * keeps anything between calls: panels lie in a workspace of the caller's. Sums run over the same terms in the same
 * order for every number of threads, but those of dA (of dB, where W0 is stored by columns), which are cut where the rows
 * of the threads asked for are, however many a runtime starts.
 */
#include "adapter.h"
#include "few_tokens.h"
#include "gradient.h"
#include "mask.h"
#include "passes.h"
#include "threads.h"
#include "update.h"
#include "bf16.h"
#if HAS_TILES
#include "bf16_input.h"
#endif

typedef struct {
    i64 tokens, rows, cols, parts, bands; /* bands of tokens, each for parts / bands threads */
    int thirds;
    matrix x, weight;
    const adapter *m;
    float *y, *workspace;
    int add;
} linear_job;

/* Floats that smoa_linear needs. */
i64 smoa_linear_workspace(i64 tokens, i64 cols, i64 rank, i64 threads) {
    return threads * product_size(by_thirds(tokens, cols), tokens, cols, rank) + 16;
}

static void linear_part(void *it, i64 part) {
    linear_job *j = it;
    if (part >= j->parts) return;
    i64 sides = j->parts / j->bands, band = part / sides, side = part % sides, high = left_height(j->thirds);
    i64 top = share_of(j->tokens, high, band, j->bands), height = share_of(j->tokens, high, band + 1, j->bands) - top;
    i64 left = share_of(j->rows, NR, side, sides), width = share_of(j->rows, NR, side + 1, sides) - left;
    if (!height || !width) return;
    i64 size = product_size(j->thirds, j->tokens, j->cols, j->m ? j->m->rank : 0);
    product(j->thirds, j->x, top, height, j->weight, left, width, j->cols, terms_of(j->tokens), j->m,
            j->y + top * j->rows + left, j->rows, j->add, j->workspace + part * size);
}

/* Every thread packs what it multiplies: of x `tokens / bands` rows, of W0 as many as `bands / parts` leaves it. */
static i64 bands_of(i64 tokens, i64 rows, i64 parts) {
    i64 best = 1;
    for (i64 bands = 2; bands <= parts; bands++)
        if (parts % bands == 0 && tokens / bands + rows * bands / parts < tokens / best + rows * best / parts) best = bands;
    return best;
}

/* y (tokens, rows) = x W_effᵀ, or y plus that where `add`: x (tokens, cols) with contiguous rows, W0 (rows, cols) in
 * either memory order, both as they are stored; with W0 for W_eff where rank is 0. No dimension is 0. */
void smoa_linear(i64 tokens, i64 rows, i64 cols, const void *x, i64 x_stored, i64 x_stride, const void *weight, i64 stored,
                 i64 row_stride, i64 col_stride, const void *row_block, const void *col_block, i64 wide, const int32_t *ranks, i64 rank,
                 const float *A, i64 A_rank, i64 A_col, const float *B, i64 B_row, i64 B_rank, float scaling, float *y,
                 i64 add, float *workspace, i64 threads) {
    adapter m = {A, B, A_rank, A_col, B_row, B_rank, rank, scaling, {row_block, wide}, {col_block, wide}, ranks, NULL,
                 NULL};
    linear_job job = {tokens, rows, cols, threads, bands_of(tokens, rows, threads), by_thirds(tokens, cols),
                      matrix_of(x, x_stored, x_stride, 1), matrix_of(weight, stored, row_stride, col_stride), rank ? &m : NULL, y, from_a_line(workspace), add != 0};
    in_parallel(linear_part, &job, threads);
}

/* Whether this takes no longer than torch's GEMM with what it leaves to do. On Intel's processors MKL's takes AVX-512 too,
 * so that of many tokens it is faster (measured at 1024 and 2048; at 512 and less it is not) where there is no AMX. */
i64 smoa_linear_fit(i64 tokens) {
    return VECTOR_BYTES < 64 || !__builtin_cpu_is("intel") || tokens < 1024 || amx_allowed();
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

enum { SEEN = 1 << 16 /* coordinates that are looked for at a time: a bit for each, on the stack */ };

static int indexed(const i64 *index, const int32_t *offsets, i64 count, i64 blocks) {
    int found = offsets[0] == 0 && offsets[blocks] == count;
    for (i64 k = 0; k < blocks; k++) found &= offsets[k] <= offsets[k + 1];
    for (i64 first = 0; first < count; first += SEEN) {
        uint64_t seen[SEEN / 64];
        memset(seen, 0, (size_t)least(SEEN, count - first + 63) / 64 * 8);
        for (i64 i = 0; i < count; i++) {
            if (index[i] < 0 || index[i] >= count) return 0;
            uint64_t at = (uint64_t)(index[i] - first), bit = (uint64_t)1 << at % 64;
            if (at >= SEEN) continue;
            if (seen[at / 64] & bit) return 0;
            seen[at / 64] |= bit;
        }
    }
    return found;
}

/* Whether the blocks share all rows and all columns, each once: what smoa_gradient, smoa_update and smoa_few take for
 * granted. */
i64 smoa_indices_fit(i64 rows, i64 cols, const i64 *row_index, const i64 *col_index, const int32_t *row_offsets,
                     const int32_t *col_offsets, i64 blocks) {
    return indexed(row_index, row_offsets, rows, blocks) && indexed(col_index, col_offsets, cols, blocks);
}

#include "experts.h"

/* Whether there are threads to be had: without, one thread does it all. */
int smoa_has_threads(void) { return GOMP_parallel != NULL; }

/* Of which sources this was compiled. */
const char *smoa_source(void) { return SOURCE; }
