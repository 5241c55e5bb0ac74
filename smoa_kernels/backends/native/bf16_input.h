/* dX of bf16_linear.h: dY W_eff, rounded once; under dropout dY W0, to which the masked dY ΔW is the first term.
 *
 * Columns of W0 are right tiles whose terms are its rows, two of which are paired as they are read and modulated.
 */
#pragma once

#include "bf16_gradient.h"

/* Columns of dX that are multiplied at a time, and of dY ΔW. */
static i64 bf16_input_columns(const layer *l, i64 threads) { return bf16_together(l->cols, l->rows, L2_CACHE, threads); }
static i64 bf16_update_columns(const layer *l, i64 tallest, i64 threads) {
    return bf16_together(l->cols, tallest, L2_CACHE, threads);
}

static i64 bf16_input_part_size(const layer *l, i64 tallest, i64 threads) {
    i64 rows = l->rows, rank = l->rank, group = bf16_input_columns(l, threads);
    i64 columns = bf16_update_columns(l, tallest, threads);
    i64 update = lines(PAIR * PAIR / 2) + lines(columns * up(tallest, TERMS) * TERMS / 2) + lines(rank * padded(PAIR)) +
                 lines(rank * ROWS) + lines(ROWS * padded(PAIR) / 2) + pieces_size(PAIR) + lines(columns * PAIR);
    i64 product = lines(up(rows, TERMS) * TERMS * group / 2) + lines(rank * padded(group)) + lines(rank * (rows + ROWS)) +
                  lines(rows + group) + lines(group * PAIR);
    return greatest(greatest(update, product), lines(up(rows, TERMS) * TILE / 2));
}

/* Whether dY is multiplied where it lies: whole tiles, which AMX does not take. */
static i64 bf16_dy_in_place(i64 tokens, i64 rows) { return tokens % SIDE == 0 && rows % TERMS == 0 && !amx_allowed(); }

/* Tokens of a band: all where nothing of them is kept in the workspace. */
static i64 bf16_input_band(const layer *l, i64 tokens, i64 masked) {
    return !masked && bf16_dy_in_place(tokens, l->rows) ? tokens : bf16_band(l, masked ? 3 : 4);
}

/* Floats that smoa_bf16_input needs. */
i64 smoa_bf16_input_workspace(const layer *l, i64 tokens, i64 masked, i64 threads) {
    i64 n = up(least(tokens, bf16_input_band(l, tokens, masked)), PAIR) * PAIR;
    i64 update = bf16_block_tiles(l->rows, l->blocks) + up(l->cols, TERMS);
    return lines(bf16_dy_in_place(tokens, l->rows) ? 0 : n * up(l->rows, TERMS) * TERMS / 2) + lines(l->rows) +
           lines(l->cols + PAIR) + lines(masked ? n * update * TERMS / 2 : 0) +
           threads * bf16_input_part_size(l, tallest_of(l), threads) + 64;
}

static float *bf16_input_room(const bf16_job *j, i64 part) {
    return j->workspace + part * bf16_input_part_size(j->l, j->tallest, j->parts);
}

/* dY as left tiles, where it is not multiplied as it lies, and where dX is masked as right tiles in block order. */
static void bf16_input_prepare(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    i64 panels = bf16_pairs(j->tokens), tiles = up(l->rows, TERMS);
    half *pairs = (half *)bf16_input_room(j, part);
    for (i64 p = share_of(panels, 1, part, j->parts); p < share_of(panels, 1, part + 1, j->parts); p++) {
        some_rows dy = rows_at(j->dy + p * SIDE * j->dy_stride, j->dy_stride, NULL, j->tokens - p * SIDE);
        if (j->left) copy_rows(&dy, l->rows, j->left + p * tiles * TILE);
        if (!j->keep) continue;
        half *to = j->blocked;
        pairs_of(&dy, l->rows, NULL, pairs);
        for (i64 k = 0; k < l->blocks; k++) {
            i64 height = l->row_offsets[k + 1] - l->row_offsets[k], step = up(height, TERMS) * TILE;
            pick_pairs(pairs, l->row_index + l->row_offsets[k], height, to + p * step);
            to += panels * step;
        }
    }
}

/* PAIR columns of ΔW_k at most as left tiles, whose terms are its rows: some rows at a time are made and transposed. */
TILES static void transposed_delta(const bf16_job *j, i64 k, const i64 *cols, i64 count, float *A, float *factor,
                                 half *line, half *some, half *out) {
    const layer *l = j->l;
    i64 top = l->row_offsets[k], height = l->row_offsets[k + 1] - top;
    piece *pieces = (piece *)(A + l->rank * padded(PAIR));
    i64 found = half_pieces_of(cols, count, pieces);
    copy_A(l, cols, 0, count, rank_of(l, k), A, padded(count));
    for (i64 n = 0; n < height; n += PAIR) {
        const i64 *rows = l->row_index + top + n;
        i64 there = least(PAIR, height - n);
        memset(some, 0, PAIR * PAIR * sizeof *some);
        for (i64 i = 0; i < there; i += ROWS) {
            const void *from[ROWS];
            void *to[ROWS];
            int these = (int)least(ROWS, there - i);
            for (int r = 0; r < these; r++) {
                half *ordered = line + r * padded(PAIR);
                gather_halves(j->weight + rows[i + r] * l->row_stride, cols, count, pieces, found, NULL, 0, ordered);
                from[r] = ordered, to[r] = some + (i + r) * PAIR;
            }
            change(l, these, from, to, 0, count, A, padded(count), rows + i, factor, NULL, (int32_t)k);
        }
        for (int upper = 0; upper < 2; upper++) {
            __m512i r[16];
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++) {
                const half *two = some + 2 * i * PAIR + upper * SIDE;
                r[i] = paired(_mm256_loadu_si256((const void *)two), _mm256_loadu_si256((const void *)(two + PAIR)));
            }
            transpose_lines(r);
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++) _mm512_store_si512(terms_at(out, up(height, TERMS), upper * SIDE + i, n), r[i]);
        }
    }
}

/* Columns of dY ΔW, a share of each block's. */
TILES static void bf16_input_update(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    i64 together = bf16_update_columns(l, j->tallest, j->parts);
    float *at = bf16_input_room(j, part), *sums = taken(&at, together * PAIR * 4);
    half *some = taken(&at, PAIR * PAIR * 2), *delta = taken(&at, together * up(j->tallest, TERMS) * TERMS * 2);
    float *factor = taken(&at, l->rank * ROWS * 4);
    half *line = taken(&at, ROWS * padded(PAIR) * 2);
    float *A = at;
    const half *blocked = j->blocked;
    i64 panels = bf16_pairs(j->tokens), tall = up(l->cols, TERMS) * TERMS * PAIR, group = 0;
    begin_tiles();
    for (i64 k = 0; k < l->blocks; k++) {
        i64 left = l->col_offsets[k], width = l->col_offsets[k + 1] - left;
        i64 deep = up(l->row_offsets[k + 1] - l->row_offsets[k], TERMS), used = rank_of(l, k) > 0;
        for (i64 c = 0; c < width; c += together, group++) {
            if (group % j->parts != part) continue;
            const i64 *cols = l->col_index + left + c;
            i64 count = least(together, width - c);
            for (i64 i = 0; i < count && used; i += PAIR)
                transposed_delta(j, k, cols + i, least(PAIR, count - i), A, factor, line, some, delta + i * deep * TERMS);
            for (i64 p = 0; p < panels; p += 2) {
                add_products(count, least(PAIR, j->tokens - p * SIDE), used ? deep : 0, delta, IN_TILES,
                             blocked + p * deep * TILE, deep, 0, sums, NULL);
                for (i64 i = 0; i < count; i += PAIR)
                    write_columns(sums + i * PAIR, cols + i, 0, NULL, least(PAIR, count - i), j->columns + p / 2 * tall);
            }
        }
        blocked += panels * deep * TILE;
    }
    end_tiles();
}

static void bf16_input_mask(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    i64 panels = up(j->tokens, SIDE), tall = up(l->cols, TERMS) * TERMS * PAIR;
    for (i64 p = share_of(panels, 1, part, j->parts); p < share_of(panels, 1, part + 1, j->parts); p++)
        rows_from(j->columns + p / 2 * tall + p % 2 * SIDE, j->tokens - p * SIDE, l->cols, j->keep + p * SIDE * words(l->cols),
                j->dx + p * SIDE * l->cols, l->cols);
}

/* Some columns of W0, or of W_eff where there are `blocks` of these columns, as right tiles; of A (rank, columns) and B
 * (rows, rank) nothing is there beyond a block's own rank. */
TILES static void weight_tiles(const bf16_job *j, i64 left, i64 width, const int32_t *blocks, const float *A,
                             const float *B, half *out) {
    const layer *l = j->l;
    i64 deep = up(l->rows, TERMS), apart_by = padded(bf16_input_columns(l, j->parts));
    i64 stride = l->row_stride, rank = l->rank, rows = l->rows; /* `out` might be where j is, for all a compiler knows */
    for (i64 n = 0; n < deep * TERMS; n += ROWS, B += ROWS * rank) {
        const half *row = j->weight + n * stride + left;
        __m512i block[ROWS];
        for (int i = 0; i < ROWS; i++) block[i] = _mm512_set1_epi32(blocks && n + i < rows ? j->row_block[n + i] : -2);
        half *to = out + n / TERMS * TILE + n % TERMS * SIDE;
        for (i64 c = 0; c < width; c += PAIR, to += 2 * deep * TILE) {
            __mmask32 inside = first_of(width - c), own[ROWS], any = 0;
            __m512i found[ROWS], one = _mm512_set1_epi32(-1), other = one;
            if (blocks) one = _mm512_loadu_si512(blocks + c), other = _mm512_loadu_si512(blocks + c + SIDE);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) {
                /* Rows are too far apart for the processor to foresee them. */
                __builtin_prefetch(row + (2 * ROWS + i) * stride + c);
                own[i] = (__mmask32)_mm512_cmpeq_epi32_mask(other, block[i]) << SIDE | _mm512_cmpeq_epi32_mask(one, block[i]);
                any |= own[i] &= inside;
                found[i] = _mm512_maskz_loadu_epi16(n + i < rows ? inside : 0, row + i * stride + c);
            }
            if (any) {
                vf update[ROWS][2] = {{{0}}};
                const float *a = A + c;
                for (i64 t = 0; t < rank; t++, a += apart_by)
#pragma GCC unroll 4
                    for (int i = 0; i < ROWS; i++)
                        update[i][0] += load(a) * B[i * rank + t], update[i][1] += load(a + SIDE) * B[i * rank + t];
#pragma GCC unroll 4
                for (int i = 0; i < ROWS; i++) {
                    vf low = HALF_WIDENED(found[i], 0), high = HALF_WIDENED(found[i], 1);
                    __m512i changed = both_narrowed(low + low * update[i][0], high + high * update[i][1]);
                    found[i] = _mm512_mask_mov_epi16(found[i], own[i], changed);
                }
            }
#pragma GCC unroll 2
            for (int upper = 0; upper < 2; upper++) {
                _mm512_store_si512(to + upper * deep * TILE, pairs_in(found[0], found[1], upper));
                _mm512_store_si512(to + upper * deep * TILE + TERMS, pairs_in(found[2], found[3], upper));
            }
        }
    }
}

/* dX of some columns, whose tiles of W0 are there; or added to what is there of it. */
TILES static void multiply_input(const bf16_job *j, i64 left, i64 width, const half *tiles, float *sums, int add) {
    const layer *l = j->l;
    i64 deep = up(l->rows, TERMS), next = left + width;
    i64 share = least(bf16_input_columns(l, j->parts), l->cols - next);
    for (i64 first = 0; first < j->tokens; first += PAIR) {
        half *to = j->dx + first * l->cols + left;
        i64 there = least(PAIR, j->tokens - first);
        ask_for_rows(j->weight + next, l->row_stride, l->rows, share, first / PAIR, up(j->tokens, PAIR));
        for (i64 i = 0; i < there && add; i++)
            for (i64 c = 0; c < width; c += PAIR) {
                __m512i found = _mm512_maskz_loadu_epi16(first_of(width - c), to + i * l->cols + c);
                store(sums + (c + i) * PAIR, HALF_WIDENED(found, 0));
                store(sums + (c + i) * PAIR + SIDE, HALF_WIDENED(found, 1));
            }
        if (j->left)
            add_products(there, width, deep, j->left + first * deep * TERMS, IN_TILES, tiles, deep, add, sums, NULL);
        else
            add_products(there, width, deep, j->dy + first * j->dy_stride, j->dy_stride, tiles, deep, add, sums, NULL);
        for (i64 i = 0; i < there; i++)
            for (i64 c = 0; c < width; c += PAIR)
                _mm512_mask_storeu_epi16(to + i * l->cols + c, first_of(width - c),
                                         both_narrowed(load(sums + (c + i) * PAIR), load(sums + (c + i) * PAIR + SIDE)));
    }
}

/* Of a factor's `count` coordinates those of one rank: what is there of it as float32, times `scale`, else 0. */
static void copy_rank(const layer *l, const void *from, i64 first, i64 count, i64 step, i64 t, const int32_t *ranks,
                      float scale, float *to, i64 apart_by) {
    for (i64 i = 0; i < count; i++)
        to[i * apart_by] = t < ranks[i] ? scale * one_of(from, first + i * step, (int)l->factors) : 0;
}

/* A share of dX's columns: dY times those of W_eff; or of W0, added to what is there. */
TILES static void bf16_input_product(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    i64 group = bf16_input_columns(l, j->parts), merged = !j->keep;
    float *at = bf16_input_room(j, part), *sums = taken(&at, group * PAIR * 4);
    half *tiles = taken(&at, up(l->rows, TERMS) * TERMS * group * 2);
    float *A = taken(&at, l->rank * padded(group) * 4), *B = taken(&at, l->rank * (l->rows + ROWS) * 4);
    int32_t *ranks = taken(&at, (l->rows + group) * 4);
    for (i64 n = 0; n < l->rows && merged; n++) ranks[n] = (int32_t)rank_of(l, j->row_block[n]);
    for (i64 t = 0; t < l->rank && merged; t++)
        copy_rank(l, l->B, t * l->B_rank, l->rows, l->B_row, t, ranks, l->scaling, B + t, l->rank);
    memset(B + l->rows * l->rank, 0, (size_t)(ROWS * l->rank) * sizeof *B);
    i64 end = share_of(l->cols, PAIR, part + 1, j->parts);
    begin_tiles();
    for (i64 left = share_of(l->cols, PAIR, part, j->parts); left < end; left += group) {
        i64 width = least(group, end - left);
        for (i64 c = 0; c < width && merged; c++)
            ranks[c] = (int32_t)rank_of(l, j->col_block[left + c]);
        for (i64 t = 0; t < l->rank && merged; t++)
            copy_rank(l, l->A, t * l->A_rank + left * l->A_col, width, l->A_col, t, ranks, 1, A + t * padded(group), 1);
        weight_tiles(j, left, width, merged ? j->col_block + left : NULL, A, B, tiles);
        multiply_input(j, left, width, tiles, sums, !merged);
    }
    end_tiles();
}

/* dX (tokens, cols): of dY (tokens, rows), with contiguous rows, and what smoa_bf16_forward takes. */
void smoa_bf16_input(const layer *l, i64 tokens, const void *dy, i64 dy_stride, const uint16_t *keep, void *dx, float *workspace,
                     i64 threads) {
    bf16_job job = bf16_job_of(l, keep, threads);
    i64 band = bf16_input_band(l, tokens, keep != NULL), n = up(least(tokens, band), PAIR) * PAIR;
    float *at = from_a_line(workspace);
    if (!bf16_dy_in_place(tokens, l->rows)) job.left = taken(&at, n * up(l->rows, TERMS) * TERMS * 2);
    job.row_block = taken(&at, l->rows * 4), job.col_block = taken(&at, (l->cols + PAIR) * 4); /* some are read beside the last */
    for (i64 k = 0; k < l->blocks; k++) {
        for (i64 i = l->row_offsets[k]; i < l->row_offsets[k + 1]; i++) job.row_block[l->row_index[i]] = (int32_t)k;
        for (i64 i = l->col_offsets[k]; i < l->col_offsets[k + 1]; i++) job.col_block[l->col_index[i]] = (int32_t)k;
    }
    if (keep) {
        job.blocked = taken(&at, n * bf16_block_tiles(l->rows, l->blocks) * TERMS * 2);
        job.columns = taken(&at, n * up(l->cols, TERMS) * TERMS * 2);
    }
    job.workspace = at;
    for (i64 first = 0; first < tokens; first += band) {
        job.tokens = least(band, tokens - first);
        job.dy = (const half *)dy + first * dy_stride, job.dy_stride = dy_stride, job.dx = (half *)dx + first * l->cols;
        job.keep = keep ? keep + first * words(l->cols) : NULL;
        if (job.left || keep) in_parallel(bf16_input_prepare, &job, threads);
        if (keep) in_parallel(bf16_input_update, &job, threads);
        if (keep) in_parallel(bf16_input_mask, &job, threads);
        in_parallel(bf16_input_product, &job, threads);
    }
}
