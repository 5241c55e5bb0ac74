"""What the compiled functions are given: operands as they read them, and masks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ...definition.dropout import Dropout
from .library import library

__all__ = [
    "KINDS",
    "Mask",
    "along_memory",
    "dense",
    "drawn",
    "kept_by",
    "named",
    "with_rows",
]

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What compiled code calls the dtypes that it takes (`stored.h`)."""


class Mask(NamedTuple):
    """A dropout mask, drawn.

    Attributes:
        kept: int16 (T, ⌈C / 16⌉), a bit for each element of x that is not dropped.
        scale: what a kept element is multiplied by.
    """

    kept: Tensor
    scale: float


def drawn(dropout: Dropout, tokens: Tensor, columns: int) -> Mask:
    """The mask of x, which has the rows of `tokens`: of the numbers that :func:`drawn_words` draws, faster."""
    shape = tokens.shape[0], -(-columns // 16)
    # Two words may be read at once, the last one and what is behind it.
    kept = tokens.new_empty(shape[0] * shape[1] + 1, dtype=torch.int16)[:-1].view(shape)
    per_token = dropout.words_per_token(columns)
    line = tokens.new_empty(4 * per_token + 16, dtype=torch.int16)
    library().smoa_mask(
        tokens.shape[0], columns, dropout.column_offset, per_token, int(dropout.seed), dropout.least_kept,
        line.data_ptr(), kept.data_ptr(),
    )  # fmt: skip
    return Mask(kept, dropout.scale)


def kept_by(mask: Mask | None) -> int | None:
    """The address of a mask's bits; without a mask nothing is dropped."""
    return None if mask is None else mask.kept.data_ptr()


def named(name: str) -> AbstractContextManager[object]:
    """Name what runs within for the profiler, where one is on: by itself it sees operators only."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


def along_memory(matrix: Tensor) -> Tensor:
    """The matrix where its rows or its columns are contiguous and share no memory, else a contiguous copy.

    What torch makes like a matrix whose rows do share memory is not laid out as that is.
    """
    (rows, cols), (down, along) = matrix.shape, matrix.stride()
    lies = (along == 1 and down >= cols) or (down == 1 and along >= rows)
    return matrix if lies else matrix.contiguous()


def with_rows(matrix: Tensor) -> Tensor:
    """The matrix where its rows are contiguous, else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor contiguous and in `dtype`: mostly itself, which is asked first because torch's conversions cost."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()
