/* Dropout masks: a bit for each element, from the very numbers that torch's generator draws on a CPU (definition/dropout.py).
 *
 * That is the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998). Made a whole state at a time its steps are loops over
 * vectors; torch makes one number after another.
 */
#pragma once

#include "pieces.h"

enum { STATE = 624, DISTANCE = 397, LEVELS = 4 /* of 16 bits in each 64 that torch draws */ };

typedef struct {
    uint32_t state[STATE];
    uint64_t drawn[STATE / 2];
    i64 next; /* of `drawn` */
} twister;

static void seed_twister(twister *t, uint32_t seed) {
    t->state[0] = seed, t->next = STATE / 2;
    for (uint32_t i = 1; i < STATE; i++) {
        uint32_t last = t->state[i - 1];
        t->state[i] = 1812433253u * (last ^ last >> 30) + i;
    }
}

static inline uint32_t twisted(uint32_t here, uint32_t next, uint32_t far) {
    uint32_t both = (here & 0x80000000u) | (next & 0x7fffffffu);
    return far ^ both >> 1 ^ (-(next & 1) & 0x9908b0dfu);
}

/* The next STATE numbers, two of which are one of 64 bits: the first its upper half. */
static __attribute__((noinline)) void twist(twister *t) {
    uint32_t *s = t->state, tempered[STATE];
    for (i64 i = 0; i < STATE - DISTANCE; i++) s[i] = twisted(s[i], s[i + 1], s[i + DISTANCE]);
    for (i64 i = STATE - DISTANCE; i < STATE - 1; i++) s[i] = twisted(s[i], s[i + 1], s[i + DISTANCE - STATE]);
    s[STATE - 1] = twisted(s[STATE - 1], s[0], s[DISTANCE - 1]);
    for (i64 i = 0; i < STATE; i++) {
        uint32_t y = s[i];
        y ^= y >> 11;
        y ^= y << 7 & 0x9d2c5680u;
        y ^= y << 15 & 0xefc60000u;
        tempered[i] = y ^ y >> 18;
    }
    memcpy(t->drawn, tempered, sizeof tempered);
    for (i64 i = 0; i < STATE / 2; i++) t->drawn[i] = t->drawn[i] << 32 | t->drawn[i] >> 32;
    t->next = 0;
}

/* Bits of PIECE levels that are `least_kept` or above. */
static inline uint16_t kept_bits(const int16_t *levels, int16_t least_kept) {
    __m256i dropped = _mm256_cmpgt_epi16(_mm256_set1_epi16(least_kept), _mm256_loadu_si256((const void *)levels));
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(dropped), _mm256_extracti128_si256(dropped, 1));
    return (uint16_t)~_mm_movemask_epi8(bytes);
}

/* keep (tokens, words(cols)): for each token `drawn` numbers are drawn, whose levels from `first` on are the columns'. A bit is
 * set where a level is `least_kept` or above. `line` has room for a token's levels and PIECE more. */
void smoa_mask(i64 tokens, i64 cols, i64 first, i64 drawn, i64 seed, i64 least_kept, int16_t *line, uint16_t *keep) {
    twister t;
    seed_twister(&t, (uint32_t)seed);
    for (i64 token = 0; token < tokens; token++) {
        for (i64 at = 0; at < drawn;) {
            if (t.next == STATE / 2) twist(&t);
            i64 some = least(STATE / 2 - t.next, drawn - at);
            memcpy(line + LEVELS * at, t.drawn + t.next, (size_t)some * sizeof *t.drawn);
            at += some, t.next += some;
        }
        for (i64 c = 0; c < cols; c += PIECE) {
            uint16_t bits = kept_bits(line + first + c, (int16_t)least_kept);
            *keep++ = cols - c < PIECE ? (uint16_t)(bits & ((1 << (cols - c)) - 1)) : bits;
        }
    }
}
