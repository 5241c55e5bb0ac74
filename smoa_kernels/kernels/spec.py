"""`Kernel`, the specification of a kernel beside its code: rows of configurations, and the space that a tuner searches.

Tiles are named by the dimension they cut: tokens T, rows N, columns C of W0, slots P of a padded block.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

from ..definition.precision import PRECISIONS, Precision
from .architectures import Architecture, limits

ALGORITHM_KEYS = ("forward", "input_gradient")
"""Keys whose choice is an algorithm, one of `backends.triton.ALGORITHMS`."""

GRANULE = 8
"""Adjacent coordinates that kernels read and write as one: 16 bytes of half types."""

STAND_INS: dict[int, int] = {}
"""Numbers of tokens that stand for others where launch parameters are chosen (`table.override`)."""

HALF = ("bf16", "fp16")  # precisions of a `Row`

PARTIAL_RANKS = 4  # partials of dA and dB are padded to a multiple of this many ranks: 128 bits of float32


class Key(NamedTuple):
    """The problem that a choice is made for. A size is 0 if the kernel's choice does not depend on it."""

    kernel: str  # name of a kernel, or one of `ALGORITHM_KEYS` if the choice is an algorithm
    dtype: str  # one of `precision.KERNEL_PRECISIONS`
    rank: int = 0  # ρ, rows of A
    blocks: int = 0  # K
    out_features: int = 0  # N
    in_features: int = 0  # C
    tokens: int = 0  # T, from :func:`bucket`
    padded_out: int = 0  # width that each block of rows is padded to
    padded_in: int = 0  # width that each block of columns is padded to
    transposed: bool = False  # the kernel reads W0 or ΔW across its rows, as dX does
    # From :func:`granule_of`; 1 if a kernel has no form for `GRANULE`. For an algorithm, `GRANULE` if blocks are slices
    # of one size, else 1.
    granule: int = 1
    factors: str = ""  # dtype of A and B, as `dtype`; empty if a kernel does not read them
    dropout: bool = False  # the kernel takes another form under dropout, because it draws the mask

    def __str__(self) -> str:
        """The key of a table's entry, "permute fp32 blocks=2 in_features=12": the fields that are not the default."""
        pairs = zip(self._fields, self, strict=True)
        sizes = (f"{name}={value}" for name, value in pairs if value != self._field_defaults.get(name, value))
        return " ".join((self.kernel, self.dtype, *sizes))


def bucket(tokens: int) -> int:
    """The next power of two: the choice for 4096 tokens also serves 2049 to 4095."""
    return 1 << max(STAND_INS.get(tokens, tokens) - 1, 0).bit_length()


@functools.cache  # asked at every call of a layer
def block_width(sizes: tuple[int, ...]) -> int:
    """P, the width that blocks of these sizes are padded to: a multiple of 64, the narrowest tile."""
    return math.ceil(max(sizes) / 64) * 64


def partial_width(rank: int) -> int:
    """R, the width of contract's partials: the rank ρ rounded up to stores of 128 bits."""
    return math.ceil(rank / PARTIAL_RANKS) * PARTIAL_RANKS


@functools.cache  # asked at every call of a layer
def granule_of(granularity: int, shape: tuple[int, ...]) -> int:
    """Adjacent coordinates that kernels read as one: `GRANULE` if it divides all blocks and both sides, else 1."""
    return 1 if any(size % GRANULE for size in (granularity, *shape)) else GRANULE


@dataclass(frozen=True)
class Config:
    """Launch parameters of a kernel. A tile is named by the dimension that it cuts; 0 if the kernel has none."""

    block_t: int = 0  # tokens, or pairs of a token and an expert
    block_n: int = 0  # rows of W0
    block_c: int = 0  # columns of W0
    block_d: int = 0  # columns of W0 in a step that makes ΔW in registers
    block_p: int = 0  # slots of a padded block
    block_r: int = 0  # most ranks at a time
    block: int = 0  # results of a sum
    group_t: int = 0  # tiles of tokens that are walked together for the L2 cache
    split: int = 0  # programs that share a sum
    wgmma: bool = False  # use Hopper's asynchronous tensor-core instruction, which reads shared memory
    num_warps: int = 4  # warps of a program
    num_stages: int = 1  # steps of a loop whose loads are in flight at the same time

    def to_json(self) -> dict[str, int]:
        """The fields that are not 0, by name."""
        return {name: value for name, value in vars(self).items() if value}

    def __str__(self) -> str:
        """The name of a choice in a table: "t=64 p=128 warps=2 stages=1"."""
        fields = self.to_json().items()
        return " ".join(
            f"{name.removeprefix('block_').removeprefix('num_')}={value}" for name, value in fields
        )

    @property
    def options(self) -> dict[str, Any]:
        """Options for the compiler. Triton from 3.10 on fuses a product and a sum only with `enable_fp_fusion`."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


class Row(NamedTuple):
    """Configurations that ship; the first row of a kernel that matches counts."""

    architectures: tuple[str, ...]  # for which it holds, from `architectures.py`; none for all
    precisions: tuple[str, ...]  # for which it holds; none for all
    configs: tuple[Config, ...]  # largest tile first
    before: str = ""  # the first Triton that does not need the row, "3.9"; empty for a row that all need


@dataclass(frozen=True)
class Kernel:
    """A kernel's specification beside its code, for its launches, the tuner and the audit."""

    name: str  # in tuning tables
    fn: Any  # the `@triton.jit` function
    rows: tuple[Row, ...]  # what ships for an architecture, a precision and a Triton
    # Picks what runs without measurements, from the configurations that ship, the key, the number of multiprocessors.
    choose: Callable[[Sequence[Config], Key, int], Config] = lambda shipped, key, multiprocessors: shipped[0]
    # Values of a configuration's fields that the tuner tries beside those that ship.
    space: Mapping[str, Sequence[int]] = field(default_factory=dict)
    # Which of their combinations make sense for a key; the compiler then drops what needs too much.
    fits: Callable[[Config, Key], bool] = lambda config, key: True
    # Bytes that a launch moves between its programs and the L2 cache or memory, to rank candidates.
    traffic: Callable[[Config, Key], float] = lambda config, key: 1.0

    def shipped(self, arch: Architecture, precision: Precision, triton: str = "") -> tuple[Config, ...]:
        """The configurations that ship for a Triton (if empty, the installed version), largest tile first."""
        version = release(triton or import_module("triton").__version__)
        return next(
            row.configs
            for row in self.rows
            if arch.name in (row.architectures or (arch.name,))
            and precision.name in (row.precisions or (precision.name,))
            and (not row.before or version < release(row.before))
        )

    def default(self, key: Key, arch: str, multiprocessors: int) -> Config:
        """Launch parameters without measurements, of those that the audit compiles, for a device of `arch`, "sm_90"."""
        return self.choose(self.shipped(limits(arch), PRECISIONS[key.dtype]), key, multiprocessors)

    def candidates(self, key: Key, arch: str) -> tuple[Config, ...]:
        """What a table may choose for a key: the configurations that ship, then the others of the search space."""
        shipped = self.shipped(limits(arch), PRECISIONS[key.dtype])
        values = (
            dict(zip(self.space, tiles, strict=True)) for tiles in itertools.product(*self.space.values())
        )
        configs = (replace(shipped[0], **fields) for fields in values)  # type: ignore[arg-type]  # wgmma stays
        return tuple(dict.fromkeys((*shipped, *(config for config in configs if self.fits(config, key)))))


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of a Triton's version."""
    return tuple(int(part) for part in version.split(".")[:2])
