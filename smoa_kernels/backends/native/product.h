/* y and dX by blocks: in float32 (FLOATS and SPLIT3) of operands in any dtype, and dX in bfloat16 (PAIRS).
 *
 * A merged product packs W_eff. Where dropout changes x for ΔW alone, y = dropout(x) ΔWᵀ comes first, block by block, and x W0ᵀ is added to
 * it. dX is the same product of the transposed layer, its mask on the result.
 */
#pragma once

#include "epilogue.h"

enum {
    BAND = 512, /* tokens of x and y that are put in another order at a time: they stay in a cache */
    L2_CACHE = 1 << 20,
};

/* Whether a float32 product of so many rows of the left operand and so many terms is computed by SPLIT3: of fewer, to split the right
 * operand takes as long as it saves. */
static int format_of(i64 rows, i64 depth) { return rows >= 96 && depth >= 32 && has_amx() ? SPLIT3 : FLOATS; }

/* y (tokens, rows) of x (tokens, cols) in one dtype, y's tokens one after another: a call, or some tokens of it. */
typedef struct {
    layer l;
    i64 algorithm, tokens, total, threads, x_stride;
    int dtype, tiles; /* tiles: multiply in bfloat16 */
    const void *x, *bias;
    const uint16_t *x_keep, *y_keep;
    void *y;
    arena workspace;
    /* Of the workspace. */
    factors factors;
    float *C;
    adapter merged;
    local_rooms rooms;
    /* Of bfloat16.h: rows of W0 that are multiplied together; all of x, and what dropout keeps of it, as tiles; columns of y's last tokens. */
    i64 together, groups;
    half *x_tiles, *kept_tiles, *last_columns;
} product;

/* Goes on by so many tokens. */
static void next_tokens(product *p, i64 count) {
    p->x = element(p->x, count * p->x_stride, p->dtype), p->y = (char *)p->y + count * p->l.rows * bytes_of(p->dtype);
    if (p->x_keep) p->x_keep += count * words(p->l.cols);
    if (p->y_keep) p->y_keep += count * words(p->l.rows);
}

/* How many of `all` rows are multiplied together. Rows have `numbers` bfloat16; the result fits into `bytes` of a cache, is at least PANEL,
 * and leaves work for all threads. */
static i64 rows_together(i64 all, i64 numbers, i64 bytes, i64 threads) {
    enum { MOST = 256 };
    i64 fit = least(MOST, round_up(ceil_div(bytes / 2, greatest(1, numbers)), PANEL));
    return least(fit, round_up(ceil_div(all, threads), PANEL));
}

/* Tokens of which tiles are in the workspace at a time. */
static i64 tokens_together(const layer *l) { return greatest(round_up((l->rows + l->cols) / 4, PANEL), 1024); }

static operand x_of(const product *p) { return operand_of(p->x, p->dtype, p->x_stride, 1, p->l.cols, p->x_keep); }

/* Every thread packs what it multiplies: of x `tokens / bands` rows, of W0 as many as `bands / threads` leaves it. */
static i64 bands_of(i64 tokens, i64 rows, i64 threads) {
    i64 best = 1;
    for (i64 bands = 2; bands <= threads; bands++)
        if (threads % bands == 0 && tokens / bands + rows * bands / threads < tokens / best + rows * best / threads) best = bands;
    return best;
}

/* Of few tokens fewer terms are summed at a time: MKL's sums are about as short there, and errors are compared with its. */
static i64 terms_of(i64 tokens) {
    enum { FEW_ROWS = 16, SHORT = 64 };
    return tokens < FEW_ROWS ? SHORT : KC;
}

/* C (+)= x W0ᵀ, or x W_effᵀ: as a gemm without its result. */
static gemm_job weight_product(const product *p) {
    gemm_job g = {.format = p->tiles ? PAIRS : format_of(p->total, p->l.cols), .depth = p->l.cols, .terms = p->tiles ? p->l.cols : terms_of(p->total),
                  .left = x_of(p), .right = weight_of(&p->l), .adapter = p->algorithm == MERGED ? &p->merged : NULL};
    g.left.keep = NULL;
    g.right_rows = p->tiles ? rows_together(p->l.rows, p->l.cols, L2_CACHE, p->threads) : right_rows_of(g.format);
    return g;
}

/* A band of tokens, and a side of the rows. */
static void multiply_weight(void *it, i64 thread, i64 first, i64 end) {
    const product *p = it;
    i64 rows = p->l.rows, bands = bands_of(p->tokens, rows, p->threads), sides = p->threads / bands, band = thread / sides, side = thread % sides;
    gemm_job g = weight_product(p);
    arena room = room_of(&p->rooms, thread);
    i64 high = left_height(g.format), row = share_of(rows, PANEL, side, sides), count = share_of(rows, PANEL, side + 1, sides) - row;
    first = share_of(p->tokens, high, band, bands), end = share_of(p->tokens, high, band + 1, bands);
    if (first == end || !count) return;
    g.C = p->C + first * rows + row, g.stride = rows, g.add = p->algorithm == SPLIT;
#if HAS_TILES
    rounded_rows to = {(half *)p->y + first * rows + row, rows};
    if (p->tiles) {
        g.C = take(&room, PANEL * g.right_rows * 4), g.stride = g.right_rows;
        g.context = &to, g.begin = p->y_keep ? begin_with_y : NULL, g.epilogue = round_panel, g.add = 0;
    }
#endif
    gemm(&g, first, end - first, row, count, room);
}

/* C = x ΔWᵀ of some tokens, a band at a time: each block's columns of x, in their order, give its columns of C. */
static void add_update(void *it, i64 thread, i64 first, i64 end) {
    const product *p = it;
    const layer *l = &p->l;
    arena room = room_of(&p->rooms, thread);
    float *C = take(&room, least(BAND, p->tokens) * tallest_of(l) * 4);
    int format = format_of(p->total, widest_of(l));
    for (i64 most = BAND / left_height(format) * left_height(format), count; first < end; first += count) {
        count = least(most, end - first);
        for (i64 k = 0; k < l->blocks; k++) {
            const i64 *rows = l->row_index + l->row_offsets[k];
            i64 height = height_of(l, k), width = width_of(l, k), in_order = l->contiguous;
            float *to = p->C + first * l->rows;
            if (!width || !rank_of(l, k)) {
                for (i64 t = 0; t < count; t++)
                    for (i64 i = 0; i < height; i++) to[t * l->rows + rows[i]] = 0;
                continue;
            }
            adapter m = adapter_of_block(l, &p->factors, k, 0, 0);
            gemm_job g = {.format = format, .depth = width, .terms = terms_of(p->total), .left = x_of(p), .right = weight_of_block(l, k, 0, 0),
                          .adapter = &m, .right_rows = right_rows_of(format), .C = in_order ? to + l->row_offsets[k] : C,
                          .stride = in_order ? l->rows : height};
            if (in_order)
                g.left.start = l->col_offsets[k];
            else
                g.left.cols = l->col_index + l->col_offsets[k];
            gemm(&g, first, count, 0, height, room);
            for (i64 t = 0; t < count; t++, to += l->rows) {
                const uint16_t *keep = p->y_keep ? p->y_keep + (first + t) * words(l->rows) : NULL;
                if (!in_order)
                    scatter(C + t * height, rows, height, keep, to);
                else if (keep)
                    widen_row(to, FLOAT32, l->row_offsets[k], height, keep, to + l->row_offsets[k]);
            }
        }
    }
}

static void finish(void *it, i64 thread, i64 first, i64 end) {
    const product *p = it;
    (void)thread;
    finish_rows(p->C, first, end, p->l.rows, p->bias, p->algorithm == UPDATE, p->y, p->dtype);
}

/* Bytes that a thread takes of the workspace. */
static i64 product_room(const product *p) {
    i64 wide = widest_of(&p->l);
    int format = format_of(p->total, wide);
    gemm_job g = weight_product(p);
    arena weight = {0}, update = {0};
    if (p->tiles) take(&weight, PANEL * g.right_rows * 4);
    packing_room_of(&weight, g.format, p->tokens, g.right_rows, g.depth, g.terms);
    take(&update, p->tiles ? 0 : least(BAND, p->tokens) * tallest_of(&p->l) * 4);
    if (!p->tiles) packing_room_of(&update, format, least(BAND, p->tokens), right_rows_of(format), wide, KC);
    return greatest(weight.bytes, update.bytes);
}

/* y = x W_effᵀ + b, or y += x ΔWᵀ. Half types that are summed in float32 are rounded once, a band at a time. In bfloat16 tiles y += x W0ᵀ
 * where some of y is dropped. */
static i64 blocked_product(product p) {
    const layer *l = &p.l;
    i64 remaining = p.tokens, in_y = p.tiles || (p.dtype == FLOAT32 && p.algorithm != UPDATE), most = in_y ? remaining : least(remaining, MC);
    arena a = p.workspace;
    p.tokens = most;
    p.factors = factors_of(&a, l, p.algorithm != MERGED, l->scaling);
    p.C = in_y ? p.y : take(&a, most * l->rows * 4);
    int32_t *row_label = take(&a, (l->rows + PANEL) * 4), *col_label = take(&a, (l->cols + PANEL) * 4);
    p.rooms = take_rooms(&a, p.threads, product_room(&p));
    if (!a.base) return floats_of(&a);
    write_labels(l->row_index, l->row_offsets, l->blocks, row_label);
    write_labels(l->col_index, l->col_offsets, l->blocks, col_label);
    p.merged = (adapter){l->rank, p.factors.A_stride, p.factors.B_stride, 0, p.factors.A, p.factors.B, row_label, col_label};
    for (; remaining > 0; remaining -= most, next_tokens(&p, most)) {
        p.tokens = least(most, remaining);
        if (p.algorithm != MERGED && !p.tiles) in_parallel(add_update, &p, p.tokens, left_height(format_of(p.total, widest_of(l))), p.threads);
        if (p.algorithm != UPDATE) in_parallel(multiply_weight, &p, p.threads, 1, p.threads);
        if (!in_y || p.bias) in_parallel(finish, &p, p.tokens, 1, p.threads);
    }
    return floats_of(&a);
}
