"""The adapter's dropout mask on the torch-operator backends: redrawn from its seed, never stored.

The mask is a function of (seed, token, global column): a shard that holds some of the columns draws the
whole width and keeps its own, so tensor parallel equals one process. One 64-bit draw serves four columns of
16 bits each, which costs a twelfth of `F.dropout`'s draw on CPU; p is therefore rounded to a multiple of
2⁻¹⁶, and the scale is that of the rounded p, so the mask stays unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dropout", "draw_seed", "dropout_multiplier"]

_LEVELS = 1 << 16
_DRAWS_PER_WORD = 4


@dataclass(frozen=True)
class Dropout:
    """An active dropout: which mask, and where in it this shard's columns lie.

    Attributes:
        seed: int64 with one element, on the activations' device.
        p: probability in (0, 1).
        column_offset: global index of the first column.
        width: global number of columns.
    """

    seed: Tensor
    p: float
    column_offset: int
    width: int

    def multiplier(self, like: Tensor, columns: int | None = None) -> Tensor:
        """Mask times scale for the tokens, dtype and (unless given) columns of a 2-D tensor."""
        return dropout_multiplier(
            self.seed,
            self.p,
            like.shape[0],
            like.shape[1] if columns is None else columns,
            like.dtype,
            column_offset=self.column_offset,
            width=self.width,
        )


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 seed from the default generator of `device`.

    Drawn outside the operator: a seed drawn inside it would be drawn anew by a recomputed forward, and the
    gradients would silently be those of another mask.
    """
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=device)


def dropout_multiplier(
    seed: Tensor,
    p: float,
    tokens: int,
    columns: int,
    dtype: torch.dtype,
    *,
    column_offset: int = 0,
    width: int | None = None,
) -> Tensor:
    """Mask times scale, (tokens, columns): 0 with probability p, else 1 / (1 - p).

    Args:
        seed: int64 with one element, on the device where the mask is wanted.
        p: dropout probability in [0, 1).
        tokens: rows of the mask.
        columns: columns of the mask.
        dtype: of the result.
        column_offset: global index of the first column.
        width: global number of columns; `columns` where nothing is sharded.
    """
    width = columns if width is None else width
    threshold = round(p * _LEVELS)
    generator = torch.Generator(device=seed.device)
    generator.manual_seed(int(seed))
    words = torch.empty(tokens, -(-width // _DRAWS_PER_WORD), dtype=torch.int64, device=seed.device)
    words.random_(
        torch.iinfo(torch.int64).min, None, generator=generator
    )  # all 64 bits; the default leaves one 0
    levels = words.view(torch.int16)[:, column_offset : column_offset + columns]
    keep = levels >= threshold - _LEVELS // 2
    return keep.to(dtype).mul_(_LEVELS / (_LEVELS - threshold))
