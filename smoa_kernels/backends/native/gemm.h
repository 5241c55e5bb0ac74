/* The blocked GEMM C (+)= left rightᵀ after Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication",
 * 2008).
 *
 * Every product of a layer and its gradients is a call of `gemm`. What differs:
 *
 *   operand.h      the matrices that are read: three dtypes, two memory orders;
 *   pack.h         packs a piece of a matrix in panels of floats and modulates a weight meanwhile (to W_eff, or ΔW);
 *   pack_tiles.h   packs and modulates in tiles of bfloat16;
 *   microkernel.h  multiplies panels by FMA, vdpbf16ps or AMX;
 *   epilogue.h     finishes rows of C: adds a bias or what was there and rounds once, or contracts them with A and B.
 *
 * Two files call it: product.h (y and dX) and gradient.h (dA and dB). Where rows or terms have another order, or
 * elements are dropped, `order_rows` copies them first.
 *
 * No function allocates memory. `smoa_about` alone keeps state. The order of a sum does not depend on the number of
 * threads, except in dA (in dB where W0 is stored by columns): each thread sums its own rows.
 */
#pragma once

#include "epilogue.h"

/* Starts threads of the OpenMP runtime that torch has loaded: a second pool would compete with it. Weak: NULL without
 * that runtime. */
void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));

/* The first item of a thread's share of `count` items; shares are multiples of `unit`. */
static i64 share_of(i64 count, i64 unit, i64 thread, i64 threads) {
    return least(count, ceil_div(count, unit) * thread / threads * unit);
}

typedef void share_function(void *job, i64 thread, i64 first, i64 end);

typedef struct {
    share_function *run;
    void *job;
    i64 count, unit, threads, next;
} team;

static void run_next(void *it) {
    team *t = it;
    i64 thread = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
    if (thread < t->threads)
        t->run(t->job, thread, share_of(t->count, t->unit, thread, t->threads),
               share_of(t->count, t->unit, thread + 1, t->threads));
}

/* Every thread runs its share of `count`. */
static void in_parallel(share_function *run, void *job, i64 count, i64 unit, i64 threads) {
    team t = {run, job, count, unit, threads, 0};
    if (threads > 1 && GOMP_parallel) GOMP_parallel(run_next, &t, (unsigned)threads, 0);
    while (__atomic_load_n(&t.next, __ATOMIC_RELAXED) < threads) run_next(&t); /* the runtime may start fewer threads */
}

/* Each thread's own part of the workspace: `bytes` for each from `base` on. */
static arena take_rooms(arena *a, i64 threads, i64 bytes) { return (arena){take(a, threads * bytes), bytes}; }

static arena room_of(const arena *rooms, i64 thread) {
    return (arena){rooms->base ? rooms->base + thread * rooms->bytes : NULL, 0};
}

/* Copies rows of a matrix, their elements in the order of an index, times dropout's mask: what is multiplied lies as it
 * is packed then. */
typedef struct {
    operand from;
    const i64 *rows, *index; /* NULL: all rows */
    const uint16_t *keep; /* or NULL; `words(width)` for a row */
    i64 width;
    char *to; /* (rows, width) */
} order_job;

static void order_rows(void *it, i64 thread, i64 row, i64 end) {
    const order_job *j = it;
    float line[KC];
    (void)thread;
    for (; row < end; row++)
        for (i64 c = 0, count; c < j->width; c += count) {
            const void *from = element_of(&j->from, j->rows ? j->rows[row] : row, 0);
            char *to = j->to + (row * j->width + c) * bytes_of(j->from.dtype);
            count = least(KC, j->width - c);
            if (!j->keep && j->from.dtype != FLOAT32) {
#pragma GCC unroll 8
                for (i64 i = 0; i < count; i++) ((half *)to)[i] = ((const half *)from)[j->index[c + i]];
                continue;
            }
            gather(from, j->from.dtype, j->index + c, count, j->keep ? j->keep + row * words(j->width) : NULL, line);
            for (i64 i = 0; i < count; i += LANES) narrow(to, i, count - i, load(line + i), j->from.dtype);
        }
}

/* The next `count` rows in that order: copied, if the job has where to. Moves on to the rows after them. */
static operand ordered(order_job *j, i64 count, i64 threads) {
    operand o = j->from;
    if (j->to) in_parallel(order_rows, j, count, 1, threads), o.data = j->to, o.stride = j->width;
    j->from.data = element_of(&j->from, count, 0);
    if (j->keep) j->keep += count * words(j->width);
    return o;
}

/* A matrix product C (+)= left rightᵀ + bias. */
typedef struct {
    int format;
    i64 depth, terms; /* all terms of a sum; terms that are summed in registers at a time */
    operand left, right;
    const adapter *adapter; /* of the right operand, or NULL */
    void *C;
    i64 stride;
    int dtype, add; /* dtype: of C */
    const void *bias; /* or NULL; in C's dtype */
} gemm_job;

/* Terms that are packed at a time: all if C is a half type, so that it is rounded once. */
static i64 packed_terms(const gemm_job *g) { return least(g->depth, g->dtype == FLOAT32 ? g->terms : g->depth); }

/* Multiplies packed operands. The operand with fewer rows is in the inner loop and stays in the L2 cache. */
static void multiply(const gemm_job *g, const float *left, const float *right, i64 depth, i64 i_count, i64 j_count) {
    _Alignas(64) float sums[PANEL * PANEL];
    int f = g->format, tall = f == FLOATS || i_count > j_count;
    i64 size = row_size(f, depth), high = left_height(f), wide = right_height(f);
    if (f != FLOATS && has_amx) use_tiles();
    for (i64 outer = 0; outer < (tall ? i_count : j_count); outer += tall ? high : wide)
        for (i64 inner = 0; inner < (tall ? j_count : i_count); inner += tall ? wide : high) {
            i64 i = tall ? outer : inner, j = tall ? inner : outer, rows = least(high, i_count - i),
                columns = least(wide, j_count - j);
            const float *l = left + i * size, *r = right + j * size;
            if (f == FLOATS)
                fma_panel(g->terms, depth, l, r, rows, sums);
            else
                tile_panel(f, depth, (const half *)l, (const half *)r, rows, sums);
            finish_rows(sums, PANEL, rows, columns, g->bias ? element(g->bias, j, g->dtype) : NULL, g->add,
                        (char *)g->C + (i * g->stride + j) * bytes_of(g->dtype), g->stride, g->dtype);
        }
    if (f != FLOATS && has_amx) release_tiles();
}

/* Bytes of a core's L2 cache: set by `smoa_about`. */
static i64 l2_cache;

/* Right rows that are packed together: they fit into the L2 cache. */
static i64 right_rows_of(int format, i64 terms) {
    i64 fit = l2_cache / (4 * greatest(1, row_size(format, terms)));
    return greatest(PANEL, least(2 * NC, fit / PANEL * PANEL));
}

/* The same of left rows; for each further group of rows the right operand is packed anew. */
static i64 left_rows_of(int format, i64 terms) {
    enum { FLOATS_AT_MOST = 1 << 21, ROWS_AT_LEAST = MR * 36 };
    i64 fit = FLOATS_AT_MOST / greatest(1, terms);
    return format == FLOATS ? least(MC, greatest(ROWS_AT_LEAST, fit / MR * MR)) : 2048;
}

typedef struct {
    float *left, *right, *scratch;
} packing_room;

/* Takes the packing buffers of a product with at most `left_count` rows on the left. */
static packing_room packing_room_of(arena *a, const gemm_job *g, i64 left_count) {
    i64 terms = packed_terms(g), size = row_size(g->format, terms), high = left_height(g->format);
    i64 left = round_up(least(left_rows_of(g->format, terms), left_count), high);
    return (packing_room){take(a, (left * size + SPILL) * 4),
                          take(a, (right_rows_of(g->format, terms) * size + SPILL) * 4),
                          take(a, g->format == SPLIT3 ? (NC * KC + SPILL) * 4 : 0)};
}

/* Multiplies some rows of the left operand by some of the right operand; C points to the product of the first two. */
static void gemm(const gemm_job *g, i64 i_first, i64 i_count, i64 j_first, i64 j_count, arena workspace) {
    int f = g->format;
    i64 kc = greatest(1, packed_terms(g)), left_rows = left_rows_of(f, kc), right_rows = right_rows_of(f, kc);
    packing_room room = packing_room_of(&workspace, g, i_count);
    for (i64 i = 0; i < i_count; i += left_rows) {
        i64 height = least(left_rows, i_count - i), k = 0;
        do {
            i64 deep = least(kc, g->depth - k);
            pack_left(f, &g->left, i_first + i, height, k, deep, room.left, room.scratch);
            for (i64 j = 0; j < j_count; j += right_rows) {
                i64 width = least(right_rows, j_count - j);
                gemm_job part = *g;
                part.C = (char *)g->C + (i * g->stride + j) * bytes_of(g->dtype), part.add = g->add || k > 0;
                part.bias = g->bias && k + deep == g->depth ? element(g->bias, j, g->dtype) : NULL;
                pack_right(f, &g->right, g->adapter, j_first + j, width, k, deep, room.right, room.scratch);
                multiply(&part, room.left, room.right, deep, height, width);
            }
            k += kc;
        } while (k < g->depth);
    }
}
