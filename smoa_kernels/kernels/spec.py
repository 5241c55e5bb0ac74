"""`Kernel`, the specification of a kernel beside its code: rows of configurations, and the space that a tuner searches.

Tiles are named by the dimension they cut: tokens T, rows N, columns C of W0, slots P of a padded block.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

from ..definition.precision import PRECISIONS, Precision
from .architectures import Architecture, limits

ALGORITHM_KEYS: Mapping[str, tuple[str, ...]] = {
    "forward": ("merged", "split", "fused"),
    "input_gradient": ("merged", "split", "fused"),
}
"""Keys whose choice is an algorithm, with the algorithms."""

GRANULE = 8
"""Adjacent coordinates that kernels read and write as one: 16 bytes of half types."""

STAND_INS: dict[int, int] = {}
"""Numbers of tokens that stand for others where launch parameters are chosen (`table.chosen_for`)."""

HALF = ("bf16", "fp16")  # precisions of a `Row`

PARTIAL_RANKS = 4  # partials of dA and dB are padded to a multiple of this many ranks: 128 bits of float32


class Key(NamedTuple):
    """The problem that a choice is made for. A size is 0 if the kernel's choice does not depend on it.

    Attributes:
        kernel: name of a kernel, or one of `ALGORITHM_KEYS` if the choice is an algorithm.
        dtype: one of `precision.KERNEL_PRECISIONS`.
        rank: ρ, rows of A.
        blocks: K.
        out_features: N.
        in_features: C.
        tokens: T, from :func:`bucket`.
        padded_out: width that each block of rows is padded to.
        padded_in: width that each block of columns is padded to.
        transposed: the kernel reads W0 or ΔW across its rows, as dX does.
        granule: from :func:`granule_of`; 1 if a kernel has no form for `GRANULE`. For an algorithm, `GRANULE` if blocks
            are slices of one size, else 1.
        factors: dtype of A and B, as `dtype`; empty if a kernel does not read them.
        dropout: the kernel takes another form under dropout, because it draws the mask.
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
    factors: str = ""
    dropout: bool = False


def bucket(tokens: int) -> int:
    """The next power of two: the choice for 4096 tokens also serves 2049 to 4095."""
    return 1 << max(STAND_INS.get(tokens, tokens) - 1, 0).bit_length()


@functools.cache  # asked at every call of a layer
def block_width(sizes: tuple[int, ...]) -> int:
    """P, the width that blocks of these sizes are padded to: a multiple of 64, the narrowest tile."""
    return math.ceil(max(sizes) / 64) * 64


def partial_width(rank: int) -> int:
    """R, the width of contract's partials: the rank ρ rounded up to whole stores of 128 bits."""
    return math.ceil(rank / PARTIAL_RANKS) * PARTIAL_RANKS


@functools.cache  # asked at every call of a layer
def granule_of(granularity: int, shape: tuple[int, ...]) -> int:
    """Adjacent coordinates that kernels read as one: `GRANULE` if it divides all blocks and both sides, else 1."""
    return 1 if any(size % GRANULE for size in (granularity, *shape)) else GRANULE


@dataclass(frozen=True)
class Config:
    """Launch parameters of a kernel. A tile is named by the dimension that it cuts; 0 if the kernel has no such tile.

    Attributes:
        block_t: tokens, or pairs of a token and an expert.
        block_n: rows of W0.
        block_c: columns of W0.
        block_d: columns of W0 in a step that makes ΔW in registers.
        block_p: slots of a padded block.
        block_r: most ranks at a time.
        block: results of a sum.
        group_t: tiles of tokens that are walked together for the L2 cache.
        split: programs that share a sum.
        wgmma: use Hopper's asynchronous tensor-core instruction, which reads shared memory.
        num_warps: warps of a program.
        num_stages: steps of a loop whose loads are in flight at the same time.
    """

    block_t: int = 0
    block_n: int = 0
    block_c: int = 0
    block_d: int = 0
    block_p: int = 0
    block_r: int = 0
    block: int = 0
    group_t: int = 0
    split: int = 0
    wgmma: bool = False
    num_warps: int = 4
    num_stages: int = 1

    def to_json(self) -> dict[str, int]:
        """The fields that are not 0, by name."""
        return {name: value for name, value in vars(self).items() if value}

    def __str__(self) -> str:
        names = {name: name.removeprefix("block_").removeprefix("num_") for name in self.to_json()}
        return " ".join(f"{short}={getattr(self, name)}" for name, short in names.items())

    @property
    def options(self) -> dict[str, Any]:
        """Options for the compiler. Triton from 3.10 on fuses a product and a sum only with `enable_fp_fusion`."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Row:
    """Configurations that ship; the first row of a kernel that matches is the one that counts.

    Attributes:
        architectures: for which it holds, from `architectures.py`; none for all.
        precisions: for which it holds; none for all.
        configs: the configurations, largest tile first.
        before: the first Triton that does not need the row, "3.9"; empty for a row that all need.
    """

    architectures: tuple[str, ...]
    precisions: tuple[str, ...]
    configs: tuple[Config, ...]
    before: str = ""


@dataclass(frozen=True)
class Kernel:
    """A kernel's specification beside its code, for its launches, the tuner and the audit.

    Attributes:
        name: in tuning tables.
        fn: the `@triton.jit` function.
        rows: what ships for an architecture, a precision and a Triton.
        choose: picks the configuration if nothing was measured, from those that ship, the key and the device's number
            of multiprocessors.
        space: values of a configuration's fields that the tuner tries beside those that ship.
        fits: which of their combinations make sense for a key; the compiler then drops what needs too much.
        traffic: bytes that a launch moves between its programs and the L2 cache or memory, to rank candidates.
    """

    name: str
    fn: Any
    rows: tuple[Row, ...]
    choose: Callable[[Sequence[Config], Key, int], Config] = lambda shipped, key, multiprocessors: shipped[0]
    space: Mapping[str, Sequence[int]] = field(default_factory=dict)
    fits: Callable[[Config, Key], bool] = lambda config, key: True
    traffic: Callable[[Config, Key], float] = lambda config, key: 1.0

    def shipped(self, arch: Architecture, precision: Precision, triton: str = "") -> tuple[Config, ...]:
        """The configurations that ship, largest tile first.

        Args:
            arch: for which they are compiled.
            precision: of the products.
            triton: version of the compiler; the installed one's if empty.
        """
        version = release(triton or import_module("triton").__version__)
        return next(
            row.configs
            for row in self.rows
            if arch.name in (row.architectures or (arch.name,))
            and precision.name in (row.precisions or (precision.name,))
            and (not row.before or version < release(row.before))
        )

    def default(self, key: Key, arch: str, multiprocessors: int) -> Config:
        """Choose launch parameters without measurements. The result is always a configuration that the audit compiles.

        Args:
            key: the problem, its tokens bucketed.
            arch: as the compiler spells it, for example "sm_90".
            multiprocessors: of the device.
        """
        return self.choose(self.shipped(limits(arch), PRECISIONS[key.dtype]), key, multiprocessors)

    def candidates(self, key: Key, arch: str) -> tuple[Config, ...]:
        """What a table may choose for a key: the configurations that ship, then the others of the search space."""
        shipped = self.shipped(limits(arch), PRECISIONS[key.dtype])
        values: Iterator[dict[str, Any]] = (
            dict(zip(self.space, each, strict=True)) for each in itertools.product(*self.space.values())
        )
        found = (replace(shipped[0], **each) for each in values)
        return tuple(dict.fromkeys((*shipped, *(config for config in found if self.fits(config, key)))))


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of a Triton's version."""
    return tuple(int(part) for part in version.split(".")[:2])
