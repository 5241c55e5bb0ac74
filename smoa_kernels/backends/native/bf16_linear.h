/* `y = x W0ᵀ + dropout(x) ΔWᵀ + b` in bfloat16: both products are summed in one float32 tile and rounded once, with b.
 *
 * x becomes right tiles, its columns in block order. Some rows of one block of W0 at a time become left tiles, their columns
 * in block order too; ΔW is made of those of the block, and both are multiplied by all tokens. Rows of contiguous blocks have
 * that order, and are multiplied where they lie if they are whole tiles. What comes out are columns of y, 32 tokens each, so
 * that to put them back into y's order is to write them where they belong. They wait in y's own memory until all are there,
 * then they become rows. Those of contiguous blocks become rows at once.
 */
#pragma once

#include "bf16.h"

enum { L2_CACHE = 1 << 20 };

/* Of `all` rows, or columns, of so many numbers each, those that are multiplied together by all tokens: they take about so many
 * `bytes` of a cache, PAIR at least, and there is work for all threads. */
static i64 bf16_together(i64 all, i64 numbers, i64 bytes, i64 threads) {
    enum { TOGETHER_MOST = 256 };
    i64 fit = least(TOGETHER_MOST, up(bytes / 2, numbers * PAIR) * PAIR);
    return least(fit, up(up(all, threads), PAIR) * PAIR);
}

/* W0's rows leave room for ΔW's, and for x of the tokens that are multiplied and of the next. */
static i64 bf16_rows_of(i64 rows, i64 cols, i64 threads) { return bf16_together(rows, cols, L2_CACHE / 2, threads); }

/* Whether W0's rows are multiplied where they lie: those of contiguous blocks of whole tiles, which AMX does not take. */
static i64 bf16_in_place(const layer *l) {
    i64 in_place = l->contiguous && l->cols % TERMS == 0 && !amx_allowed();
    for (i64 k = 0; k < l->blocks; k++) in_place = in_place && l->row_offsets[k + 1] % SIDE == 0;
    return in_place;
}

/* Tokens of a band: of more where W0's rows are copied for each, of most where they get another order and x is there once. */
static i64 bf16_forward_band(const layer *l, i64 in_place, i64 masked) {
    return bf16_band(l, in_place ? 3 : l->contiguous || masked ? 4 : 8);
}

static i64 bf16_pairs(i64 tokens) { return up(tokens, PAIR) * 2; }

/* Tiles that so many columns of a block lie in: no more than these, since a block may begin within one. */
static i64 bf16_tiles_of(i64 width) { return up(width, TERMS) + 1; }

static i64 bf16_forward_part_size(const layer *l, i64 in_place, i64 widest, i64 threads) {
    i64 height = bf16_rows_of(l->rows, l->cols, threads), tiles = up(l->cols, TERMS), own = bf16_tiles_of(widest) * TERMS;
    i64 pairs = tiles * TILE / 2, columns = up(l->rows, TERMS) * TERMS * PAIR / 2;
    i64 product = (l->contiguous ? 0 : pairs) + (in_place ? 0 : height * tiles * TERMS / 2) + height * own / 2 +
                  l->rank * own + lines(l->rank * SIDE) + height * PAIR + height * PAIR / 2;
    return l->contiguous ? product : greatest(product, columns);
}

/* Floats that smoa_bf16_forward needs. */
i64 smoa_bf16_forward_workspace(const layer *l, i64 tokens, i64 masked, i64 threads) {
    i64 in_place = bf16_in_place(l), panels = bf16_pairs(least(tokens, bf16_forward_band(l, in_place, masked)));
    return panels * up(l->cols, TERMS) * TILE / 2 * (masked ? 2 : 1) +
           (l->contiguous ? 0 : up(l->rows, TERMS) * TERMS * PAIR / 2) +
           threads * bf16_forward_part_size(l, in_place, widest_of(l), threads) + 16;
}

static float *bf16_forward_room(const bf16_job *j, i64 part) {
    return j->workspace + part * bf16_forward_part_size(j->l, j->in_place, j->widest, j->parts);
}

/* x as right tiles in block order, and again without what is dropped. */
static void bf16_prepare(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    i64 panels = bf16_pairs(j->tokens), tiles = up(l->cols, TERMS);
    for (i64 p = share_of(panels, 1, part, j->parts); p < share_of(panels, 1, part + 1, j->parts); p++)
        for (int masked = 0; masked < (j->keep ? 2 : 1); masked++) {
            half *to = (masked ? j->kept : j->all) + p * tiles * TILE;
            half *pairs = l->contiguous ? to : (half *)bf16_forward_room(j, part);
            some_rows x = rows_at(j->x + p * SIDE * j->x_stride, j->x_stride, NULL, j->tokens - p * SIDE);
            pairs_of(&x, l->cols, masked ? j->keep + p * SIDE * words(l->cols) : NULL, pairs);
            if (!l->contiguous) pick_pairs(pairs, l->col_index, l->cols, to);
        }
}

/* Of few tokens, which are multiplied at once, no more rows than a product has: ΔW is made of rows that are in the caches. */
static i64 bf16_rows_together(const bf16_job *j) {
    const layer *l = j->l;
    return j->tokens > PAIR ? bf16_rows_of(l->rows, l->cols, j->parts) : amx_allowed() ? PAIR : SIDE;
}

/* Some of the rows of W0 that are `left`, as left tiles, columns in block order. */
static void base_tiles(const bf16_job *j, const i64 *rows, i64 count, i64 left, half *pairs, half *to) {
    const layer *l = j->l;
    i64 tiles = up(l->cols, TERMS);
    for (i64 i = 0; i < count; i += SIDE, to += tiles * TILE) {
        some_rows from = rows_at(j->weight, l->row_stride, rows + i, left - i);
        from.count = least(from.count, count - i);
        if (l->contiguous) {
            copy_rows(&from, l->cols, to);
        } else {
            pairs_of(&from, l->cols, NULL, pairs);
            pick_rows(pairs, l->col_index, l->cols, to, TILE);
        }
    }
}

/* ΔW's left tiles of up to SIDE rows of block k: those that its columns lie in, and 0 in others' columns (0 times what is not
 * finite is NaN, in a token whose y is not finite anyway). Of W0's, the same rows are `stride` apart and tiles `step`. A's
 * columns begin where the first of these tiles does. */
TILES static void delta_tiles(const bf16_job *j, i64 k, const i64 *rows, i64 count, const half *from, i64 stride, i64 step,
                            const float *A, float *factor, half *to) {
    const layer *l = j->l;
    i64 left = l->col_offsets[k] % TERMS, end = left + l->col_offsets[k + 1] - l->col_offsets[k], apart = up(end, TERMS) * TERMS;
    i64 rank = rank_of(l, k);
    for (i64 i = 0; i < count; i++)
        for (i64 t = 0; t < rank; t++)
            factor[t * SIDE + i] = l->scaling * one_of(l->B, rows[i] * l->B_row + t * l->B_rank, (int)l->factors);
    for (i64 c = 0; c < end; c += TERMS, from += step, to += TILE) {
        __mmask32 own = first_of(end - c) & (c < left ? ~first_of(left - c) : ~(__mmask32)0);
        for (i64 i = 0; i < count; i += ROWS) {
            vf update[ROWS][2] = {{{0}}};
            const float *a = A + c, *b = factor + i;
            for (i64 t = 0; t < rank; t++, a += apart, b += SIDE)
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) update[r][0] += b[r] * load(a), update[r][1] += b[r] * load(a + SIDE);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                if (i + r >= count) continue;
                __m512i w = _mm512_loadu_si512(from + (i + r) * stride);
                w = both_narrowed(HALF_WIDENED(w, 0) * update[r][0], HALF_WIDENED(w, 1) * update[r][1]);
                _mm512_store_si512(to + (i + r) * TERMS, _mm512_maskz_mov_epi16(own, w));
            }
        }
    }
}

/* Columns of y, PAIR tokens each, from sums (rows of W0, PAIR tokens), plus these rows' bias unless it is NULL: where they
 * belong, or `in_order`. */
TILES static void write_columns(const float *sums, const i64 *rows, i64 in_order, const half *bias, i64 count, half *to) {
    for (i64 i = 0; i < count; i++) {
        vf own = {0};
        if (bias) own += one_of(bias, rows[i], BFLOAT16);
        _mm512_storeu_si512(to + (in_order ? i : rows[i]) * PAIR,
                            both_narrowed(load(sums + i * PAIR) + own, load(sums + i * PAIR + SIDE) + own));
    }
}

/* Where columns of PAIR tokens wait to become rows: in y itself, which has as much memory, but those of the last few. */
static half *bf16_columns(const bf16_job *j, i64 first) {
    return j->tokens - first < PAIR ? j->last : j->y + first * j->l->rows;
}

TILES static void bf16_multiply(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    i64 deep = up(l->cols, TERMS), groups = 0, group = 0, together = bf16_rows_together(j);
    float *at = bf16_forward_room(j, part);
    half *pairs = l->contiguous ? NULL : taken(&at, deep * TILE * 2);
    half *base = j->in_place ? NULL : taken(&at, together * deep * TERMS * 2);
    half *delta = taken(&at, together * bf16_tiles_of(j->widest) * TERMS * 2);
    float *A = taken(&at, l->rank * bf16_tiles_of(j->widest) * TERMS * 4), *factor = taken(&at, l->rank * SIDE * 4);
    float *sums = taken(&at, together * PAIR * 4);
    half *columns = taken(&at, together * PAIR * 2);
    for (i64 k = 0; k < l->blocks; k++) groups += up(l->row_offsets[k + 1] - l->row_offsets[k], together);
    i64 first = share_of(groups, 1, part, j->parts), end = share_of(groups, 1, part + 1, j->parts);
    i64 stride = j->in_place ? l->row_stride : IN_TILES;
    begin_tiles();
    for (i64 k = 0; k < l->blocks; k++) {
        i64 top = l->row_offsets[k], height = l->row_offsets[k + 1] - top, left = l->col_offsets[k];
        i64 width = l->col_offsets[k + 1] - left, rank = width ? rank_of(l, k) : 0, before = left / TERMS;
        i64 own = up(left + width, TERMS) - before;
        const half *kept = (j->keep ? j->kept : j->all) + before * TILE;
        for (i64 n = 0; n < height; n += together, group++) {
            if (group < first || group >= end) continue;
            const i64 *rows = l->row_index + top + n;
            const half *W0 = j->in_place ? j->weight + *rows * stride : base;
            i64 count = least(together, height - n);
            if (!j->in_place) base_tiles(j, rows, count, l->rows - top - n, pairs, base);
            if (n == 0 || group == first)
                copy_A(l, l->col_index + left, 0, width, rank, A + left % TERMS, own * TERMS);
            for (i64 i = 0; i < count && rank > 0; i += SIDE) {
                const half *from = j->in_place ? W0 + i * stride + before * TERMS : base + (i * deep + before * SIDE) * TERMS;
                delta_tiles(j, k, rows + i, least(SIDE, count - i), from, j->in_place ? stride : TERMS,
                            j->in_place ? TERMS : TILE, A, factor, delta + i * own * TERMS);
            }
            for (i64 t = 0; t < j->tokens; t += PAIR) {
                i64 there = least(PAIR, j->tokens - t);
                const half *x = j->all + t * deep * TERMS, *next = t + PAIR < j->tokens ? x + PAIR * deep * TERMS : NULL;
                add_products(count, there, deep, W0, stride, x, deep, 0, sums, next);
                if (rank > 0) add_products(count, there, own, delta, IN_TILES, kept + t * deep * TERMS, deep, 1, sums, NULL);
                if (!l->contiguous) {
                    write_columns(sums, rows, 0, j->bias, count, bf16_columns(j, t));
                    continue;
                }
                write_columns(sums, rows, 1, j->bias, count, columns);
                for (i64 i = 0; i < there; i += SIDE)
                    rows_from(columns + i, there - i, count, NULL, j->y + (t + i) * l->rows + top + n, l->rows);
            }
        }
    }
    end_tiles();
}

static void bf16_finish(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    half *columns = (half *)bf16_forward_room(j, part);
    i64 panels = up(j->tokens, PAIR);
    for (i64 p = share_of(panels, 1, part, j->parts); p < share_of(panels, 1, part + 1, j->parts); p++) {
        i64 t = p * PAIR, there = least(PAIR, j->tokens - t);
        memcpy(columns, bf16_columns(j, t), (size_t)(l->rows * PAIR) * sizeof *columns);
        for (i64 i = 0; i < there; i += SIDE)
            rows_from(columns + i, there - i, l->rows, NULL, j->y + (t + i) * l->rows, l->rows);
    }
}

/* y (tokens, rows): x (tokens, cols) and W0 with contiguous rows, of x some dropped by `keep` for ΔW, as in smoa_order. A and B
 * are contiguous; `bias` (rows) may be NULL. There is a token, a row and a column. Needs indices. */
void smoa_bf16_forward(const layer *l, i64 tokens, const void *x, i64 x_stride, const uint16_t *keep, const void *bias, void *y,
                       float *workspace, i64 threads) {
    bf16_job job = bf16_job_of(l, keep, threads);
    float *at = from_a_line(workspace);
    job.bias = bias, job.in_place = bf16_in_place(l);
    i64 band = bf16_forward_band(l, job.in_place, keep != NULL), panels = bf16_pairs(least(tokens, band));
    job.all = taken(&at, panels * up(l->cols, TERMS) * TILE * 2);
    if (keep) job.kept = taken(&at, panels * up(l->cols, TERMS) * TILE * 2);
    if (!l->contiguous) job.last = taken(&at, up(l->rows, TERMS) * TERMS * PAIR * 2);
    job.workspace = at;
    for (i64 first = 0; first < tokens; first += band) {
        job.tokens = least(band, tokens - first);
        job.x = (const half *)x + first * x_stride, job.x_stride = x_stride, job.y = (half *)y + first * l->rows;
        job.keep = keep ? keep + first * words(l->cols) : NULL;
        in_parallel(bf16_prepare, &job, threads);
        in_parallel(bf16_multiply, &job, threads);
        if (!l->contiguous) in_parallel(bf16_finish, &job, threads);
    }
}
