"""The adapter's dropout mask on the torch-operator backends: redrawn from its seed, never stored.

The mask is a function of (seed, token, global column). A shard that holds some of the columns draws the whole width
and keeps its own, so tensor parallel equals one process. One 64-bit draw serves four columns of 16 bits each, which
costs a twelfth of `F.dropout`'s draw on CPU. p is therefore rounded to a multiple of 2⁻¹⁶; the scale is that of the
rounded p, so the mask stays unbiased.

On the CPU a generator draws. On a GPU each word is a hash of seed and position: seeding a generator would wait for the
GPU, and a CUDA graph would always replay the same mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WIDEST = 2**31 - 1
"""The most columns of a layer: they are counted in 32 bits."""

_LEVELS = 1 << 16
_DRAWS_PER_WORD = 4
_LOWEST = torch.iinfo(torch.int64).min
MASK_ROWS = 256
"""Tokens per draw on the CPU; their numbers stay in cache."""

# SplitMix64's increment and multipliers (Steele, Lea and Flood 2014), as int64.
_GAMMA, _FIRST, _SECOND = (
    word - (1 << 64) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class Dropout:
    """An active dropout: which mask, and where in it this shard's columns lie.

    Attributes:
        seed: int64 with one element, on the activations' device.
        p: probability in [0, 1) of dropping an element; rounded to a multiple of 2⁻¹⁶.
        column_offset: global index of the first column.
        width: global number of columns; None stands for the tensor's own. The kernels do not need it.
    """

    seed: Tensor
    p: float
    column_offset: int = 0
    width: int | None = None

    @property
    def threshold(self) -> int:
        """The 16-bit draw below which an element is dropped."""
        return min(round(self.p * _LEVELS), _LEVELS - 1)

    @property
    def scale(self) -> float:
        """Factor of a kept element: 1 / (1 - p) of the rounded p, so that the mask is unbiased."""
        return _LEVELS / (_LEVELS - self.threshold)

    @property
    def least_kept(self) -> int:
        """The threshold as a signed number: an element whose 16 bits, read as an int16, are at least it is kept."""
        return self.threshold - _LEVELS // 2

    def multiplier(self, x: Tensor) -> Tensor:
        """Draw the mask that x (T, C) is multiplied by: 0 or the scale, in x's shape and dtype."""
        return self.stream(x.shape[1])(x.new_empty(x.shape))

    def stream(self, columns: int) -> Callable[[Tensor], Tensor]:
        """Return a function that fills a tensor (tokens, columns) with the multiplier of the next tokens."""
        on_host, per_token = draws(self.seed.device), self.words_per_token(columns)
        words = drawn_words(self.seed, per_token) if on_host else hashed_words(self.seed, per_token)
        own = slice(self.column_offset, self.column_offset + columns)

        def fill(out: Tensor) -> Tensor:
            for rows in out.split(MASK_ROWS) if on_host else (out,):
                levels = words(rows.shape[0]).view(torch.int16)[:, own]
                torch.ge(levels, self.least_kept, out=rows).mul_(self.scale)
            return out

        return fill

    def words_per_token(self, columns: int) -> int:
        """64-bit numbers drawn per token, for the columns of all shards."""
        return -(-(columns if self.width is None else self.width) // _DRAWS_PER_WORD)


def draws(device: torch.device) -> bool:
    """Whether masks come from a generator, which reads the seed on the host."""
    return device.type == "cpu"


def drawn_words(seed: Tensor, per_token: int) -> Callable[[int], Tensor]:
    """Return a function that draws int64 (tokens, per_token), at most `MASK_ROWS` tokens at a time, into one buffer."""
    generator = torch.Generator().manual_seed(int(seed))
    words = torch.empty(MASK_ROWS, per_token, dtype=torch.int64, device=seed.device)
    # From the lowest int64 on, so that all 64 bits are random; the default range leaves the sign 0.
    return lambda tokens: words[:tokens].random_(_LOWEST, None, generator=generator)


def hashed_words(seed: Tensor, per_token: int) -> Callable[[int], Tensor]:
    """The same by SplitMix64 from `seed`, which is read on its own device, for any number of tokens."""
    done = 0

    def hashed(tokens: int) -> Tensor:
        nonlocal done
        first = 1 + done * per_token
        done += tokens
        words = torch.arange(first, first + tokens * per_token, device=seed.device)
        words.mul_(_GAMMA).add_(seed.reshape(()))
        for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
            # `>>` repeats the sign bit; the mask makes it an unsigned shift.
            words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
        return words.view(tokens, per_token)

    return hashed


def draw_seed(device: torch.device) -> Tensor:
    """Draw a fresh int64 seed from the default generator of `device`.

    The seed is drawn outside the operator. Drawn inside, it would change when a forward is recomputed, and gradients
    would silently belong to another mask.
    """
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=device)
