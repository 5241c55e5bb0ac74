/* bfloat16 of 2048 columns and rows, contiguous blocks: how often does it miss another processor's L1 cache? README.md says
 * how to run it. Given tokens, and by how many numbers more than 2048 rows lie apart. */
#include "linear.c"

#include <stdio.h>

enum { WIDE = 2048, BLOCKS = 4, RANK = 8 };

static void *page(i64 bytes) {
    void *found = aligned_alloc(4096, (size_t)whole(bytes, 4096));
    return memset(found, 0, (size_t)bytes);
}

int main(int count, char **given) {
    if (count != 3) return fprintf(stderr, "misses TOKENS APART\n"), 2;
    i64 tokens = atoi(given[1]), apart = WIDE + atoi(given[2]), *index = page(WIDE * sizeof *index);
    half *weight = page(WIDE * apart * 2), *x = page(tokens * apart * 2), *dy = page(tokens * apart * 2);
    half *y = page(tokens * WIDE * 2), *dx = page(tokens * WIDE * 2);
    float *A = page(RANK * WIDE * 4), *B = page(WIDE * RANK * 4), *dA = page(RANK * WIDE * 4), *dB = page(WIDE * RANK * 4);
    int32_t offsets[BLOCKS + 1], ranks[BLOCKS];
    uint8_t *blocks = page(WIDE);
    for (i64 i = 0; i < WIDE; i++) index[i] = i, blocks[i] = (uint8_t)(i * BLOCKS / WIDE);
    for (i64 k = 0; k <= BLOCKS; k++) offsets[k] = (int32_t)(WIDE * k / BLOCKS);
    for (i64 k = 0; k < BLOCKS; k++) ranks[k] = RANK;
    layer l = {WIDE, WIDE, BFLOAT16, apart, 1, weight, RANK, FLOAT32, WIDE, 1, RANK, 1, A, B, BLOCKS, 1, ranks, index, index,
               offsets, offsets, {blocks, 0}, {blocks, 0}, 1};
    smoa_bf16_forward(&l, tokens, x, apart, NULL, NULL, y, page(4 * smoa_bf16_forward_workspace(&l, tokens, 0, 1)), 1);
    smoa_bf16_gradient(&l, tokens, dy, apart, x, apart, NULL, dA, dB,
                       page(4 * smoa_bf16_gradient_workspace(&l, tokens, 1)), 1);
    smoa_bf16_input(&l, tokens, dy, apart, NULL, dx, page(4 * smoa_bf16_input_workspace(&l, tokens, 0, 1)), 1);
    return 0;
}
