"""What a bring-up compares and tunes."""

from __future__ import annotations

from smoa_kernels.tuning.plan import Layer

from ..cases import BF16
from ..providers import Case

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
TOKENS = (8192, 2048, 256)
BLOCKS = (4, 1, 2, 8)
RANK = 16

SQUARE, DOWN = Case(8192, 4096, 4096, 4, RANK, BF16), Case(8192, 4096, 14336, 4, RANK, BF16)
SQUARE_HIRA, DOWN_HIRA = Case(8192, 4096, 4096, 1, RANK, BF16), Case(8192, 4096, 14336, 1, RANK, BF16)
GOAL_CASES = (SQUARE, DOWN, SQUARE_HIRA, DOWN_HIRA)


def comparison_cases(smoke: bool) -> tuple[Case, ...]:
    """The goals' cases, then the grid; cases with the same weight and partition follow each other."""
    if smoke:
        return (Case(9, 48, 40, 2, 4), Case(9, 48, 40, 2, 4, dropout=0.05))
    grid = (
        Case(tokens, n, c, blocks, RANK, BF16, dropout)
        for blocks in BLOCKS
        for n, c in SHAPES
        for dropout in (0.0, 0.05)
        for tokens in TOKENS
    )
    return tuple(dict.fromkeys((*GOAL_CASES, *grid)))


def tuned_layers(smoke: bool) -> list[Layer]:
    """The shapes that are compared, at the goals' number of blocks."""
    if smoke:
        return [Layer(48, 40, 9, "fp32", 4, 2)]
    return [Layer(n, c, tokens, "bf16", RANK, 4) for tokens in TOKENS for n, c in SHAPES]
