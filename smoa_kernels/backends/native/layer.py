"""What every compiled function is told of a layer: the struct of `layer.h`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...definition.packed import PackedAdapter
from .library import library
from .operands import KINDS, dense

__all__ = ["Layer", "integers", "pointers"]

Fields = list[tuple[str, type]]


def integers(names: str) -> Fields:
    """Fields of a C struct, int64 each."""
    return [(name, ctypes.c_int64) for name in names.split()]


def pointers(names: str) -> Fields:
    """Fields of a C struct, a pointer each."""
    return [(name, ctypes.c_void_p) for name in names.split()]


class Layer(ctypes.Structure):
    """A frozen weight W0 and an adapter of it, as compiled code reads them; keeps alive what it points to.

    Attributes:
        indices: row and column indices by block, and their offsets, once :meth:`index` has been called.
    """

    _fields_ = [
        *integers("rows cols stored row_stride col_stride"),
        *pointers("weight"),
        *integers("rank factors A_rank A_col B_row B_rank"),
        *pointers("A B"),
        *integers("blocks contiguous"),
        *pointers("ranks row_index col_index row_offsets col_offsets row_block"),
        *integers("row_wide"),
        *pointers("col_block"),
        *integers("col_wide"),
        ("scaling", ctypes.c_float),
    ]
    indices: tuple[Tensor, Tensor, Tensor, Tensor]

    def __init__(self, weight: Tensor) -> None:
        super().__init__(*weight.shape, KINDS[weight.dtype], *weight.stride(), weight.data_ptr())
        self._kept = [weight]

    @property
    def _as_parameter_(self) -> object:
        return ctypes.byref(self)

    def adapt(self, adapter: PackedAdapter, A: Tensor, B: Tensor, scale: float = 1.0) -> Layer:
        """Give it the adapter's ranks and `scale` times its scaling, and its factors as they are to be read."""
        ranks = dense(adapter.ranks, torch.int32)
        self.blocks, self.ranks, self.scaling = len(ranks), ranks.data_ptr(), scale * adapter.scaling.item()
        self.rank, self.factors, self.A, self.B = A.shape[0], KINDS[A.dtype], A.data_ptr(), B.data_ptr()
        (self.A_rank, self.A_col), (self.B_row, self.B_rank) = A.stride(), B.stride()
        self._kept += ranks, A, B
        return self

    def index(self, adapter: PackedAdapter) -> Layer:
        """Tell it which rows and columns each block has; it has been adapted.

        Raises:
            ValueError: they do not fit the weight.
        """
        p = adapter.partition
        self.indices = (
            dense(p.row_index, torch.int64), dense(p.col_index, torch.int64),
            dense(p.row_offsets, torch.int32), dense(p.col_offsets, torch.int32),
        )  # fmt: skip
        self.contiguous = p.is_contiguous
        self.row_index, self.col_index, self.row_offsets, self.col_offsets = (
            one.data_ptr() for one in self.indices
        )
        sizes = self.rows, self.cols, self.blocks + 1, self.blocks + 1
        return self._checked(
            p.num_blocks, tuple(one.numel() for one in self.indices) == sizes, "smoa_indices_fit"
        )

    def label(self, adapter: PackedAdapter, *, rows: bool = True, wide: bool = False) -> Layer:
        """Tell it each column's block, and each row's where `rows`, as int32 where `wide`; it has been adapted.

        Raises:
            ValueError: they do not fit the weight.
        """
        p = adapter.partition
        wide = wide or not p.row_block.dtype == p.col_block.dtype == torch.uint8
        columns = dense(p.col_block, torch.int32 if wide else torch.uint8)
        self.col_block, self.col_wide, fits = columns.data_ptr(), wide, columns.numel() == self.cols
        self._kept.append(columns)
        if rows:
            found = dense(p.row_block, columns.dtype)
            self.row_block, self.row_wide, fits = found.data_ptr(), wide, fits and found.numel() == self.rows
            self._kept.append(found)
        return self._checked(p.num_blocks, fits, "smoa_labels_fit")

    def _checked(self, num_blocks: int, fits: bool, check: str) -> Layer:
        """Where torch's operators would meet an index out of range, compiled code would read on."""
        if fits and self.blocks == num_blocks and getattr(library(), check)(self):
            return self
        raise ValueError(
            f"partition must have all rows and columns of weight {(self.rows, self.cols)} in its {num_blocks} "
            "blocks, got labels, indices or offsets that do not"
        )
