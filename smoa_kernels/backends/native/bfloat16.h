/* y in bfloat16 tiles (PAIRS), each element one sum over all terms, rounded once: y = x W0ᵀ + dropout(x) ΔWᵀ + b.
 *
 * A W_eff in bfloat16 would lose an update smaller than W0's last bit, so W0 and ΔW are both multiplied, into one C. W0's rows are the left
 * operand, x the right one: C has tokens side by side, so its columns may go anywhere. Of the transposed layer ΔW alone is multiplied, for
 * dX under dropout: dY ΔW is kept in bfloat16, so that dX is rounded twice.
 */
#pragma once

#include "product.h"

#if HAS_TILES
/* What a thread multiplies a group of rows with. */
typedef struct {
    const product *p;
    half *W0, *delta;
    float *scratch, *C;
    const i64 *rows;
    i64 before, steps; /* before: steps of x before the block's columns; steps: how many overlap them */
} row_room;

static row_room row_room_of(const product *p, arena *a) {
    const layer *l = &p->l;
    i64 width = (ceil_div(widest_of(l), TERMS) + 1) * TERMS, alone = p->algorithm == UPDATE;
    row_room r = {.p = p};
    r.W0 = take(a, alone ? 0 : p->together * round_up(l->cols, TERMS) * 2);
    r.delta = take(a, p->together * width * 2), r.C = take(a, PANEL * PANEL * 4);
    r.scratch = take(a, 4 * greatest(scratch_size(PAIRS, l->cols), round_up(l->rows, TERMS) * PANEL / 2)); /* or a panel of columns */
    return r;
}

/* x, and what is kept of it, as right tiles in block order, some panels of tokens. */
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

/* C = ΔW's rows by what is kept of x: the block's own terms. */
TARGET_BF16 static int begin_with_delta(const gemm_job *g, i64 i, i64 height, i64 j, i64 width) {
    const row_room *r = g->context;
    const half *x = r->p->x_keep ? r->p->kept_tiles : r->p->x_tiles;
    if (!r->steps) return 0;
    pairs_panel(r->steps, r->delta + i * r->steps * TERMS, x + j * round_up(r->p->l.cols, TERMS) + r->before * STEP, g->C, g->stride,
                height, width, 0);
    return 1;
}

/* Where columns of PANEL tokens of y wait until `turn_columns` makes rows of them: in y's own memory, or those of the last ones elsewhere. */
static half *columns_at(const product *p, i64 first) {
    return p->tokens - first < PANEL ? p->last_columns : (half *)p->y + first * p->l.rows;
}

/* C, (rows, PANEL tokens), takes its bias, and is rounded once: columns of y. */
TARGET_BF16 static void write_columns(const gemm_job *g, i64 i, i64 height, i64 j, i64 width) {
    const row_room *r = g->context;
    const product *p = r->p;
    (void)width;
    for (i64 n = 0; n < height; n++) {
        const float *from = g->C + n * PANEL;
        i64 row = r->rows[i + n];
        vf added = {0};
        if (p->bias) added += value_at(p->bias, row, BFLOAT16);
        _mm512_storeu_si512(columns_at(p, j) + row * PANEL, narrowed(load(from) + added, load(from + SIDE) + added));
    }
}

/* Groups of rows of W0 and ΔW, or of ΔW alone of a transposed layer, by all tokens. */
static void multiply_rows(void *it, i64 thread, i64 first, i64 end) {
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
            r.rows = l->row_index + l->row_offsets[k] + n, r.before = col / TERMS;
            r.steps = width && m.rank ? ceil_div(skip + width, TERMS) : 0;
            if (alone && r.steps) {
                operand block = weight_of_block(l, k, n, skip);
                pack_right(PAIRS, &block, &m, 0, count, 0, skip + width, (float *)r.delta, r.scratch);
                turn_tiles(ceil_div(count, PANEL) * r.steps * 2, r.delta);
            }
            operand W0 = weight_of(l);
            W0.rows = r.rows, W0.cols = l->contiguous ? NULL : l->col_index;
            if (!alone) pack_left(PAIRS, &W0, 0, count, 0, l->cols, (float *)r.W0, r.scratch);
            for (i64 i = 0; i < count && r.steps && !alone; i += SIDE, m.B += SIDE) {
                i64 tile = i % PANEL * TERMS, panel = i / PANEL * PANEL;
                delta_tiles(&m, least(SIDE, count - i), skip + width, r.W0 + panel * deep + r.before * STEP + tile,
                            r.delta + panel * r.steps * TERMS + tile);
            }
            gemm_job g = {.format = PAIRS, .depth = alone ? 0 : l->cols, .terms = l->cols, .left_tiles = alone ? r.delta : r.W0,
                          .right_tiles = p->x_tiles, .right_rows = PANEL, .C = r.C, .stride = PANEL, .begin = begin_with_delta,
                          .epilogue = write_columns, .context = &r};
            gemm(&g, 0, count, 0, p->tokens, local);
        }
}

/* Columns of some panels of tokens become rows of y, without what is dropped of it. */
TARGET_BF16 static void turn_columns(void *it, i64 thread, i64 panel, i64 end) {
    const product *p = it;
    arena local = room_of(&p->rooms, thread);
    half *columns = (half *)row_room_of(p, &local).scratch;
    for (i64 t = panel * PANEL, rows = p->l.rows; t < least(p->tokens, end * PANEL); t += SIDE) {
        if (t % PANEL == 0) memcpy(columns, columns_at(p, t), (size_t)(rows * PANEL) * sizeof *columns);
        for (i64 c = 0; c < rows; c += TERMS) {
            __m512i r[SIDE];
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++) r[i] = paired(columns + (c + 2 * i) * PANEL + t % PANEL, PANEL);
            transpose_lines(r);
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++) {
                if (t + i >= p->tokens) continue;
                if (p->y_keep) r[i] = drop(r[i], p->y_keep + (t + i) * words(rows), c);
                _mm512_mask_storeu_epi16((half *)p->y + (t + i) * rows + c, first_halves(rows - c), r[i]);
            }
        }
    }
}

/* y = x W0ᵀ + dropout(x) ΔWᵀ + b, or x ΔWᵀ; returns the floats that it needs of the workspace. */
static i64 rows_by_tokens(product p) {
    const layer *l = &p.l;
    i64 remaining = p.tokens, most = least(remaining, tokens_together(l));
    i64 size = round_up(most, PANEL) * round_up(l->cols, TERMS) * 2;
    arena a = p.workspace, local = {0};
    /* Of few tokens, which are multiplied at once, no more rows than a panel: ΔW is made of rows that are in the caches. */
    p.together = remaining <= PANEL ? PANEL : rows_together(l->rows, l->cols, L2_CACHE / 2, p.threads), p.groups = 0;
    for (i64 k = 0; k < l->blocks; k++) p.groups += ceil_div(height_of(l, k), p.together);
    p.factors = factors_of(&a, l, 1, l->scaling);
    p.x_tiles = take(&a, size), p.kept_tiles = take(&a, p.x_keep ? size : 0);
    p.last_columns = take(&a, l->rows * PANEL * 2);
    row_room_of(&p, &local), p.rooms = take_rooms(&a, p.threads, local.bytes);
    for (; a.base && remaining > 0; remaining -= most, next_tokens(&p, most)) {
        p.tokens = least(most, remaining);
        in_parallel(pack_x, &p, ceil_div(p.tokens, PANEL), 1, p.threads);
        in_parallel(multiply_rows, &p, p.groups, 1, p.threads);
        in_parallel(turn_columns, &p, ceil_div(p.tokens, PANEL), 1, p.threads);
    }
    return floats_of(&a);
}
#else
static i64 rows_by_tokens(product p) { return p.tokens; }
#endif
