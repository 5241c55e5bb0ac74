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
    const layer *l;
    const adapter *m; /* NULL: none */
    i64 tokens, parts, bands; /* bands of tokens, each for parts / bands threads */
    int thirds;
    matrix x;
    float *y, *workspace;
    int add;
} linear_job;

static i64 linear_size(const layer *l, i64 tokens) {
    return product_size(by_thirds(tokens, l->cols), tokens, l->cols, l->rank);
}

/* Floats that smoa_linear needs. */
i64 smoa_linear_workspace(const layer *l, i64 tokens, i64 threads) { return threads * linear_size(l, tokens) + 16; }

static void linear_part(void *it, i64 part) {
    linear_job *j = it;
    if (part >= j->parts) return;
    i64 rows = j->l->rows, sides = j->parts / j->bands, band = part / sides, side = part % sides;
    i64 high = left_height(j->thirds), top = share_of(j->tokens, high, band, j->bands);
    i64 height = share_of(j->tokens, high, band + 1, j->bands) - top;
    i64 left = share_of(rows, NR, side, sides), width = share_of(rows, NR, side + 1, sides) - left;
    if (!height || !width) return;
    product(j->thirds, j->x, top, height, weight_of(j->l), left, width, j->l->cols, terms_of(j->tokens), j->m,
            j->y + top * rows + left, rows, j->add, j->workspace + part * linear_size(j->l, j->tokens));
}

/* Every thread packs what it multiplies: of x `tokens / bands` rows, of W0 as many as `bands / parts` leaves it. */
static i64 bands_of(i64 tokens, i64 rows, i64 parts) {
    i64 best = 1;
    for (i64 bands = 2; bands <= parts; bands++)
        if (parts % bands == 0 && tokens / bands + rows * bands / parts < tokens / best + rows * best / parts) best = bands;
    return best;
}

/* y (tokens, rows) = x W_effᵀ, or y plus that where `add`; with W0 for W_eff where rank is 0. x (tokens, cols) has contiguous
 * rows, W0 either memory order, both as they are stored; the factors are float32. No dimension is 0. Needs labels. */
void smoa_linear(const layer *l, i64 tokens, const void *x, i64 x_stored, i64 x_stride, float *y, i64 add, float *workspace,
                 i64 threads) {
    adapter m = adapter_of(l);
    linear_job job = {l, l->rank ? &m : NULL, tokens, threads, bands_of(tokens, l->rows, threads), by_thirds(tokens, l->cols),
                      matrix_of(x, x_stored, x_stride, 1), y, from_a_line(workspace), add != 0};
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

/* Whether every row and column, of those that have labels, is of one of the blocks: what functions take for granted. */
i64 smoa_labels_fit(const layer *l) {
    return (!l->row_block.of || labelled(l->row_block, l->rows, l->blocks)) &&
           (!l->col_block.of || labelled(l->col_block, l->cols, l->blocks));
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

/* Whether the blocks share all rows and all columns, each once: what functions take for granted. */
i64 smoa_indices_fit(const layer *l) {
    return indexed(l->row_index, l->row_offsets, l->rows, l->blocks) &&
           indexed(l->col_index, l->col_offsets, l->cols, l->blocks);
}

#include "experts.h"

/* Whether there are threads to be had: without, one thread does it all. */
int smoa_has_threads(void) { return GOMP_parallel != NULL; }

/* Of which sources this was compiled. */
const char *smoa_source(void) { return SOURCE; }
