"""The adapter's dropout mask: the same on every backend and device, redrawn from its seed, never stored.

The mask is a function of (seed, token, global column), so tensor parallel equals one process. It is Philox-4x32-7,
which Triton's kernels and compiled code compute too. Seven rounds are the fewest that pass TestU01's tests of
randomness (Salmon et al. 2011); FlashAttention also uses seven. The key is the seed, the counter is the column and
the number of a group of eight tokens. Each of the four words serves two tokens, the low half first. p is therefore
rounded to a multiple of 2⁻¹⁶; the scale is that of the rounded p, so the mask stays unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDEST = 2**31 - 1
"""The most columns of a layer: they are counted in 32 bits."""

_LEVELS = 1 << 16
_SIGN = 1 << 15
_ROUNDS = 7  # as in kernels/common.py and backends/native/calls.c
_TOKENS_PER_DRAW = 8
_DRAWS_AT_ONCE = 2**17  # each of their temporaries takes a megabyte
_WORD = 2**32 - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


@dataclass(frozen=True)
class Dropout:
    """An active dropout: which mask, and where in it this shard's columns lie.

    Attributes:
        seed: int64 with one element, on the activations' device. It is not read on the host: that would wait for a
            GPU, and a CUDA graph would always replay the same mask.
        p: probability in [0, 1) of dropping an element; rounded to a multiple of 2⁻¹⁶.
        column_offset: global index of the first column.

    Example:
        >>> mask = Dropout(torch.tensor(7), p=0.5).multiplier(torch.ones(64, 64))
        >>> sorted(set(mask.flatten().tolist()))
        [0.0, 2.0]
    """

    seed: Tensor
    p: float
    column_offset: int = 0

    @property
    def threshold(self) -> int:
        """The 16-bit draw below which an element is dropped."""
        return min(round(self.p * _LEVELS), _LEVELS - 1)

    @property
    def scale(self) -> float:
        """Factor of a kept element: 1 / (1 - p) of the rounded p, so that the mask is unbiased."""
        return _LEVELS / (_LEVELS - self.threshold)

    def multiplier(self, x: Tensor) -> Tensor:
        """Draw the mask that x (T, C) is multiplied by: 0 or the scale, in x's shape and dtype."""
        tokens, columns = x.shape
        of_column = torch.arange(self.column_offset, self.column_offset + columns, device=self.seed.device)
        keys, out = _keys(self.seed.reshape(())), x.new_empty(x.shape)
        at_once = max(1, _DRAWS_AT_ONCE // max(1, columns))
        for first in range(0, -(-tokens // _TOKENS_PER_DRAW), at_once):
            part = out[first * _TOKENS_PER_DRAW : (first + at_once) * _TOKENS_PER_DRAW]
            groups = torch.arange(first, first + -(-len(part) // _TOKENS_PER_DRAW), device=out.device)
            draws = groups.new_empty(len(groups), _TOKENS_PER_DRAW, columns, dtype=torch.int16)
            for i, word in enumerate(_philox(keys, of_column, groups[:, None])):
                draws[:, 2 * i] = word
                draws[:, 2 * i + 1] = word.bitwise_right_shift_(16)
            # The draws are unsigned numbers of 16 bits. Inverting the first bit lets signed int16 compare them.
            draws.bitwise_xor_(-_SIGN).ge_(self.threshold - _SIGN)
            part.copy_(draws.flatten(0, 1)[: len(part)]).mul_(self.scale)
        return out


def _keys(seed: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both words of the key in each round."""
    rounds = torch.arange(_ROUNDS, device=seed.device)
    low = ((seed & _WORD) + rounds * _KEY_STEPS[0]) & _WORD
    high = ((seed >> 32) + rounds * _KEY_STEPS[1]) & _WORD
    return list(zip(low, high, strict=True))


def _philox(keys: list[tuple[Tensor, Tensor]], column: Tensor, group: Tensor) -> tuple[Tensor, ...]:
    """Four words for each counter (column, group, 0, 0): the lower 32 bits of int64. Column and group broadcast."""
    zero = torch.zeros_like(column[:1])
    # In the first two rounds most words depend on the column alone or on the group alone, so their tensors are small.
    c0, c1, c2, c3 = column.clone(), group, zero.clone(), zero
    for low, high in keys:
        # Each product is 64 bits, whose lower half is a word too. `>>` repeats the sign bit; the mask removes it.
        a, b = c0.mul_(_MULTIPLIERS[0]), c2.mul_(_MULTIPLIERS[1])
        c0, c1 = _xor(b >> 32, c1).bitwise_xor_(low).bitwise_and_(_WORD), b
        c2, c3 = _xor(a >> 32, c3).bitwise_xor_(high).bitwise_and_(_WORD), a
    return c0, c1, c2, c3


def _xor(word: Tensor, other: Tensor) -> Tensor:
    """`word ^ other`; overwrites `word` if their shapes are equal."""
    return word.bitwise_xor_(other) if word.shape == other.shape else word ^ other


def draw_seed(device: torch.device) -> Tensor:
    """Draw a fresh int64 seed from the default generator of `device`.

    The seed is drawn outside the operator. Drawn inside, it would change when a forward is recomputed, and gradients
    would silently belong to another mask.
    """
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=device)
