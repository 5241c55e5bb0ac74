/* y and dX: in float32 (FLOATS and SPLIT3) from operands in any dtype, and in bfloat16 (PAIRS).
 *
 * The merged algorithm packs W_eff, which PAIRS rounds by thresholds. With dropout only ΔW sees the dropped x: y =
 * dropout(x) ΔWᵀ is computed first, block by block, and then x W0ᵀ is added. dX is the same product of the transposed
 * layer, and the mask applies to its result.
 */
#pragma once

#include "gemm.h"

enum { BAND = 512 }; /* tokens at a time whose update is in the workspace, if y is split */

/* The format of a float32 product. Below these limits splitting the right operand takes as long as SPLIT3 saves. */
static int format_of(i64 rows, i64 depth) { return rows >= 96 && depth >= 32 && has_amx ? SPLIT3 : FLOATS; }

/* A call, or some tokens of it: y (tokens, rows) from x (tokens, cols) in the same dtype. */
typedef struct {
    layer l;
    i64 algorithm, tokens, total, threads, x_stride, y_stride, C_stride;
    int dtype, tiles; /* tiles: multiply in bfloat16 */
    const void *x, *bias;
    const uint16_t *x_keep, *y_keep;
    void *y;
    arena workspace;
    /* In the workspace. */
    factors factors;
    void *C; /* float32, or y */
    adapter merged;
    operand update_x; /* dropout(x) in block order */
    char *ordered_weight; /* the blocks of W0 in block order, or NULL: as they lie */
    arena rooms;
} product;

/* Advances by `count` tokens. */
static void next_tokens(product *p, i64 count) {
    p->x = element(p->x, count * p->x_stride, p->dtype), p->y = (char *)p->y + count * p->y_stride * bytes_of(p->dtype);
    if (p->y_keep) p->y_keep += count * words(p->l.rows);
}

static operand x_of(const product *p) { return (operand){p->x, p->dtype, 1, p->x_stride}; }

/* How many parts to cut the tokens into. A thread then packs `tokens / parts` rows of x and `rows * parts / threads` of
 * W0: least in sum. */
static i64 token_parts_of(i64 tokens, i64 rows, i64 threads) {
    i64 best = 1;
    for (i64 parts = 2; parts <= threads; parts++)
        if (threads % parts == 0 && tokens / parts + rows * parts / threads < tokens / best + rows * best / threads)
            best = parts;
    return best;
}

/* Terms per partial sum: all in tiles. They are fewer for few tokens, as MKL's, with whose error tests compare ours. */
static i64 terms_of(const product *p, i64 depth) { return p->tiles ? depth : p->total < 16 ? 64 : KC; }

/* Whether C is y. Else it is float32, for a band of tokens, and `finish` rounds it. */
static int is_in_y(const product *p) { return p->dtype == FLOAT32 || p->algorithm == MERGED; }

/* The gemm of C (+)= x W0ᵀ or x W_effᵀ; the caller sets C. */
static gemm_job weight_product(const product *p) {
    const layer *l = &p->l;
    int merged = p->algorithm == MERGED, format = p->tiles ? PAIRS : format_of(p->total, l->cols);
    return (gemm_job){.format = format, .depth = l->cols, .terms = terms_of(p, l->cols), .left = x_of(p),
                      .right = weight_of(l), .adapter = merged ? &p->merged : NULL, .stride = p->C_stride,
                      .dtype = is_in_y(p) ? p->dtype : FLOAT32, .add = !merged};
}

/* A thread multiplies one part of the tokens by one part of the rows. */
static void multiply_weight(void *it, i64 thread, i64 first, i64 end) {
    const product *p = it;
    gemm_job g = weight_product(p);
    i64 high = left_height(g.format), parts = token_parts_of(p->tokens, p->l.rows, p->threads);
    i64 row_parts = p->threads / parts, part = thread / row_parts, row_part = thread % row_parts;
    i64 row = share_of(p->l.rows, PANEL, row_part, row_parts);
    i64 count = share_of(p->l.rows, PANEL, row_part + 1, row_parts) - row;
    first = share_of(p->tokens, high, part, parts), end = share_of(p->tokens, high, part + 1, parts);
    if (first == end || !count) return;
    g.C = (char *)p->C + (first * g.stride + row) * bytes_of(g.dtype);
    if (p->bias && is_in_y(p)) g.bias = element(p->bias, row, p->dtype);
    gemm(&g, first, end - first, row, count, room_of(&p->rooms, thread));
}

/* Elements of W0 in the blocks before k. */
static i64 elements_before(const layer *l, i64 k) {
    i64 before = 0;
    for (i64 b = 0; b < k; b++) before += height_of(l, b) * width_of(l, b);
    return before;
}

/* Copies the blocks of W0 in block order, their lines as they lie in memory. */
static void order_weight(const product *p) {
    layer l = p->l.col_stride == 1 ? p->l : transposed(p->l);
    for (i64 k = 0; k < l.blocks; k++) {
        order_job j = {weight_of(&l), l.row_index + l.row_offsets[k], l.col_index + l.col_offsets[k], NULL,
                       width_of(&l, k), p->ordered_weight + elements_before(&l, k) * bytes_of(l.dtype)};
        if (j.width) in_parallel(order_rows, &j, height_of(&l, k), 1, p->threads);
    }
}

/* The gemm of C = x_k ΔW_kᵀ, whose columns are those of a block in block order; those of a block of rank 0 become 0. */
static gemm_job block_product(const product *p, const adapter *m, i64 k) {
    const layer *l = &p->l;
    int format = p->tiles ? PAIRS : format_of(p->total, widest_of(l));
    i64 depth = rank_of(l, k) ? width_of(l, k) : 0;
    gemm_job g = {.format = format, .depth = depth, .terms = terms_of(p, depth), .left = p->update_x,
                  .right = weight_of(l), .adapter = m, .C = (float *)p->C + l->row_offsets[k], .stride = p->C_stride};
    i64 row = l->row_offsets[k], col = l->col_offsets[k], line = g.right.row_major ? row : col, at = row + col - line;
    g.left.data = element_of(&g.left, 0, col);
    if (p->ordered_weight)
        g.right.data = p->ordered_weight + elements_before(l, k) * bytes_of(l->dtype),
        g.right.stride = g.right.row_major ? width_of(l, k) : height_of(l, k);
    else
        g.right.data = element_of(&g.right, line, at);
    return g;
}

/* Computes C = x ΔWᵀ for a thread's tokens, block by block; then each row is copied to `line`, put back in y's order,
 * and masked. */
static void add_update(void *it, i64 thread, i64 first, i64 end) {
    const product *p = it;
    const layer *l = &p->l;
    arena room = room_of(&p->rooms, thread);
    float *C = (float *)p->C + first * p->C_stride, *line = take(&room, l->rows * 4);
    for (i64 k = 0; k < l->blocks; k++) {
        adapter m = adapter_of_block(l, &p->factors, k);
        gemm_job g = block_product(p, &m, k);
        g.C = (float *)g.C + first * p->C_stride;
        gemm(&g, first, end - first, 0, height_of(l, k), room);
    }
    for (i64 t = first; t < end; t++, C += p->C_stride) {
        if (!l->contiguous) {
            memcpy(line, C, (size_t)l->rows * sizeof *line);
            for (i64 i = 0; i < l->rows; i++) C[l->row_index[i]] = line[i];
        }
        if (p->y_keep) widen_row(C, FLOAT32, l->rows, p->y_keep + t * words(l->rows), C);
    }
}

static void finish(void *it, i64 thread, i64 first, i64 end) {
    const product *p = it;
    (void)thread;
    void *to = (char *)p->y + first * p->y_stride * bytes_of(p->dtype);
    finish_rows((float *)p->C + first * p->C_stride, p->C_stride, end - first, p->l.rows, p->bias, 0, to, p->y_stride,
                p->dtype);
}

/* Bytes of workspace per thread, for `multiply_weight`, and for `add_update` of the block that takes most. */
static i64 product_room(const product *p) {
    gemm_job g = weight_product(p);
    arena a = {0};
    packing_room_of(&a, &g, p->tokens);
    for (i64 k = 0; k < p->l.blocks && p->algorithm == SPLIT; k++) {
        arena b = {0};
        gemm_job block = block_product(p, NULL, k);
        i64 high = left_height(block.format);
        take(&b, p->l.rows * 4);
        packing_room_of(&b, &block, ceil_div(ceil_div(p->tokens, high), p->threads) * high);
        a.bytes = greatest(a.bytes, b.bytes);
    }
    return a.bytes;
}

/* y = x W_effᵀ + b, or split x W0ᵀ + dropout(x) ΔWᵀ + b. Each number of a half type is summed in float32 and rounded
 * once. */
static i64 blocked_product(product p) {
    const layer *l = &p.l;
    int in_y = is_in_y(&p), split = p.algorithm == SPLIT;
    i64 remaining = p.tokens, most = split ? least(remaining, BAND) : remaining;
    arena a = p.workspace;
    p.tokens = most;
    p.factors = factors_of(&a, l, split, l->scaling);
    p.C = take(&a, in_y ? 0 : most * l->rows * 4), p.C_stride = in_y ? p.y_stride : l->rows;
    order_job x = {x_of(&p), NULL, l->col_index, p.x_keep, l->cols, NULL};
    if (split && (!l->contiguous || p.x_keep)) x.to = take(&a, most * l->cols * bytes_of(p.dtype));
    if (split && !l->contiguous) p.ordered_weight = take(&a, elements_before(l, l->blocks) * bytes_of(l->dtype));
    int32_t *row_label = take(&a, (l->rows + PANEL) * 4), *col_label = take(&a, (l->cols + PANEL) * 4);
    p.rooms = take_rooms(&a, p.threads, product_room(&p));
    if (!a.base) return floats_of(&a);
    write_labels(l->row_index, l->row_offsets, l->blocks, row_label);
    write_labels(l->col_index, l->col_offsets, l->blocks, col_label);
    p.merged = (adapter){l->rank, p.factors.A_stride, p.factors.B_stride, l->place, l->row_step, l->col_step,
                         p.factors.A, p.factors.B, row_label, col_label};
    if (p.ordered_weight) order_weight(&p);
    for (; remaining > 0; remaining -= most, next_tokens(&p, most)) {
        p.tokens = least(most, remaining), p.C = in_y ? p.y : p.C;
        p.update_x = ordered(&x, p.tokens, p.threads);
        if (split) in_parallel(add_update, &p, p.tokens, left_height(block_product(&p, NULL, 0).format), p.threads);
        in_parallel(multiply_weight, &p, p.threads, 1, p.threads);
        if (!in_y) in_parallel(finish, &p, p.tokens, 1, p.threads);
    }
    return floats_of(&a);
}
