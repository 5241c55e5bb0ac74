/* What the emulated instructions must do, and with a letter what they must find (test_instructions.py). */
#include <immintrin.h>

#include <math.h>
#include <sys/mman.h>

static uint16_t half_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* Known results, of numbers that bfloat16 holds. */
static void products(void) {
    __m512 tiny = _mm512_set1_ps(0x1p-130f), one = _mm512_set1_ps(1);
    halves_ pairs, ones;
    EACH(32, (pairs[i] = half_of(i % 2 ? -2.f * i : 1.f * i), ones[i] = half_of(1)));
    __m512 sum = _mm512_dpbf16_ps(one, (__m512bh)pairs, (__m512bh)ones);
    EACH(16, must_(sum[i] == 1 + 2 * i - 2.f * (2 * i + 1), "a pair's products are added"));
    EACH(32, pairs[i] = half_of(0x1p-130f));
    sum = _mm512_dpbf16_ps(tiny, (__m512bh)pairs, (__m512bh)_mm512_set1_epi16((short)half_of(0x1p100f)));
    EACH(16, must_(sum[i] == 0, "what is below the smallest normal number is 0"));
}

static void roundings(void) {
    __m512 upper = {1, 1.00390625f, 1.01171875f, -1.00390625f, NAN, INFINITY, 3.4e38f}, lower = _mm512_set1_ps(0x1p-130f);
    halves_ line = (halves_)_mm512_cvtne2ps_pbh(upper, lower);
    const uint16_t wanted[] = {0x3f80, 0x3f80, 0x3f82, 0xbf80, 0x7fc0, 0x7f80, 0x7f80};
    EACH(7, must_(line[16 + i] == wanted[i], "to the nearest, of two the even one"));
    EACH(16, must_(line[i] == 0, "tiny numbers are 0"));
}

static void orders(void) {
    halves_ a, b, order;
    EACH(32, (a[i] = (uint16_t)i, b[i] = (uint16_t)(100 + i), order[i] = (uint16_t)(63 - i)));
    halves_ line = (halves_)_mm512_permutex2var_epi16((__m512i)a, (__m512i)order, (__m512i)b);
    EACH(32, must_(line[i] == 131 - i, "a number of two lines"));
    line = (halves_)_mm512_maskz_compress_epi16(0x80000005, (__m512i)a);
    must_(line[0] == 0 && line[1] == 2 && line[2] == 31 && line[3] == 0, "those of the mask, side by side");
    line = (halves_)_mm512_maskz_expand_epi16(0x80000005, (__m512i)b);
    must_(line[0] == 100 && line[1] == 0 && line[2] == 101 && line[31] == 102, "where the mask has them");
    line = (halves_)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b);
    must_(line[0] == 4 && line[2] == 104 && line[4] == 6 && line[8] == 12 && line[26] == 128 + 0, "upper halves in turn");
    line = (halves_)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0xdd);
    must_(line[0] == 8 && line[8] == 24 && line[16] == 108 && line[24] == 124, "quarters");
}

/* A page behind which none is: what a mask leaves out is not touched. */
static void masks(void) {
    char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(page + 4096, 4096, PROT_NONE);
    uint16_t *last = (uint16_t *)(page + 4096) - 3;
    _mm512_mask_storeu_epi16(last, 7, _mm512_set1_epi16(5));
    halves_ line = (halves_)_mm512_maskz_loadu_epi16(7, last);
    must_(line[0] == 5 && line[2] == 5 && line[3] == 0, "what is there, and zeros");
}

static void tiles(int height, int multiplied) {
    tile_sizes_ sizes = {.palette = 1};
    EACH(3, (sizes.rows[i] = (uint8_t)(i == 2 ? 2 : height), sizes.bytes[i] = (uint16_t)(i == 1 ? 8 : 64)));
    uint16_t left[2][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}}, right[2][32];
    float sums[2][16] = {{10}, {20}};
    EACH(8, left[0][i] = half_of(left[0][i]));
    EACH(64, right[0][i] = half_of((float)(i % 2 ? 1 : 2)));
    _tile_loadconfig(&sizes);
    _tile_loadd(0, sums, 64), _tile_loadd(1, left, 8), _tile_loadd(2, right, 64);
    _tile_dpbf16ps(0, 1, multiplied);
    _tile_stored(0, sums, 64);
    _tile_release();
    must_(sums[0][0] == 10 + 2 + 2 + 6 + 4 && sums[1][0] == 20 + 10 + 6 + 14 + 8 && sums[1][15] == 38, "a product of tiles");
}

int main(int count, char **arguments) {
    _Alignas(64) char line[128];
    switch (count > 1 ? *arguments[1] : 0) {
        case 'a': _mm512_store_si512(line + 2, _mm512_setzero_si512()); break;
        case 't': _tile_zero(0); break;
        case 'f': tiles(2, 1); break;
        default: products(), roundings(), orders(), masks(), tiles(2, 2), puts("right");
    }
}
