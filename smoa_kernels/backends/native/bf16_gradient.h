/* dA and dB of bf16_linear.h: each block's G = dYᵀ x is contracted tile by tile.
 *
 * A tile of G becomes one of H = s G ∘ W0, which is the operand of two more products, `dB = H Aᵀ` and `dA = Bᵀ H`. Where the
 * factors are bfloat16, H is rounded to it, and they are products of tiles; else H stays float32, as all of the sums do,
 * and so has the precision that factors in float32 are kept for.
 */
#pragma once

#include "bf16_linear.h"

/* Tokens of a band: dY and x of these take as much memory as a square W0; a quarter of it where no rows of W0 are copied for
 * each band. */
static i64 bf16_gradient_band(const layer *l) { return bf16_band(l, l->contiguous ? 1 : 4); }

/* Tiles of each block's columns, or rows, padded: no more than these. */
static i64 bf16_block_tiles(i64 count, i64 blocks) { return up(count, TERMS) + blocks; }

static i64 bf16_rank_tiles(i64 ranks) { return up(ranks, SIDE); }

/* Rows whose G is made at a time. */
static i64 bf16_gradient_rows(const layer *l, i64 threads) {
    return bf16_together(l->rows, bf16_gradient_band(l), L2_CACHE, threads);
}

static i64 bf16_gradient_part_size(const layer *l, i64 widest, i64 threads) {
    i64 height = bf16_gradient_rows(l, threads), tiles = bf16_rank_tiles(l->rank);
    i64 prepare = (up(l->rows, TERMS) + up(l->cols, TERMS)) * TILE;
    i64 factors = lines(height * PAIR) + lines(PAIR * PAIR) + lines(height * tiles * SIDE) +
                  (l->contiguous ? 0 : height * up(widest, TERMS) * TERMS / 2 + up(l->cols, TERMS) * TILE / 2);
    return greatest(prepare, factors);
}

/* Sums of a factor's gradient, of all ranks of PAIR rows, or columns, after another. */
static i64 bf16_sums_size(i64 count, i64 blocks, i64 tiles) { return bf16_block_tiles(count, blocks) * TERMS * tiles * SIDE; }

/* Floats that smoa_bf16_gradient needs. */
i64 smoa_bf16_gradient_workspace(const layer *l, i64 tokens, i64 threads) {
    i64 tiles = bf16_rank_tiles(l->rank), tall = bf16_block_tiles(l->rows, l->blocks);
    i64 wide = bf16_block_tiles(l->cols, l->blocks), some = least(tokens, bf16_gradient_band(l));
    return (tall + wide) * TERMS * up(some, PAIR) * PAIR / 2 + lines(wide * TERMS * tiles * SIDE) +
           bf16_sums_size(l->rows, l->blocks, tiles) +
           threads * (bf16_sums_size(l->cols, l->blocks, tiles) + bf16_gradient_part_size(l, widest_of(l), threads)) + 16;
}

static float *bf16_gradient_room(const bf16_job *j, i64 part) {
    return j->workspace + part * bf16_gradient_part_size(j->l, j->widest, j->parts);
}

/* A as right tiles. */
static void bf16_A_tiles(const bf16_job *j) {
    const layer *l = j->l;
    half *to = j->A_lines, *pairs = (half *)j->workspace;
    i64 tiles = bf16_rank_tiles(l->rank);
    for (i64 k = 0; k < l->blocks; k++) {
        i64 width = l->col_offsets[k + 1] - l->col_offsets[k], step = up(width, TERMS) * TILE;
        for (i64 q = 0; q < tiles; q++, to += step) {
            some_rows some = rows_at((const half *)l->A + q * SIDE * l->cols, l->cols, NULL, l->rank - q * SIDE);
            pairs_of(&some, l->cols, NULL, pairs);
            pick_pairs(pairs, l->col_index + l->col_offsets[k], width, to);
        }
    }
}

/* The same in float32: SIDE ranks of a column, then those of the next. */
static void float_A_lines(const bf16_job *j) {
    const layer *l = j->l;
    float *to = j->A_lines;
    i64 tiles = bf16_rank_tiles(l->rank);
    for (i64 k = 0; k < l->blocks; k++) {
        const i64 *cols = l->col_index + l->col_offsets[k];
        i64 width = l->col_offsets[k + 1] - l->col_offsets[k], deep = up(width, TERMS) * TERMS;
        for (i64 q = 0; q < tiles; q++)
            for (i64 c = 0; c < deep; c++, to += SIDE)
                for (i64 t = 0; t < SIDE; t++) {
                    i64 rank = q * SIDE + t;
                    to[t] = c < width && rank < l->rank ? one_of(l->A, rank * l->cols + cols[c], l->factors) : 0;
                }
    }
}

/* Whether the products read dY of pairs of tokens, as they read x: AMX takes lines of a row. */
static i64 bf16_dy_in_pairs(i64 contiguous) { return contiguous && !amx_allowed(); }

/* Both operands, PAIR tokens at a time: columns of tokens in block order, which the right tiles are made of. Contiguous blocks
 * need no such columns of x where nothing is dropped, nor of dY where it is read as pairs. */
TILES static void bf16_gradient_prepare(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    float *at = bf16_gradient_room(j, part);
    i64 steps = up(j->tokens, PAIR), lies = l->contiguous && !j->keep, pairs = bf16_dy_in_pairs(l->contiguous);
    half *dy = taken(&at, up(l->rows, TERMS) * TILE * 4), *x = taken(&at, up(l->cols, TERMS) * TILE * 4);
    for (i64 t = share_of(steps, 1, part, j->parts); t < share_of(steps, 1, part + 1, j->parts); t++) {
        i64 first = t * PAIR, there = j->tokens - first;
        const half *from = j->x + first * j->x_stride;
        half *left = j->dy_terms, *right = j->x_terms;
        if (!pairs) columns_of(j->dy + first * j->dy_stride, j->dy_stride, there, l->rows, NULL, dy);
        if (!lies)
            columns_of(from, j->x_stride, there, l->cols, j->keep ? j->keep + first * words(l->cols) : NULL, x);
        for (i64 k = 0; k < l->blocks; k++) {
            const i64 *rows = l->row_index + l->row_offsets[k], *cols = l->col_index + l->col_offsets[k];
            i64 height = l->row_offsets[k + 1] - l->row_offsets[k], width = l->col_offsets[k + 1] - l->col_offsets[k];
            for (i64 n = 0; n < height && pairs; n += PAIR)
                tiles_of_tokens(j->dy + first * j->dy_stride, j->dy_stride, there, l->row_offsets[k] + n, height - n, NULL, 0,
                                left + (n / SIDE * steps + t) * TILE, steps * TILE);
            for (i64 n = 0; n < height && !pairs; n++) {
                __builtin_prefetch(terms_at(left, steps, n + SIDE, t * TERMS), 1); /* the next tile is far away */
                _mm512_store_si512(terms_at(left, steps, n, t * TERMS), _mm512_load_si512(dy + rows[n] * PAIR));
            }
            left += up(height, PAIR) * PAIR * steps * TERMS;
            for (i64 c = 0; c < width && lies; c += PAIR)
                tiles_of_tokens(from, j->x_stride, there, l->col_offsets[k] + c, width - c, NULL, 0,
                                right + (c / SIDE * steps + t) * TILE, steps * TILE);
            for (i64 c = 0; c < width && !lies; c += SIDE) {
                __m512i r[16];
#pragma GCC unroll 16
                for (int i = 0; i < SIDE; i++)
                    r[i] = c + i < width ? _mm512_load_si512(x + cols[c + i] * PAIR) : _mm512_setzero_si512();
                half *to = right + (c / SIDE * steps + t) * TILE;
                for (int i = 0; i < SIDE; i++) __builtin_prefetch(to + steps * TILE + i * TERMS, 1);
                transpose_lines(r);
                store_lines(r, to);
            }
            right += up(width, PAIR) * PAIR * steps * TERMS;
        }
    }
}

/* H, as two left tiles and two right ones, of G (PAIR, PAIR) and W0 of as many, of which some are there. */
TILES static void make_H(const float *G, const half *weight, i64 stride, i64 height, i64 width, vf scale, half *H) {
    __mmask32 there = first_of(width);
    half *right = H + 2 * TILE;
    for (i64 i = 0; i < PAIR; i += 2, right += TERMS) {
        __m512i line[2];
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++) {
            __mmask32 own = i + r < height ? there : 0;
            __m512i w = _mm512_maskz_loadu_epi16(own, weight + (i + r) * stride);
            line[r] = both_narrowed(load(G + (i + r) * PAIR) * (scale * HALF_WIDENED(w, 0)),
                                    load(G + (i + r) * PAIR + SIDE) * (scale * HALF_WIDENED(w, 1)));
            line[r] = _mm512_maskz_mov_epi16(own, line[r]); /* of G there may be anything */
            _mm512_store_si512(H + (i + r) * TERMS, line[r]);
        }
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++)
            _mm512_store_si512(right + c * TILE, pairs_in(line[0], line[1], c));
    }
}

/* H in float32 (PAIR, PAIR), of the same. */
static void make_float_H(const float *G, const half *weight, i64 stride, i64 height, i64 width, vf scale, float *H) {
    __mmask32 there = first_of(width);
    for (i64 i = 0; i < PAIR; i++) {
        __mmask32 own = i < height ? there : 0;
        __m512i w = _mm512_maskz_loadu_epi16(own, weight + i * stride);
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            vf value = load(G + i * PAIR + c * SIDE) * (scale * HALF_WIDENED(w, c));
            store(H + i * PAIR + c * SIDE, (vf)_mm512_maskz_mov_ps((__mmask16)(own >> c * SIDE), (__m512)value));
        }
    }
}

/* What contract_H adds, in float32: a line of A has SIDE ranks of a column, one of B those of a row. Sums are short: those of
 * a tile are added to what is there. */
static __attribute__((noinline)) void contract_float_H(i64 ranks, const float *H, const float *A, i64 deep, const float *B,
                                                       float *dA, float *dB) {
    for (; ranks > 0; ranks -= SIDE, A += deep * TERMS * SIDE, B += PAIR * SIDE, dA += PAIR * SIDE, dB += PAIR * SIDE) {
        for (i64 i = 0; i < PAIR; i += SIDE) {
            vf sum[SIDE] = {{0}};
            const float *h = H + i * PAIR, *a = A;
            for (int c = 0; c < PAIR; c++, h++, a += SIDE)
#pragma GCC unroll 16
                for (int r = 0; r < SIDE; r++) sum[r] += h[r * PAIR] * load(a);
#pragma GCC unroll 16
            for (int r = 0; r < SIDE; r++) store(dB + (i + r) * SIDE, load(dB + (i + r) * SIDE) + sum[r]);
        }
        for (i64 t = 0; t < least(ranks, SIDE); t += SIDE / 2) {
            vf sum[SIDE / 2][2] = {{{0}}};
            const float *h = H, *b = B + t;
            for (int i = 0; i < PAIR; i++, h += PAIR, b += SIDE)
#pragma GCC unroll 8
                for (int r = 0; r < SIDE / 2; r++)
                    for (int c = 0; c < 2; c++) sum[r][c] += b[r] * load(h + c * SIDE);
#pragma GCC unroll 8
            for (int r = 0; r < SIDE / 2; r++)
                for (int c = 0; c < 2; c++) {
                    float *to = dA + (t + r) * SIDE + c * SIDE * SIDE;
                    store(to, load(to) + sum[r][c]);
                }
        }
    }
}

/* contract_H without AMX. Its calls are kept out of the loop there: they would put addresses on the stack, and reading those
 * behind tiles that were just stored made dA and dB a fifth slower. */
static __attribute__((noinline)) void contract_by_dots(i64 ranks, const half *H, const half *A, i64 deep, const half *B,
                                                      float *dA, float *dB) {
    for (; ranks > 0; ranks -= SIDE, A += deep * TILE, B += TILE, dA += PAIR * SIDE, dB += PAIR * SIDE) {
        for (i64 i = 0; i < PAIR; i += SIDE) dots_of_tiles(1, H + i * TERMS, IN_TILES, A, 0, 1, dB + i * SIDE, SIDE, 0, NULL);
        for (i64 t = 0; t < least(ranks, SIDE); t += SIDE / 2)
            wide_dots_of_tiles(1, B + t * TERMS, IN_TILES, H + 2 * TILE, TILE, 1, dA + t * SIDE, SIDE, SIDE * SIDE, NULL);
    }
}

/* dB (PAIR, SIDE ranks) += H A, dA (2, SIDE ranks, SIDE columns) += B H, for each SIDE of the ranks. */
TILES static inline void contract_H(i64 ranks, const half *H, const half *A, i64 deep, const half *B, float *dA, float *dB) {
    if (!amx_allowed()) {
        contract_by_dots(ranks, H, A, deep, B, dA, dB);
        return;
    }
    WRITTEN;
    for (; ranks > 0; ranks -= SIDE, A += deep * TILE, B += TILE, dA += PAIR * SIDE, dB += PAIR * SIDE) {
        _tile_loadd(0, dB, 64);
        _tile_loadd(1, dB + SIDE * SIDE, 64);
        _tile_loadd(2, dA, 64);
        _tile_loadd(3, dA + SIDE * SIDE, 64);
        _tile_loadd(4, H, 64);
        _tile_loadd(5, H + TILE, 64);
        _tile_loadd(6, A, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, B, 64);
        _tile_loadd(6, H + 2 * TILE, 64);
        _tile_loadd(7, H + 3 * TILE, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 7);
        _tile_stored(0, dB, 64);
        _tile_stored(1, dB + SIDE * SIDE, 64);
        _tile_stored(2, dA, 64);
        _tile_stored(3, dA + SIDE * SIDE, 64);
    }
}

/* The first `count` of up to LANES sums, as they are stored. */
INLINE void put(void *to, i64 at, i64 count, vf sum, int stored) {
#define CALL(kind) narrow(to, at, count, sum, kind)
    WITH_KIND(stored, CALL)
#undef CALL
}

/* dA's sums and dB, of a share of the rows. */
TILES static void bf16_factors(void *it, i64 part) {
    bf16_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    i64 steps = up(j->tokens, PAIR), ranks = l->rank, tiles = bf16_rank_tiles(ranks), group = 0, groups = 0;
    i64 size = bf16_sums_size(l->cols, l->blocks, tiles);
    i64 group_rows = bf16_gradient_rows(l, j->parts);
    float *at = bf16_gradient_room(j, part), *dA = j->sums + part * size, *dB = j->row_sums;
    float *G = taken(&at, group_rows * PAIR * 4);
    void *H = taken(&at, PAIR * PAIR * 4), *B = taken(&at, group_rows * tiles * SIDE * 4);
    half *ordered = taken(&at, l->contiguous ? 0 : group_rows * up(j->widest, TERMS) * TERMS * 2);
    half *row_pairs = taken(&at, l->contiguous ? 0 : up(l->cols, TERMS) * TILE * 2);
    const half *left = j->dy_terms, *right = j->x_terms;
    i64 in_halves = l->factors == BFLOAT16, pairs = bf16_dy_in_pairs(l->contiguous);
    i64 before = 0; /* columns of the blocks before, padded */
    for (i64 k = 0; k < l->blocks; k++) groups += up(l->row_offsets[k + 1] - l->row_offsets[k], group_rows);
    i64 first = share_of(groups, 1, part, j->parts), end = share_of(groups, 1, part + 1, j->parts);
    begin_tiles();
    for (i64 k = 0; k < l->blocks; k++) {
        i64 top = l->row_offsets[k], height = l->row_offsets[k + 1] - top, rank = rank_of(l, k);
        const i64 *cols = l->col_index + l->col_offsets[k];
        i64 width = l->col_offsets[k + 1] - l->col_offsets[k], deep = up(width, TERMS);
        i64 tall = up(height, PAIR) * PAIR;
        for (i64 n = 0; n < height; n += group_rows, group++) {
            if (group < first || group >= end || rank < 1) continue;
            const i64 *rows = l->row_index + top + n;
            i64 count = least(group_rows, height - n);
            const half *weight = j->weight + (top + n) * l->row_stride + l->col_offsets[k];
            for (i64 i = 0; i < count && !l->contiguous; i += SIDE) {
                some_rows some = rows_at(j->weight, l->row_stride, rows + i, height - n - i);
                pairs_of(&some, l->cols, NULL, row_pairs);
                pick_rows(row_pairs, cols, width, ordered + (i / PAIR * deep * 2 + i / SIDE % 2) * TILE, 2 * TILE);
            }
            memset(B, 0, (size_t)(group_rows * tiles * SIDE * 4));
            for (i64 i = 0; i < count; i++) {
                for (i64 t = 0; t < ranks && in_halves; t++)
                    ((half *)B)[(i / PAIR * tiles * SIDE + t) * TERMS + i % PAIR] =
                        ((const half *)l->B)[rows[i] * ranks + t];
                for (i64 t = 0; t < ranks && !in_halves; t++)
                    ((float *)B)[((i / PAIR * tiles + t / SIDE) * PAIR + i % PAIR) * SIDE + t % SIDE] =
                        one_of(l->B, rows[i] * ranks + t, l->factors);
            }
            for (i64 c = 0; c < width; c += PAIR) {
                if (l->contiguous) ask_for_rows(weight + c, l->row_stride, count, PAIR, 0, 1);
                add_products(count, least(PAIR, width - c), steps, left + n * steps * TERMS, pairs ? IN_PAIRS : IN_TILES,
                             right + c * steps * TERMS, steps, 0, G,
                             c + PAIR < width ? right + (c + PAIR) * steps * TERMS : NULL);
                for (i64 i = 0; i < count; i += PAIR) {
                    i64 A_at = (before * tiles + c) * SIDE, B_at = i * tiles * SIDE, there = least(PAIR, count - i);
                    const half *w = l->contiguous ? weight + i * l->row_stride + c : ordered + (i * deep + c) * PAIR;
                    i64 stride = l->contiguous ? l->row_stride : TERMS;
                    float *to_A = dA + c * tiles * SIDE, *to_B = dB + (n + i) * tiles * SIDE;
                    vf scale = (vf){0} + l->scaling;
                    if (in_halves) {
                        make_H(G + i * PAIR, w, stride, there, width - c, scale, H);
                        contract_H(ranks, H, (half *)j->A_lines + A_at, deep, (half *)B + B_at, to_A, to_B);
                    } else {
                        make_float_H(G + i * PAIR, w, stride, there, width - c, scale, H);
                        contract_float_H(ranks, H, (float *)j->A_lines + A_at, deep, (float *)B + B_at, to_A, to_B);
                    }
                }
            }
        }
        left += tall * steps * TERMS, dB += tall * tiles * SIDE;
        right += deep * 2 * steps * TILE;
        before += deep * TERMS;
        dA += deep * tiles * PAIR * SIDE;
    }
    end_tiles();
}

/* dB of its sums. */
static void bf16_write_dB(const bf16_job *j) {
    const layer *l = j->l;
    i64 tiles = bf16_rank_tiles(l->rank);
    const float *from = j->row_sums;
    for (i64 k = 0; k < l->blocks; k++) {
        const i64 *rows = l->row_index + l->row_offsets[k];
        i64 height = l->row_offsets[k + 1] - l->row_offsets[k], rank = rank_of(l, k);
        for (i64 i = 0; i < height; i++) {
            for (i64 t = 0; t < l->rank; t += SIDE) {
                vf sum = load(from + (i / PAIR * tiles + t / SIDE) * PAIR * SIDE + i % PAIR * SIDE);
                sum = (vf)_mm512_maskz_mov_ps(t < rank ? (__mmask16)first_of(rank - t) : 0, (__m512)sum);
                put(j->dB, rows[i] * l->rank + t, l->rank - t, sum, l->factors);
            }
        }
        from += up(height, PAIR) * tiles * PAIR * SIDE;
    }
}

/* dA of the parts' sums. */
static void bf16_write_dA(const bf16_job *j) {
    const layer *l = j->l;
    i64 tiles = bf16_rank_tiles(l->rank), size = bf16_sums_size(l->cols, l->blocks, tiles);
    const float *from = j->sums;
    for (i64 k = 0; k < l->blocks; k++) {
        const i64 *cols = l->col_index + l->col_offsets[k];
        i64 width = l->col_offsets[k + 1] - l->col_offsets[k], rank = rank_of(l, k);
        for (i64 t = 0; t < l->rank; t++)
            for (i64 c = 0; c < width; c += SIDE) {
                vf sum = {0};
                const float *own = from + (c / PAIR * tiles + t / SIDE) * PAIR * SIDE + (c % PAIR + t % SIDE) * SIDE;
                for (i64 part = 0; part < j->parts && t < rank; part++) sum += load(own + part * size);
                char some[VECTOR_BYTES];
                i64 there = least(SIDE, width - c);
                put(some, 0, LANES, sum, l->factors);
                for (i64 i = 0; i < there; i++)
                    if (l->factors == FLOAT32)
                        ((float *)j->dA)[t * l->cols + cols[c + i]] = ((const float *)some)[i];
                    else
                        ((half *)j->dA)[t * l->cols + cols[c + i]] = ((const half *)some)[i];
            }
        from += up(width, PAIR) * tiles * PAIR * SIDE;
    }
}

/* dA (rank, cols) and dB (rows, rank), stored as A and B: of dY (tokens, rows), with contiguous rows, and what
 * smoa_bf16_forward takes. */
void smoa_bf16_gradient(const layer *l, i64 tokens, const void *dy, i64 dy_stride, const void *x, i64 x_stride,
                        const uint16_t *keep, void *dA, void *dB, float *workspace, i64 threads) {
    bf16_job job = bf16_job_of(l, keep, threads);
    i64 tiles = bf16_rank_tiles(l->rank), wide = bf16_block_tiles(l->cols, l->blocks) * TERMS;
    i64 band = bf16_gradient_band(l), some = least(tokens, band);
    i64 sums = bf16_sums_size(l->rows, l->blocks, tiles) + threads * bf16_sums_size(l->cols, l->blocks, tiles);
    float *at = from_a_line(workspace);
    job.dA = dA, job.dB = dB;
    job.dy_terms = taken(&at, bf16_block_tiles(l->rows, l->blocks) * TERMS * up(some, PAIR) * PAIR * 2);
    job.x_terms = taken(&at, wide * up(some, PAIR) * PAIR * 2);
    job.A_lines = taken(&at, wide * tiles * SIDE * 4);
    job.row_sums = taken(&at, sums * 4), job.sums = job.row_sums + bf16_sums_size(l->rows, l->blocks, tiles);
    job.workspace = at;
    memset(job.row_sums, 0, (size_t)sums * sizeof *job.row_sums);
    l->factors == BFLOAT16 ? bf16_A_tiles(&job) : float_A_lines(&job);
    for (i64 first = 0; first < tokens; first += band) {
        job.tokens = least(band, tokens - first);
        job.dy = (const half *)dy + first * dy_stride, job.dy_stride = dy_stride;
        job.x = (const half *)x + first * x_stride, job.x_stride = x_stride;
        job.keep = keep ? keep + first * words(l->cols) : NULL;
        in_parallel(bf16_gradient_prepare, &job, threads);
        in_parallel(bf16_factors, &job, threads);
    }
    bf16_write_dA(&job);
    bf16_write_dB(&job);
}
