"""The adapter's dropout mask on the torch-operator backends: redrawn from its seed, never stored.

The mask is a function of (seed, token, global column): a shard that holds some of the columns draws the
whole width and keeps its own, so tensor parallel equals one process. One 64-bit draw serves four columns of
16 bits each, which costs a twelfth of `F.dropout`'s draw on CPU; p is therefore rounded to a multiple of
2⁻¹⁶, and the scale is that of the rounded p, so the mask stays unbiased.

On the CPU a generator draws. On a GPU giving it the seed would wait for the GPU, and a CUDA graph would hold one
mask for ever: there each word is a hash of seed and position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count, check_device, check_kind, check_number

__all__ = ["Dropout", "draw_seed"]

WIDEST = 2**31 - 1  # columns are counted in 32 bits

_LEVELS = 1 << 16
_DRAWS_PER_WORD = 4
_LOWEST = torch.iinfo(torch.int64).min
ROWS = 256  # tokens at a time on the CPU: what is drawn for them stays in cache

# SplitMix64's increment and multipliers (Steele, Lea and Flood 2014), as int64.
_GAMMA, _FIRST, _SECOND = (
    word - (1 << 64) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class Dropout:
    """An active dropout: which mask, and where in it this shard's columns lie.

    Attributes:
        seed: int64 with one element, on the activations' device.
        p: probability in [0, 1), rounded to a multiple of 2⁻¹⁶.
        column_offset: global index of the first column.
        width: global number of columns; the tensor's own where None. With a column_offset the masks of this class
            need it, by generator or hash; the kernels do not.

    Raises:
        TypeError, ValueError: a seed, a probability or a column that is none.

    Example:
        >>> mask = Dropout(torch.tensor(7), p=0.5).multiplier(torch.ones(64, 64))
        >>> sorted(set(mask.flatten().tolist()))
        [0.0, 2.0]
    """

    seed: Tensor
    p: float
    column_offset: int = 0
    width: int | None = None

    def __post_init__(self) -> None:
        check_kind("seed", self.seed, Tensor)
        if self.seed.is_nested or self.seed.dtype != torch.int64 or self.seed.numel() != 1:
            raise TypeError(f"seed must be an int64 tensor with one element, got {self.seed!r}")
        check_number("p", self.p)
        if not 0.0 <= self.p < 1.0:
            raise ValueError(f"p must lie in [0, 1), got {self.p}")
        check_count("column_offset", self.column_offset, 0, WIDEST)
        if self.width is not None:
            check_count("width", self.width, 0, WIDEST)

    @property
    def threshold(self) -> int:
        """A 16-bit draw below this is dropped."""
        return min(round(self.p * _LEVELS), _LEVELS - 1)

    @property
    def scale(self) -> float:
        """What a kept element is multiplied with: that of the rounded p, so that the mask is unbiased."""
        return _LEVELS / (_LEVELS - self.threshold)

    @property
    def least_kept(self) -> int:
        """The threshold as a signed level: see :meth:`levels`."""
        return self.threshold - _LEVELS // 2

    def multiplier(self, like: Tensor, columns: int | None = None) -> Tensor:
        """Mask times scale for the tokens, dtype and (unless given) columns of a 2-D tensor.

        Args:
            like: (T, C), whose dtype the mask takes.
            columns: of the mask, where they are not those of `like`.

        Raises:
            TypeError: `like` is no matrix of floating-point numbers.
            ValueError: it is not where the seed is, or the columns do not lie in the whole width.
        """
        check_kind("like", like, Tensor)
        if like.is_nested or like.layout != torch.strided or like.ndim != 2 or not like.is_floating_point():
            raise TypeError(f"like must be a matrix of floating-point numbers, got {like!r}")
        columns = like.shape[1] if columns is None else columns
        if like.device != self.seed.device:
            raise ValueError(f"like must be on the seed's device {self.seed.device}, got {like.device}")
        return self.stream(columns)(like.new_empty(like.shape[0], columns))

    def stream(self, columns: int) -> Callable[[Tensor], Tensor]:
        """A function that fills a tensor (tokens, columns) with the multiplier of the tokens that come next.

        Args:
            columns: of the tensors, from column_offset on.

        Raises:
            TypeError, ValueError: no number of columns, or they do not lie in the whole width.
        """
        levels = self.levels(columns)

        def fill(out: Tensor) -> Tensor:
            for rows in out.split(ROWS) if draws(self.seed.device) else (out,):
                torch.ge(levels(rows.shape[0]), self.least_kept, out=rows).mul_(self.scale)
            return out

        return fill

    def levels(self, columns: int) -> Callable[[int], Tensor]:
        """A function that draws int16 (tokens, columns) for so many tokens that come next, on the CPU at most 256.

        An element is kept whose level is `least_kept` or above. What is drawn next may be written over it.

        Args, Raises: as :meth:`stream`.
        """
        width = columns if self.width is None else self.width
        check_count("columns", columns, 0, WIDEST)
        if self.column_offset + columns > width:
            raise ValueError(
                f"columns must lie in the width {width}, got {self.column_offset} to {self.column_offset + columns}"
            )
        per_token = -(-width // _DRAWS_PER_WORD)
        words = (drawn_words if draws(self.seed.device) else hashed_words)(self.seed, per_token)
        kept = slice(self.column_offset, self.column_offset + columns)
        return lambda tokens: words(tokens).view(torch.int16)[:, kept]


def draws(device: torch.device) -> bool:
    """Whether masks come from a generator, which reads the seed on the host."""
    return device.type == "cpu"


def drawn_words(seed: Tensor, per_token: int) -> Callable[[int], Tensor]:
    """A function that draws int64 (tokens, per_token) for so many next tokens, at most `ROWS`, into one buffer."""
    generator = torch.Generator().manual_seed(int(seed))
    words = torch.empty(ROWS, per_token, dtype=torch.int64, device=seed.device)
    # From the lowest int64 up: all 64 bits are random, where the default range leaves the sign 0.
    return lambda tokens: words[:tokens].random_(_LOWEST, None, generator=generator)


def hashed_words(seed: Tensor, per_token: int) -> Callable[[int], Tensor]:
    """The same by SplitMix64 started at `seed`, which is read on its own device."""
    done = 0

    def hashed(tokens: int) -> Tensor:
        nonlocal done
        first = 1 + done * per_token
        done += tokens
        words = torch.arange(first, first + tokens * per_token, device=seed.device)
        words.mul_(_GAMMA).add_(seed.reshape(()))
        for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
            # `>>` repeats the sign: the mask makes it a shift of 64 unsigned bits.
            words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
        return words.view(tokens, per_token)

    return hashed


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 seed from the default generator of `device`.

    Drawn outside the operator: a seed drawn inside it would be drawn anew by a recomputed forward, and the
    gradients would silently be those of another mask.

    Args:
        device: of the activations.

    Raises:
        TypeError: it is none.
        ValueError: this machine does not have it.

    Example:
        >>> seed = draw_seed(torch.device("cpu"))
        >>> seed.dtype, seed.shape
        (torch.int64, torch.Size([]))
    """
    check_kind("device", device, torch.device)
    try:
        return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=device)
    except (AssertionError, RuntimeError):
        check_device(device)
        raise
