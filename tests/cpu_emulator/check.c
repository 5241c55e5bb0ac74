/* Checks the emulated instructions. With a letter, commits a misuse that must be found (test_instructions.py). */
#include <immintrin.h>

#include <math.h>
#include <sys/mman.h>

static uint16_t half_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* sum + odd_a odd_b + even_a even_b, of bfloat16 numbers, in each place of a vector. */
static float added(float sum, float odd_a, float odd_b, float even_a, float even_b) {
    halves_ a, b;
    EACH(32, (a[i] = half_of(i % 2 ? odd_a : even_a), b[i] = half_of(i % 2 ? odd_b : even_b)));
    __m512 found = _mm512_dpbf16_ps(_mm512_set1_ps(sum), (__m512bh)a, (__m512bh)b);
    EACH(16, must_(memcmp((float *)&found + i, &found, 4) == 0, "places of a line agree"));
    return found[0];
}

static void products(void) {
    must_(added(1, 2, 3, 4, 5) == 27, "a pair's products are added");
    must_(added(0x1p24f, 1, 1, -0x1p24f, 1) == 0, "the odd one first");
    must_(added(-0x1p127f, 0x1p64f, 0x1p64f, 0, 0) == 0x1p127f, "a product is not rounded before it is added");
    must_(added(0x1p-130f, 0x1p-130f, 0x1p100f, 0, 0) == 0, "what is below the smallest normal number is 0");
    must_(added(0, 0x1p-70f, 0x1p-60f, 0, 0) == 0, "a sum too");
}

static void halves(void) {
    __m512 upper = {1, 1.00390625f, 1.01171875f, -1.00390625f, NAN, INFINITY, 3.4e38f}, lower = _mm512_set1_ps(0x1p-130f);
    halves_ line = (halves_)_mm512_cvtne2ps_pbh(upper, lower);
    const uint16_t wanted[] = {0x3f80, 0x3f80, 0x3f82, 0xbf80, 0x7fc0, 0x7f80, 0x7f80};
    EACH(7, must_(line[16 + i] == wanted[i], "to the nearest, of two the even one"));
    EACH(16, must_(line[i] == 0, "tiny numbers are 0"));
    __m512 numbers;
    EACH(16, numbers[i] = (float)i);
    __m512 again = _mm512_cvtph_ps(_mm512_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT));
    ints_ whole = (ints_)_mm512_cvtepu16_epi32(_mm512_cvtepi32_epi16(_mm512_set1_epi32(0x12345)));
    EACH(16, must_(again[i] == i && whole[i] == 0x2345, "there and back"));
}

static void orders(void) {
    halves_ a, b, order;
    EACH(32, (a[i] = (uint16_t)i, b[i] = (uint16_t)(100 + i), order[i] = (uint16_t)(63 - i)));
    halves_ line = (halves_)_mm512_permutex2var_epi16((__m512i)a, (__m512i)order, (__m512i)b);
    EACH(32, must_(line[i] == 131 - i, "a number of two lines"));
    line = (halves_)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b);
    must_(line[0] == 4 && line[2] == 104 && line[4] == 6 && line[8] == 12 && line[26] == 128, "upper halves in turn");
    line = (halves_)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
    must_(line[0] == 0 && line[4] == 100 && line[8] == 8 && line[28] == 124, "lower halves in turn");
    line = (halves_)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0xdd);
    must_(line[0] == 8 && line[8] == 24 && line[16] == 108 && line[24] == 124, "quarters");
    uint16_t upper[16];
    __m256i half = _mm512_extracti64x4_epi64((__m512i)a, 1);
    memcpy(upper, &half, sizeof upper);
    must_(upper[0] == 16 && upper[15] == 31, "the upper half");
    __m512i product = _mm512_mul_epu32(_mm512_set1_epi64(0x7fffffff00000003), _mm512_set1_epi64(0xffffffff));
    EACH(8, must_(product[i] == 0x2fffffffd, "a product of lower halves"));
}

/* At the end of the last mapped page: masked-out elements must not be touched. */
static void masks(void) {
    char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(page + 4096, 4096, PROT_NONE);
    uint16_t *halves = (uint16_t *)(page + 4096) - 3;
    _mm512_mask_storeu_epi16(halves, 7, _mm512_set1_epi16(5));
    halves_ line = (halves_)_mm512_maskz_loadu_epi16(7, halves);
    must_(line[0] == 5 && line[2] == 5 && line[3] == 0, "what is there, and zeros");
}

/* `sum` plus a product of two tiles, of four terms: the left tile holds `even` and `odd` in turn, the right tile `by`. */
static float of_tiles(float sum, float even, float odd, float by, int right_bytes, int right_tile) {
    tile_sizes_ sizes = {.palette = 1, .rows = {2, 2, 2}, .bytes = {64, 8, (uint16_t)right_bytes}};
    uint16_t left[8], right[64];
    float sums[32];
    EACH(8, left[i] = half_of(i % 2 ? odd : even));
    EACH(64, right[i] = half_of(by));
    EACH(32, sums[i] = sum);
    _tile_loadconfig(&sizes);
    _tile_loadd(0, sums, 64), _tile_loadd(1, left, 8), _tile_loadd(2, right, 64);
    _tile_dpbf16ps(0, 1, right_tile);
    _tile_stored(0, sums, 64);
    _tile_release();
    EACH(32, must_(memcmp(sums + i, sums, 4) == 0, "places of a tile agree"));
    return sums[0];
}

static void tiles(void) {
    must_(of_tiles(10, 2, 3, 4, 64, 2) == 50, "a product of tiles");
    must_(of_tiles(0, 0x1p24f, 2, 1, 64, 2) == 0x1p25f + 4, "even and odd ones apart");
    must_(of_tiles(-0x1p25f, 0x1p24f, 1, 1, 64, 2) == 0, "what was there comes last");
    must_(of_tiles(0, 0x1p-130f, 0x1p-130f, 0x1p100f, 64, 2) == 0, "tiny numbers are 0");
}

int main(int count, char **arguments) {
    static const tile_sizes_ wrong = {.palette = 1, .rows = {40}, .bytes = {64}};
    _Alignas(64) char line[128] = {0};
    switch (count > 1 ? *arguments[1] : 0) {
        case 'a': _mm512_store_si512(line + 2, _mm512_setzero_si512()); break;
        case 'l': _mm512_store_ps(line, _mm512_load_ps(line + 4)); break;
        case 't': _tile_zero(0); break;
        case 'r': tiles(), _tile_zero(0); break;
        case 'f': of_tiles(1, 1, 1, 1, 32, 2); break;
        case 's': of_tiles(1, 1, 1, 1, 64, 1); break;
        case 'c': _tile_loadconfig(&wrong); break;
        default: products(), halves(), orders(), masks(), tiles(), puts("right");
    }
}
