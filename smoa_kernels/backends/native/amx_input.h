/* dX of amx_linear.h: dY W_eff, rounded once; under dropout dY W0, to which the masked dY ΔW is the first term.
 *
 * Columns of W0 are right tiles whose terms are its rows, two of which are paired as they are read and modulated.
 */
#pragma once

#include "amx_gradient.h"

static i64 amx_input_part_size(i64 rows, i64 tallest, i64 rank) {
    i64 update = lines(PAIR * PAIR / 2) + lines(PAIR * apart(tallest) / 2) + lines(rank * padded(PAIR)) + lines(rank * ROWS) +
                 lines(ROWS * padded(PAIR)) + pieces_size(PAIR);
    i64 group = amx_together(rows);
    i64 product = lines(up(rows, TERMS) * TERMS * group / 2) + lines(rank * padded(group)) + lines(rank * (rows + ROWS)) +
                  lines(rows + group);
    i64 prepare = lines(up(rows, TERMS) * TILE / 2);
    return lines(PAIR * PAIR) + (update > product ? update : product) + prepare;
}

static i64 amx_input_workspace(i64 tokens, i64 rows, i64 cols, i64 blocks, i64 tallest, i64 rank, i64 masked, i64 threads) {
    i64 n = up(tokens, PAIR) * PAIR, update = amx_block_tiles(rows, blocks) + up(cols, TERMS);
    return lines(n * apart(rows) / 2) + lines(rows) + lines(cols + SIDE) + lines(masked ? n * update * TERMS / 2 : 0) +
           threads * amx_input_part_size(rows, tallest, rank) + 64;
}

static float *amx_input_room(const amx_job *j, i64 part) {
    return j->workspace + part * amx_input_part_size(j->rows, j->tallest, j->rank);
}

/* dY as left tiles, and where dX is masked as right tiles in block order. */
static void amx_input_prepare(void *it, i64 part) {
    amx_job *j = it;
    if (part >= j->parts) return;
    i64 panels = amx_pairs(j->tokens), wide = up(j->rows, TERMS) * TERMS;
    half *pairs = (half *)amx_input_room(j, part);
    for (i64 p = share_of(panels, 1, part, j->parts); p < share_of(panels, 1, part + 1, j->parts); p++) {
        const half *dy = j->dy + p * SIDE * j->dy_stride;
        for (i64 i = 0; i < SIDE; i++) {
            half *to = j->left + (p * SIDE + i) * apart(j->rows);
            i64 there = p * SIDE + i < j->tokens ? j->rows : 0;
            if (there) memcpy(to, dy + i * j->dy_stride, (size_t)there * sizeof *to);
            memset(to + there, 0, (size_t)(wide - there) * sizeof *to);
        }
        if (!j->keep) continue;
        half *to = j->blocked;
        pairs_of(dy, j->dy_stride, j->tokens - p * SIDE, j->rows, NULL, pairs);
        for (i64 k = 0; k < j->blocks; k++) {
            i64 height = j->row_offsets[k + 1] - j->row_offsets[k], step = up(height, TERMS) * TILE;
            pick_pairs(pairs, j->row_index + j->row_offsets[k], height, to + p * step);
            to += panels * step;
        }
    }
}

/* PAIR columns of ΔW_k at most as left tiles, whose terms are its rows: some rows at a time are made and transposed. */
AMX static void transposed_delta(const amx_job *j, i64 k, const i64 *cols, i64 count, float *A, float *factor,
                                 half *line, half *some, half *out) {
    i64 top = j->row_offsets[k], height = j->row_offsets[k + 1] - top, step = apart(j->tallest);
    piece *pieces = (piece *)(A + j->rank * padded(PAIR));
    i64 found = half_pieces_of(cols, count, pieces);
    copy_A(&j->change, cols, count, rank_of(j->ranks, k, j->rank), A);
    for (i64 n = 0; n < height; n += PAIR) {
        const i64 *rows = j->row_index + top + n;
        i64 there = least(PAIR, height - n);
        memset(some, 0, PAIR * PAIR * sizeof *some);
        for (i64 i = 0; i < there; i += ROWS) {
            const void *from[ROWS];
            void *to[ROWS];
            int these = (int)least(ROWS, there - i);
            for (int r = 0; r < these; r++) {
                gather_halves(j->weight + rows[i + r] * j->stride, cols, count, pieces, found, NULL, 0, line + r * 2 * PAIR);
                from[r] = line + r * 2 * PAIR, to[r] = some + (i + r) * PAIR;
            }
            change(&j->change, these, from, to, 0, count, A, padded(count), rows + i, factor, NULL, (int32_t)k);
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
            for (int i = 0; i < SIDE; i++) _mm512_store_si512(out + (upper * SIDE + i) * step + n, r[i]);
        }
    }
}

/* Columns of dY ΔW, a share of each block's. */
AMX static void amx_input_update(void *it, i64 part) {
    amx_job *j = it;
    if (part >= j->parts) return;
    float *at = amx_input_room(j, part), *sums = taken(&at, PAIR * PAIR * 4);
    half *some = taken(&at, PAIR * PAIR * 2), *delta = taken(&at, PAIR * apart(j->tallest) * 2);
    float *factor = taken(&at, j->rank * ROWS * 4);
    half *line = taken(&at, ROWS * padded(PAIR) * 4);
    float *A = at;
    const half *blocked = j->blocked;
    i64 panels = amx_pairs(j->tokens), tall = up(j->cols, TERMS) * TERMS * SIDE, group = 0;
    use_tiles();
    for (i64 k = 0; k < j->blocks; k++) {
        i64 left = j->col_offsets[k], width = j->col_offsets[k + 1] - left;
        i64 deep = up(j->row_offsets[k + 1] - j->row_offsets[k], TERMS), used = rank_of(j->ranks, k, j->rank) > 0;
        for (i64 c = 0; c < width; c += PAIR, group++) {
            if (group % j->parts != part) continue;
            const i64 *cols = j->col_index + left + c;
            i64 count = least(PAIR, width - c);
            if (used) transposed_delta(j, k, cols, count, A, factor, line, some, delta);
            for (i64 p = 0; p < panels; p += 2) {
                zero_sums();
                add_product(used ? deep : 0, delta, apart(j->tallest), blocked + p * deep * TILE, deep * TILE);
                store_sums(sums);
                write_columns(sums, cols, count, j->columns + p * tall, j->columns + (p + 1) * tall);
            }
        }
        blocked += panels * deep * TILE;
    }
    _tile_release();
}

static void amx_input_mask(void *it, i64 part) {
    amx_job *j = it;
    if (part >= j->parts) return;
    i64 panels = up(j->tokens, SIDE), tall = up(j->cols, TERMS) * TERMS * SIDE;
    for (i64 p = share_of(panels, 1, part, j->parts); p < share_of(panels, 1, part + 1, j->parts); p++)
        rows_from(j->columns + p * tall, j->tokens - p * SIDE, j->cols, j->keep + p * SIDE * words(j->cols),
                j->dx + p * SIDE * j->cols, j->cols);
}

/* Some columns of W0, or of W_eff where there are `blocks` of these columns, as right tiles; of A (rank, columns) and B
 * (rows, rank) nothing is there beyond a block's own rank. */
AMX static void weight_tiles(const amx_job *j, i64 left, i64 width, const int32_t *blocks, const float *A,
                             const float *B, half *out) {
    i64 deep = up(j->rows, TERMS), apart_by = padded(amx_together(j->rows));
    for (i64 n = 0; n < deep * TERMS; n += ROWS) {
        i64 there = least(ROWS, j->rows - n);
        __m512i block[ROWS];
        for (int i = 0; i < ROWS; i++) block[i] = _mm512_set1_epi32(blocks && i < there ? j->row_block[n + i] : -2);
        for (i64 c = 0; c < width; c += SIDE) {
            __mmask16 inside = (__mmask16)first_of(width - c), own[ROWS] = {0};
            __m512i col = blocks ? _mm512_loadu_si512(blocks + c) : _mm512_set1_epi32(-1);
            vf w[ROWS], update[ROWS] = {{0}};
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) {
                own[i] = _mm512_cmpeq_epi32_mask(col, block[i]);
                __m256i found = _mm256_maskz_loadu_epi16(i < there ? inside : 0, j->weight + (n + i) * j->stride + left + c);
                w[i] = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(found), 16);
            }
            if (own[0] | own[1] | own[2] | own[3])
                for (i64 t = 0; t < j->rank; t++) {
                    vf a = load(A + t * apart_by + c);
#pragma GCC unroll 4
                    for (int i = 0; i < ROWS; i++) update[i] += a * B[(n + i) * j->rank + t];
                }
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++)
                w[i] = (vf)_mm512_mask_fmadd_ps((__m512)w[i], own[i], (__m512)update[i], (__m512)w[i]);
            half *to = out + (c / SIDE * deep + n / TERMS) * TILE + n % TERMS * SIDE;
            _mm512_store_si512(to, paired(narrowed(w[0]), narrowed(w[1])));
            _mm512_store_si512(to + TERMS, paired(narrowed(w[2]), narrowed(w[3])));
        }
    }
}

/* dX of some columns, whose tiles of W0 are there; or added to what is there of it. */
AMX static void multiply_input(const amx_job *j, i64 left, i64 width, const half *tiles, float *sums, int add) {
    i64 deep = up(j->rows, TERMS), step = apart(j->rows);
    i64 next = left + width, share = least(amx_together(j->rows), j->cols - next);
    for (i64 first = 0; first < j->tokens; first += PAIR) {
        ask_for_rows(j->weight + next, j->stride, NULL, j->rows, share, first / PAIR, up(j->tokens, PAIR));
        for (i64 c = 0; c < width; c += PAIR) {
            half *to = j->dx + first * j->cols + left + c;
            i64 there = least(PAIR, j->tokens - first);
            __mmask32 inside = first_of(width - c);
            for (i64 i = 0; i < there && add; i++) {
                __m512i found = _mm512_maskz_loadu_epi16(inside, to + i * j->cols);
                store(sums + i * PAIR, HALF_WIDENED(found, 0));
                store(sums + i * PAIR + SIDE, HALF_WIDENED(found, 1));
            }
            if (add)
                load_sums(sums);
            else
                zero_sums();
            add_product(deep, j->left + first * step, step, tiles + c / SIDE * deep * TILE, deep * TILE);
            store_sums(sums);
            for (i64 i = 0; i < there; i++)
                _mm512_mask_storeu_epi16(to + i * j->cols, inside,
                                         both_narrowed(load(sums + i * PAIR), load(sums + i * PAIR + SIDE)));
        }
    }
}

/* Of a factor's `count` coordinates those of one rank: what is there of it as float32, times `scale`, else 0. */
static void copy_rank(const change_job *m, const void *from, i64 first, i64 count, i64 step, i64 t, const int32_t *ranks,
                      float scale, float *to, i64 apart_by) {
    for (i64 i = 0; i < count; i++)
        to[i * apart_by] = t < ranks[i] ? scale * one_of(from, first + i * step, m->factors) : 0;
}

/* A share of dX's columns: dY times those of W_eff; or of W0, added to what is there. */
AMX static void amx_input_product(void *it, i64 part) {
    amx_job *j = it;
    if (part >= j->parts) return;
    i64 group = amx_together(j->rows), merged = !j->keep;
    float *at = amx_input_room(j, part), *sums = taken(&at, PAIR * PAIR * 4);
    half *tiles = taken(&at, up(j->rows, TERMS) * TERMS * group * 2);
    float *A = taken(&at, j->rank * padded(group) * 4), *B = taken(&at, j->rank * (j->rows + ROWS) * 4);
    int32_t *ranks = taken(&at, (j->rows + group) * 4);
    const change_job *m = &j->change;
    for (i64 n = 0; n < j->rows && merged; n++) ranks[n] = (int32_t)rank_of(j->ranks, j->row_block[n], j->rank);
    for (i64 t = 0; t < j->rank && merged; t++)
        copy_rank(m, m->B, t * m->B_rank, j->rows, m->B_row, t, ranks, m->scaling, B + t, j->rank);
    memset(B + j->rows * j->rank, 0, (size_t)(ROWS * j->rank) * sizeof *B);
    i64 end = share_of(j->cols, PAIR, part + 1, j->parts);
    use_tiles();
    for (i64 left = share_of(j->cols, PAIR, part, j->parts); left < end; left += group) {
        i64 width = least(group, end - left);
        for (i64 c = 0; c < width && merged; c++)
            ranks[c] = (int32_t)rank_of(j->ranks, j->col_block[left + c], j->rank);
        for (i64 t = 0; t < j->rank && merged; t++)
            copy_rank(m, m->A, t * m->A_rank + left * m->A_col, width, m->A_col, t, ranks, 1, A + t * padded(group), 1);
        weight_tiles(j, left, width, merged ? j->col_block + left : NULL, A, B, tiles);
        multiply_input(j, left, width, tiles, sums, !merged);
    }
    _tile_release();
}

static void amx_input(amx_job *job, float *at) {
    i64 n = up(job->tokens, PAIR) * PAIR;
    job->left = taken(&at, n * apart(job->rows) * 2);
    job->row_block = taken(&at, job->rows * 4), job->col_block = taken(&at, (job->cols + SIDE) * 4);
    for (i64 k = 0; k < job->blocks; k++) {
        for (i64 i = job->row_offsets[k]; i < job->row_offsets[k + 1]; i++) job->row_block[job->row_index[i]] = (int32_t)k;
        for (i64 i = job->col_offsets[k]; i < job->col_offsets[k + 1]; i++) job->col_block[job->col_index[i]] = (int32_t)k;
    }
    if (job->keep) {
        job->blocked = taken(&at, n * amx_block_tiles(job->rows, job->blocks) * TERMS * 2);
        job->columns = taken(&at, n * up(job->cols, TERMS) * TERMS * 2);
    }
    job->workspace = at;
    in_parallel(amx_input_prepare, job, job->parts);
    if (job->keep) in_parallel(amx_input_update, job, job->parts);
    if (job->keep) in_parallel(amx_input_mask, job, job->parts);
    in_parallel(amx_input_product, job, job->parts);
}

/* Floats that smoa_amx_backward needs. */
i64 smoa_amx_backward_workspace(i64 tokens, i64 rows, i64 cols, i64 blocks, i64 tallest, i64 widest, i64 rank, i64 terms,
                                i64 masked, i64 threads) {
    i64 factors = amx_gradient_workspace(tokens, rows, cols, blocks, widest, terms * rank, threads);
    i64 input = amx_input_workspace(tokens, rows, cols, blocks, tallest, rank, masked, threads);
    return factors > input ? factors : input;
}

/* dX (tokens, cols), and dA and dB, stored as A and B, those that are not NULL: of dY (tokens, rows), with contiguous rows,
 * and what smoa_amx_forward takes. A_halves and B_halves are A (terms rank, cols) and B (rows, terms rank) in bfloat16. */
void smoa_amx_backward(i64 tokens, i64 rows, i64 cols, const void *dy, i64 dy_stride, const void *x, i64 x_stride,
                       const void *weight, i64 stride, const uint16_t *keep, const i64 *row_index, const i64 *col_index,
                       const int32_t *row_offsets, const int32_t *col_offsets, i64 blocks, i64 contiguous,
                       const int32_t *ranks, i64 rank, const void *A, const void *B, i64 factors, float scaling,
                       i64 terms, const void *A_halves, const void *B_halves, void *dx, void *dA, void *dB,
                       float *workspace, i64 threads) {
    amx_job job = amx_job_of(tokens, rows, cols, weight, stride, keep, row_index, col_index, row_offsets, col_offsets,
                             blocks, contiguous, ranks, rank, A, B, factors, scaling, threads);
    job.dy = dy, job.dy_stride = dy_stride, job.x = x, job.x_stride = x_stride;
    job.terms = terms, job.A = A_halves, job.B = B_halves, job.dx = dx, job.dA = dA, job.dB = dB;
    if (dA) amx_gradient(&job, from_a_line(workspace));
    if (dx) amx_input(&job, from_a_line(workspace));
}
