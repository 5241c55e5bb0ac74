/* Products in bfloat16 (PAIRS): y, dX, dA and dB. Each element of y is one sum over all terms, and is rounded once. dX under dropout is
 * rounded twice, since dY ΔW is kept in bfloat16. Sums of dA and dB are float32.
 *
 * `rows_by_tokens`: y = x W0ᵀ + dropout(x) ΔWᵀ + b. A W_eff in bfloat16 would lose an update smaller than W0's last bit, so both are
 * multiplied, into one C. W0's rows are the left operand, x the right one: C has tokens side by side, so its columns may go anywhere.
 * `tokens_by_columns`: dX = dY W_eff. dY is the left operand, W0's columns the right one. Under dropout it is dY W0, added to the masked
 * dY ΔW, which `rows_by_tokens` computes first, of the transposed layer.
 * `tiles_gradient`: dA and dB. dY is the left operand, x the right one, and tokens are the terms.
 */
#pragma once

#include "epilogue.h"

#if HAS_TILES
enum { L2_CACHE = 1 << 20 };

/* How many of `all` rows are multiplied together. Rows have `numbers` elements; the result fits into `bytes` of a cache, is at least PANEL,
 * and leaves work for all threads. */
static i64 rows_together(i64 all, i64 numbers, i64 bytes, i64 threads) {
    enum { MOST = 256 };
    i64 fit = least(MOST, round_up(ceil_div(bytes / 2, greatest(1, numbers)), PANEL));
    return least(fit, round_up(ceil_div(all, threads), PANEL));
}

/* Tokens in the workspace at a time: quarters · max((rows + cols) / 16, 256), the first rounded up to PANEL. */
static i64 band_of(const layer *l, i64 quarters) {
    return greatest(ceil_div((l->rows + l->cols) * quarters, 16 * PANEL) * PANEL, 256 * quarters);
}

/* A band of tokens of one call. A layer whose W0 has contiguous columns is the transposed one. */
typedef struct {
    layer l;
    int delta_only; /* multiply by ΔW, not by W0 too */
    i64 parts, tokens, together, groups, x_stride, dy_stride;
    const half *x, *dy, *bias;
    const uint16_t *x_keep, *y_keep;
    half *y;
    half *x_tiles, *kept_tiles, *dy_tiles; /* all of x, what dropout keeps of it, and dY, as tiles */
    half *last;                            /* columns of the last tokens of y */
    int32_t *row_label, *col_label;
    gradient_sums sums;
    char *own; /* each part's share of the workspace */
    i64 own_bytes;
} band;

static arena own_of(const band *b, i64 part) { return (arena){b->own ? b->own + part * b->own_bytes : NULL, 0}; }

static void take_own(band *b, arena *a, i64 bytes) { b->own_bytes = bytes, b->own = take(a, b->parts * bytes); }

/* Goes on by so many tokens. */
static void next_band(band *b, i64 tokens) {
    if (b->x) b->x += tokens * b->x_stride;
    if (b->dy) b->dy += tokens * b->dy_stride;
    if (b->y) b->y += tokens * b->l.rows;
    if (b->x_keep) b->x_keep += tokens * words(b->l.cols);
    if (b->y_keep) b->y_keep += tokens * words(b->l.rows);
}

/* Groups of `together` rows of each block: those that this part multiplies. */
#define EACH_GROUP                                                                                                    \
    for (i64 k = 0, group = 0; k < l->blocks; k++)                                                                    \
        for (i64 n = 0; n < height_of(l, k); n += b->together, group++)                                               \
            if (group >= share_of(b->groups, 1, part, b->parts) && group < share_of(b->groups, 1, part + 1, b->parts))

static i64 groups_of(const layer *l, i64 together) {
    i64 groups = 0;
    for (i64 k = 0; k < l->blocks; k++) groups += ceil_div(height_of(l, k), together);
    return groups;
}

/* --- y ------------------------------------------------------------------------------------------------------------------ */

/* What a part multiplies a group of rows with. */
typedef struct {
    const band *b;
    half *W0, *delta, *scratch, *columns;
    float *A, *B, *C;
    const i64 *rows;
    i64 rank, top, before, own; /* before: the first tile of x that overlaps the block's columns; own: how many do */
} row_room;

static row_room row_room_of(const band *b, arena *a) {
    const layer *l = &b->l;
    i64 own = (ceil_div(widest_of(l), TERMS) + 1) * TERMS;
    row_room r = {.b = b};
    r.W0 = take(a, b->together * round_up(l->cols, TERMS) * 2);
    r.delta = take(a, b->together * own * 2), r.A = take(a, l->rank * own * 4), r.B = take(a, l->rank * PANEL * 4);
    r.C = take(a, PANEL * PANEL * 4);
    /* One after the other: right tiles of SIDE rows, columns of PANEL tokens. */
    r.scratch = r.columns = take(a, round_up(greatest(l->cols, l->rows), TERMS) * PANEL * 2);
    return r;
}

/* x, and what is kept of it, as right tiles in block order. */
static void pack_x(void *it, i64 part) {
    const band *b = it;
    const layer *l = &b->l;
    arena own = own_of(b, part);
    half *scratch = row_room_of(b, &own).scratch;
    i64 panels = ceil_div(b->tokens, PANEL);
    for (i64 p = share_of(panels, 1, part, b->parts); p < share_of(panels, 1, part + 1, b->parts); p++)
        for (int masked = 0; masked < (b->x_keep ? 2 : 1); masked++)
            tile_rows(b->x + p * PANEL * b->x_stride, b->x_stride, NULL, PANEL, b->tokens - p * PANEL, l->cols,
                      l->contiguous ? NULL : l->col_index, l->cols, 0, masked ? b->x_keep + p * PANEL * words(l->cols) : NULL, scratch,
                      (masked ? b->kept_tiles : b->x_tiles) + p * PANEL * round_up(l->cols, TERMS));
}

/* C = ΔW's rows by what is kept of x: the block's own terms. */
TILES static int begin_with_delta(const gemm_job *g, i64 i, i64 height, i64 j, i64 width) {
    const row_room *r = g->context;
    i64 deep = ceil_div(r->b->l.cols, TERMS);
    if (!r->own) return 0;
    const half *x = (r->b->x_keep ? r->b->kept_tiles : r->b->x_tiles) + j * deep * TERMS + r->before * TILE;
    pairs_panel(r->own, r->delta + i * r->own * TERMS, x, deep, g->C, g->stride, height, width, 0);
    return 1;
}

/* Where C is kept, column by column for PANEL tokens, until `turn_columns` writes it as rows: in y's own memory, or for the last tokens in
 * `last`. */
static half *columns_at(const band *b, i64 first) { return b->tokens - first < PANEL ? b->last : b->y + first * b->l.rows; }

/* Whether C's columns have y's order: blocks are contiguous, and nothing is dropped. */
static int in_order(const band *b) { return b->l.contiguous && !b->y_keep; }

static void finish_columns(const gemm_job *g, i64 i, i64 height, i64 j, i64 width) {
    const row_room *r = g->context;
    const band *b = r->b;
    write_columns(g->C, r->rows + i, in_order(b), b->bias, height, in_order(b) ? r->columns : columns_at(b, j));
    for (i64 t = 0; t < width && in_order(b); t += SIDE)
        rows_of_columns(r->columns + t, width - t, height, NULL, b->y + (j + t) * b->l.rows + r->top + i, b->l.rows);
}

/* Rows of W0 and ΔW, or of ΔW alone of a transposed layer, by all tokens. */
static void multiply_rows(void *it, i64 part) {
    const band *b = it;
    const layer *l = &b->l;
    arena own = own_of(b, part);
    row_room r = row_room_of(b, &own);
    int alone = b->delta_only;
    EACH_GROUP {
        i64 left = l->col_offsets[k], width = width_of(l, k), count = least(b->together, height_of(l, k) - n);
        const i64 *index = l->contiguous ? NULL : l->col_index;
        r.rank = rank_of(l, k), r.top = l->row_offsets[k] + n, r.rows = l->row_index + r.top, r.before = left / TERMS;
        r.own = width && r.rank ? ceil_div(left + width, TERMS) - r.before : 0;
        if (!alone)
            tile_rows(l->weight, l->row_stride, r.rows, count, l->rows - r.top, l->cols, index, l->cols, 1, NULL, r.scratch, r.W0);
        if (!alone) copy_A(l, l->col_index + left, 0, width, r.rank, NULL, r.A + left % TERMS, r.own * TERMS);
        for (i64 i = 0; i < count && r.own && !alone; i += SIDE)
            delta_left(l, k, r.rows + i, least(SIDE, count - i), r.W0 + i * round_up(l->cols, TERMS) + r.before * TILE, r.A, r.B,
                       r.delta + i * r.own * TERMS);
        for (i64 i = 0; i < count && r.own && alone; i += PANEL)
            delta_transposed(l, k, r.rows + i, least(PANEL, count - i), r.A, r.B, r.delta + i * r.own * TERMS);
        gemm_job g = {.format = PAIRS, .depth = alone ? 0 : l->cols, .left_tiles = r.W0, .right_tiles = b->x_tiles,
                      .left_rows = b->together, .right_rows = PANEL, .C = r.C, .stride = PANEL, .begin = begin_with_delta,
                      .epilogue = finish_columns, .context = &r};
        gemm(&g, 0, count, 0, b->tokens, NULL);
    }
}

/* Columns that wait become rows, without what is dropped of y. */
static void turn_columns(void *it, i64 part) {
    const band *b = it;
    arena own = own_of(b, part);
    half *columns = row_room_of(b, &own).columns;
    i64 panels = ceil_div(b->tokens, PANEL), rows = b->l.rows;
    for (i64 p = share_of(panels, 1, part, b->parts); p < share_of(panels, 1, part + 1, b->parts); p++) {
        i64 t = p * PANEL, there = least(PANEL, b->tokens - t);
        memcpy(columns, columns_at(b, t), (size_t)(rows * PANEL) * sizeof *columns);
        for (i64 i = 0; i < there; i += SIDE)
            rows_of_columns(columns + i, there - i, rows, b->y_keep ? b->y_keep + (t + i) * words(rows) : NULL, b->y + (t + i) * rows, rows);
    }
}

/* y (tokens, rows) of x (tokens, cols); returns the floats that it needs of the workspace. */
static i64 rows_by_tokens(band b, arena a) {
    const layer *l = &b.l;
    i64 left = b.tokens, most = least(left, band_of(l, l->contiguous || b.x_keep ? 4 : 8)), panels = round_up(most, PANEL);
    arena part = {0};
    /* Of few tokens, which are multiplied at once, no more rows than a panel: ΔW is made of rows that are in the caches. */
    b.together = left <= PANEL ? PANEL : rows_together(l->rows, l->cols, L2_CACHE / 2, b.parts), b.groups = groups_of(l, b.together);
    b.x_tiles = take(&a, panels * round_up(l->cols, TERMS) * 2);
    b.kept_tiles = take(&a, b.x_keep ? panels * round_up(l->cols, TERMS) * 2 : 0);
    b.last = take(&a, in_order(&b) ? 0 : l->rows * PANEL * 2);
    row_room_of(&b, &part), take_own(&b, &a, part.bytes);
    for (; a.base && left > 0; left -= most, next_band(&b, most)) {
        b.tokens = least(most, left);
        in_parallel(pack_x, &b, b.parts);
        in_parallel(multiply_rows, &b, b.parts);
        if (!in_order(&b)) in_parallel(turn_columns, &b, b.parts);
    }
    return floats_of(&a);
}

static i64 tiles_forward(const call *c) {
    band b = {.l = c->layer, .parts = c->threads, .tokens = c->tokens, .x = c->x, .x_stride = c->x_stride, .x_keep = c->keep, .bias = c->bias,
              .y = c->y};
    return rows_by_tokens(b, workspace_of(c->workspace));
}

/* --- dX: of the transposed layer, whose rows are W0's columns -------------------------------------------------------------- */

typedef struct {
    const band *b;
    half *tiles;
    float *A, *B, *C;
    i64 group, left;
} column_room;

static column_room column_room_of(const band *b, arena *a) {
    const layer *l = &b->l;
    column_room r = {.b = b, .group = rows_together(l->rows, l->cols, L2_CACHE, b->parts)};
    r.tiles = take(a, round_up(l->cols, TERMS) * r.group * 2), r.C = take(a, r.group * PANEL * 4);
    r.A = take(a, l->rank * (l->cols + BESIDE) * 4), r.B = take(a, l->rank * r.group * 4);
    return r;
}

static void pack_dy(void *it, i64 part) {
    const band *b = it;
    i64 panels = ceil_div(b->tokens, PANEL), cols = b->l.cols;
    for (i64 p = share_of(panels, 1, part, b->parts); p < share_of(panels, 1, part + 1, b->parts); p++)
        tile_rows(b->x + p * PANEL * b->x_stride, b->x_stride, NULL, PANEL, b->tokens - p * PANEL, cols, NULL, cols, 1, NULL, NULL,
                  b->x_tiles + p * PANEL * round_up(cols, TERMS));
}

/* C = what is there of dX: the masked dY ΔW. The memory is asked meanwhile for a share of the columns of W0 that are read next. */
TILES static int begin_with_dx(const gemm_job *g, i64 i, i64 height, i64 j, i64 width) {
    const column_room *r = g->context;
    const layer *l = &r->b->l;
    const half *from = r->b->y + i * l->rows + r->left + j, *next = (const half *)l->weight + r->left + width;
    i64 panels = ceil_div(r->b->tokens, PANEL), p = i / PANEL;
    for (i64 n = l->cols * p / panels; n < l->cols * (p + 1) / panels; n++)
        for (i64 c = 0; c < least(r->group, l->rows - r->left - width); c += TERMS) __builtin_prefetch(next + n * l->col_stride + c, 0, 2);
    for (i64 t = 0; t < height && r->b->y_keep; t++)
        for (i64 c = 0; c < width; c += PANEL) {
            __m512i found = _mm512_maskz_loadu_epi16(first_halves(width - c), from + t * l->rows + c);
            store(g->C + t * g->stride + c, HALF_WIDENED(found, 0));
            store(g->C + t * g->stride + c + SIDE, HALF_WIDENED(found, 1));
        }
    return r->b->y_keep != NULL;
}

TILES static void write_rows_of_dx(const gemm_job *g, i64 i, i64 height, i64 j, i64 width) {
    const column_room *r = g->context;
    half *to = r->b->y + i * r->b->l.rows + r->left + j;
    for (i64 t = 0; t < height; t++)
        for (i64 c = 0; c < width; c += PANEL) {
            const float *from = g->C + t * g->stride + c;
            _mm512_mask_storeu_epi16(to + t * r->b->l.rows + c, first_halves(width - c), narrowed(load(from), load(from + SIDE)));
        }
}

static void multiply_columns(void *it, i64 part) {
    const band *b = it;
    const layer *l = &b->l;
    arena own = own_of(b, part);
    column_room r = column_room_of(b, &own);
    i64 end = share_of(l->rows, PANEL, part + 1, b->parts), merged = !b->y_keep;
    if (merged) copy_A(l, NULL, 0, l->cols, l->rank, b->col_label, r.A, l->cols + BESIDE);
    for (r.left = share_of(l->rows, PANEL, part, b->parts); r.left < end; r.left += r.group) {
        i64 width = least(r.group, end - r.left);
        if (merged) copy_B(l, NULL, r.left, width, l->rank, b->row_label, r.B, r.group);
        weight_right(l, r.left, width, merged ? b->row_label : NULL, b->col_label, r.A, r.B, r.group, r.tiles);
        gemm_job g = {.format = PAIRS, .depth = l->cols, .left_tiles = b->x_tiles, .right_tiles = r.tiles,
                      .left_rows = round_up(b->tokens, PANEL), .right_rows = r.group, .C = r.C, .stride = r.group, .begin = begin_with_dx,
                      .epilogue = write_rows_of_dx, .context = &r};
        gemm(&g, 0, b->tokens, 0, width, NULL);
    }
}

/* y (tokens, rows) = x W_effᵀ of the transposed layer, or where some of y is dropped x W0ᵀ added to what is there of it. */
static i64 tokens_by_columns(band b, arena a) {
    const layer *l = &b.l;
    i64 left = b.tokens, most = least(left, band_of(l, 4));
    arena part = {0};
    b.x_tiles = take(&a, round_up(most, PANEL) * round_up(l->cols, TERMS) * 2);
    b.row_label = take(&a, (l->rows + PANEL) * 4), b.col_label = take(&a, l->cols * 4); /* some are read beside the last */
    column_room_of(&b, &part), take_own(&b, &a, part.bytes);
    if (!a.base) return floats_of(&a);
    write_labels(l->row_index, l->row_offsets, l->blocks, b.row_label);
    write_labels(l->col_index, l->col_offsets, l->blocks, b.col_label);
    for (; left > 0; left -= most, next_band(&b, most)) {
        b.tokens = least(most, left);
        in_parallel(pack_dy, &b, b.parts);
        in_parallel(multiply_columns, &b, b.parts);
    }
    return floats_of(&a);
}

static i64 tiles_input(const call *c) {
    band b = {.l = transposed(c->layer), .parts = c->threads, .tokens = c->tokens, .x = c->dy, .x_stride = c->dy_stride, .y_keep = c->keep,
              .y = c->y};
    b.delta_only = c->keep != NULL;
    i64 update = b.delta_only ? rows_by_tokens(b, workspace_of(c->workspace)) : 0;
    return greatest(update, tokens_by_columns(b, workspace_of(c->workspace)));
}

/* --- dA and dB ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    const band *b;
    half *dy_lines, *x_lines; /* of one PANEL of tokens, while operands are packed */
    half *W0, *scratch;       /* while they are multiplied */
    float *C, *B, *H, *dA;
    const half *weight;
    i64 k, top, stride, below, before;
} gradient_room;

static gradient_room gradient_room_of(const band *b, arena *a) {
    const layer *l = &b->l;
    gradient_room r = {.b = b};
    arena pack = *a;
    r.dy_lines = take(&pack, round_up(l->rows, TERMS) * PANEL * 2), r.x_lines = take(&pack, round_up(l->cols, TERMS) * PANEL * 2);
    r.W0 = take(a, l->contiguous ? 0 : b->together * round_up(widest_of(l), TERMS) * 2);
    r.scratch = take(a, round_up(l->cols, TERMS) * SIDE * 2);
    r.C = take(a, PANEL * PANEL * 4), r.H = take(a, PANEL * PANEL * 4), r.B = take(a, b->together * b->sums.ranks * 4);
    a->bytes = greatest(a->bytes, pack.bytes);
    return r;
}

/* Both operands, whose terms are tokens, in block order, PANEL tokens at a time: columns of dY are its left tiles' rows, those of x,
 * transposed, its right tiles. Contiguous blocks of an x of which nothing is dropped are tiles at once. */
TILES static void pack_terms(void *it, i64 part) {
    const band *b = it;
    const layer *l = &b->l;
    arena own = own_of(b, part);
    gradient_room r = gradient_room_of(b, &own);
    i64 steps = ceil_div(b->tokens, PANEL), at_once = l->contiguous && !b->x_keep;
    for (i64 t = share_of(steps, 1, part, b->parts); t < share_of(steps, 1, part + 1, b->parts); t++) {
        i64 first = t * PANEL, there = b->tokens - first;
        const half *x = b->x + first * b->x_stride;
        half *left = b->dy_tiles + t * TILE, *right = b->x_tiles + t * TILE;
        lines_of_columns(b->dy + first * b->dy_stride, b->dy_stride, there, l->rows, NULL, r.dy_lines);
        if (!at_once)
            lines_of_columns(x, b->x_stride, there, l->cols, b->x_keep ? b->x_keep + first * words(l->cols) : NULL, r.x_lines);
        for (i64 k = 0; k < l->blocks; k++) {
            const i64 *rows = l->row_index + l->row_offsets[k], *cols = l->col_index + l->col_offsets[k];
            i64 height = height_of(l, k), width = width_of(l, k);
            for (i64 n = 0; n < height; n++) {
                half *to = left + n / SIDE * steps * TILE + n % SIDE * TERMS;
                __builtin_prefetch(to + steps * TILE, 1); /* the next tile is far away */
                _mm512_store_si512(to, _mm512_load_si512(r.dy_lines + rows[n] * PANEL));
            }
            for (i64 c = 0; c < width && at_once; c += PANEL)
                pair_terms(x, b->x_stride, there, l->col_offsets[k] + c, width - c, NULL, 0, right + c / SIDE * steps * TILE, steps * TILE);
            for (i64 c = 0; c < width && !at_once; c += SIDE) {
                half *to = right + c / SIDE * steps * TILE;
                __m512i line[16];
#pragma GCC unroll 16
                for (int i = 0; i < SIDE; i++)
                    line[i] = c + i < width ? _mm512_load_si512(r.x_lines + cols[c + i] * PANEL) : _mm512_setzero_si512();
                for (int i = 0; i < SIDE; i++) __builtin_prefetch(to + steps * TILE + i * TERMS, 1);
                transpose_lines(line);
                store_lines(line, to);
            }
            left += round_up(height, PANEL) * steps * TERMS, right += round_up(width, PANEL) * steps * TERMS;
        }
    }
}

/* G, a panel of C, becomes H, and sums of dA and dB. */
static void contract_panel(const gemm_job *g, i64 i, i64 height, i64 j, i64 width) {
    const gradient_room *r = g->context;
    const layer *l = &r->b->l;
    const gradient_sums *s = &r->b->sums;
    const half *W0 = r->weight + i / SIDE * r->below + j / TERMS * (l->contiguous ? TERMS : TILE);
    float *dB = s->dB + (padded_before(l->row_offsets, r->k) + r->top + i) * s->ranks;
    for (i64 n = 0; n < round_up(height, GROUP); n++)
        if (n < height)
            H_row(g->C + n * PANEL, W0 + n / SIDE * r->below + n % SIDE * r->stride, BFLOAT16, (float)l->scaling, width, r->H + n * PANEL);
        else
            memset(r->H + n * PANEL, 0, PANEL * sizeof *r->H);
    for (i64 n = 0; n < height; n += GROUP)
        contract(rank_of(l, r->k), s->ranks, r->H + n * PANEL, PANEL, PANEL, s->A + (r->before + j) * s->ranks, r->B + (i + n) * s->ranks,
                 r->dA + r->before + j, s->wide, dB + n * s->ranks);
}

static void multiply_terms(void *it, i64 part) {
    const band *b = it;
    const layer *l = &b->l;
    arena own = own_of(b, part);
    gradient_room r = gradient_room_of(b, &own);
    i64 steps = ceil_div(b->tokens, PANEL);
    r.dA = b->sums.dA + part * b->sums.ranks * b->sums.wide;
    EACH_GROUP {
        i64 width = width_of(l, k), count = least(b->together, height_of(l, k) - n);
        const i64 *rows = l->row_index + l->row_offsets[k] + n;
        if (!rank_of(l, k) || !width) continue;
        r.k = k, r.top = n, r.before = padded_before(l->col_offsets, k);
        r.weight = l->contiguous ? (const half *)l->weight + *rows * l->row_stride + l->col_offsets[k] : r.W0;
        r.stride = l->contiguous ? l->row_stride : TERMS, r.below = SIDE * (l->contiguous ? l->row_stride : round_up(width, TERMS));
        if (!l->contiguous)
            tile_rows(l->weight, l->row_stride, rows, count, height_of(l, k) - n, l->cols, l->col_index + l->col_offsets[k], width, 1, NULL,
                      r.scratch, r.W0);
        copy_B_rows(&b->sums, k, rows, count, r.B);
        gemm_job g = {.format = PAIRS, .depth = b->tokens, .left_rows = b->together, .right_rows = PANEL, .C = r.C, .stride = PANEL,
                      .epilogue = contract_panel, .context = &r};
        g.left_tiles = b->dy_tiles + (padded_before(l->row_offsets, k) + n) * steps * TERMS;
        g.right_tiles = b->x_tiles + r.before * steps * TERMS;
        gemm(&g, 0, count, 0, width, NULL);
    }
}

/* dA (rank, cols) and dB (rows, rank) of dY (tokens, rows) and x (tokens, cols). */
static i64 tiles_gradient(const call *c) {
    band b = {.l = c->layer, .parts = c->threads, .x = c->x, .x_stride = c->x_stride, .x_keep = c->keep, .dy = c->dy,
              .dy_stride = c->dy_stride};
    i64 left = c->tokens, all = band_of(&b.l, b.l.contiguous ? 1 : 4), most = least(left, all), panels = round_up(most, PANEL);
    arena a = workspace_of(c->workspace), part = {0};
    b.sums = sums_in(&a, &b.l, b.parts);
    b.together = rows_together(b.l.rows, all, L2_CACHE, b.parts), b.groups = groups_of(&b.l, b.together);
    b.dy_tiles = take(&a, padded_before(b.l.row_offsets, b.l.blocks) * panels * 2);
    b.x_tiles = take(&a, padded_before(b.l.col_offsets, b.l.blocks) * panels * 2);
    gradient_room_of(&b, &part), take_own(&b, &a, part.bytes);
    if (!a.base) return floats_of(&a);
    begin_sums(&b.sums);
    for (; left > 0; left -= most, next_band(&b, most)) {
        b.tokens = least(most, left);
        in_parallel(pack_terms, &b, b.parts);
        in_parallel(multiply_terms, &b, b.parts);
    }
    end_sums(&b.sums, c->dA, c->dB, 0);
    return floats_of(&a);
}
#endif
