/* Products in float32 (FLOATS and PARTS) of operands in any dtype: y, dX, dA and dB.
 *
 * A merged product packs W_eff. Where dropout changes x for ΔW alone, y = dropout(x) ΔWᵀ comes first, block by block, and x W0ᵀ is added to
 * it. dX is the same product of the transposed layer, its mask on the result.
 */
#pragma once

#include "epilogue.h"

/* Whether a product of so many rows of the left operand and so many terms is computed by PARTS: of fewer, to cut the right operand
 * takes as long as it saves. */
static int format_of(i64 rows, i64 depth) { return rows >= 96 && depth >= 32 && has_amx() ? PARTS : FLOATS; }

/* y (tokens, rows) of x (tokens, cols) in one dtype: a part of a call, in which y's tokens lie one after another. */
typedef struct {
    layer l; /* its factors are float32 */
    i64 algorithm, tokens, total, parts, x_stride;
    int dtype;
    const void *x, *bias;
    const uint16_t *x_keep, *y_keep;
    void *y;
    arena rest; /* of the workspace */
    float *C;
    adapter m;
    char *own;
    i64 own_bytes;
} product;

enum { BAND = 512 /* tokens of x and y that are put in another order at a time: they stay in a cache */ };

/* A layer whose A (rank, cols) and B (rows, rank) are float32 and dense; `a` takes copies. */
static layer with_float_factors(layer l, arena *a) {
    float *A = take(a, l.rank * l.cols * 4), *B = take(a, l.rows * l.rank * 4);
    if (A) copy_A(&l, NULL, 0, l.cols, l.rank, NULL, A, l.cols);
    for (i64 i = 0; B && i < l.rows; i++)
        for (i64 t = 0; t < l.rank; t++) B[i * l.rank + t] = factor_B(&l, i, t);
    l.A = A, l.A_rank = l.cols, l.A_col = 1, l.B = B, l.B_row = l.rank, l.B_rank = 1, l.factor_dtype = FLOAT32;
    return l;
}

static operand x_of(const product *p) {
    return masked(operand_of(p->x, p->dtype, p->x_stride, 1), p->x_keep, p->l.cols);
}

/* Every thread packs what it multiplies: of x `tokens / bands` rows, of W0 as many as `bands / parts` leaves it. */
static i64 bands_of(i64 tokens, i64 rows, i64 parts) {
    i64 best = 1;
    for (i64 bands = 2; bands <= parts; bands++)
        if (parts % bands == 0 && tokens / bands + rows * bands / parts < tokens / best + rows * best / parts) best = bands;
    return best;
}

static i64 terms_of(i64 tokens) { return tokens < FEW_ROWS ? SHORT : KC; }

/* C (+)= x W0ᵀ, or x W_effᵀ: a band of tokens, and a side of the rows. */
static void multiply_weight(void *it, i64 part) {
    const product *p = it;
    i64 rows = p->l.rows, bands = bands_of(p->tokens, rows, p->parts), sides = p->parts / bands, band = part / sides, side = part % sides;
    int format = format_of(p->total, p->l.cols);
    i64 high = left_height(format), top = share_of(p->tokens, high, band, bands), end = share_of(p->tokens, high, band + 1, bands);
    i64 left = share_of(rows, NR, side, sides), right = share_of(rows, NR, side + 1, sides);
    if (top == end || left == right) return;
    operand x = x_of(p);
    x.keep = NULL;
    gemm_job g = {.format = format, .depth = p->l.cols, .terms = terms_of(p->total), .left = x, .right = weight_of(&p->l),
                  .adapter = p->algorithm == MERGED ? &p->m : NULL, .right_rows = right_rows_of(format), .C = p->C + top * rows + left,
                  .stride = rows, .add = p->algorithm == SPLIT};
    gemm(&g, top, end - top, left, right - left, (float *)(p->own + part * p->own_bytes));
}

typedef struct {
    float *C, *rest;
    chunk *chunks;
} update_room;

static update_room update_room_of(const product *p, arena *a) {
    i64 tall = tallest_of(&p->l), wide = greatest(1, widest_of(&p->l));
    update_room r = {take(a, (least(BAND, p->tokens) * tall + CHUNK) * 4), NULL, take(a, tall * (i64)sizeof(chunk))};
    int format = format_of(p->total, wide);
    r.rest = take(a, 4 * gemm_size(format, least(BAND, p->tokens), right_rows_of(format), wide, p->l.rank));
    return r;
}

/* C = x ΔWᵀ of some tokens, a band at a time: each block's columns of x, in their order, give its columns of C. */
static void add_update(void *it, i64 part) {
    const product *p = it;
    const layer *l = &p->l;
    arena own = {p->own + part * p->own_bytes, 0};
    update_room r = update_room_of(p, &own);
    int format = format_of(p->total, greatest(1, widest_of(l)));
    i64 high = left_height(format), end = share_of(p->tokens, high, part + 1, p->parts);
    for (i64 first = share_of(p->tokens, high, part, p->parts); first < end; first += BAND / high * high) {
        i64 count = least(BAND / high * high, end - first);
        for (i64 k = 0; k < l->blocks; k++) {
            const i64 *rows = l->row_index + l->row_offsets[k], *cols = l->col_index + l->col_offsets[k];
            i64 height = height_of(l, k), width = width_of(l, k), in_place = l->contiguous && !p->y_keep;
            float *to = p->C + first * l->rows;
            if (!width || !rank_of(l, k)) {
                for (i64 t = 0; t < count; t++)
                    for (i64 i = 0; i < height; i++) to[t * l->rows + rows[i]] = 0;
                continue;
            }
            adapter m = {.l = l, .rank = rank_of(l, k), .rows = rows, .cols = cols};
            gemm_job g = {.format = format, .depth = width, .terms = terms_of(p->total), .left = x_of(p), .right = weight_of(l), .adapter = &m,
                          .right_rows = right_rows_of(format), .C = in_place ? to + l->row_offsets[k] : r.C, .stride = in_place ? l->rows : height};
            g.left.cols = cols;
            g.right.rows = rows, g.right.cols = cols;
            if (l->contiguous) {
                i64 at = l->row_offsets[k] * l->row_stride + l->col_offsets[k] * l->col_stride;
                g.right = operand_of(element(l->weight, at, l->dtype), l->dtype, l->row_stride, l->col_stride);
                if (!p->x_keep) g.left.cols = NULL, g.left.data = element(p->x, l->col_offsets[k], p->dtype);
            }
            gemm(&g, first, count, 0, height, r.rest);
            if (in_place) continue;
            i64 some = chunks_of(rows, height, FLOAT32, r.chunks);
            for (i64 t = 0; t < count; t++)
                scatter(r.C + t * height, rows, height, r.chunks, some, p->y_keep ? p->y_keep + (first + t) * words(l->rows) : NULL,
                        to + t * l->rows);
        }
    }
}

static void finish(void *it, i64 part) {
    const product *p = it;
    finish_rows(p->C, share_of(p->tokens, 1, part, p->parts), share_of(p->tokens, 1, part + 1, p->parts), p->l.rows, p->bias,
                p->algorithm == UPDATE, p->y, p->dtype);
}

/* y = x W_effᵀ + b, or y += x ΔWᵀ. Half types are summed in float32, a band at a time, and rounded once. */
static i64 float_product(product *p) {
    const layer *l = &p->l;
    i64 all = p->tokens, in_y = p->dtype == FLOAT32 && p->algorithm != UPDATE, most = in_y ? all : least(all, MC);
    int format = format_of(p->total, l->cols);
    arena a = p->rest, part = {0};
    p->tokens = most;
    p->C = in_y ? p->y : take(&a, most * l->rows * 4);
    int32_t *row_label = take(&a, l->rows * 4), *col_label = take(&a, l->cols * 4);
    update_room_of(p, &part);
    p->own_bytes = greatest(part.bytes, 4 * round_up(gemm_size(format, most, right_rows_of(format), l->cols, l->rank), 16));
    p->own = take(&a, p->parts * p->own_bytes);
    if (!a.base) return floats_of(&a);
    p->m = (adapter){.l = l, .rank = l->rank, .row_label = row_label, .col_label = col_label};
    write_labels(l->row_index, l->row_offsets, l->blocks, row_label);
    write_labels(l->col_index, l->col_offsets, l->blocks, col_label);
    for (i64 first = 0; first < all; first += most) {
        p->tokens = least(most, all - first);
        if (p->algorithm != MERGED) in_parallel(add_update, p, p->parts);
        if (p->algorithm != UPDATE) in_parallel(multiply_weight, p, p->parts);
        if (!in_y || p->bias) in_parallel(finish, p, p->parts);
        p->x = element(p->x, most * p->x_stride, p->dtype), p->y = (char *)p->y + most * l->rows * bytes_of(p->dtype);
        if (p->x_keep) p->x_keep += most * words(l->cols);
        if (p->y_keep) p->y_keep += most * words(l->rows);
    }
    return floats_of(&a);
}

/* --- dA and dB ---------------------------------------------------------------------------------------------------------- */

enum { SLAB = 512 /* rows of a block whose G is held at a time, at most */ };

typedef struct {
    layer l; /* W0's rows are contiguous */
    i64 tokens, parts, slab;
    operand dy, x; /* (rows, tokens), (cols, tokens) */
    gradient_sums sums;
    int format;
    char *own;
    i64 own_bytes;
} gradient;

typedef struct {
    float *G, *H, *B, *dA, *line, *rest;
    chunk *chunks;
} slab_room;

static slab_room slab_room_of(const gradient *g, arena *a) {
    i64 wide = widest_of(&g->l), padded = round_up(wide, PANEL);
    slab_room r = {take(a, g->slab * wide * 4), take(a, GROUP * padded * 4), take(a, g->slab * g->sums.ranks * 4),
                   take(a, g->sums.ranks * padded * 4), take(a, (wide + CHUNK) * 4), NULL, take(a, wide * (i64)sizeof(chunk))};
    r.rest = take(a, 4 * gemm_size(g->format, g->slab, right_rows_of(g->format), g->tokens, 0));
    return r;
}

/* H of a slab's rows, GROUP at a time, contracted with the factors; of dA a slab is summed by itself, so that sums stay short. */
static void contract_slab(const gradient *g, const slab_room *r, i64 k, i64 top, i64 count, i64 some, float *dA) {
    const layer *l = &g->l;
    const gradient_sums *s = &g->sums;
    i64 width = width_of(l, k), padded = round_up(width, PANEL), before = padded_before(l->col_offsets, k);
    const i64 *rows = l->row_index + l->row_offsets[k] + top, *cols = l->col_index + l->col_offsets[k];
    float *dB = s->dB + (padded_before(l->row_offsets, k) + top) * s->ranks;
    memset(r->dA, 0, (size_t)(s->ranks * padded) * sizeof *r->dA);
    for (i64 n = 0; n < count; n += GROUP) {
        for (i64 i = 0; i < GROUP; i++) {
            float *H = r->H + i * padded;
            if (n + i >= count) {
                memset(H, 0, (size_t)padded * sizeof *H);
                continue;
            }
            const void *W0 = element(l->weight, rows[n + i] * l->row_stride, l->dtype), *ordered = r->line;
            int dtype = l->contiguous ? (int)l->dtype : FLOAT32;
            if (l->contiguous)
                ordered = element(W0, l->col_offsets[k], dtype);
            else
                gather(W0, (int)l->dtype, cols, width, r->chunks, some, NULL, r->line);
            i64 ahead = n + i + ROWS_AHEAD < count ? ROWS_AHEAD * l->row_stride : 0;
            for (i64 c = 0; c < width && l->contiguous; c += 64 / bytes_of(dtype)) __builtin_prefetch(element(ordered, ahead + c, dtype));
#define CALL(dtype) H_row(r->G + (n + i) * width, ordered, dtype, (float)l->scaling, width, H)
            WITH_DTYPE(dtype, CALL)
#undef CALL
        }
        contract(rank_of(l, k), s->ranks, r->H, padded, padded, s->A + before * s->ranks, r->B + n * s->ranks, r->dA, padded,
                 dB + n * s->ranks);
    }
    for (i64 t = 0; t < rank_of(l, k); t++)
        for (i64 c = 0; c < padded; c++) dA[t * s->wide + before + c] += r->dA[t * padded + c];
}

static void gradient_part(void *it, i64 part) {
    const gradient *g = it;
    const layer *l = &g->l;
    arena own = {g->own + part * g->own_bytes, 0};
    slab_room r = slab_room_of(g, &own);
    for (i64 k = 0; k < l->blocks; k++) {
        /* In whole groups, so that a row of dB is summed in the same order however many threads there are; where a block
         * has fewer than threads, others take the next block's. */
        i64 height = height_of(l, k), width = width_of(l, k), turn = (part + k) % g->parts;
        i64 end = share_of(height, GROUP, turn + 1, g->parts);
        if (!width || !rank_of(l, k)) continue;
        i64 some = chunks_of(l->col_index + l->col_offsets[k], width, (int)l->dtype, r.chunks);
        gemm_job product = {.format = g->format, .depth = g->tokens, .terms = KC, .left = g->dy, .right = g->x,
                            .right_rows = right_rows_of(g->format), .C = r.G, .stride = width};
        product.left.rows = l->contiguous && !g->dy.keep ? NULL : l->row_index;
        product.right.rows = l->contiguous && !g->x.keep ? NULL : l->col_index;
        for (i64 top = share_of(height, GROUP, turn, g->parts); top < end; top += g->slab) {
            i64 count = least(g->slab, end - top);
            gemm(&product, l->row_offsets[k] + top, count, l->col_offsets[k], width, r.rest);
            copy_B_rows(&g->sums, k, l->row_index + l->row_offsets[k] + top, count, r.B);
            contract_slab(g, &r, k, top, count, some, g->sums.dA + part * g->sums.ranks * g->sums.wide);
        }
    }
}

/* dA and dB, dense, of a layer either of whose sides is contiguous. */
static i64 float_gradient(const call *c) {
    operand dy = operand_of(c->dy, c->dtype, 1, c->dy_stride);
    operand x = masked(operand_of(c->x, c->dtype, 1, c->x_stride), c->keep, c->layer.cols);
    int swapped = c->layer.col_stride != 1;
    gradient g = {.l = swapped ? transposed(c->layer) : c->layer, .tokens = c->tokens, .parts = c->threads, .dy = swapped ? x : dy,
                  .x = swapped ? dy : x};
    arena a = workspace_of(c->workspace), part = {0};
    i64 groups = ceil_div(ceil_div(tallest_of(&g.l), GROUP), g.parts); /* no more rows than a thread has of a block */
    /* The format goes by a block's rows, not by a thread's share of them: results would depend on the number of threads. */
    g.slab = least(SLAB, groups * GROUP), g.format = format_of(tallest_of(&g.l), c->tokens);
    g.sums = sums_in(&a, &g.l, g.parts);
    slab_room_of(&g, &part);
    g.own_bytes = part.bytes, g.own = take(&a, g.parts * part.bytes);
    if (!c->workspace) return floats_of(&a);
    begin_sums(&g.sums);
    in_parallel(gradient_part, &g, g.parts);
    end_sums(&g.sums, swapped ? c->dB : c->dA, swapped ? c->dA : c->dB, swapped);
    return floats_of(&a);
}
