"""What is known of a kernel besides its code: one `Kernel` in the kernel's own file, read by launches, tuner and audit.

Tiles are named by the dimension they cut: tokens T, rows N, columns C of W0, slots P of a padded block.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..definition.experts import ExpertBlocks, ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.precision import PRECISIONS, Precision
from ..definition.reference import reference_delta_weight
from .architectures import Architecture, facts

__all__ = [
    "ALGORITHM_KEYS",
    "GRANULE",
    "INDEX",
    "LABELS",
    "ONE_NUMBER",
    "PARTIAL_RANKS",
    "Config",
    "Kernel",
    "Key",
    "Operands",
    "Work",
    "bucket",
    "delta_weight",
    "granule_of",
    "in_dtype",
    "padding_multiple",
    "partial_width",
    "tile_divides",
]

ALGORITHM_KEYS: Mapping[str, tuple[str, ...]] = {
    "forward": ("merged", "split", "fused", "eager"),
    "input_gradient": ("merged", "fused", "eager"),
    "factor_gradients": ("block_grad", "eager"),
}
"""Keys whose choice is an algorithm, and which there are; "eager" leaves it to torch's operators."""

GRANULE = 8
"""Adjacent coordinates that kernels read and write as one: 16 bytes of half types."""

# In the padded block-major layout each block's width is a multiple of the wide padding, which every shipped tile
# divides, or of the narrow one where no block is wider than that.
WIDE_PADDING, NARROW_PADDING = 128, 64
PARTIAL_RANKS = 4  # partials of dA and dB are padded to a multiple of this many ranks: 128 bits of float32


class Key(NamedTuple):
    """What a choice depends on besides the GPU; 0 where a kernel does not see a size.

    Attributes:
        kernel: one of `KERNELS`, or of `ALGORITHM_KEYS` where the choice is an algorithm.
        dtype: one of `precision.KERNEL_PRECISIONS`.
        rank: ρ, rows of A.
        blocks: K.
        out_features: N.
        in_features: C.
        tokens: T, from :func:`bucket`.
        padded_out: width that each block of rows is padded to.
        padded_in: likewise for columns.
        transposed: the kernel reads W0 or ΔW along the other side, as dX does.
        granule: from :func:`granule_of`; 1 where a kernel has no form for `GRANULE`.
    """

    kernel: str
    dtype: str
    rank: int = 0
    blocks: int = 0
    out_features: int = 0
    in_features: int = 0
    tokens: int = 0
    padded_out: int = 0
    padded_in: int = 0
    transposed: bool = False
    granule: int = 1


def bucket(tokens: int) -> int:
    """The next power of two: one choice serves 2049 to 4096 tokens, and was made for 4096."""
    return 1 << max(tokens - 1, 0).bit_length()


@functools.cache  # asked at every call of a layer
def padding_multiple(sizes: tuple[int, ...]) -> int:
    """The number to whose multiples blocks of these sizes are padded."""
    return WIDE_PADDING if max(sizes) > NARROW_PADDING else NARROW_PADDING


def partial_width(rank: int) -> int:
    """R, the width of block_grad's partials: the rank ρ rounded up to whole stores of 128 bits."""
    return math.ceil(rank / PARTIAL_RANKS) * PARTIAL_RANKS


def granule_of(granularity: int, shape: Sequence[int]) -> int:
    """Adjacent coordinates that kernels take as one: `GRANULE` where blocks and sides consist of so many, else 1."""
    return 1 if any(size % GRANULE for size in (granularity, *shape)) else GRANULE


class Operands:
    """A layer of a key's sizes, its blocks cut evenly from granules in random order, and activations.

    Args:
        key: the sizes.
        form: which of the kernel's forms a launch should take.
        device: where.
        filled: with random numbers, the same at each call; False leaves memory as it is, for launches that are only
            captured.
    """

    def __init__(self, key: Key, form: str, device: torch.device, *, filled: bool = True) -> None:
        self.key, self.form, self.device, self.filled = key, form, device, filled
        self.dtype, self.allow_tf32 = PRECISIONS[key.dtype].dtype, key.dtype == "tf32"
        self.factor_dtype = torch.float32 if "fp32 factors" in form else self.dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers in the key's dtype, or another."""
        dtype = dtype or self.dtype
        if not self.filled:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype)

    def labels(self, features: int) -> Tensor:
        """A block for each of `features` coordinates."""
        granules = features // self.key.granule
        even = torch.arange(granules, device=self.device) * self.key.blocks // granules
        order = torch.randperm(granules, generator=self._generator, device=self.device)
        return even[order].repeat_interleave(self.key.granule)

    def partition(self, rows: int, cols: int) -> BlockPartition:
        """A partition of a weight of this shape into the key's blocks."""
        return BlockPartition.from_labels(self.labels(rows), self.labels(cols), self.key.blocks)

    def ranks(self) -> Tensor:
        """The rank of each block: all have the key's."""
        return torch.full((self.key.blocks,), self.key.rank, dtype=torch.int32, device=self.device)

    def adapter(self) -> PackedAdapter:
        """The parts of W_eff; for a transposed key those of the layer whose dX it is, seen from dX's side."""
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
        )
        return adapter.T if key.transposed else adapter

    def experts(self) -> tuple[ExpertsAdapter, Tensor, Tensor, Tensor]:
        """An adapter of four experts, where their pairs end, x and dY: `tokens` pairs an expert on average.

        Blocks are contiguous where the form says so, else in an order of each expert's own.
        """
        key, device, experts = self.key, self.device, 4
        rows, cols = key.out_features, key.in_features
        if key.transposed:
            rows, cols = cols, rows
        row_block, col_block = (
            torch.stack([self.labels(size) for _ in range(experts)]) for size in (rows, cols)
        )
        if "contiguous" in self.form:
            row_block, col_block = row_block.sort(1).values, col_block.sort(1).values
        blocks = ExpertBlocks.from_labels(row_block, col_block, key.blocks)
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
        # One expert has nearly all that another lacks.
        pairs = experts * key.tokens
        ends = torch.tensor([key.tokens, 2 * key.tokens + key.tokens // 2, 3 * key.tokens, pairs]).int()
        x, dy = self.tensor(pairs, key.in_features), self.tensor(pairs, key.out_features)
        return adapter, ends.to(device), x, dy


AnAdapter = TypeVar("AnAdapter", PackedAdapter, ExpertsAdapter)


def in_dtype(adapter: AnAdapter, dtype: torch.dtype) -> AnAdapter:
    """The adapter with its weight and factors in `dtype`."""
    return replace(adapter, weight=adapter.weight.to(dtype), A=adapter.A.to(dtype), B=adapter.B.to(dtype))


def delta_weight(adapter: PackedAdapter, dtype: torch.dtype) -> Tensor:
    """ΔW (N, C) by the definition, computed in `dtype`."""
    a = in_dtype(adapter, dtype)
    return reference_delta_weight(a.weight, a.A, a.B, a.partition, a.ranks, scaling=a.scaling)


@dataclass(frozen=True)
class Config:
    """Launch parameters of a kernel; a subclass per kernel names its tiles, `num_warps` and `num_stages`."""

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told at a launch. It may fuse a product and a sum: from Triton 3.10 on only if asked."""
        own = {name: value for name, value in vars(self).items() if name.startswith("num_")}
        return own | {"enable_fp_fusion": True}


AConfig = TypeVar("AConfig", bound=Config)


def on_amd(configs: Sequence[AConfig]) -> tuple[AConfig, ...]:
    """For 64 threads a warp and 64 KiB of shared memory: half the warps, two stages."""
    return tuple(
        replace(config, num_warps=max(1, config.num_warps // 2), num_stages=min(2, config.num_stages))  # type: ignore[attr-defined,call-arg]
        for config in configs
    )


Work: TypeAlias = tuple[Callable[[Any], Sequence[Tensor]], Callable[[torch.dtype], Sequence[Tensor]]]
"""Launches with a configuration and returns what was computed; the same by the definition, in a dtype."""


def tile_divides(config: Any, key: Key) -> bool:
    """Whether tiles of `block_n` rows and `block_c` columns divide the padded blocks."""
    return bool(key.padded_out % config.block_n == 0 and key.padded_in % config.block_c == 0)


@dataclass(frozen=True)
class Kernel:
    """One kernel as launches, the tuner and the audit see it.

    Attributes:
        name: in options, tuning tables and audit records.
        fn: the `@triton.jit` function.
        config: the class of its launch parameters.
        role: "matmul", "gather" or "copy": which rules of the audit apply.
        shipped: the configurations that ship for an architecture and a precision, largest tile first.
        workload: what to launch and to compare with, over the operands of a key.
        forms: names of the constexpr paths of a launch. The audit compiles each, the tuner times the first. "r64" in a
            name is ρ, else 16; "fp32 factors" are those that PEFT keeps; "transposed" reads along the other side;
            "granules" are coordinates that the partition keeps together.
        narrow: pointers that may be accessed below 128 bits, each with its reason.
        fits: whether a configuration can run a key.
        choose: the one to launch where nothing was measured, of those that fit: from these, the key and the device's
            multiprocessors.
    """

    name: str
    fn: Any
    config: type[Config]
    role: Literal["matmul", "gather", "copy"]
    shipped: Callable[[Architecture, Precision], tuple[Config, ...]]
    workload: Callable[[Operands], Work]
    forms: tuple[str, ...]
    narrow: Mapping[str, str] = field(default_factory=dict)
    fits: Callable[[Any, Key], bool] = lambda config, key: True
    choose: Callable[[Sequence[Any], Key, int], Config] = lambda fitting, key, multiprocessors: fitting[0]

    def default(self, key: Key, arch: str, multiprocessors: int) -> Config:
        """Launch parameters where nothing was measured. Always answers, with a configuration that the audit compiles.

        Args:
            key: the problem, its tokens bucketed.
            arch: as the compiler spells it, for example "sm_90".
            multiprocessors: of the device.
        """
        configs = self.shipped(facts(arch), PRECISIONS[key.dtype])
        fitting = [config for config in configs if self.fits(config, key)]
        return self.choose(fitting, key, multiprocessors) if fitting else configs[-1]

    def representative(self, dtype: str, form: str) -> Key:
        """A key that makes a launch take `form`, and compiles to what keys of real sizes do.

        Its sizes are multiples of 16 and more than one tile of each kind.
        """
        named = re.search(r"\br(\d+)\b", form)
        rank, blocks, tokens = int(named[1]) if named else 16, 2, 512
        transposed, granule = "transposed" in form, GRANULE if "granules" in form else 1
        rows, cols = (2048, 1024) if transposed else (1024, 2048)
        padded = rows // blocks, cols // blocks
        return Key(self.name, dtype, rank, blocks, rows, cols, tokens, *padded, transposed, granule)


# Why a pointer may be narrow.
LABELS = "labels and ranks: a few bytes per coordinate, looked up"
INDEX = "indices and offsets: one per coordinate or block"
ONE_NUMBER = "one number"
