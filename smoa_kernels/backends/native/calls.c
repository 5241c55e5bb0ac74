/* SMoA's forward and backward on a CPU: the functions that Python calls (library.py). gemm.h explains the method.
 *
 * hatch_build.py compiles this once per instruction set and sets VECTOR_BYTES. The functions that compute return the
 * size of the workspace that they need, in floats; called without a workspace they do nothing else. They assume that
 * `smoa_check` accepted a layer's indices; those of experts they check.
 */
#include <unistd.h>

#include "few_tokens.h"
#include "gradient.h"

/* One expert's index as i64. */
static const i64 *index_of(const void *all, i64 bytes, i64 first, i64 count, i64 *to) {
    for (i64 i = 0; i < count && to; i++)
        to[i] = !all ? i : bytes == 2 ? ((const int16_t *)all)[first + i] : ((const int32_t *)all)[first + i];
    return to;
}

/* Whether indices and offsets give each of `count` coordinates to exactly one block; `seen` has one byte per
 * coordinate. If it is NULL, only offsets are checked, on which the size of a workspace depends. */
static int shared_out(const i64 *index, const int32_t *offsets, i64 count, i64 blocks, uint8_t *seen) {
    int right = offsets[0] == 0 && offsets[blocks] == count;
    for (i64 k = 0; k < blocks; k++) right &= offsets[k] <= offsets[k + 1];
    for (i64 i = 0; i < count && seen; i++) right &= index[i] >= 0 && index[i] < count;
    if (!right || !seen) return right;
    memset(seen, 0, (size_t)count);
    for (i64 i = 0; i < count; i++) right &= !seen[index[i]]++;
    return right;
}

static i64 misfit(const layer *l, uint8_t *seen) {
    return !shared_out(l->row_index, l->row_offsets, l->rows, l->blocks, seen) ||
           !shared_out(l->col_index, l->col_offsets, l->cols, l->blocks, seen);
}

static int update_is_zero(const layer *l) {
    for (i64 i = 0; i < l->rows * l->rank && l->scaling != 0; i++)
        if (value_at(l->B, i / l->rank * l->B_row + i % l->rank * l->B_rank, (int)l->factor_dtype) != 0) return 0;
    return 1;
}

/* Calls `function` for the layer, or for each expert that has pairs; with `skip_zeros` not for those whose ΔW is zero.
 * For experts it returns -1 if `ends` or indices do not fit, else with a workspace how many experts it skipped. */
static i64 for_each(const call *c, i64 (*function)(const call *), int skip_zeros) {
    if (!c->experts) return function(c);
    arena a = workspace_of(c->workspace);
    i64 *row_index = take(&a, c->layer.rows * 8), *col_index = take(&a, c->layer.cols * 8);
    i64 most = 0, first = 0, skipped = 0;
    uint8_t *seen = take(&a, greatest(c->layer.rows, c->layer.cols));
    for (i64 e = 0; e < c->experts; first = c->ends[e++]) {
        call part = *c;
        layer *l = &part.layer;
        part.tokens = c->ends[e] - first;
        if (part.tokens < 0 || c->ends[e] > c->tokens) return -1;
        if (!part.tokens) continue;
        if (part.tokens <= c->few) part.path = FEW_TOKENS;
        part.workspace = a.base ? (float *)(a.base + a.bytes) : NULL;
        l->row_index = index_of(c->row_index, c->row_bytes, e * c->row_step, l->rows, row_index);
        l->col_index = index_of(c->col_index, c->col_bytes, e * c->col_step, l->cols, col_index);
        l->row_offsets += e * c->row_offsets_step, l->col_offsets += e * c->col_offsets_step;
        l->weight = element(l->weight, e * c->weight_step, l->dtype);
        l->A = element(l->A, e * c->A_step, l->factor_dtype), l->B = element(l->B, e * c->B_step, l->factor_dtype);
        if (misfit(l, seen)) return -1;
        if (skip_zeros && update_is_zero(l)) {
            skipped++;
            continue;
        }
        part.x = element(c->x, first * c->x_stride, c->dtype), part.dy = element(c->dy, first * c->dy_stride, c->dtype);
        part.y = (char *)c->y + first * c->y_stride * bytes_of(c->dtype);
        part.dA = (char *)c->dA + e * l->rank * l->cols * bytes_of(l->factor_dtype);
        part.dB = (char *)c->dB + e * l->rank * l->rows * bytes_of(l->factor_dtype);
        most = greatest(most, function(&part));
    }
    return first != c->tokens ? -1 : c->workspace ? skipped : most + floats_of(&a);
}

static i64 compute(const call *c, product p) {
    p.algorithm = c->algorithm, p.tiles = c->path == TILES_PATH, p.dtype = (int)c->dtype;
    p.tokens = p.total = c->tokens, p.threads = c->threads;
    p.bias = c->bias, p.y = c->y, p.y_stride = c->y_stride, p.workspace = workspace_of(c->workspace);
    return (c->path == FEW_TOKENS ? few_product : blocked_product)(p);
}

static i64 forward(const call *c) {
    return compute(c, (product){.l = c->layer, .x = c->x, .x_stride = c->x_stride, .x_keep = c->keep});
}

static i64 input(const call *c) {
    return compute(c, (product){.l = transposed(c->layer), .x = c->dy, .x_stride = c->dy_stride, .y_keep = c->keep});
}

/* y (tokens, rows) = x W0ᵀ + dropout(x) ΔWᵀ + b. No dimension is 0, here and below. */
i64 smoa_forward(const call *c) { return for_each(c, forward, 1); }

/* y (tokens, cols) = dX = dY W_eff; under dropout dY W0 plus the masked dY ΔW. */
i64 smoa_input(const call *c) { return for_each(c, input, 0); }

/* dA (rank, cols) and dB (rows, rank), dense, in the dtype of A and B, from dY (tokens, rows) and x (tokens, cols). */
i64 smoa_gradient(const call *c) { return for_each(c, factor_gradients, 0); }

/* 0 if each row and each column of the layer is in exactly one block, else 1. The workspace must have 64 floats, and
 * one byte per coordinate of the longer side. */
i64 smoa_check(const call *c) {
    arena a = workspace_of(c->workspace);
    return misfit(&c->layer, take(&a, greatest(c->layer.rows, c->layer.cols)));
}

/* Dropout's mask, a bit per element (definition/dropout.py), by Philox-4x32-7 (Salmon et al. 2011). A 64-bit lane
 * computes the four words of one column and eight tokens, in its lower 32 bits; its upper 32 are of no use. A token
 * takes 16 bits of a word. */
enum { GROUPS = VECTOR_BYTES / 8, TOGETHER = 8 * GROUPS };

static void draw_mask(void *it, i64 thread, i64 token, i64 end) {
    const call *m = it;
    (void)thread;
    for (; token < end; token += TOGETHER)
        for (i64 c = 0; c < m->layer.cols; c += 16) {
            vl bits[8] = {{0}}, group;
            for (int i = 0; i < GROUPS; i++) group[i] = (uint64_t)(token / 8 + i);
            for (i64 b = 0; b < least(16, m->layer.cols - c); b++) {
                vl word[4] = {(vl){0} + (uint64_t)(m->column_offset + c + b), group};
                uint32_t low = (uint32_t)m->seed, high = (uint32_t)((uint64_t)m->seed >> 32);
#pragma GCC unroll 7
                for (int round = 0; round < 7; round++, low += 0x9e3779b9, high += 0xbb67ae85) {
                    vl p = product_of_lower(word[0], 0xd2511f53), q = product_of_lower(word[2], 0xcd9e8d57);
                    word[0] = q >> 32 ^ word[1] ^ low, word[1] = q, word[2] = p >> 32 ^ word[3] ^ high, word[3] = p;
                }
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++)
                    bits[i] |= (vl)((word[i / 2] >> i % 2 * 16 & 0xffff) >= (uint64_t)m->threshold) & (uint64_t)1 << b;
            }
            for (i64 t = token; t < least(token + TOGETHER, end); t++)
                ((uint16_t *)m->y)[t * words(m->layer.cols) + c / 16] = (uint16_t)bits[t % 8][(t - token) / 8];
        }
}

/* y (tokens, words(cols)), of 16 bits each: a bit is set where the draw of a token and a column is at least
 * `threshold`. */
i64 smoa_mask(call *c) {
    in_parallel(draw_mask, c, c->tokens, TOGETHER, c->threads);
    return 0;
}

/* Facts about this library that Python checks. Python sets `has_bf16` and `has_amx` to what is to be used; smoa_about
 * clears those that the compiler does not know. */
typedef struct {
    const char *source; /* digest of the sources that it was compiled from */
    i64 has_threads, has_bf16, has_amx;
    i64 format[13]; /* must be library.py's */
} about;

i64 smoa_about(about *a) {
    has_bf16 = HAS_TILES && a->has_bf16, has_amx = HAS_TILES && a->has_amx;
    l2_cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (l2_cache <= 0) l2_cache = 1 << 20; /* it is not known */
    *a = (about){SOURCE,
                 GOMP_parallel != NULL,
                 has_bf16,
                 has_amx,
                 {VECTOR_BYTES, FLOAT32, BFLOAT16, FLOAT16, FEW_TOKENS, FLOAT, TILES_PATH, MERGED, SPLIT,
                  offsetof(call, path), offsetof(call, workspace), offsetof(call, ends), sizeof(call)}};
    return 0;
}
