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
    const layer *l;
    i64 rows, cols, top, left; /* how many, and from where on */
    void *out;
    i64 out_stride;
    float *workspace;
    i64 parts;
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
static void change(const layer *l, int some, const void *const *from, void *const *to, i64 first, i64 end,
                   const float *A, i64 stride, const i64 *rows, float *factor, const int32_t *blocks, int32_t k) {
    i64 rank = rank_of(l, k);
    for (int i = 0; i < some && some < ROWS && some > 1; i++)
        change(l, 1, from + i, to + i, first, end, A, stride, rows + i, factor, blocks, k);
    if (some != 1 && some != ROWS) return;
    for (i64 t = 0; t < rank; t++)
        for (int i = 0; i < some; i++)
            factor[t * some + i] = l->scaling * one_of(l->B, rows[i] * l->B_row + t * l->B_rank, (int)l->factors);
#define CALL(kind)                                                                           \
    if (some == 1)                                                                           \
        change_rows(kind, 1, from, to, first, end, A, stride, rank, factor, blocks, k);      \
    else                                                                                     \
        change_rows(kind, ROWS, from, to, first, end, A, stride, rank, factor, blocks, k)
    WITH_KIND(l->stored, CALL)
#undef CALL
}

static i64 padded(i64 cols) { return lines(cols + PIECE); }

static i64 change_size(i64 widest, i64 rank) {
    return lines(rank * ROWS) + (rank + ROWS + 1) * padded(widest) + pieces_size(widest);
}

/* A's columns `cols` side by side, ranks `apart`; NULL: those from `first` on. */
static void copy_A(const layer *l, const i64 *cols, i64 first, i64 width, i64 rank, float *to, i64 apart) {
    for (i64 t = 0; t < rank; t++)
        for (i64 c = 0; c < width; c++)
            to[t * apart + c] = one_of(l->A, t * l->A_rank + (cols ? cols[c] : first + c) * l->A_col, (int)l->factors);
}

static void deltas_part(void *it, i64 part) {
    change_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    i64 widest = widest_of(l);
    int kind = (int)l->stored;
    float *factor = j->workspace + part * change_size(widest, l->rank), *A = factor + lines(l->rank * ROWS);
    char *out = j->out;
    for (i64 k = 0; k < l->blocks; k++) {
        i64 height = l->row_offsets[k + 1] - l->row_offsets[k], width = l->col_offsets[k + 1] - l->col_offsets[k];
        i64 rank = rank_of(l, k);
        const i64 *rows = l->row_index + l->row_offsets[k], *cols = l->col_index + l->col_offsets[k];
        float *line = A + l->rank * padded(widest);
        piece *pieces = (piece *)(line + ROWS * padded(widest));
        i64 some = stored_pieces_of(cols, width, kind, pieces);
        copy_A(l, cols, 0, width, rank, A, padded(width));
        i64 first = share_of(height, ROWS, part, j->parts), end = share_of(height, ROWS, part + 1, j->parts);
        for (; first < end && rank > 0; first += ROWS) {
            const void *from[ROWS];
            void *to[ROWS];
            int there = (int)least(ROWS, end - first);
            for (int i = 0; i < there; i++) {
                const void *weight = number(l->weight, rows[first + i] * l->row_stride, kind);
                void *ordered = line + i * padded(widest);
                from[i] = l->contiguous ? number(weight, l->col_offsets[k], kind) : ordered;
                if (!l->contiguous) gather_stored(weight, cols, width, pieces, some, kind, ordered);
                to[i] = out + (first + i) * width * bytes_of(kind);
            }
            change(l, there, from, to, 0, width, A, padded(width), rows + first, factor, NULL, (int32_t)k);
        }
        out += height * width * bytes_of(kind);
    }
}

/* Floats that smoa_deltas needs. */
i64 smoa_deltas_workspace(const layer *l, i64 threads) { return threads * change_size(widest_of(l), l->rank) + 16; }

/* out = ΔW_k = W0 ∘ s B_k A_k of every block (its rows, its columns), one after another, stored as W0 is, whose rows are
 * contiguous; of blocks of no rank nothing is written. Needs indices. */
void smoa_deltas(const layer *l, void *out, float *workspace, i64 threads) {
    change_job job = {.l = l, .out = out, .workspace = from_a_line(workspace), .parts = threads};
    in_parallel(deltas_part, &job, threads);
}

static void modulate_part(void *it, i64 part) {
    change_job *j = it;
    if (part >= j->parts) return;
    const layer *l = j->l;
    int kind = (int)l->stored;
    i64 size = bytes_of(kind);
    float *factor = j->workspace + part * change_size(l->cols, l->rank), *A = factor + lines(l->rank * ROWS);
    int32_t *blocks = (int32_t *)(A + l->rank * padded(j->cols));
    i64 first = share_of(j->rows, ROWS, part, j->parts), end = share_of(j->rows, ROWS, part + 1, j->parts);
    copy_A(l, NULL, j->left, j->cols, l->rank, A, padded(j->cols));
    for (i64 c = 0; c < j->cols; c++) blocks[c] = label(l->col_block, j->left + c);
    for (i64 k = 0; k < l->blocks; k++) {
        range own = {j->cols, j->cols}; /* what is not of the block is W0's */
        for (i64 c = 0; c < j->cols; c++)
            if (blocks[c] == k) own = (range){least(own.first, c / LANES * LANES), least(j->cols, (c / LANES + 1) * LANES)};
        const void *from[ROWS];
        void *to[ROWS];
        i64 rows[ROWS];
        int there = 0;
        for (i64 r = first; r < end; r++) {
            if (label(l->row_block, j->top + r) != k) continue;
            const char *weight = number(l->weight, (j->top + r) * l->row_stride + j->left, kind);
            char *out = (char *)j->out + r * j->out_stride * size;
            memcpy(out, weight, (size_t)(own.first * size));
            memcpy(out + own.end * size, weight + own.end * size, (size_t)((j->cols - own.end) * size));
            from[there] = weight, to[there] = out, rows[there++] = j->top + r;
            if (there == ROWS) {
                change(l, there, from, to, own.first, own.end, A, padded(j->cols), rows, factor, blocks, (int32_t)k);
                there = 0;
            }
        }
        change(l, there, from, to, own.first, own.end, A, padded(j->cols), rows, factor, blocks, (int32_t)k);
    }
}

/* Floats that smoa_modulate needs. */
i64 smoa_modulate_workspace(const layer *l, i64 threads) { return threads * change_size(l->cols, l->rank) + 16; }

/* out (rows, cols), rows `out_stride` apart, = a part of W_eff, from row `top` and column `left` on, stored as W0 is, whose
 * rows are contiguous. Needs labels. */
void smoa_modulate(const layer *l, i64 rows, i64 cols, i64 top, i64 left, void *out, i64 out_stride, float *workspace,
                   i64 threads) {
    change_job job = {l, rows, cols, top, left, out, out_stride, from_a_line(workspace), threads};
    in_parallel(modulate_part, &job, threads);
}
