/* The AVX-512, AVX512-BF16 and AMX instructions that `backends/native` uses, in plain C.
 *
 * The compiler finds this header before its own <immintrin.h>, so code for these processors runs on any processor with AVX2.
 * The program stops where a processor would fault. The order of sums and the treatment of underflow follow Intel's Software
 * Developer's Manual, volume 2.
 */
#pragma once

/* The compiler's headers for AVX2 may be included directly only if one of these is defined. */
#define _IMMINTRIN_H_INCLUDED /* GCC */
#define __IMMINTRIN_H         /* clang */
#include <smmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <f16cintrin.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* `target` attributes are ignored. */
#define target(...)

#define EMULATED static inline
#define LINE(type) __attribute__((vector_size(64), may_alias)) type

typedef LINE(float) __m512;
typedef LINE(long long) __m512i;
typedef LINE(short) __m512bh;
typedef LINE(int32_t) ints_;
typedef LINE(uint32_t) words_;
typedef LINE(uint16_t) halves_;
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

/* For each element i of a vector (a "line"): `EACH(16, to[i] = from[i])`. */
#define EACH(count, statement) for (int i = 0; i < count; i++) statement

EMULATED void must_(int holds, const char *what) {
    if (__builtin_expect(!holds, 0)) fprintf(stderr, "emulated processor: %s\n", what), abort();
}

EMULATED void aligned_(const void *at) { must_((uintptr_t)at % 64 == 0, "a line does not begin at a multiple of 64 bytes"); }

/* Memory. Masked-out elements are not touched. */
EMULATED __m512i _mm512_loadu_si512(const void *from) {
    __m512i line;
    memcpy(&line, from, sizeof line);
    return line;
}
EMULATED __m512 _mm512_loadu_ps(const void *from) { return (__m512)_mm512_loadu_si512(from); }
EMULATED __m512i _mm512_load_si512(const void *from) { return aligned_(from), _mm512_loadu_si512(from); }
EMULATED __m512 _mm512_load_ps(const void *from) { return aligned_(from), _mm512_loadu_ps(from); }
EMULATED void _mm512_storeu_si512(void *to, __m512i line) { memcpy(to, &line, sizeof line); }
EMULATED void _mm512_storeu_ps(void *to, __m512 line) { memcpy(to, &line, sizeof line); }
EMULATED void _mm512_store_si512(void *to, __m512i line) { aligned_(to), _mm512_storeu_si512(to, line); }
EMULATED void _mm512_store_ps(void *to, __m512 line) { aligned_(to), _mm512_storeu_ps(to, line); }

EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void *from) {
    if (mask == UINT32_MAX) return _mm512_loadu_si512(from);
    halves_ line = {0};
    EACH(32, if (mask >> i & 1) memcpy((uint16_t *)&line + i, (const uint16_t *)from + i, 2));
    return (__m512i)line;
}
EMULATED void _mm512_mask_storeu_epi16(void *to, __mmask32 mask, __m512i line) {
    EACH(32, if (mask >> i & 1) memcpy((uint16_t *)to + i, (uint16_t *)&line + i, 2));
}

/* Broadcasts, and arithmetic element by element. */
EMULATED __m512i _mm512_setzero_si512(void) { return (__m512i){0}; }
EMULATED __m512 _mm512_setzero_ps(void) { return (__m512){0}; }
EMULATED __m512 _mm512_set1_ps(float value) { return value - (__m512){0}; }
EMULATED __m512i _mm512_set1_epi32(int value) { return (__m512i)(value - (ints_){0}); }
EMULATED __m512i _mm512_set1_epi64(long long value) { return value - (__m512i){0}; }
EMULATED __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
    __m512i line;
    EACH(8, line[i] = (long long)((uint64_t)(uint32_t)a[i] * (uint32_t)b[i]));
    return line;
}
EMULATED __m512i _mm512_set1_epi16(short value) { return (__m512i)((uint16_t)value - (halves_){0}); }
EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((words_)a + (words_)b); }
EMULATED __m512i _mm512_add_epi16(__m512i a, __m512i b) { return (__m512i)((halves_)a + (halves_)b); }
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned by) { return (__m512i)((words_)a << by); }

EMULATED float _mm512_reduce_add_ps(__m512 v) {
    for (int half = 8; half; half /= 2) EACH(half, v[i] += v[i + half]);
    return v[0];
}

/* Masks. */
EMULATED __mmask32 _mm512_mask_cmpeq_epi16_mask(__mmask32 own, __m512i a, __m512i b) {
    __mmask32 mask = 0;
    EACH(32, mask |= (__mmask32)(((halves_)a)[i] == ((halves_)b)[i]) << i);
    return mask & own;
}
EMULATED __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
    __mmask16 mask = 0;
    EACH(16, mask |= (__mmask16)((((ints_)a)[i] == ((ints_)b)[i]) << i));
    return mask;
}
EMULATED __m512i _mm512_mask_mov_epi32(__m512i without, __mmask16 mask, __m512i with) {
    ints_ line;
    EACH(16, line[i] = mask >> i & 1 ? ((ints_)with)[i] : ((ints_)without)[i]);
    return (__m512i)line;
}
EMULATED __m512i _mm512_mask_mov_epi16(__m512i without, __mmask32 mask, __m512i with) {
    halves_ line;
    EACH(32, line[i] = mask >> i & 1 ? ((halves_)with)[i] : ((halves_)without)[i]);
    return (__m512i)line;
}
EMULATED __m512i _mm512_maskz_mov_epi16(__mmask32 mask, __m512i a) {
    return _mm512_mask_mov_epi16(_mm512_setzero_si512(), mask, a);
}

/* Permutations. */
EMULATED __m512i _mm512_permutex2var_epi16(__m512i a, __m512i order, __m512i b) {
    halves_ line;
    EACH(32, line[i] = ((halves_)(((halves_)order)[i] & 32 ? b : a))[((halves_)order)[i] & 31]);
    return (__m512i)line;
}
/* Interleaves a and b: the lower or the upper half of each 128-bit lane. */
EMULATED __m512i unpacked_(__m512i a, __m512i b, int size, int upper) {
    __m512i line;
    for (int at = 0; at < 64; at += size) {
        int quarter = at / 16 * 16, n = at % 16 / size;
        const char *from = (const char *)(n % 2 ? &b : &a) + quarter + upper * 8 + n / 2 * size;
        memcpy((char *)&line + at, from, (size_t)size);
    }
    return line;
}
EMULATED __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return unpacked_(a, b, 2, 0); }
EMULATED __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return unpacked_(a, b, 2, 1); }
EMULATED __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpacked_(a, b, 4, 0); }
EMULATED __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpacked_(a, b, 4, 1); }
EMULATED __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpacked_(a, b, 8, 0); }
EMULATED __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpacked_(a, b, 8, 1); }
EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {
    __m512i line;
    EACH(4, memcpy((char *)&line + 16 * i, (const char *)(i < 2 ? &a : &b) + 16 * (order >> 2 * i & 3), 16));
    return line;
}
EMULATED __m256i _mm512_extracti64x4_epi64(__m512i a, int upper) {
    __m256i part;
    memcpy(&part, (const char *)&a + 32 * upper, sizeof part);
    return part;
}

/* Half types. */
EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
    ints_ line;
    uint16_t part[16];
    memcpy(part, &a, sizeof part);
    EACH(16, line[i] = part[i]);
    return (__m512i)line;
}
EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
    uint16_t part[16];
    EACH(16, part[i] = (uint16_t)((ints_)a)[i]);
    return _mm256_loadu_si256((const __m256i *)part);
}
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
    __m256 part[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
    return _mm512_loadu_ps(part);
}
EMULATED __m256i _mm512_cvtps_ph(__m512 a, int how) {
    must_(how == _MM_FROUND_TO_NEAREST_INT, "of roundings there is only the one to the nearest");
    __m256 part[2];
    memcpy(part, &a, sizeof part);
    return _mm256_setr_m128i(_mm256_cvtps_ph(part[0], 0), _mm256_cvtps_ph(part[1], 0));
}

/* bfloat16. Subnormal numbers count as 0, both read and written. */
EMULATED __m512 normal_(__m512 a) {
    words_ size = (words_)a & 0x7fffffff;
    return (__m512)((words_)a & ((words_)(size >= 0x800000) | 0x80000000));
}
EMULATED __m512 even_(__m512i pairs) { return normal_((__m512)((words_)pairs << 16)); }
EMULATED __m512 odd_(__m512i pairs) { return normal_((__m512)((words_)pairs & 0xffff0000)); }

EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    sum = normal_(normal_(sum) + odd_((__m512i)a) * odd_((__m512i)b));
    return normal_(sum + even_((__m512i)a) * even_((__m512i)b));
}
EMULATED words_ rounded_(__m512 a) {
    words_ bits = (words_)normal_(a), up = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, none = (words_)(a != a);
    return (up & ~none) | ((bits >> 16 | 0x40) & none);
}
EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 upper, __m512 lower) {
    __m256i part[2] = {_mm512_cvtepi32_epi16((__m512i)rounded_(lower)), _mm512_cvtepi32_epi16((__m512i)rounded_(upper))};
    return (__m512bh)_mm512_loadu_si512(part);
}

/* AMX: eight tiles per thread. The thread sets the rows, and the bytes of a row, of each tile. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_sizes_;
static __thread tile_sizes_ sizes_; /* palette 0: no tile may be used */
static __thread __m512i tiles_[8][16];

EMULATED void _tile_loadconfig(const void *from) {
    memcpy(&sizes_, from, sizeof sizes_), memset(tiles_, 0, sizeof tiles_);
    EACH(8, must_(sizes_.rows[i] <= 16 && sizes_.bytes[i] <= 64 && sizes_.bytes[i] % 4 == 0, "a size that no tile has"));
}
EMULATED void _tile_release(void) { memset(&sizes_, 0, sizeof sizes_); }
EMULATED __m512i *tile_(int t) { return must_(sizes_.palette == 1 && sizes_.rows[t], "a tile that has no size"), tiles_[t]; }
EMULATED void _tile_zero(int t) { memset(tile_(t), 0, sizeof tiles_[t]); }
EMULATED void _tile_loadd(int t, const void *from, long stride) {
    _tile_zero(t);
    EACH(sizes_.rows[t], memcpy(&tiles_[t][i], (const char *)from + i * stride, sizes_.bytes[t]));
}
EMULATED void _tile_stored(int t, void *to, long stride) {
    const __m512i *tile = tile_(t);
    EACH(sizes_.rows[t], memcpy((char *)to + i * stride, &tile[i], sizes_.bytes[t]));
}
/* Sums even and odd products apart, then adds both to the tile. Meanwhile the processor flushes subnormal numbers to 0. */
static __attribute__((noinline, optimize("O3"))) void multiply_tiles_(__m512i *sums, const __m512i *left,
                                                                      const __m512i *right, int rows, int pairs) {
    enum { FLUSHES = 0x8040 };
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | FLUSHES);
    __asm__ volatile("" ::: "memory");
    __m512 evens[16], odds[16];
    EACH(pairs, (evens[i] = even_(right[i]), odds[i] = odd_(right[i])));
    for (int m = 0; m < rows; m++) {
        __m512 even = {0}, odd = {0};
        for (int k = 0; k < pairs; k++) {
            uint32_t pair = ((words_)left[m])[k];
            even += (__m512)(pair << 16 | (words_){0}) * evens[k];
            odd += (__m512)((pair & 0xffff0000) | (words_){0}) * odds[k];
        }
        sums[m] = (__m512i)((__m512)sums[m] + (even + odd));
    }
    __asm__ volatile("" ::: "memory");
    _mm_setcsr(before);
}
EMULATED void _tile_dpbf16ps(int sums, int left, int right) {
    must_(sums != left && sums != right && left != right, "one tile twice in a product");
    must_(sizes_.rows[left] == sizes_.rows[sums] && sizes_.bytes[right] == sizes_.bytes[sums] &&
              sizes_.bytes[left] == 4 * sizes_.rows[right],
          "tiles whose sizes do not fit");
    multiply_tiles_(tile_(sums), tile_(left), tile_(right), sizes_.rows[sums], sizes_.rows[right]);
}
