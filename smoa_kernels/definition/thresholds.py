"""How W_eff is rounded to a half type: by a threshold for each entry, so that small updates survive (docs/numerics.md).

W0 lies on the half type's grid, so rounding to nearest undoes every update below half of its last bit. Here a share of
the entries moves by a whole last bit instead, as large as the update asks for:

    bits(W_eff) = (bits of the float32 W_eff + u(i, j)) with the bits that the half type lacks cut off
    u(i, j) = (40503 i + 30011 j) mod 2^16, of which float16, which lacks 13 bits, takes the upper 13

These are multiples of two irrational numbers, nearly, so u is spread evenly along every row and column, and a sum over
a row delivers the whole update. Where ΔW is zero the result is W0, bit for bit. u depends on the place alone: forward,
gradient, recomputation, merging and every process of a job round alike, but for entries so near their threshold that
the order of a float32 sum decides. i and j count in the whole weight.

An update below float16's normal numbers (2^-14) is rounded to nearest. float32 is not rounded, but by the kernels for
products in TF32, to its ten bits, as to float16's; torch's operators take "split" there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 2**16
_ROW_STEP, _COL_STEP = 40503, 30011
LACKS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's 23 bits behind the point


class Place(NamedTuple):
    """Where a matrix lies in the whole weight, as far as the thresholds depend on it.

    Attributes:
        first: u of its first entry.
        row_step: what u grows by from a row to the next.
        col_step: what u grows by from a column to the next.
    """

    first: int = 0
    row_step: int = _ROW_STEP
    col_step: int = _COL_STEP

    @property
    def T(self) -> Place:
        """The place of the transposed matrix."""
        return Place(self.first, self.col_step, self.row_step)

    def part(self, row: int, col: int) -> Place:
        """The place of the part that begins at a row and a column of this matrix."""
        first = self.first + row * self.row_step + col * self.col_step
        return self._replace(first=first % LEVELS)


ORIGIN = Place()
"""The place of a matrix that begins at the weight's first row and column."""


def round_weight(
    W_eff: Tensor, dtype: torch.dtype, place: Place = ORIGIN, index: Tensor | None = None
) -> Tensor:
    """Round W_eff to `dtype`; half types by thresholds. NaN and Inf stay.

    Args:
        W_eff: (N, C), at least float32.
        dtype: W0's.
        place: of W_eff in the whole weight.
        index: (N,), the weight's rows that W_eff holds; all in their order where None.

    Example:
        >>> W0 = torch.full((1, 1000), 1.0, dtype=torch.bfloat16)
        >>> rounded = round_weight(W0.float() * 1.0001, torch.bfloat16)
        >>> W0.sum().item(), round(rounded.float().sum().item(), 1)
        (1000.0, 1000.1)
    """
    lacks = LACKS.get(dtype)
    if lacks is None:
        return W_eff.to(dtype)
    rows, cols = W_eff.shape
    if W_eff.stride(0) < W_eff.stride(1) and index is None:  # along memory
        return round_weight(W_eff.T, dtype, place.T).T
    row, col = (torch.arange(size, dtype=torch.int32, device=W_eff.device) for size in (rows, cols))
    row = row if index is None else index.int()
    # int32 wraps round, which does not change the lower 16 bits.
    bits = torch.add((row * place.row_step + place.first)[:, None], col * place.col_step)
    bits.bitwise_and_(LEVELS - 1).bitwise_right_shift_(16 - lacks)
    bits.add_(W_eff.float().contiguous().view(torch.int32)).bitwise_and_(-(1 << lacks))
    return torch.where(W_eff.isnan(), W_eff, bits.view(torch.float32)).to(dtype)
