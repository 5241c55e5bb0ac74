/* What SMoA takes beside GEMMs where torch multiplies: activations in block order and back, ΔW and W_eff. Each is one pass
 * that reads its operands once and rounds once. (dA and dB are gradient.h's.)
 */
#pragma once

#include "few_tokens.h"

typedef struct {
    i64 tokens, stride, blocks, parts;
    void *own, *blocked;
    int kind;
    const i64 *index;
    const int32_t *offsets;
    const uint16_t *keep;
    float *workspace;
    int back;
} order_job;

static i64 order_size(i64 cols) { return pieces_size(cols) + lines(cols + PIECE); }

/* Columns of a block of one row, or back, by way of a `line` where more is written or read than they are. */
static void order_floats(float *own, float *blocked, const i64 *index, i64 width, const piece *pieces, i64 some,
                         const uint16_t *keep, float *line, int back) {
    if (back) {
        memcpy(line, blocked, (size_t)width * sizeof *line);
        scatter(line, index, width, pieces, some, keep, own);
    } else {
        gather(own, index, width, pieces, some, keep, line);
        memcpy(blocked, line, (size_t)width * sizeof *line);
    }
}

static void order_part(void *it, i64 part) {
    order_job *j = it;
    if (part >= j->parts) return;
    i64 first = share_of(j->tokens, 1, part, j->parts), end = share_of(j->tokens, 1, part + 1, j->parts);
    i64 cols = j->offsets[j->blocks], size = bytes_of(j->kind);
    for (i64 t = first; t < end && !j->index; t++)
        for (i64 k = 0; k < j->blocks; k++) {
            i64 left = j->offsets[k], width = j->offsets[k + 1] - left;
            memcpy((char *)j->blocked + (j->tokens * left + t * width) * size,
                   number(j->own, t * j->stride + left, j->kind), (size_t)(width * size));
        }
    if (!j->index) return;
    float *line = j->workspace + part * order_size(cols);
    piece *pieces = (piece *)(line + lines(cols + PIECE));
    for (i64 k = 0; k < j->blocks; k++) {
        const i64 *index = j->index + j->offsets[k];
        i64 width = j->offsets[k + 1] - j->offsets[k], some = stored_pieces_of(index, width, j->kind, pieces);
        for (i64 t = first; t < end; t++) {
            void *own = (char *)j->own + t * j->stride * size;
            void *blocked = (char *)j->blocked + (j->tokens * j->offsets[k] + t * width) * size;
            const uint16_t *keep = j->keep ? j->keep + t * words(cols) : NULL;
            if (j->kind == FLOAT32)
                order_floats(own, blocked, index, width, pieces, some, keep, line, j->back);
            else if (j->back)
                scatter_halves(blocked, index, width, pieces, some, keep, exponent_of(j->kind), own);
            else
                gather_halves(own, index, width, pieces, some, keep, exponent_of(j->kind), blocked);
        }
    }
}

/* Floats that smoa_order needs. */
i64 smoa_order_workspace(i64 cols, i64 threads) { return threads * order_size(cols) + 16; }

/* blocked = the columns of own (tokens, cols), rows `stride` apart, both of `kind`: one block (tokens, its columns) after
 * another; or, where `back`, own from blocked. What `keep` has no bit for, in own's order, is dropped, unless it is
 * NULL. Behind its last row one word more may be read. */
void smoa_order(i64 tokens, void *own, i64 stride, i64 kind, const i64 *index, const int32_t *offsets, i64 blocks,
                const uint16_t *keep, void *blocked, i64 back, float *workspace, i64 threads) {
    order_job job = {tokens, stride, blocks, threads, own, blocked, (int)kind, index,
                     offsets, keep, from_a_line(workspace), back != 0};
    in_parallel(order_part, &job, threads);
}

typedef struct {
    i64 rows, cols, blocks, parts, stride, out_stride, contiguous;
    const void *weight;
    int kind; /* of W0, and of what is made */
    /* A (rank, cols) and B (rows, rank), of `factors`, with any strides. */
    const void *A, *B;
    int factors;
    i64 A_rank, A_col, B_row, B_rank, rank;
    float scaling;
    const int32_t *ranks;
    labels row_block, col_block;
    const i64 *row_index, *col_index;
    const int32_t *row_offsets, *col_offsets;
    void *out;
    float *workspace;
} change_job;

/* Columns of some rows of block k, side by side, as many of LANES from `c` on as are `there`: W0 ∘ (1 + s B A) where `blocks`
 * says k, W0 where not; or W0 ∘ s B A where there is no `blocks`. A's are `stride` apart, `factor` (rank, some) is s B. */
INLINE void change_lanes(int kind, int some, const void *const *from, void *const *to, i64 c, i64 there, const float *A,
                         i64 stride, i64 rank, const float *factor, const int32_t *blocks, int32_t k) {
    vf update[ROWS] = {{0}};
    vi labels = {0};
    if (blocks) memcpy(&labels, blocks + c, sizeof labels);
    for (i64 t = 0; t < rank; t++) {
        vf a = load(A + t * stride + c);
#pragma GCC unroll 4
        for (int i = 0; i < some; i++) update[i] += a * factor[t * some + i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < some; i++) {
        vf w = widened(from[i], c, there, kind);
        narrow(to[i], c, there, blocks ? chosen(labels, k, w + w * update[i], w) : w * update[i], kind);
    }
}

/* The same of columns from `first` to `end`: whole vectors without asking how much of each is there. */
INLINE void change_rows(int kind, int some, const void *const *from, void *const *to, i64 first, i64 end, const float *A,
                        i64 stride, i64 rank, const float *factor, const int32_t *blocks, int32_t k) {
    i64 c = first;
    for (; c + LANES <= end; c += LANES)
        change_lanes(kind, some, from, to, c, LANES, A, stride, rank, factor, blocks, k);
    if (c < end) change_lanes(kind, some, from, to, c, end - c, A, stride, rank, factor, blocks, k);
}

/* The same of up to ROWS rows, whose B is that of `rows`. */
static void change(const change_job *j, int some, const void *const *from, void *const *to, i64 first, i64 end,
                   const float *A, i64 stride, const i64 *rows, float *factor, const int32_t *blocks, int32_t k) {
    i64 rank = rank_of(j->ranks, k, j->rank);
    for (int i = 0; i < some && some < ROWS && some > 1; i++)
        change(j, 1, from + i, to + i, first, end, A, stride, rows + i, factor, blocks, k);
    if (some != 1 && some != ROWS) return;
    for (i64 t = 0; t < rank; t++)
        for (int i = 0; i < some; i++)
            factor[t * some + i] = j->scaling * one_of(j->B, rows[i] * j->B_row + t * j->B_rank, j->factors);
#define CALL(kind)                                                                           \
    if (some == 1)                                                                           \
        change_rows(kind, 1, from, to, first, end, A, stride, rank, factor, blocks, k);      \
    else                                                                                     \
        change_rows(kind, ROWS, from, to, first, end, A, stride, rank, factor, blocks, k)
    WITH_KIND(j->kind, CALL)
#undef CALL
}

static i64 padded(i64 cols) { return lines(cols + PIECE); }

static i64 change_size(i64 widest, i64 rank) {
    return lines(rank * ROWS) + (rank + ROWS + 1) * padded(widest) + pieces_size(widest);
}

/* A's columns side by side, ranks `apart`; `cols` NULL: all. */
static void copy_A(const change_job *j, const i64 *cols, i64 width, i64 rank, float *to, i64 apart) {
    for (i64 t = 0; t < rank; t++)
        for (i64 c = 0; c < width; c++)
            to[t * apart + c] = one_of(j->A, t * j->A_rank + (cols ? cols[c] : c) * j->A_col, j->factors);
}

static void deltas_part(void *it, i64 part) {
    change_job *j = it;
    if (part >= j->parts) return;
    i64 widest = largest_of(j->col_offsets, j->blocks);
    float *factor = j->workspace + part * change_size(widest, j->rank), *A = factor + lines(j->rank * ROWS);
    char *out = j->out;
    for (i64 k = 0; k < j->blocks; k++) {
        i64 height = j->row_offsets[k + 1] - j->row_offsets[k], width = j->col_offsets[k + 1] - j->col_offsets[k];
        i64 rank = rank_of(j->ranks, k, j->rank);
        const i64 *rows = j->row_index + j->row_offsets[k], *cols = j->col_index + j->col_offsets[k];
        float *line = A + j->rank * padded(widest);
        piece *pieces = (piece *)(line + ROWS * padded(widest));
        i64 some = stored_pieces_of(cols, width, j->kind, pieces);
        copy_A(j, cols, width, rank, A, padded(width));
        i64 first = share_of(height, ROWS, part, j->parts), end = share_of(height, ROWS, part + 1, j->parts);
        for (; first < end && rank > 0; first += ROWS) {
            const void *from[ROWS];
            void *to[ROWS];
            int there = (int)least(ROWS, end - first);
            for (int i = 0; i < there; i++) {
                const void *weight = number(j->weight, rows[first + i] * j->stride, j->kind);
                void *ordered = line + i * padded(widest);
                from[i] = j->contiguous ? number(weight, j->col_offsets[k], j->kind) : ordered;
                if (!j->contiguous) gather_stored(weight, cols, width, pieces, some, j->kind, ordered);
                to[i] = out + (first + i) * width * bytes_of(j->kind);
            }
            change(j, there, from, to, 0, width, A, padded(width), rows + first, factor, NULL, (int32_t)k);
        }
        out += height * width * bytes_of(j->kind);
    }
}

/* Floats that smoa_deltas needs, of the columns of the widest block, or smoa_modulate, of all. */
i64 smoa_change_workspace(i64 widest, i64 rank, i64 threads) { return threads * change_size(widest, rank) + 16; }

/* out = ΔW_k = W0 ∘ s B_k A_k of every block (its rows, its columns), one after another; of blocks of no rank nothing is
 * written. W0, its rows contiguous, and `out` are of `kind`. */
void smoa_deltas(const void *weight, i64 stride, i64 kind, const i64 *row_index, const i64 *col_index,
                 const int32_t *row_offsets, const int32_t *col_offsets, i64 blocks, i64 contiguous,
                 const int32_t *ranks, i64 rank, const void *A, i64 A_rank, i64 A_col, const void *B, i64 B_row,
                 i64 B_rank, i64 factors, float scaling, void *out, float *workspace, i64 threads) {
    change_job job = {0, 0, blocks, threads, stride, 0, contiguous, weight, (int)kind, A, B, (int)factors, A_rank, A_col,
                      B_row, B_rank, rank, scaling, ranks, {NULL, 0}, {NULL, 0}, row_index, col_index, row_offsets,
                      col_offsets, out, from_a_line(workspace)};
    in_parallel(deltas_part, &job, threads);
}

static void modulate_part(void *it, i64 part) {
    change_job *j = it;
    if (part >= j->parts) return;
    float *factor = j->workspace + part * change_size(j->cols, j->rank), *A = factor + lines(j->rank * ROWS);
    int32_t *blocks = (int32_t *)(A + j->rank * padded(j->cols));
    i64 first = share_of(j->rows, ROWS, part, j->parts), end = share_of(j->rows, ROWS, part + 1, j->parts);
    copy_A(j, NULL, j->cols, j->rank, A, padded(j->cols));
    for (i64 c = 0; c < j->cols; c++) blocks[c] = label(j->col_block, c);
    for (i64 k = 0; k < j->blocks; k++) {
        range own = {j->cols, j->cols}; /* what is not of the block is W0's */
        for (i64 c = 0; c < j->cols; c++)
            if (blocks[c] == k) own = (range){least(own.first, c / LANES * LANES), least(j->cols, (c / LANES + 1) * LANES)};
        const void *from[ROWS];
        void *to[ROWS];
        i64 rows[ROWS], size = bytes_of(j->kind);
        int there = 0;
        for (i64 r = first; r < end; r++) {
            if (label(j->row_block, r) != k) continue;
            const char *weight = number(j->weight, r * j->stride, j->kind);
            char *out = (char *)j->out + r * j->out_stride * size;
            memcpy(out, weight, (size_t)(own.first * size));
            memcpy(out + own.end * size, weight + own.end * size, (size_t)((j->cols - own.end) * size));
            from[there] = weight, to[there] = out, rows[there++] = r;
            if (there == ROWS) {
                change(j, there, from, to, own.first, own.end, A, padded(j->cols), rows, factor, blocks, (int32_t)k);
                there = 0;
            }
        }
        change(j, there, from, to, own.first, own.end, A, padded(j->cols), rows, factor, blocks, (int32_t)k);
    }
}

/* out (rows, cols), rows `out_stride` apart, = a part of W_eff, from row `top` and column `left` on, of W0 with contiguous
 * rows, both of `kind`; W0's rows and columns have labels. */
void smoa_modulate(i64 rows, i64 cols, i64 top, i64 left, const void *weight, i64 stride, i64 kind,
                   const void *row_block, const void *col_block, i64 wide, i64 blocks, const int32_t *ranks, i64 rank,
                   const void *A, i64 A_rank, i64 A_col, const void *B, i64 B_row, i64 B_rank, i64 factors,
                   float scaling, void *out, i64 out_stride, float *workspace, i64 threads) {
    i64 label_size = wide ? 4 : 1;
    labels row_labels = {(const char *)row_block + top * label_size, wide};
    labels col_labels = {(const char *)col_block + left * label_size, wide};
    change_job job = {rows, cols, blocks, threads, stride, out_stride, 0, number(weight, top * stride + left, (int)kind),
                      (int)kind, number(A, left * A_col, (int)factors), number(B, top * B_row, (int)factors),
                      (int)factors, A_rank, A_col, B_row, B_rank, rank, scaling, ranks, row_labels, col_labels, NULL,
                      NULL, NULL, NULL, out, from_a_line(workspace)};
    in_parallel(modulate_part, &job, threads);
}
