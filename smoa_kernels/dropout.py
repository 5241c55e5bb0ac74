"""The adapter's dropout mask on the torch-operator backends: redrawn from its seed, never stored.

The mask is a function of (seed, token, global column): a shard that holds some of the columns draws the
whole width and keeps its own, so tensor parallel equals one process. One 64-bit draw serves four columns of
16 bits each, which costs a twelfth of `F.dropout`'s draw on CPU; p is therefore rounded to a multiple of
2⁻¹⁶, and the scale is that of the rounded p, so the mask stays unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dropout", "draw_seed"]

_LEVELS = 1 << 16
_DRAWS_PER_WORD = 4
_LOWEST = torch.iinfo(torch.int64).min
_ROWS = 256  # tokens at a time: what is drawn for them stays in cache


@dataclass(frozen=True)
class Dropout:
    """An active dropout: which mask, and where in it this shard's columns lie.

    Attributes:
        seed: int64 with one element, on the activations' device.
        p: probability in [0, 1), rounded to a multiple of 2⁻¹⁶.
        column_offset: global index of the first column.
        width: global number of columns; the tensor's own where None. Only the generator's draw needs it.

    Example:
        >>> mask = Dropout(torch.tensor(7), p=0.5).multiplier(torch.ones(64, 64))
        >>> sorted(set(mask.flatten().tolist()))
        [0.0, 2.0]
    """

    seed: Tensor
    p: float
    column_offset: int = 0
    width: int | None = None

    @property
    def threshold(self) -> int:
        """A 16-bit draw below this is dropped."""
        return min(round(self.p * _LEVELS), _LEVELS - 1)

    @property
    def scale(self) -> float:
        """What a kept element is multiplied with: that of the rounded p, so that the mask is unbiased."""
        return _LEVELS / (_LEVELS - self.threshold)

    def multiplier(self, like: Tensor, columns: int | None = None) -> Tensor:
        """Mask times scale for the tokens, dtype and (unless given) columns of a 2-D tensor.

        Args:
            like: (T, C), whose dtype the mask takes.
            columns: of the mask, where they are not those of `like`.
        """
        columns = like.shape[1] if columns is None else columns
        return self.stream(columns)(like.new_empty(like.shape[0], columns))

    def stream(self, columns: int) -> Callable[[Tensor], Tensor]:
        """A function that fills a tensor (tokens, columns) with the multiplier of the tokens that come next."""
        width = columns if self.width is None else self.width
        generator = torch.Generator(device=self.seed.device)
        generator.manual_seed(int(self.seed))
        words = torch.empty(_ROWS, -(-width // _DRAWS_PER_WORD), dtype=torch.int64, device=self.seed.device)

        def draw(out: Tensor) -> Tensor:
            for rows in out.split(_ROWS):
                # From the lowest int64 up: all 64 bits are random, where the default range leaves the sign 0.
                drawn = words[: rows.shape[0]].random_(_LOWEST, None, generator=generator)
                levels = drawn.view(torch.int16)[:, self.column_offset : self.column_offset + columns]
                torch.ge(levels, self.threshold - _LEVELS // 2, out=rows).mul_(self.scale)
            return out

        return draw


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 seed from the default generator of `device`.

    Drawn outside the operator: a seed drawn inside it would be drawn anew by a recomputed forward, and the
    gradients would silently be those of another mask.

    Args:
        device: of the activations.

    Example:
        >>> seed = draw_seed(torch.device("cpu"))
        >>> seed.dtype, seed.shape
        (torch.int64, torch.Size([]))
    """
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=device)
