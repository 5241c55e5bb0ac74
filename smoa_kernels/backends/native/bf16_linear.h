/* `y = x W0ᵀ + dropout(x) ΔWᵀ + b` in bfloat16: both products are summed in one float32 tile and rounded once, with b.
 *
 * W0's rows are left tiles as they lie, x is prepared once. Some rows of one block at a time are copied side by side, ΔW is
 * made of them, and both are multiplied by all tokens. What comes out are columns of y, 32 tokens each, so that to put them
 * back into y's order is to write them where they belong; then they become rows. Those of contiguous blocks are in order.
 */
#pragma once

#include "bf16.h"

/* Of `all` rows, or columns, of so many numbers each, those that are multiplied together by all tokens: they stay in the L2
 * cache, and there is work for all threads. */
static i64 bf16_together(i64 all, i64 numbers, i64 threads) {
    enum { TOGETHER_MOST = 256, CACHED = 1 << 20 };
    i64 fit = least(TOGETHER_MOST, up(CACHED / 2, numbers * PAIR) * PAIR);
    return least(fit, up(up(all, threads), PAIR) * PAIR);
}

/* Whether W0's rows are multiplied where they lie: those of contiguous blocks of whole tiles, which AMX does not take. */
static i64 bf16_in_place(const int32_t *row_offsets, i64 cols, i64 blocks, i64 contiguous) {
    i64 whole = contiguous && cols % TERMS == 0 && !amx_allowed();
    for (i64 k = 0; k < blocks; k++) whole = whole && row_offsets[k + 1] % SIDE == 0;
    return whole;
}

/* Tokens of a band: of more where W0's rows are copied for each, and nothing in block order. */
static i64 bf16_forward_band(i64 rows, i64 cols, i64 in_place, i64 contiguous) {
    return bf16_band(rows, cols, contiguous && !in_place ? 4 : 3);
}

static i64 bf16_forward_part_size(i64 rows, i64 cols, i64 in_place, i64 widest, i64 rank, i64 threads) {
    i64 height = bf16_together(rows, cols, threads);
    return lines(up(cols, TERMS) * TILE / 2) + (in_place ? 0 : lines(height * up(cols, TERMS) * TERMS / 2)) +
           lines(height * up(widest, TERMS) * TERMS / 2) + 2 * lines(ROWS * padded(widest) / 2) +
           lines(rank * padded(widest)) + lines(rank * ROWS) + pieces_size(cols) + lines(height * PAIR) +
           lines(height * PAIR / 2);
}

static i64 bf16_pairs(i64 tokens) { return up(tokens, PAIR) * 2; }

/* Tiles of each block's columns, padded: no more than these. */
static i64 bf16_block_tiles(i64 cols, i64 blocks) { return up(cols, TERMS) + blocks; }

/* Whether x as it is has a block's columns as tiles: those of contiguous blocks, of which nothing is dropped. */
static i64 bf16_lies(const int32_t *col_offsets, i64 blocks, i64 contiguous, int masked) {
    i64 lies = contiguous && !masked;
    for (i64 k = 0; k < blocks; k++) lies = lies && col_offsets[k] % TERMS == 0;
    return lies;
}

/* Floats that smoa_bf16_forward needs. */
i64 smoa_bf16_forward_workspace(i64 tokens, i64 rows, i64 cols, const int32_t *row_offsets, const int32_t *col_offsets,
                               i64 blocks, i64 contiguous, i64 masked, i64 rank, i64 threads) {
    i64 in_place = bf16_in_place(row_offsets, cols, blocks, contiguous);
    i64 widest = largest_of(col_offsets, blocks), lies = bf16_lies(col_offsets, blocks, contiguous, masked != 0);
    i64 tiles = up(cols, TERMS) + (lies ? 0 : bf16_block_tiles(cols, blocks));
    i64 panels = bf16_pairs(least(tokens, bf16_forward_band(rows, cols, in_place, contiguous)));
    return panels * (tiles * TILE + (contiguous ? 0 : up(rows, TERMS) * TILE)) / 2 +
           threads * bf16_forward_part_size(rows, cols, in_place, widest, rank, threads) + 16;
}

static float *bf16_forward_room(const bf16_job *j, i64 part) {
    return j->workspace + part * bf16_forward_part_size(j->rows, j->cols, j->in_place, j->widest, j->rank, j->parts);
}

/* x as right tiles, and again in block order, without what is dropped. */
static void bf16_prepare(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    i64 tiles = up(j->cols, TERMS), panels = bf16_pairs(j->tokens);
    half *some = (half *)bf16_forward_room(j, part);
    for (i64 p = share_of(panels, 1, part, j->parts); p < share_of(panels, 1, part + 1, j->parts); p++) {
        const half *x = j->x + p * SIDE * j->x_stride, *from = j->all + p * tiles * TILE;
        i64 there = j->tokens - p * SIDE;
        pairs_of(x, j->x_stride, there, j->cols, NULL, j->all + p * tiles * TILE);
        if (j->lies) continue;
        if (j->keep) pairs_of(x, j->x_stride, there, j->cols, j->keep + p * SIDE * words(j->cols), some), from = some;
        half *to = j->blocked;
        for (i64 k = 0; k < j->blocks; k++) {
            i64 width = j->col_offsets[k + 1] - j->col_offsets[k], step = up(width, TERMS) * TILE;
            pick_pairs(from, j->col_index + j->col_offsets[k], width, to + p * step);
            to += panels * step;
        }
    }
}

/* Of few tokens, which are multiplied at once, no more rows than a product has: ΔW is made of rows that are in the caches. */
static i64 bf16_rows_together(const bf16_job *j) {
    return j->tokens > PAIR ? bf16_together(j->rows, j->cols, j->parts) : amx_allowed() ? PAIR : SIDE;
}

/* Some rows of block k as left tiles: W0's unless `base` is NULL, and ΔW's of the block's columns, by way of ROWS lines
 * where those are in order, and of as many where they are made. */
static void bf16_rows(const bf16_job *j, i64 k, i64 first, i64 count, const float *A, float *factor,
                     const piece *pieces, i64 some, half *ordered, half *made, half *base, half *delta) {
    i64 left = j->col_offsets[k], width = j->col_offsets[k + 1] - left, step = padded(j->widest);
    const i64 *rows = j->row_index + first;
    for (i64 i = 0; i < count && base; i += SIDE) {
        const void *from[SIDE], *ahead[SIDE];
        i64 there = least(SIDE, count - i), last = j->rows - 1 - first;
        for (i64 r = 0; r < there; r++) {
            from[r] = j->weight + rows[i + r] * j->stride;
            ahead[r] = j->weight + rows[least(i + r + SIDE, last)] * j->stride;
        }
        copy_rows(from, ahead, there, j->cols, base, up(j->cols, TERMS), i);
    }
    for (i64 i = 0; i < count && A; i += ROWS) {
        const void *from[ROWS];
        void *to[ROWS];
        int there = (int)least(ROWS, count - i);
        for (int r = 0; r < there; r++) {
            const half *row = j->weight + rows[i + r] * j->stride;
            from[r] = j->contiguous ? row + left : ordered + r * step;
            to[r] = made + r * step;
            if (!j->contiguous)
                gather_halves(row, j->col_index + left, width, pieces, some, NULL, 0, ordered + r * step);
        }
        change(&j->change, there, from, to, 0, width, A, padded(width), rows + i, factor, NULL, (int32_t)k);
        copy_rows((const void *const *)to, NULL, there, width, delta, up(width, TERMS), i);
    }
}

/* Columns of y, PAIR tokens each, from sums (rows of W0, PAIR tokens), plus these rows' bias unless it is NULL: where they
 * belong, or `in_order`. */
TILES static void write_columns(const float *sums, const i64 *rows, i64 in_order, const half *bias, i64 count, half *to) {
    for (i64 i = 0; i < count; i++) {
        vf own = {0};
        if (bias) own += one_of(bias, rows[i], BFLOAT16);
        _mm512_store_si512(to + (in_order ? i : rows[i]) * PAIR,
                           both_narrowed(load(sums + i * PAIR) + own, load(sums + i * PAIR + SIDE) + own));
    }
}

TILES static void bf16_multiply(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    i64 tiles = up(j->cols, TERMS), panels = bf16_pairs(j->tokens), groups = 0;
    i64 tall = up(j->rows, TERMS) * TERMS * PAIR, together = bf16_rows_together(j);
    float *at = bf16_forward_room(j, part);
    half *base = j->in_place ? NULL : taken(&at, together * tiles * TERMS * 2);
    half *delta = taken(&at, together * up(j->widest, TERMS) * TERMS * 2);
    half *ordered = taken(&at, ROWS * padded(j->widest) * 2), *made = taken(&at, ROWS * padded(j->widest) * 2);
    float *A = taken(&at, j->rank * padded(j->widest) * 4), *factor = taken(&at, j->rank * ROWS * 4);
    float *sums = taken(&at, together * PAIR * 4);
    half *columns = taken(&at, together * PAIR * 2);
    piece *pieces = (piece *)at;
    for (i64 k = 0; k < j->blocks; k++) groups += up(j->row_offsets[k + 1] - j->row_offsets[k], together);
    i64 first = share_of(groups, 1, part, j->parts), end = share_of(groups, 1, part + 1, j->parts), group = 0;
    const half *blocked = j->blocked;
    begin_tiles();
    for (i64 k = 0; k < j->blocks; k++) {
        i64 top = j->row_offsets[k], height = j->row_offsets[k + 1] - top, left = j->col_offsets[k];
        i64 width = j->col_offsets[k + 1] - left, rank = rank_of(j->ranks, k, j->rank), some = 0;
        i64 deep = width && rank > 0 ? up(width, TERMS) : 0;
        for (i64 n = 0; n < height; n += together, group++) {
            if (group < first || group >= end) continue;
            const i64 *rows = j->row_index + top + n;
            i64 count = least(together, height - n);
            if (deep && (n == 0 || group == first)) {
                some = half_pieces_of(j->col_index + left, width, pieces);
                copy_A(&j->change, j->col_index + left, width, rank, A);
            }
            bf16_rows(j, k, top + n, count, deep ? A : NULL, factor, pieces, some, ordered, made, base, delta);
            for (i64 p = 0; p < panels; p += 2) {
                const half *all = j->all + p * tiles * TILE;
                i64 there = least(PAIR, j->tokens - p * SIDE);
                if (base)
                    add_products(count, there, tiles, base, IN_TILES, all, tiles, 0, sums);
                else
                    add_products(count, there, tiles, j->weight + *rows * j->stride, j->stride, all, tiles, 0, sums);
                if (deep && j->lies)
                    add_products(count, there, deep, delta, IN_TILES, all + left / TERMS * TILE, tiles, 1, sums);
                else if (deep)
                    add_products(count, there, deep, delta, IN_TILES, blocked + p * deep * TILE, deep, 1, sums);
                if (!j->contiguous) {
                    write_columns(sums, rows, 0, j->bias, count, j->columns + p / 2 * tall);
                    continue;
                }
                write_columns(sums, rows, 1, j->bias, count, columns);
                for (i64 t = p * SIDE; t < least(j->tokens, (p + 2) * SIDE); t += SIDE)
                    rows_from(columns + t % PAIR, j->tokens - t, count, NULL, j->y + t * j->rows + top + n, j->rows);
            }
        }
        blocked += panels * up(width, TERMS) * TILE;
    }
    end_tiles();
}

static void bf16_finish(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    i64 panels = up(j->tokens, SIDE), tall = up(j->rows, TERMS) * TERMS * PAIR;
    for (i64 p = share_of(panels, 1, part, j->parts); p < share_of(panels, 1, part + 1, j->parts); p++)
        rows_from(j->columns + p / 2 * tall + p % 2 * SIDE, j->tokens - p * SIDE, j->rows, NULL, j->y + p * SIDE * j->rows, j->rows);
}

/* y (tokens, rows): x (tokens, cols) and W0 (rows, cols) with contiguous rows, of x some dropped by `keep` for ΔW, as in
 * smoa_order. A (rank, cols) and B (rows, rank) are `factors`, contiguous; `bias` (rows) may be NULL. There is a token, a row and
 * a column. */
void smoa_bf16_forward(i64 tokens, i64 rows, i64 cols, const void *x, i64 x_stride, const void *weight, i64 stride,
                      const uint16_t *keep, const i64 *row_index, const i64 *col_index, const int32_t *row_offsets,
                      const int32_t *col_offsets, i64 blocks, i64 contiguous, const int32_t *ranks, i64 rank,
                      const void *A, const void *B, i64 factors, float scaling, const void *bias, void *y, float *workspace,
                      i64 threads) {
    bf16_job job = bf16_job_of(tokens, rows, cols, weight, stride, keep, row_index, col_index, row_offsets, col_offsets,
                             blocks, contiguous, ranks, rank, A, B, factors, scaling, threads);
    float *at = from_a_line(workspace);
    job.in_place = bf16_in_place(row_offsets, cols, blocks, contiguous);
    i64 band = bf16_forward_band(rows, cols, job.in_place, contiguous), panels = bf16_pairs(least(tokens, band));
    job.bias = bias, job.lies = bf16_lies(col_offsets, blocks, contiguous, keep != NULL);
    job.all = taken(&at, panels * up(cols, TERMS) * TILE * 2);
    if (!job.lies) job.blocked = taken(&at, panels * bf16_block_tiles(cols, blocks) * TILE * 2);
    if (!contiguous) job.columns = taken(&at, panels * up(rows, TERMS) * TERMS * SIDE * 2);
    job.workspace = at;
    for (i64 first = 0; first < tokens; first += band) {
        job.tokens = least(band, tokens - first);
        job.x = (const half *)x + first * x_stride, job.x_stride = x_stride, job.y = (half *)y + first * rows;
        job.keep = keep ? keep + first * words(cols) : NULL;
        in_parallel(bf16_prepare, &job, threads);
        in_parallel(bf16_multiply, &job, threads);
        if (!contiguous) in_parallel(bf16_finish, &job, threads);
    }
}
