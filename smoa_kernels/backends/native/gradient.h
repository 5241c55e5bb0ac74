/* dA and dB. G = dYᵀ x, a sum over tokens, is computed for some rows of a block at a time and contracted with the
 * factors at once. If blocks are not contiguous, or elements of x are dropped, some tokens are copied in block order
 * first, once for all blocks. dA and dB are summed in float32, as (rank, coordinates in padded block order).
 */
#pragma once

#include "product.h"

enum {
    SLAB = 512, /* most rows of G that are held at a time */
    COPIED_TOKENS = 256, /* of float32 tokens that are copied in block order, or masked, at a time */
};

/* Tokens that are packed in tiles at a time. */
static i64 tokens_together(const layer *l) { return greatest(round_up((l->rows + l->cols) / 4, PANEL), 1024); }

typedef struct {
    layer l; /* W0 is row-major */
    i64 tokens, threads, slab;
    operand dy, x; /* (rows, tokens), (cols, tokens), in block order */
    factors factors; /* B, not s B */
    float *dA, *dB; /* laid out as A and B; one dA per thread */
    int format;
    arena rooms;
} gradient;

typedef struct {
    float *G, *dA, *line;
    arena rest;
} gradient_room;

static gradient_room gradient_room_of(const gradient *g, arena a) {
    i64 padded = round_up(widest_of(&g->l), PANEL);
    gradient_room r = {
        .G = take(&a, g->slab * padded * 4), .dA = take(&a, g->l.rank * padded * 4), .line = take(&a, padded * 4)};
    r.rest = a;
    return r;
}

/* Turns rows of G into H, GROUP at a time, and contracts them with the factors. dA is summed per slab first, so that
 * sums stay short. */
static void contract_slab(const gradient *g, const gradient_room *r, i64 k, i64 top, i64 count, float *dA) {
    const layer *l = &g->l;
    const factors *f = &g->factors;
    i64 width = width_of(l, k), padded = round_up(width, PANEL), before = padded_before(l->col_offsets, k);
    i64 row = padded_before(l->row_offsets, k) + top;
    int dtype = l->contiguous ? (int)l->dtype : FLOAT32;
    const i64 *rows = l->row_index + l->row_offsets[k] + top;
    memset(r->dA, 0, (size_t)(l->rank * padded) * sizeof *r->dA);
    memset(r->G + count * padded, 0, (size_t)((round_up(count, GROUP) - count) * padded) * sizeof *r->G);
    for (i64 n = 0; n < count; n += GROUP) {
        for (i64 i = n; i < least(count, n + GROUP); i++) {
            const void *W0 = element(l->weight, rows[i] * l->row_stride, l->dtype);
            if (!l->contiguous) gather(W0, (int)l->dtype, l->col_index + l->col_offsets[k], width, NULL, r->line);
            W0 = l->contiguous ? element(W0, l->col_offsets[k], dtype) : r->line;
            make_H(r->G + i * padded, W0, dtype, (float)l->scaling, width);
        }
        contract(rank_of(l, k), r->G + n * padded, padded, f->A + before, f->A_stride, f->B + row + n, f->B_stride,
                 r->dA, padded, g->dB + row + n, f->B_stride);
    }
    for (i64 t = 0; t < rank_of(l, k); t++)
        for (i64 c = 0; c < padded; c++) dA[t * f->A_stride + before + c] += r->dA[t * padded + c];
}

/* The gemm of some rows of a block's G. */
static gemm_job product_of(const gradient *g, float *G, i64 width) {
    return (gemm_job){.format = g->format, .depth = g->tokens, .terms = g->format == PAIRS ? g->tokens : KC,
                      .left = g->dy, .right = g->x, .C = G, .stride = round_up(width, PANEL)};
}

/* A thread's rows of each block. */
static void add_gradients(void *it, i64 thread, i64 first, i64 end) {
    const gradient *g = it;
    const layer *l = &g->l;
    gradient_room r = gradient_room_of(g, room_of(&g->rooms, thread));
    for (i64 k = 0; k < l->blocks; k++) {
        /* Threads share whole panels, so that the order of dB's sums does not depend on their number. `share` differs
         * from block to block: when a block has fewer panels than there are threads, other threads take the next
         * block's. */
        i64 height = height_of(l, k), width = width_of(l, k), share = (thread + k) % g->threads;
        if (!width || !rank_of(l, k)) continue;
        gemm_job product = product_of(g, r.G, width);
        end = share_of(height, PANEL, share + 1, g->threads);
        for (first = share_of(height, PANEL, share, g->threads); first < end; first += g->slab) {
            i64 count = least(g->slab, end - first);
            gemm(&product, l->row_offsets[k] + first, count, l->col_offsets[k], width, r.rest);
            contract_slab(g, &r, k, first, count, g->dA + thread * l->rank * g->factors.A_stride);
        }
    }
}

/* Adds the threads' sums and writes dA (rank, cols), stored as A is; for the transposed layer dB. */
static void write_gradient(const layer *l, const float *sums, i64 stride, i64 threads, void *dA, i64 rank_step,
                           i64 col_step) {
    for (i64 k = 0, before = 0; k < l->blocks; before += round_up(width_of(l, k), PANEL), k++)
        for (i64 t = 0; t < l->rank; t++)
            for (i64 c = 0; c < width_of(l, k); c++) {
                const float *from = sums + t * stride + before + c;
                vf sum = {0};
                for (i64 thread = 0; thread < threads && t < rank_of(l, k); thread++)
                    sum[0] += from[thread * l->rank * stride];
                narrow(dA, t * rank_step + l->col_index[l->col_offsets[k] + c] * col_step, 1, sum,
                       (int)l->factor_dtype);
            }
}

/* Dense dA and dB. Where W0 is column-major, the transposed layer's. */
static i64 factor_gradients(const call *c) {
    int tiles = c->path == TILES_PATH, swapped = c->layer.col_stride != 1, size = (int)bytes_of(c->dtype);
    gradient g = {.l = swapped ? transposed(c->layer) : c->layer, .threads = c->threads};
    const layer *l = &g.l;
    order_job dy = {{c->dy, (int)c->dtype, 0, c->dy_stride}, NULL, c->layer.row_index, NULL, c->layer.rows, NULL};
    order_job x = {{c->x, (int)c->dtype, 0, c->x_stride}, NULL, c->layer.col_index, c->keep, c->layer.cols, NULL};
    i64 panels = ceil_div(ceil_div(tallest_of(l), PANEL), g.threads); /* most of a block that one thread has */
    i64 remaining = c->tokens;
    i64 together = tiles ? tokens_together(l) : !l->contiguous || x.keep ? COPIED_TOKENS : remaining;
    i64 most = least(remaining, together);
    arena a = workspace_of(c->workspace), local = {0};
    /* A block's rows decide the format; with a thread's share of them, results would depend on the number of threads.
     */
    g.format = tiles ? PAIRS : format_of(tallest_of(l), remaining);
    g.slab = least(SLAB, panels * PANEL), g.tokens = most;
    g.factors = factors_of(&a, l, 1, 1);
    g.dA = take(&a, g.threads * l->rank * g.factors.A_stride * 4), g.dB = take(&a, l->rank * g.factors.B_stride * 4);
    if (!l->contiguous) dy.to = take(&a, most * dy.width * size);
    if (!l->contiguous || x.keep) x.to = take(&a, most * x.width * size);
    local = gradient_room_of(&g, local).rest;
    gemm_job product = product_of(&g, NULL, 0);
    packing_room_of(&local, &product, g.slab);
    g.rooms = take_rooms(&a, g.threads, local.bytes);
    if (!a.base) return floats_of(&a);
    memset(g.dA, 0, (size_t)(g.threads * l->rank * g.factors.A_stride) * sizeof *g.dA);
    memset(g.dB, 0, (size_t)(l->rank * g.factors.B_stride) * sizeof *g.dB);
    for (; remaining > 0; remaining -= g.tokens) {
        g.tokens = least(most, remaining);
        g.dy = ordered(&dy, g.tokens, g.threads), g.x = ordered(&x, g.tokens, g.threads);
        if (swapped) {
            operand was = g.dy;
            g.dy = g.x, g.x = was;
        }
        in_parallel(add_gradients, &g, g.threads, 1, g.threads);
    }
    layer other = transposed(*l);
    write_gradient(l, g.dA, g.factors.A_stride, g.threads, swapped ? c->dB : c->dA, swapped ? 1 : l->cols,
                   swapped ? l->rank : 1);
    write_gradient(&other, g.dB, g.factors.B_stride, 1, swapped ? c->dA : c->dB, swapped ? l->rows : 1,
                   swapped ? 1 : l->rank);
    return floats_of(&a);
}
