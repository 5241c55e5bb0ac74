/* y and dX: in float32 (FLOATS and SPLIT3) from operands in any dtype, and in bfloat16 (PAIRS; its y has a section of its own below).
 *
 * The merged algorithm packs W_eff. With dropout only ΔW sees the dropped x: y = dropout(x) ΔWᵀ is computed first, block by block, and then
 * x W0ᵀ is added. dX is the same product of the transposed layer, and the mask applies to its result.
 */
#pragma once

#include "gemm.h"

enum {
    L2_CACHE = 1 << 20,
    HALF_TOKENS = 512, /* tokens computed at a time if y is a half type: their float32 sums take memory, but each time W0 is packed again */
};

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
    local_rooms rooms;
    /* For y in bfloat16: rows of W0 that are multiplied together; x and dropout(x) as tiles; panels of y, transposed: (rows, PANEL tokens). */
    i64 together, groups;
    half *x_tiles, *kept_tiles, *columns;
} product;

/* Advances by `count` tokens. */
static void next_tokens(product *p, i64 count) {
    p->x = element(p->x, count * p->x_stride, p->dtype), p->y = (char *)p->y + count * p->y_stride * bytes_of(p->dtype);
    if (p->x_keep) p->x_keep += count * words(p->l.cols);
    if (p->y_keep) p->y_keep += count * words(p->l.rows);
}

/* How many of `all` rows, each of `numbers` bfloat16, are multiplied together: they fit into `bytes` of a cache, are at least PANEL, and
 * leave work for all threads. */
static i64 rows_together(i64 all, i64 numbers, i64 bytes, i64 threads) {
    enum { MOST = 256 };
    i64 fit = least(MOST, round_up(ceil_div(bytes / 2, greatest(1, numbers)), PANEL));
    return least(fit, round_up(ceil_div(all, threads), PANEL));
}

/* Tokens whose tiles are in the workspace at a time. */
static i64 tokens_together(const layer *l) { return greatest(round_up((l->rows + l->cols) / 4, PANEL), 1024); }

static operand x_of(const product *p) { return operand_of(p->x, p->dtype, 1, p->x_stride, 1, p->l.cols, p->x_keep); }

/* How many parts to cut the tokens into. A thread then packs `tokens / parts` rows of x and `rows * parts / threads` of W0: least in sum. */
static i64 token_parts_of(i64 tokens, i64 rows, i64 threads) {
    i64 best = 1;
    for (i64 parts = 2; parts <= threads; parts++)
        if (threads % parts == 0 && tokens / parts + rows * parts / threads < tokens / best + rows * best / threads) best = parts;
    return best;
}

/* Terms per partial sum. They are fewer for few tokens, where MKL's sums are about as short: the tests compare the error with MKL's. */
static i64 terms_of(i64 tokens) {
    enum { FEW_ROWS = 16, SHORT = 64 };
    return tokens < FEW_ROWS ? SHORT : KC;
}

/* The gemm of C (+)= x W0ᵀ or x W_effᵀ; the caller sets C. */
static gemm_job weight_product(const product *p) {
    gemm_job g = {.format = p->tiles ? PAIRS : format_of(p->total, p->l.cols), .depth = p->l.cols, .terms = p->tiles ? p->l.cols : terms_of(p->total),
                  .left = x_of(p), .right = weight_of(&p->l), .adapter = p->algorithm == MERGED ? &p->merged : NULL};
    g.left.keep = NULL;
    g.right_rows = p->tiles ? rows_together(p->l.rows, p->l.cols, L2_CACHE, p->threads) : right_rows_of(g.format);
    return g;
}

/* A thread multiplies one part of the tokens by one part of the rows. */
static void multiply_weight(void *it, i64 thread, i64 first, i64 end) {
    const product *p = it;
    i64 rows = p->l.rows, token_parts = token_parts_of(p->tokens, rows, p->threads), row_parts = p->threads / token_parts;
    i64 token_part = thread / row_parts, row_part = thread % row_parts;
    gemm_job g = weight_product(p);
    arena room = room_of(&p->rooms, thread);
    i64 high = left_height(g.format), row = share_of(rows, PANEL, row_part, row_parts), count = share_of(rows, PANEL, row_part + 1, row_parts) - row;
    first = share_of(p->tokens, high, token_part, token_parts), end = share_of(p->tokens, high, token_part + 1, token_parts);
    if (first == end || !count) return;
    g.dtype = p->tiles ? BFLOAT16 : FLOAT32, g.stride = p->C_stride, g.add = p->tiles ? p->y_keep != NULL : p->algorithm == SPLIT;
    g.C = (char *)p->C + (first * g.stride + row) * bytes_of(g.dtype);
    gemm(&g, first, end - first, row, count, room);
}

/* Computes C = x ΔWᵀ for a thread's tokens. The columns of a block of rank 0 become 0. At first C's columns are in block order; then each row
 * is copied to `line`, put back in y's order, and masked. */
static void add_update(void *it, i64 thread, i64 first, i64 end) {
    const product *p = it;
    const layer *l = &p->l;
    arena room = room_of(&p->rooms, thread);
    float *C = (float *)p->C + first * p->C_stride, *line = take(&room, l->rows * 4);
    int format = format_of(p->total, widest_of(l));
    for (i64 k = 0; k < l->blocks; k++) {
        adapter m = adapter_of_block(l, &p->factors, k, 0, 0);
        gemm_job g = {.format = format, .depth = m.rank ? width_of(l, k) : 0, .terms = terms_of(p->total), .left = x_of(p),
                      .right = weight_of_block(l, k, 0, 0), .adapter = &m, .right_rows = right_rows_of(format),
                      .C = C + l->row_offsets[k], .stride = p->C_stride};
        if (l->contiguous)
            g.left.start = l->col_offsets[k];
        else
            g.left.cols = l->col_index + l->col_offsets[k];
        gemm(&g, first, end - first, 0, height_of(l, k), room);
    }
    for (i64 t = first; t < end; t++, C += p->C_stride) {
        if (!l->contiguous) {
            memcpy(line, C, (size_t)l->rows * sizeof *line);
            for (i64 i = 0; i < l->rows; i++) C[l->row_index[i]] = line[i];
        }
        if (p->y_keep) widen_row(C, FLOAT32, 0, l->rows, p->y_keep + t * words(l->rows), C);
    }
}

static void finish(void *it, i64 thread, i64 first, i64 end) {
    const product *p = it;
    (void)thread;
    void *to = (char *)p->y + first * p->y_stride * bytes_of(p->dtype);
    finish_rows((float *)p->C + first * p->C_stride, p->C_stride, end - first, p->l.rows, p->bias, 0, to, p->y_stride, p->dtype);
}

/* Whether `add_update` computes the update. */
static int has_update(const product *p) { return p->algorithm != MERGED && !p->tiles; }

/* Bytes of workspace per thread, for `add_update` and for `multiply_weight`. */
static i64 product_room(const product *p) {
    gemm_job g = weight_product(p);
    arena a = {0}, b = {0};
    int format = format_of(p->total, widest_of(&p->l)), high = left_height(format);
    i64 tokens = ceil_div(ceil_div(p->tokens, high), p->threads) * high; /* most of a thread */
    if (has_update(p)) {
        take(&a, p->l.rows * 4);
        packing_room_of(&a, format, tokens, right_rows_of(format), widest_of(&p->l), KC);
    }
    packing_room_of(&b, g.format, p->tokens, g.right_rows, g.depth, g.terms);
    return greatest(a.bytes, b.bytes);
}

/* y = x W_effᵀ + b, or split x W0ᵀ + dropout(x) ΔWᵀ + b. Half types are summed in float32 and rounded once. In bfloat16 tiles, which
 * compute dX alone, y += x W0ᵀ if y has a mask (dropout). */
static i64 blocked_product(product p) {
    const layer *l = &p.l;
    i64 remaining = p.tokens, in_y = p.tiles || p.dtype == FLOAT32;
    i64 most = in_y ? remaining : least(remaining, round_up(HALF_TOKENS, left_height(weight_product(&p).format)));
    arena a = p.workspace;
    p.tokens = most;
    p.factors = factors_of(&a, l, p.algorithm != MERGED, l->scaling);
    p.C = take(&a, in_y ? 0 : most * l->rows * 4), p.C_stride = in_y ? p.y_stride : l->rows;
    int32_t *row_label = take(&a, (l->rows + PANEL) * 4), *col_label = take(&a, (l->cols + PANEL) * 4);
    p.rooms = take_rooms(&a, p.threads, product_room(&p));
    if (!a.base) return floats_of(&a);
    write_labels(l->row_index, l->row_offsets, l->blocks, row_label);
    write_labels(l->col_index, l->col_offsets, l->blocks, col_label);
    p.merged = (adapter){l->rank, p.factors.A_stride, p.factors.B_stride, 0, p.factors.A, p.factors.B, row_label, col_label};
    for (; remaining > 0; remaining -= most, next_tokens(&p, most)) {
        p.tokens = least(most, remaining), p.C = in_y ? p.y : p.C;
        if (has_update(&p)) in_parallel(add_update, &p, p.tokens, left_height(format_of(p.total, widest_of(l))), p.threads);
        in_parallel(multiply_weight, &p, p.threads, 1, p.threads);
        if (!in_y || p.bias) in_parallel(finish, &p, p.tokens, 1, p.threads);
    }
    return floats_of(&a);
}

/* --- y in bfloat16 ------------------------------------------------------------------------------------------------------ */

/* y in bfloat16 tiles (PAIRS), each element one sum over all terms, rounded once: y = x W0ᵀ + dropout(x) ΔWᵀ + b.
 *
 * A W_eff in bfloat16 would lose an update smaller than W0's last bit. So x is multiplied by W0 and by ΔW, and both are summed in one C. W0
 * is the left operand and x the right one, so a row of C is one column of y and may be written anywhere. For dX under dropout only dY ΔW is
 * computed here, with the transposed layer; it is stored in bfloat16, so dX is rounded twice.
 */
#if HAS_TILES
/* A thread's buffers, and the rows of W0, while it multiplies a group of rows. */
typedef struct {
    const product *p;
    half *W0, *delta;
    float *scratch;
    const i64 *rows;
} row_room;

static row_room row_room_of(const product *p, arena *a) {
    const layer *l = &p->l;
    i64 width = (ceil_div(widest_of(l), TERMS) + 1) * TERMS, alone = p->algorithm == UPDATE;
    row_room r = {.p = p};
    r.W0 = take(a, alone ? 0 : p->together * round_up(l->cols, TERMS) * 2);
    r.delta = take(a, p->together * width * 2);
    r.scratch = take(a, 4 * scratch_size(PAIRS, l->cols));
    return r;
}

/* Packs some panels of tokens of x, and of dropout(x), in right tiles in block order. */
static void pack_x(void *it, i64 thread, i64 panel, i64 end) {
    const product *p = it;
    const layer *l = &p->l;
    arena local = room_of(&p->rooms, thread);
    float *scratch = row_room_of(p, &local).scratch;
    operand x = x_of(p);
    i64 count = least(p->tokens, end * PANEL) - panel * PANEL, at = panel * PANEL * round_up(l->cols, TERMS);
    x.cols = l->contiguous ? NULL : l->col_index;
    if (p->x_keep) pack_right(PAIRS, &x, NULL, panel * PANEL, count, 0, l->cols, (float *)(p->kept_tiles + at), scratch);
    x.keep = NULL;
    pack_right(PAIRS, &x, NULL, panel * PANEL, count, 0, l->cols, (float *)(p->x_tiles + at), scratch);
}

/* Adds the bias to sums (rows, PANEL tokens), rounds them once and writes them as columns of y. */
TARGET_BF16 INLINE void write_columns(const void *context, const float *sums, i64 row, i64 count, i64 token, i64 tokens) {
    const row_room *r = context;
    const product *p = r->p;
    half *to = p->columns + token * round_up(p->l.rows, TERMS);
    (void)tokens;
    for (i64 n = row; n < row + count; n++, sums += PANEL) {
        vf added = {0};
        if (p->bias) added += value_at(p->bias, r->rows[n], BFLOAT16);
        _mm512_store_si512(to + r->rows[n] * PANEL, narrowed(load(sums) + added, load(sums + SIDE) + added));
    }
}

/* Multiplies groups of rows of W0 and ΔW, or of ΔW alone for dX, by all tokens. */
TARGET_BF16 static void multiply_rows(void *it, i64 thread, i64 first, i64 end) {
    const product *p = it;
    const layer *l = &p->l;
    arena local = room_of(&p->rooms, thread);
    row_room r = row_room_of(p, &local);
    i64 alone = p->algorithm == UPDATE, deep = round_up(l->cols, TERMS);
    for (i64 k = 0, group = 0; k < l->blocks; k++)
        for (i64 n = 0; n < height_of(l, k); n += p->together, group++) {
            if (group < first || group >= end) continue;
            i64 col = l->col_offsets[k], skip = col % TERMS, width = width_of(l, k), count = least(p->together, height_of(l, k) - n);
            adapter m = adapter_of_block(l, &p->factors, k, n, skip);
            i64 before = col / TERMS, steps = width && m.rank ? ceil_div(skip + width, TERMS) : 0; /* steps of x before and in the block */
            r.rows = l->row_index + l->row_offsets[k] + n;
            if (alone && steps) {
                operand block = weight_of_block(l, k, n, skip);
                pack_right(PAIRS, &block, &m, 0, count, 0, skip + width, (float *)r.delta, r.scratch);
                transpose_tiles(ceil_div(count, PANEL) * steps * 2, r.delta);
            }
            operand weight = weight_of(l);
            weight.rows = r.rows, weight.cols = l->contiguous ? NULL : l->col_index;
            if (!alone) pack_left(PAIRS, &weight, 0, count, 0, l->cols, (float *)r.W0, r.scratch);
            for (i64 i = 0; i < count && steps && !alone; i += SIDE, m.B += SIDE) {
                i64 tile = i % PANEL * TERMS, panel = i / PANEL * PANEL;
                const half *from = r.W0 + panel * deep + before * STEP + tile;
                delta_tiles(&m, least(SIDE, count - i), skip + width, from, r.delta + panel * steps * TERMS + tile);
            }
            const half *x = p->x_keep ? p->kept_tiles : p->x_tiles;
            packed operands[] = {{(float *)r.delta, (float *)(x + before * STEP), steps * TERMS, l->cols},
                                 {(const float *)r.W0, (float *)p->x_tiles, l->cols, l->cols}};
            multiply_tiles(PAIRS, operands, alone ? 1 : 2, count, p->tokens, write_columns, &r);
        }
}

/* Transposes some panels of tokens back to rows of y and applies y's mask. */
TARGET_BF16 static void transpose_columns(void *it, i64 thread, i64 panel, i64 end) {
    const product *p = it;
    i64 rows = p->l.rows, deep = round_up(rows, TERMS);
    (void)thread;
    for (; panel < end; panel++)
        for (i64 c = 0; c < deep; c += TERMS)
            for (int upper = 0; upper < 2; upper++) {
                const half *from = p->columns + (panel * deep + c) * PANEL;
                __m512i r[SIDE];
#pragma GCC unroll 16
                for (int i = 0; i < SIDE; i++, from += 2 * PANEL) {
                    __m512i one = _mm512_load_si512(from), other = _mm512_load_si512(from + PANEL);
                    r[i] = upper ? _mm512_unpackhi_epi16(one, other) : _mm512_unpacklo_epi16(one, other);
                }
                transpose_lines(r);
#pragma GCC unroll 16
                for (int i = 0; i < SIDE; i++) {
                    i64 t = panel * PANEL + i / 4 * 8 + upper * 4 + i % 4; /* of each eight tokens, unpacking gives the first or last four */
                    if (t >= p->tokens) continue;
                    if (p->y_keep) r[i] = drop(r[i], p->y_keep + t * words(rows), c);
                    _mm512_mask_storeu_epi16((half *)p->y + t * p->y_stride + c, first_halves(rows - c), r[i]);
                }
            }
}

/* y = x W0ᵀ + dropout(x) ΔWᵀ + b, or x ΔWᵀ; returns the size of the workspace that it needs, in floats. */
static i64 rows_by_tokens(product p) {
    const layer *l = &p.l;
    i64 remaining = p.tokens, most = least(remaining, tokens_together(l));
    i64 size = round_up(most, PANEL) * round_up(l->cols, TERMS) * 2;
    arena a = p.workspace, local = {0};
    /* Few tokens are multiplied at once; groups of one panel then make ΔW from rows of W0 that are still in the caches. */
    p.together = remaining <= PANEL ? PANEL : rows_together(l->rows, l->cols, L2_CACHE / 2, p.threads), p.groups = 0;
    for (i64 k = 0; k < l->blocks; k++) p.groups += ceil_div(height_of(l, k), p.together);
    p.factors = factors_of(&a, l, 1, l->scaling);
    p.x_tiles = take(&a, size), p.kept_tiles = take(&a, p.x_keep ? size : 0);
    p.columns = take(&a, round_up(most, PANEL) * round_up(l->rows, TERMS) * 2);
    row_room_of(&p, &local), p.rooms = take_rooms(&a, p.threads, local.bytes);
    for (; a.base && remaining > 0; remaining -= most, next_tokens(&p, most)) {
        p.tokens = least(most, remaining);
        in_parallel(pack_x, &p, ceil_div(p.tokens, PANEL), 1, p.threads);
        in_parallel(multiply_rows, &p, p.groups, 1, p.threads);
        in_parallel(transpose_columns, &p, ceil_div(p.tokens, PANEL), 1, p.threads);
    }
    return floats_of(&a);
}
#else
static i64 rows_by_tokens(product p) { return (void)p, 0; }
#endif
