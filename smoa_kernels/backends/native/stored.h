/* Numbers as they are stored: float32, bfloat16 or float16. They are read as float32 and rounded once, to the nearest,
 * where they are written; columns of half types that are put in another order are moved as they are. */
#pragma once

#include <string.h>

#include "pieces.h"

typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));

enum { LANES = VECTOR_BYTES / 4 };

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* So many rows of a contiguous block before it reads them a pass asks the memory for them: each is a short run. */
enum { ROWS_AHEAD = 16 };

typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));

/* CALL(stored) with a kind that the compiler knows. */
#define WITH_KIND(stored, CALL)                  \
    switch (stored) {                            \
        case FLOAT32: CALL(FLOAT32); break;      \
        case BFLOAT16: CALL(BFLOAT16); break;    \
        case FLOAT16: CALL(FLOAT16); break;      \
    }

static inline vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

static inline i64 bytes_of(int stored) { return stored == FLOAT32 ? 4 : 2; }

static inline const void *number(const void *from, i64 at, int stored) {
    return (const char *)from + at * bytes_of(stored);
}

/* One of them, number `at`. */
static inline float one_of(const void *from, i64 at, int stored) {
    if (stored == FLOAT32) return ((const float *)from)[at];
    uint16_t half = ((const uint16_t *)from)[at];
    if (stored == FLOAT16) return _cvtsh_ss(half);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* to[at] = from[index], as they are stored. */
static inline void copy_number(void *to, i64 at, const void *from, i64 index, int stored) {
    memcpy((char *)to + at * bytes_of(stored), number(from, index, stored), (size_t)bytes_of(stored));
}

/* `yes` where a label is k, else `no`. */
INLINE vf chosen(vi labels, int32_t k, vf yes, vf no) {
#if VECTOR_BYTES == 64
    return (vf)_mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask((__m512i)labels, _mm512_set1_epi32(k)), (__m512)no, (__m512)yes);
#else
    return (vf)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)(labels == k));
#endif
}

/* In the upper half of each lane as bfloat16; what is no number stays none. */
INLINE vu rounded(vf value) {
    vu bits = (vu)value, up = bits + 0x7fff + (bits >> 16 & 1);
#if VECTOR_BYTES == 64
    __mmask16 none = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
    return (vu)_mm512_mask_or_epi32((__m512i)up, none, (__m512i)bits, _mm512_set1_epi32(0x7fc00000));
#else
    return (vu)_mm256_blendv_ps((__m256)(bits | 0x7fc00000), (__m256)up, (__m256)(value == value));
#endif
}

INLINE vf all_widened(const void *from, int stored) {
    if (stored == FLOAT32) return load(from);
#if VECTOR_BYTES == 64
    __m256i found = _mm256_loadu_si256(from);
    return stored == FLOAT16 ? (vf)_mm512_cvtph_ps(found) : (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(found), 16);
#else
    __m128i found = _mm_loadu_si128(from);
    return stored == FLOAT16 ? (vf)_mm256_cvtph_ps(found) : (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(found), 16);
#endif
}

/* LANES numbers from number `at` on, of which `there` are there: more are not read, but 0. */
INLINE vf widened(const void *from, i64 at, i64 there, int stored) {
    if (there >= LANES) return all_widened(number(from, at, stored), stored);
    float some[LANES] = {0};
    memcpy(some, number(from, at, stored), (size_t)(there * bytes_of(stored)));
    return all_widened(some, stored);
}

INLINE void all_narrowed(void *to, vf value, int stored) {
    vu upper = rounded(value) >> 16;
#if VECTOR_BYTES == 64
    if (stored == BFLOAT16) _mm256_storeu_si256(to, _mm512_cvtepi32_epi16((__m512i)upper));
    if (stored == FLOAT16) _mm256_storeu_si256(to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#else
    __m128i low = _mm256_castsi256_si128((__m256i)upper), high = _mm256_extracti128_si256((__m256i)upper, 1);
    if (stored == BFLOAT16) _mm_storeu_si128(to, _mm_packus_epi32(low, high));
    if (stored == FLOAT16) _mm_storeu_si128(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#endif
    if (stored == FLOAT32) store(to, value);
}

/* The first `there` of LANES numbers, from number `at` on. */
INLINE void narrow(void *to, i64 at, i64 there, vf value, int stored) {
    char *first = (char *)to + at * bytes_of(stored), some[VECTOR_BYTES];
    all_narrowed(there >= LANES ? first : some, value, stored);
    if (there < LANES) memcpy(first, some, (size_t)(there * bytes_of(stored)));
}

static __attribute__((noinline)) void widen(const void *from, i64 count, int stored, float *to) {
    for (i64 c = 0; c < count; c += LANES) {
        i64 there = count - c;
        vf value = stored == BFLOAT16 ? widened(from, c, there, BFLOAT16) : widened(from, c, there, FLOAT16);
        narrow(to, c, there, value, FLOAT32);
    }
}

/* Where a processor moves 16-bit numbers of one cache line together, HALF_PIECE of them are looked at at a time. */
enum { HALF_PIECE = 32 };

static inline uint16_t exponent_of(int stored) { return stored == BFLOAT16 ? 0x7f80 : 0x7c00; }

/* A number, or where `keep` has no bit for it 0: of what is not finite NaN, as 0 times it is. */
static inline uint16_t kept_half(uint16_t value, const uint16_t *keep, i64 at, uint16_t exponent) {
    if (!keep || keep[at / 16] >> at % 16 & 1) return value;
    return (value & exponent) == exponent ? 0x7fff : 0;
}

#if VECTOR_BYTES == 64
#define MOVES_HALVES __attribute__((target("avx512vbmi2")))

static int moves_halves(void) { return __builtin_cpu_supports("avx512vbmi2"); }

/* The same of HALF_PIECE numbers; the next word of `keep` is read, whatever it is. */
MOVES_HALVES static inline __m512i kept_halves(__m512i values, const uint16_t *keep, i64 at, uint16_t exponent) {
    uint32_t kept;
    memcpy(&kept, keep + at / 16, sizeof kept);
    __m512i all = _mm512_set1_epi16((short)exponent);
    __mmask32 lost = _mm512_mask_cmpeq_epi16_mask(~kept, _mm512_and_si512(values, all), all);
    return _mm512_mask_mov_epi16(_mm512_maskz_mov_epi16(kept, values), lost, _mm512_set1_epi16(0x7fff));
}

static inline __mmask32 first_of(i64 count) {
    return count < HALF_PIECE ? ((__mmask32)1 << count) - 1 : ~(__mmask32)0;
}

MOVES_HALVES static void gather_pieces(const uint16_t *from, i64 count, const piece *pieces, i64 some,
                                       const uint16_t *keep, uint16_t exponent, uint16_t *out) {
    for (i64 i = 0; i < some; i++) {
        __mmask32 taken = (__mmask32)pieces[i].taken;
        __m512i found = _mm512_maskz_loadu_epi16(taken, from + pieces[i].at);
        if (keep) found = kept_halves(found, keep, pieces[i].at, exponent);
        found = _mm512_maskz_compress_epi16(taken, found);
        if (count >= HALF_PIECE)
            _mm512_storeu_si512(out, found); /* what is too much is overwritten */
        else
            _mm512_mask_storeu_epi16(out, first_of(count), found);
        i64 moved = __builtin_popcountll((unsigned long long)taken);
        out += moved, count -= moved;
    }
}

MOVES_HALVES static void scatter_pieces(const uint16_t *from, i64 count, const piece *pieces, i64 some,
                                        const uint16_t *keep, uint16_t exponent, uint16_t *to) {
    for (i64 i = 0; i < some; i++) {
        __mmask32 taken = (__mmask32)pieces[i].taken;
        __m512i found = _mm512_maskz_loadu_epi16(first_of(count), from);
        found = _mm512_maskz_expand_epi16(taken, found);
        if (keep) found = kept_halves(found, keep, pieces[i].at, exponent);
        _mm512_mask_storeu_epi16(to + pieces[i].at, taken, found);
        i64 moved = __builtin_popcountll((unsigned long long)taken);
        from += moved, count -= moved;
    }
}
#else
static int moves_halves(void) { return 0; }
#define gather_pieces(from, count, pieces, ...) ((void)(pieces))
#define scatter_pieces(from, count, pieces, ...) ((void)(pieces))
#endif

/* Coordinates as pieces of HALF_PIECE numbers; 0 where they are moved one by one. */
static i64 half_pieces_of(const i64 *index, i64 count, piece *pieces) {
    return moves_halves() ? pieces_of(index, count, HALF_PIECE, pieces) : 0;
}

/* As `gather` of pieces.h; beyond the last number nothing is written. */
static void gather_halves(const uint16_t *from, const i64 *index, i64 count, const piece *pieces, i64 some,
                          const uint16_t *keep, uint16_t exponent, uint16_t *out) {
    if (some)
        gather_pieces(from, count, pieces, some, keep, exponent, out);
    else
        for (i64 i = 0; i < count; i++) out[i] = kept_half(from[index[i]], keep, index[i], exponent);
}

/* As `scatter` of pieces.h. */
static void scatter_halves(const uint16_t *from, const i64 *index, i64 count, const piece *pieces, i64 some,
                           const uint16_t *keep, uint16_t exponent, uint16_t *to) {
    if (some)
        scatter_pieces(from, count, pieces, some, keep, exponent, to);
    else
        for (i64 i = 0; i < count; i++) to[index[i]] = kept_half(from[i], keep, index[i], exponent);
}

/* Coordinates of one row of a weight, as they are stored; `pieces` of floats, or of half types. */
INLINE void gather_stored(const void *from, const i64 *index, i64 count, const piece *pieces, i64 some, int stored,
                          void *out) {
    if (stored == FLOAT32)
        gather(from, index, count, pieces, some, NULL, out);
    else
        gather_halves(from, index, count, pieces, some, NULL, 0, out);
}

/* The same of any row, some dropped, as floats: up to PIECE more are written. Halves are put in order in the upper half of
 * what they become: each vector of them is read before it is written over. */
INLINE void gather_floats(const void *from, const i64 *index, i64 count, const piece *pieces, i64 some,
                          const uint16_t *keep, int stored, float *out) {
    if (stored == FLOAT32) {
        gather(from, index, count, pieces, some, keep, out);
        return;
    }
    uint16_t *ordered = (uint16_t *)out + count;
    gather_halves(from, index, count, pieces, some, keep, exponent_of(stored), ordered);
    widen(ordered, count, stored, out);
}

static i64 stored_pieces_of(const i64 *index, i64 count, int stored, piece *pieces) {
    return stored == FLOAT32 ? pieces_of(index, count, PIECE, pieces) : half_pieces_of(index, count, pieces);
}
