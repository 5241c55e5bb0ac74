/* `y = x W0ᵀ + dropout(x) ΔWᵀ` in bfloat16 by AMX: both products are summed in one float32 tile and rounded once.
 *
 * W0's rows are left tiles as they lie, x is prepared once. Some rows of one block at a time are copied side by side, ΔW is
 * made of them, and both are multiplied by all tokens. What comes out are columns of y, 16 tokens each, so that to put them
 * back into y's order is to write them where they belong; then they become rows.
 */
#pragma once

#include "amx.h"

/* Rows, or columns, of so many numbers each that are multiplied together by all tokens: they stay in the L2 cache. */
static i64 amx_together(i64 numbers) {
    enum { TOGETHER_MOST = 256, CACHED = 1 << 18 };
    return least(TOGETHER_MOST, up(CACHED / 2, numbers * PAIR) * PAIR);
}

static i64 amx_forward_part_size(i64 cols, i64 widest, i64 rank) {
    i64 height = amx_together(cols);
    return lines(up(cols, TERMS) * TILE / 2) + lines(height * apart(cols) / 2) + lines(height * apart(widest) / 2) +
           lines(ROWS * padded(widest)) + lines(rank * padded(widest)) + lines(rank * ROWS) + pieces_size(cols) +
           lines(PAIR * PAIR);
}

static i64 amx_pairs(i64 tokens) { return up(tokens, PAIR) * 2; }

/* Tiles of each block's columns, padded: no more than these. */
static i64 amx_block_tiles(i64 cols, i64 blocks) { return up(cols, TERMS) + blocks; }

/* Floats that smoa_amx_forward needs. */
i64 smoa_amx_forward_workspace(i64 tokens, i64 rows, i64 cols, i64 blocks, i64 widest, i64 rank, i64 threads) {
    i64 tiles = up(cols, TERMS) + amx_block_tiles(cols, blocks);
    return lines(amx_pairs(tokens) * (tiles * TILE + up(rows, TERMS) * TERMS * SIDE) / 2) +
           threads * amx_forward_part_size(cols, widest, rank) + 16;
}

static float *amx_forward_room(const amx_job *j, i64 part) {
    return j->workspace + part * amx_forward_part_size(j->cols, j->widest, j->rank);
}

/* x as right tiles, and again in block order, without what is dropped. */
static void amx_prepare(void *it, i64 part) {
    amx_job *j = it;
    if (part >= j->parts) return;
    i64 tiles = up(j->cols, TERMS), panels = amx_pairs(j->tokens);
    half *some = (half *)amx_forward_room(j, part);
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

/* Some rows of block k: W0's to `base`, ΔW's to `delta`, what is beyond their columns 0. */
static void amx_rows(const amx_job *j, i64 k, i64 first, i64 count, const float *A, float *factor,
                     const piece *pieces, i64 some, half *line, half *base, half *delta) {
    i64 left = j->col_offsets[k], width = j->col_offsets[k + 1] - left, step = apart(j->cols), narrow = apart(j->widest);
    const i64 *rows = j->row_index + first;
    for (i64 i = 0; i < count; i++) {
        memcpy(base + i * step, j->weight + rows[i] * j->stride, (size_t)j->cols * sizeof *base);
        memset(base + i * step + j->cols, 0, (size_t)(up(j->cols, TERMS) * TERMS - j->cols) * sizeof *base);
    }
    for (i64 i = 0; i < count && A; i += ROWS) {
        const void *from[ROWS];
        void *to[ROWS];
        int there = (int)least(ROWS, count - i);
        for (int r = 0; r < there; r++) {
            const half *row = base + (i + r) * step;
            from[r] = j->contiguous ? row + left : line + r * padded(j->widest);
            if (!j->contiguous)
                gather_halves(row, j->col_index + left, width, pieces, some, NULL, 0, line + r * padded(j->widest));
            to[r] = delta + (i + r) * narrow;
            memset(delta + (i + r) * narrow + width, 0, (size_t)(up(width, TERMS) * TERMS - width) * sizeof *delta);
        }
        change(&j->change, there, from, to, 0, width, A, padded(width), rows + i, factor, NULL, (int32_t)k);
    }
}

/* Columns of y, SIDE tokens each, from sums (PAIR rows of W0, PAIR tokens). */
AMX static void write_columns(const float *sums, const i64 *rows, i64 count, half *first, half *second) {
    for (i64 i = 0; i < count; i++) {
        _mm256_storeu_si256((void *)(first + rows[i] * SIDE), narrowed(load(sums + i * PAIR)));
        _mm256_storeu_si256((void *)(second + rows[i] * SIDE), narrowed(load(sums + i * PAIR + SIDE)));
    }
}

AMX static void amx_multiply(void *it, i64 part) {
    amx_job *j = it;
    if (part >= j->parts) return;
    i64 tiles = up(j->cols, TERMS), panels = amx_pairs(j->tokens), groups = 0;
    i64 tall = up(j->rows, TERMS) * TERMS * SIDE;
    float *at = amx_forward_room(j, part);
    i64 together = amx_together(j->cols), wide = apart(j->cols), narrow = apart(j->widest);
    half *base = taken(&at, together * wide * 2), *delta = taken(&at, together * narrow * 2);
    half *line = taken(&at, ROWS * padded(j->widest) * 4);
    float *A = taken(&at, j->rank * padded(j->widest) * 4), *factor = taken(&at, j->rank * ROWS * 4);
    float *sums = taken(&at, PAIR * PAIR * 4);
    piece *pieces = (piece *)at;
    for (i64 k = 0; k < j->blocks; k++) groups += up(j->row_offsets[k + 1] - j->row_offsets[k], together);
    i64 first = share_of(groups, 1, part, j->parts), end = share_of(groups, 1, part + 1, j->parts), group = 0;
    const half *blocked = j->blocked;
    use_tiles();
    for (i64 k = 0; k < j->blocks; k++) {
        i64 top = j->row_offsets[k], height = j->row_offsets[k + 1] - top, left = j->col_offsets[k];
        i64 width = j->col_offsets[k + 1] - left, rank = rank_of(j->ranks, k, j->rank), some = 0;
        i64 deep = width && rank > 0 ? up(width, TERMS) : 0, apart_by = j->lies ? tiles : up(width, TERMS);
        const half *own = j->lies ? j->all + left / TERMS * TILE : blocked;
        for (i64 n = 0; n < height; n += together, group++) {
            if (group < first || group >= end) continue;
            const i64 *rows = j->row_index + top + n;
            i64 count = least(together, height - n), next = least(together, height - n - count);
            if (deep && (n == 0 || group == first)) {
                some = half_pieces_of(j->col_index + left, width, pieces);
                copy_A(&j->change, j->col_index + left, width, rank, A);
            }
            amx_rows(j, k, top + n, count, deep ? A : NULL, factor, pieces, some, line, base, delta);
            for (i64 p = 0; p < panels; p += 2) {
                const half *all = j->all + p * tiles * TILE, *ordered = own + p * apart_by * TILE;
                ask_for_rows(j->weight, j->stride, rows + count, next, j->cols, p / 2, panels / 2);
                for (i64 i = 0; i < count; i += PAIR) {
                    zero_sums();
                    add_product(tiles, base + i * wide, wide, all, tiles * TILE);
                    add_product(deep, delta + i * narrow, narrow, ordered, apart_by * TILE);
                    store_sums(sums);
                    write_columns(sums, rows + i, least(PAIR, count - i), j->columns + p * tall, j->columns + (p + 1) * tall);
                }
            }
        }
        blocked += panels * up(width, TERMS) * TILE;
    }
    _tile_release();
}

static void amx_finish(void *it, i64 part) {
    amx_job *j = it;
    if (part >= j->parts) return;
    i64 panels = up(j->tokens, SIDE), tall = up(j->rows, TERMS) * TERMS * SIDE;
    for (i64 p = share_of(panels, 1, part, j->parts); p < share_of(panels, 1, part + 1, j->parts); p++)
        rows_from(j->columns + p * tall, j->tokens - p * SIDE, j->rows, NULL, j->y + p * SIDE * j->rows, j->rows);
}

/* y (tokens, rows): x (tokens, cols) and W0 (rows, cols) with contiguous rows, of x some dropped by `keep` for ΔW, as in
 * smoa_order. A (rank, cols) and B (rows, rank) are `factors`, contiguous. There is a token, a row and a column. */
void smoa_amx_forward(i64 tokens, i64 rows, i64 cols, const void *x, i64 x_stride, const void *weight, i64 stride,
                      const uint16_t *keep, const i64 *row_index, const i64 *col_index, const int32_t *row_offsets,
                      const int32_t *col_offsets, i64 blocks, i64 contiguous, const int32_t *ranks, i64 rank,
                      const void *A, const void *B, i64 factors, float scaling, void *y, float *workspace, i64 threads) {
    amx_job job = amx_job_of(tokens, rows, cols, weight, stride, keep, row_index, col_index, row_offsets, col_offsets,
                             blocks, contiguous, ranks, rank, A, B, factors, scaling, threads);
    float *at = from_a_line(workspace);
    i64 panels = amx_pairs(tokens);
    job.x = x, job.x_stride = x_stride, job.y = y;
    job.lies = contiguous && !keep;
    for (i64 k = 0; k < blocks; k++) job.lies = job.lies && col_offsets[k] % TERMS == 0;
    job.all = taken(&at, panels * up(cols, TERMS) * TILE * 2);
    job.blocked = taken(&at, panels * amx_block_tiles(cols, blocks) * TILE * 2);
    job.columns = taken(&at, panels * up(rows, TERMS) * TERMS * SIDE * 2);
    job.workspace = at;
    in_parallel(amx_prepare, &job, threads);
    in_parallel(amx_multiply, &job, threads);
    in_parallel(amx_finish, &job, threads);
}
