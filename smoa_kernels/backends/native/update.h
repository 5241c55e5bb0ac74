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
    const layer *l;
    i64 tokens, parts;
    matrix x;
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
static i64 update_size(const layer *l, int thirds, i64 tokens) {
    i64 prepared = prepare_size(thirds, l->cols, l->rank);
    i64 multiplied = band_size(thirds, least(band_of(thirds), tokens), l->cols, l->blocks) +
                     left_height(thirds) * lines(l->cols + PIECE) + lines(l->rows + PIECE) + pieces_size(l->cols) +
                     pieces_size(l->rows);
    return multiplied > prepared ? multiplied : prepared;
}

static float *update_room(const update_job *j, i64 part) {
    return j->workspace + part * update_size(j->l, j->thirds, j->tokens);
}

/* ΔW_k of every block as panels of rows, a part of each: KC columns after KC columns. */
static void delta_part(void *it, i64 part) {
    update_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    float *to = j->deltas;
    adapter m = adapter_of(l);
    for (i64 k = 0; k < l->blocks; k++) {
        i64 rows = l->row_offsets[k + 1] - l->row_offsets[k], cols = l->col_offsets[k + 1] - l->col_offsets[k];
        i64 first = share_of(rows, NR, part, j->parts), count = share_of(rows, NR, part + 1, j->parts) - first;
        matrix weight = weight_of(l);
        m.rows = l->row_index + l->row_offsets[k];
        m.cols = l->col_index + l->col_offsets[k];
        if (l->contiguous)
            weight.data = number(l->weight, l->row_offsets[k] * l->row_stride + l->col_offsets[k] * l->col_stride, weight.stored);
        else
            weight.rows = m.rows, weight.cols = m.cols;
        m.rank = rank_of(l, k);
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
    const layer *l = j->l;
    const float *deltas = j->deltas;
    i64 terms = terms_of(j->tokens), high = left_height(j->thirds), together = right_most(j->thirds);
    for (i64 k = 0; k < l->blocks; k++) {
        i64 rows = l->row_offsets[k + 1] - l->row_offsets[k], cols = l->col_offsets[k + 1] - l->col_offsets[k];
        int there = cols > 0 && rank_of(l, k) > 0;
        for (i64 t = 0; t < height && !there; t++) memset(y + t * l->rows, 0, (size_t)rows * sizeof *y);
        for (i64 p = 0; p < cols; p += KC) {
            i64 deep = least(KC, cols - p), size = row_size(j->thirds, deep);
            const float *right = deltas + whole(rows, NR) * row_size(j->thirds, p);
            for (i64 r = 0; r < rows && there; r += together)
                for (i64 t = 0; t < height; t += high)
                    multiply(j->thirds, terms, deep, band + t * size, right + r * size, y + t * l->rows + r, l->rows,
                             height - t, least(together, rows - r), p > 0);
            band += lines(whole(height, high) * size + TRANSPOSED);
        }
        deltas += delta_size(j->thirds, rows, cols), y += rows;
    }
}

static void update_part(void *it, i64 part) {
    update_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    i64 high = left_height(j->thirds), most = band_of(j->thirds), stride = lines(l->cols + PIECE);
    i64 first = share_of(j->tokens, high, part, j->parts), end = share_of(j->tokens, high, part + 1, j->parts);
    float *band = update_room(j, part), *ordered = band + band_size(j->thirds, least(most, j->tokens), l->cols, l->blocks);
    float *line = ordered + high * stride;
    piece *of_cols = (piece *)(line + lines(l->rows + PIECE)), *of_rows = of_cols + l->cols;
    i64 some = stored_pieces_of(l->col_index, l->cols, j->x.stored, of_cols);
    i64 others = pieces_of(l->row_index, l->rows, PIECE, of_rows);
    /* cut_rows takes floats. */
    int x_is_ordered = l->contiguous && !j->x.keep && (!j->thirds || j->x.stored == FLOAT32);
    int y_is_ordered = l->contiguous && !j->keep;
    begin_product(j->thirds);
    for (; first < end; first += most) {
        i64 height = least(most, end - first);
        for (i64 t = 0; t < height; t += high) {
            i64 some_rows = least(high, height - t);
            for (i64 i = 0; i < some_rows && !x_is_ordered; i++) {
                i64 at = first + t + i;
                gather_floats(number(j->x.data, at * j->x.row_stride, j->x.stored), l->col_index, l->cols, of_cols, some,
                              j->x.keep ? j->x.keep + at * j->x.kept : NULL, j->x.stored, ordered + i * stride);
            }
            float *to = band;
            for (i64 k = 0; k < l->blocks; k++)
                for (i64 p = l->col_offsets[k]; p < l->col_offsets[k + 1]; p += KC) {
                    i64 deep = least(KC, l->col_offsets[k + 1] - p), size = row_size(j->thirds, deep);
                    matrix x = x_is_ordered ? j->x : matrix_of(ordered, FLOAT32, stride, 1);
                    prepare_left(j->thirds, x, x_is_ordered ? first + t : 0, some_rows, p, deep, NULL, to + t * size);
                    to += lines(whole(height, high) * size + TRANSPOSED);
                }
        }
        float *y = j->y + first * l->rows;
        multiply_blocks(j, height, band, y);
        for (i64 t = 0; t < height && !y_is_ordered; t++, y += l->rows) {
            memcpy(line, y, (size_t)l->rows * sizeof *y);
            scatter(line, l->row_index, l->rows, of_rows, others, j->keep ? j->keep + (first + t) * words(l->rows) : NULL, y);
        }
    }
    end_product(j->thirds);
}

/* Floats that smoa_update needs. */
i64 smoa_update_workspace(const layer *l, i64 tokens, i64 threads) {
    int thirds = by_thirds(tokens, widest_of(l));
    i64 deltas = 0;
    for (i64 k = 0; k < l->blocks; k++)
        deltas += delta_size(thirds, l->row_offsets[k + 1] - l->row_offsets[k], l->col_offsets[k + 1] - l->col_offsets[k]);
    return deltas + threads * update_size(l, thirds, tokens) + 16;
}

/* y (tokens, rows) = x ΔWᵀ, x with contiguous rows, stored as it may be; the factors are float32. Of x some may be dropped, or
 * of y: `x_keep` and `y_keep` have a bit for each element, a row of it in whole words, or are NULL. No dimension is 0. Needs
 * indices. */
void smoa_update(const layer *l, i64 tokens, const void *x, i64 x_stored, i64 x_stride, const uint16_t *x_keep, float *y,
                 const uint16_t *y_keep, float *workspace, i64 threads) {
    int thirds = by_thirds(tokens, widest_of(l));
    float *own = from_a_line(workspace);
    update_job job = {l, tokens, threads, some_of(x, x_stored, x_stride, 1, x_keep, l->cols), y,
                      own + threads * update_size(l, thirds, tokens), own, y_keep, thirds};
    in_parallel(delta_part, &job, threads);
    in_parallel(update_part, &job, threads);
}
