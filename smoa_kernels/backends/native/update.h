/* y = x ΔWᵀ, for x of which some was dropped, which no W_eff can stand for.
 *
 * ΔW is packed once, as panels of its blocks. A band of tokens at a time, x is put in block order, multiplied, and y put
 * back in its own order, while all of it is in the cache: of each row every block has a share of every cache line, so
 * that block after block would read and write x and y once for each. Contiguous blocks are in their order already.
 */
#pragma once

#include "adapter.h"
#include "threads.h"

/* Tokens whose columns are in block order at a time, those of x and of y. */
static i64 band_of(int thirds) { return left_height(thirds) * (thirds ? 8 : 18); }

typedef struct {
    i64 tokens, rows, cols, blocks, parts, contiguous;
    matrix x, weight;
    adapter m;
    const i64 *row_index, *col_index;
    const int32_t *row_offsets, *col_offsets;
    float *y, *deltas, *workspace;
    const uint16_t *keep;
    int thirds;
} update_job;

static i64 delta_size(int thirds, i64 rows, i64 cols) { return lines(whole(rows, NR) * row_size(thirds, cols)); }

/* Floats of a band of x as panels: those of each block and KC columns apart. */
static i64 band_size(int thirds, i64 height, i64 cols, i64 blocks) {
    i64 size = thirds ? row_size(1, cols) + blocks * row_size(1, 1) : cols;
    return lines(whole(height, left_height(thirds)) * size + (blocks + cols / KC) * (TRANSPOSED + 16));
}

/* Of one part, beside what all share. */
static i64 update_size(int thirds, i64 tokens, i64 rows, i64 cols, i64 blocks, i64 rank) {
    i64 prepared = prepare_size(thirds, cols, rank);
    i64 multiplied = band_size(thirds, least(band_of(thirds), tokens), cols, blocks) +
                     left_height(thirds) * lines(cols + PIECE) + lines(rows + PIECE) + pieces_size(cols) + pieces_size(rows);
    return multiplied > prepared ? multiplied : prepared;
}

static float *update_room(const update_job *j, i64 part) {
    return j->workspace + part * update_size(j->thirds, j->tokens, j->rows, j->cols, j->blocks, j->m.rank);
}

/* ΔW_k of every block as panels of rows, a part of each: KC columns after KC columns. */
static void delta_part(void *it, i64 part) {
    update_job *j = it;
    if (part >= j->parts) return;
    float *to = j->deltas;
    adapter m = j->m;
    for (i64 k = 0; k < j->blocks; k++) {
        i64 rows = j->row_offsets[k + 1] - j->row_offsets[k], cols = j->col_offsets[k + 1] - j->col_offsets[k];
        i64 first = share_of(rows, NR, part, j->parts), count = share_of(rows, NR, part + 1, j->parts) - first;
        matrix weight = j->weight;
        m.rows = j->row_index + j->row_offsets[k];
        m.cols = j->col_index + j->col_offsets[k];
        if (j->contiguous)
            weight.data = number(weight.data, j->row_offsets[k] * weight.row_stride + j->col_offsets[k] * weight.col_stride, weight.stored);
        else
            weight.rows = m.rows, weight.cols = m.cols;
        m.rank = rank_of(j->m.ranks, k, j->m.rank);
        for (i64 p = 0; p < cols && count > 0 && m.rank > 0; p += KC) {
            i64 deep = least(KC, cols - p);
            float *panels = to + whole(rows, NR) * row_size(j->thirds, p) + first * row_size(j->thirds, deep);
            prepare_right(j->thirds, weight, &m, first, count, p, deep, panels, update_room(j, part));
        }
        to += delta_size(j->thirds, rows, cols);
    }
}

/* y (height, rows) = x ΔWᵀ, all columns in block order: x (height, cols) as panels in `band`. */
static void multiply_blocks(const update_job *j, i64 height, const float *band, float *y) {
    const float *deltas = j->deltas;
    i64 terms = terms_of(j->tokens), high = left_height(j->thirds), together = right_most(j->thirds);
    for (i64 k = 0; k < j->blocks; k++) {
        i64 rows = j->row_offsets[k + 1] - j->row_offsets[k], cols = j->col_offsets[k + 1] - j->col_offsets[k];
        int there = cols > 0 && rank_of(j->m.ranks, k, j->m.rank) > 0;
        for (i64 t = 0; t < height && !there; t++) memset(y + t * j->rows, 0, (size_t)rows * sizeof *y);
        for (i64 p = 0; p < cols; p += KC) {
            i64 deep = least(KC, cols - p), size = row_size(j->thirds, deep);
            const float *right = deltas + whole(rows, NR) * row_size(j->thirds, p);
            for (i64 r = 0; r < rows && there; r += together)
                for (i64 t = 0; t < height; t += high)
                    multiply(j->thirds, terms, deep, band + t * size, right + r * size, y + t * j->rows + r, j->rows,
                             height - t, least(together, rows - r), p > 0);
            band += lines(whole(height, high) * size + TRANSPOSED);
        }
        deltas += delta_size(j->thirds, rows, cols), y += rows;
    }
}

static void update_part(void *it, i64 part) {
    update_job *j = it;
    if (part >= j->parts) return;
    i64 high = left_height(j->thirds), most = band_of(j->thirds), stride = lines(j->cols + PIECE);
    i64 first = share_of(j->tokens, high, part, j->parts), end = share_of(j->tokens, high, part + 1, j->parts);
    float *band = update_room(j, part), *ordered = band + band_size(j->thirds, least(most, j->tokens), j->cols, j->blocks);
    float *line = ordered + high * stride;
    piece *of_cols = (piece *)(line + lines(j->rows + PIECE)), *of_rows = of_cols + j->cols;
    i64 some = stored_pieces_of(j->col_index, j->cols, j->x.stored, of_cols), others = pieces_of(j->row_index, j->rows, PIECE, of_rows);
    /* cut_rows takes floats. */
    int x_is_ordered = j->contiguous && !j->x.keep && (!j->thirds || j->x.stored == FLOAT32), y_is_ordered = j->contiguous && !j->keep;
    begin_product(j->thirds);
    for (; first < end; first += most) {
        i64 height = least(most, end - first);
        for (i64 t = 0; t < height; t += high) {
            i64 some_rows = least(high, height - t);
            for (i64 i = 0; i < some_rows && !x_is_ordered; i++) {
                i64 at = first + t + i;
                gather_floats(number(j->x.data, at * j->x.row_stride, j->x.stored), j->col_index, j->cols, of_cols, some,
                              j->x.keep ? j->x.keep + at * j->x.kept : NULL, j->x.stored, ordered + i * stride);
            }
            float *to = band;
            for (i64 k = 0; k < j->blocks; k++)
                for (i64 p = j->col_offsets[k]; p < j->col_offsets[k + 1]; p += KC) {
                    i64 deep = least(KC, j->col_offsets[k + 1] - p), size = row_size(j->thirds, deep);
                    if (x_is_ordered)
                        prepare_left(j->thirds, j->x, first + t, some_rows, p, deep, NULL, to + t * size);
                    else
                        prepare_left(j->thirds, matrix_of(ordered, FLOAT32, stride, 1), 0, some_rows, p, deep, NULL, to + t * size);
                    to += lines(whole(height, high) * size + TRANSPOSED);
                }
        }
        float *y = j->y + first * j->rows;
        multiply_blocks(j, height, band, y);
        for (i64 t = 0; t < height && !y_is_ordered; t++, y += j->rows) {
            memcpy(line, y, (size_t)j->rows * sizeof *y);
            scatter(line, j->row_index, j->rows, of_rows, others, j->keep ? j->keep + (first + t) * words(j->rows) : NULL, y);
        }
    }
    end_product(j->thirds);
}

/* Floats that smoa_update needs. */
i64 smoa_update_workspace(i64 tokens, i64 rows, i64 cols, const int32_t *row_offsets, const int32_t *col_offsets,
                          i64 blocks, i64 rank, i64 threads) {
    int thirds = by_thirds(tokens, largest_of(col_offsets, blocks));
    i64 deltas = 0;
    for (i64 k = 0; k < blocks; k++)
        deltas += delta_size(thirds, row_offsets[k + 1] - row_offsets[k], col_offsets[k + 1] - col_offsets[k]);
    return deltas + threads * update_size(thirds, tokens, rows, cols, blocks, rank) + 16;
}

/* y (tokens, rows) = x ΔWᵀ, x with contiguous rows; x and W0 as they are stored. Of x some may be dropped, or of y: `x_keep` and `y_keep` have a bit
 * for each element, a row of it in whole words, or are NULL. No dimension is 0. `contiguous` is that of smoa_gradient. */
void smoa_update(i64 tokens, i64 rows, i64 cols, const void *x, i64 x_stored, i64 x_stride, const uint16_t *x_keep,
                 const void *weight, i64 stored, i64 row_stride, i64 col_stride, const i64 *row_index, const i64 *col_index,
                 const int32_t *row_offsets, const int32_t *col_offsets, i64 blocks, i64 contiguous, const int32_t *ranks, i64 rank,
                 const float *A, i64 A_rank, i64 A_col, const float *B, i64 B_row, i64 B_rank, float scaling, float *y,
                 const uint16_t *y_keep, float *workspace, i64 threads) {
    int thirds = by_thirds(tokens, largest_of(col_offsets, blocks));
    float *own = from_a_line(workspace);
    update_job job = {tokens, rows, cols, blocks, threads, contiguous, some_of(x, x_stored, x_stride, 1, x_keep, cols),
                      matrix_of(weight, stored, row_stride, col_stride),
                      {A, B, A_rank, A_col, B_row, B_rank, rank, scaling, {NULL, 0}, {NULL, 0}, ranks, NULL, NULL},
                      row_index, col_index, row_offsets, col_offsets, y,
                      own + threads * update_size(thirds, tokens, rows, cols, blocks, rank), own, y_keep, thirds};
    in_parallel(delta_part, &job, threads);
    in_parallel(update_part, &job, threads);
}
