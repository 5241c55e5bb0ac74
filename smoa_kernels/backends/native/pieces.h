/* Coordinates of a block in a row of numbers: read side by side, or written where they belong.
 *
 * A block of a few has several in every cache line. With AVX-512 those of one line are moved together; with AVX2 eight
 * that are neighbours, which blocks of granules have.
 */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef int64_t i64;

static i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* In whole units. */
static i64 whole(i64 count, i64 unit) { return (count + unit - 1) / unit * unit; }

/* Floats in whole cache lines. */
static i64 lines(i64 count) { return (count + 15) / 16 * 16; }

/* The first whole cache line. */
static float *from_a_line(float *p) { return p + (16 - (uintptr_t)p / 4 % 16) % 16; }

/* 16-bit words that hold a bit for each of so many. */
static i64 words(i64 count) { return (count + 15) / 16; }

enum { PIECE = 16, RUN = 8 };

/* Of PIECE floats (or more of a smaller type) from `at`, those that `taken` has a bit for: the coordinates of a block that lie
 * there. With AVX2 all of so many as `taken` says. */
typedef struct {
    i64 at, taken;
} piece;

/* The coordinates index[0] to index[count - 1] as pieces of `size`, of which there are no more than coordinates; 0 where reading
 * one at a time is as fast: they lie too far apart, or with AVX2 are not neighbours, all but the last in runs of RUN. */
static i64 pieces_of(const i64 *index, i64 count, i64 size, piece *pieces) {
#if VECTOR_BYTES == 64
    i64 some = 0, last = -1;
    for (i64 i = 0; i < count; last = index[i++]) {
        i64 at = index[i] / size * size, bit = (i64)1 << index[i] % size;
        if (some && index[i] > last && pieces[some - 1].at == at)
            pieces[some - 1].taken |= bit;
        else if (3 * some < count)
            pieces[some++] = (piece){at, bit};
        else
            return 0;
    }
    return some;
#else
    i64 some = 0;
    (void)size;
    for (i64 i = 0; i < count; i += RUN) {
        i64 there = least(RUN, count - i);
        for (i64 c = 1; c < there; c++)
            if (index[i + c] != index[i] + c) return 0;
        pieces[some++] = (piece){index[i], there};
    }
    return some;
#endif
}

/* 1, or 0 for what is dropped: a factor, so that NaN and Inf are seen there too. */
static inline float kept(const uint16_t *keep, i64 at) { return (float)(keep[at / PIECE] >> at % PIECE & 1); }

/* out = the values at `count` coordinates, 0 for what `keep` lacks, by their pieces where there are; up to PIECE floats
 * more are written. */
INLINE void gather(const float *from, const i64 *index, i64 count, const piece *pieces, i64 some, const uint16_t *keep,
                   float *out) {
#if VECTOR_BYTES == 64
    for (i64 i = 0; i < some; i++) { /* masked: what is not taken may lie beyond the matrix */
        __mmask16 taken = (__mmask16)pieces[i].taken;
        __m512 found = _mm512_maskz_loadu_ps(taken, from + pieces[i].at);
        if (keep) found = _mm512_mul_ps(found, _mm512_maskz_mov_ps(keep[pieces[i].at / PIECE], _mm512_set1_ps(1)));
        _mm512_storeu_ps(out, _mm512_maskz_compress_ps(taken, found));
        out += __builtin_popcountll((unsigned long long)taken);
    }
#else
    for (i64 i = 0; i < some; i++, out += RUN) { /* the last may end where the matrix does */
        const float *run = from + pieces[i].at;
        if (!keep && pieces[i].taken == RUN)
            memcpy(out, run, RUN * sizeof *out);
        else
            for (i64 c = 0; c < pieces[i].taken; c++) out[c] = keep ? run[c] * kept(keep, pieces[i].at + c) : run[c];
    }
#endif
    if (!some)
        for (i64 i = 0; i < count; i++) out[i] = keep ? from[index[i]] * kept(keep, index[i]) : from[index[i]];
}

/* The values at `count` coordinates of `to` = from, of which up to PIECE floats more are read, 0 for what `keep` lacks. */
INLINE void scatter(const float *from, const i64 *index, i64 count, const piece *pieces, i64 some, const uint16_t *keep,
                    float *to) {
#if VECTOR_BYTES == 64
    for (i64 i = 0; i < some; i++) {
        __mmask16 taken = (__mmask16)pieces[i].taken;
        __m512 found = _mm512_maskz_expand_ps(taken, _mm512_loadu_ps(from));
        if (keep) found = _mm512_mul_ps(found, _mm512_maskz_mov_ps(keep[pieces[i].at / PIECE], _mm512_set1_ps(1)));
        _mm512_mask_storeu_ps(to + pieces[i].at, taken, found);
        from += __builtin_popcountll((unsigned long long)taken);
    }
#else
    for (i64 i = 0; i < some; i++, from += RUN) {
        float *run = to + pieces[i].at;
        if (!keep && pieces[i].taken == RUN)
            memcpy(run, from, RUN * sizeof *run);
        else
            for (i64 c = 0; c < pieces[i].taken; c++) run[c] = keep ? from[c] * kept(keep, pieces[i].at + c) : from[c];
    }
#endif
    if (!some)
        for (i64 i = 0; i < count; i++) to[index[i]] = keep ? from[i] * kept(keep, index[i]) : from[i];
}

/* Floats that the pieces of so many columns take. */
static i64 pieces_size(i64 count) { return lines(count * (i64)(sizeof(piece) / sizeof(float))); }
