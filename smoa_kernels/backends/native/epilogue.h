/* Epilogues of a finished piece of C. Of every product: add what was there and a bias, and round once. For dA and dB,
 * where C is rows of a block's G = dYᵀ x: make H = s G ∘ W0 and contract it with the factors, dA += Bᵀ H, dB += H Aᵀ.
 */
#pragma once

#include "pack_tiles.h"

enum { ROWS_BELOW = 6 };

/* C (+)= sums + bias for some rows of float32 sums; the bias may be NULL. Each number is rounded once. */
INLINE void finish_as(int dtype, const float *sums, i64 stride, i64 count, i64 cols, const void *bias, int add, void *C,
                      i64 C_stride) {
    for (i64 t = 0; t < count; t++)
        for (i64 c = 0; c < cols; c += LANES) {
            void *to = (char *)C + (t * C_stride + c) * bytes_of(dtype);
            vf value = widen(sums + t * stride, c, cols - c, FLOAT32);
            __builtin_prefetch((char *)to + ROWS_BELOW * C_stride * bytes_of(dtype), 1); /* it has left the cache */
            if (add) value += widen(to, 0, cols - c, dtype);
            if (bias) value += widen(bias, c, cols - c, dtype);
            narrow(to, 0, cols - c, value, dtype);
        }
}

static __attribute__((noinline)) void finish_rows(const float *sums, i64 stride, i64 count, i64 cols, const void *bias,
                                                  int add, void *C, i64 C_stride, int dtype) {
    if (dtype == FLOAT32)
        finish_as(FLOAT32, sums, stride, count, cols, bias, add, C, C_stride);
    else
        finish_as(dtype, sums, stride, count, cols, bias, add, C, C_stride);
}

enum {
    GROUP = 16, /* rows of H that are contracted together */
    DOTS = REGISTERS / 2, /* sums that registers hold */
    RANKS = 4,
};

/* Overwrites a row of G with H = scale G ∘ W0, and with 0 from `width` to a multiple of PANEL. */
INLINE void make_H(float *G, const void *W0, int dtype, float scale, i64 width) {
    i64 c = 0;
    for (; c < width; c += LANES)
        store(G + c, widen(G, c, width - c, FLOAT32) * (scale * widen(W0, c, width - c, dtype)));
    for (; c < round_up(width, PANEL); c += LANES) store(G + c, (vf){0});
}

/* dB (rank, rows) += H Aᵀ for GROUP rows and up to RANKS of the `rank` ranks that are left, DOTS sums at a time. */
INLINE void add_dB(i64 rank, const float *H, i64 columns, const float *A, i64 A_stride, float *dB, i64 dB_stride) {
    const int rows = DOTS / RANKS;
    for (i64 top = 0; top < GROUP; top += rows, H += rows * columns) {
        vf sum[DOTS] = {{0}};
        for (i64 c = 0; c < columns; c += LANES) {
            vf a[RANKS];
#pragma GCC unroll 4
            for (int r = 0; r < RANKS; r++) a[r] = load(A + least(r, rank - 1) * A_stride + c);
#pragma GCC unroll 16
            for (int n = 0; n < DOTS; n++) sum[n] += a[n % RANKS] * load(H + n / RANKS * columns + c);
        }
        for (int n = 0; n < DOTS; n++)
            if (n % RANKS < rank) dB[n % RANKS * dB_stride + top + n / RANKS] += total(sum[n]);
    }
}

/* dA (rank, columns) += Bᵀ H for GROUP rows and up to RANKS of the `rank` ranks that are left. */
INLINE void add_dA(i64 rank, const float *H, i64 columns, const float *B, i64 B_stride, float *dA, i64 dA_stride) {
    for (i64 c = 0; c < columns; c += 2 * LANES) {
        vf sum[RANKS][2] = {{{0}}};
        for (int i = 0; i < GROUP; i++) {
            vf low = load(H + i * columns + c), high = load(H + i * columns + c + LANES);
#pragma GCC unroll 4
            for (int r = 0; r < RANKS; r++) {
                float b = B[least(r, rank - 1) * B_stride + i];
                sum[r][0] += low * b;
                sum[r][1] += high * b;
            }
        }
        for (int r = 0; r < least(RANKS, rank); r++) {
            float *to = dA + r * dA_stride + c;
            store(to, load(to) + sum[r][0]);
            store(to + LANES, load(to + LANES) + sum[r][1]);
        }
    }
}

/* dA += Bᵀ H and dB += H Aᵀ for GROUP rows: H (GROUP, columns), with columns a multiple of PANEL. */
static __attribute__((noinline)) void contract(i64 rank, const float *H, i64 columns, const float *A, i64 A_stride,
                                               const float *B, i64 B_stride, float *dA, i64 dA_stride, float *dB,
                                               i64 dB_stride) {
    for (i64 t = 0; t < rank; t += RANKS) {
        add_dB(rank - t, H, columns, A + t * A_stride, A_stride, dB + t * dB_stride, dB_stride);
        add_dA(rank - t, H, columns, B + t * B_stride, B_stride, dA + t * dA_stride, dA_stride);
    }
}
