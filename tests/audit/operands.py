"""Random operands of a layer, for the audit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smoa_kernels.definition.experts import ExpertBlocks, ExpertsAdapter
from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.definition.precision import PRECISIONS
from smoa_kernels.kernels.spec import Key

DROPOUT = 0.1


class Operands:
    """A layer of a key's sizes, its blocks cut evenly from granules, and activations.

    Args:
        key: the sizes.
        form: the kernel's form that a launch should take. If "contiguous" is in it the granules keep their order, else
            it is random, for each expert another.
        device: of the tensors.
        filled: whether to fill them with random numbers, the same at each call; False is for launches that are only
            captured, and for the "meta" device.
    """

    def __init__(self, key: Key, form: str, device: torch.device, *, filled: bool = True) -> None:
        self.key, self.form, self.device, self.filled = key, form, device, filled
        self.dtype = PRECISIONS[key.dtype].dtype
        factors = "fp32" if "fp32 factors" in form else key.factors or key.dtype
        self.factor_dtype = PRECISIONS[factors].dtype
        self._order = torch.Generator().manual_seed(0)
        self._generator = torch.Generator(device).manual_seed(0) if filled else None

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers in the key's dtype, or another."""
        dtype = dtype or self.dtype
        if not self.filled:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype)

    def labels(self, features: int) -> Tensor:
        """A block for each of `features` coordinates, on the CPU."""
        granules = features // self.key.granule
        even = torch.arange(granules) * self.key.blocks // granules
        if "contiguous" not in self.form:
            even = even[torch.randperm(granules, generator=self._order)]
        return even.repeat_interleave(self.key.granule)

    def partition(self, rows: int, cols: int) -> BlockPartition:
        """A partition of a weight of this shape into the key's blocks."""
        labels = self.labels(rows), self.labels(cols)
        return BlockPartition.from_labels(*labels, self.key.blocks).to(self.device)

    def ranks(self) -> Tensor:
        """The rank of each block: all have the key's."""
        return torch.full((self.key.blocks,), self.key.rank, dtype=torch.int32, device=self.device)

    def adapter(self) -> PackedAdapter:
        """The adapter; for a transposed key the transposed adapter of the layer whose dX is computed."""
        key = self.key
        rows, cols = key.out_features, key.in_features
        if key.transposed:
            rows, cols = cols, rows
        adapter = PackedAdapter(
            weight=self.tensor(rows, cols) / cols**0.5,
            A=self.tensor(key.rank, cols, dtype=self.factor_dtype),
            B=self.tensor(rows, key.rank, dtype=self.factor_dtype) / key.rank**0.5,
            partition=self.partition(rows, cols),
            ranks=self.ranks(),
            scaling=torch.ones((), device=self.device),
            block_ranks=[key.rank] * key.blocks,
        )
        return adapter.T if key.transposed else adapter

    def experts(self) -> tuple[ExpertsAdapter, Tensor, Tensor, Tensor]:
        """An adapter of four experts, the ends of their pairs, x and dY, with `tokens` pairs per expert on average."""
        key, device, experts = self.key, self.device, 4
        rows, cols = key.out_features, key.in_features
        if key.transposed:
            rows, cols = cols, rows
        row_block, col_block = (
            torch.stack([self.labels(size) for _ in range(experts)]) for size in (rows, cols)
        )
        blocks = ExpertBlocks.from_labels(row_block, col_block, key.blocks)
        known = vars(blocks).items()
        tensors: dict[str, Any] = {name: one.to(device) for name, one in known if isinstance(one, Tensor)}
        blocks = replace(blocks, **tensors)
        adapter = ExpertsAdapter(
            weight=self.tensor(experts, rows, cols) / cols**0.5,
            A=self.tensor(experts, key.rank, cols, dtype=self.factor_dtype),
            B=self.tensor(experts, rows, key.rank, dtype=self.factor_dtype) / key.rank**0.5,
            blocks=blocks,
            ranks=self.ranks(),
            scaling=torch.ones((), device=device),
        )
        if key.transposed:
            adapter = adapter.T
        # The split is uneven: one expert gets nearly all pairs that another lacks.
        pairs = experts * key.tokens
        ends = torch.tensor([key.tokens, 2 * key.tokens + key.tokens // 2, 3 * key.tokens, pairs]).int()
        x, dy = self.tensor(pairs, key.in_features), self.tensor(pairs, key.out_features)
        return adapter, ends.to(device), x, dy
