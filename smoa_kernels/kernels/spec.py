"""What is known of a kernel besides its code: one `Kernel` in the kernel's own file, read by launches, tuner and audit.

Tiles are named by the dimension they cut: tokens T, rows N, columns C of W0, slots P of a padded block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..definition.precision import PRECISIONS, Precision
from .architectures import Architecture, facts

__all__ = [
    "ALGORITHM_KEYS",
    "GRANULE",
    "PARTIAL_RANKS",
    "Config",
    "Kernel",
    "Key",
    "bucket",
    "granule_of",
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
        factors: dtype of A and B, as `dtype`; empty where a kernel does not see them.
        dropout: the kernel takes another form under dropout: it draws the mask, or reads x gathered with it.
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
    """The next power of two: one choice serves 2049 to 4096 tokens, and was made for 4096."""
    return 1 << max(tokens - 1, 0).bit_length()


@functools.cache  # asked at every call of a layer
def padding_multiple(sizes: tuple[int, ...]) -> int:
    """The number to whose multiples blocks of these sizes are padded."""
    return WIDE_PADDING if max(sizes) > NARROW_PADDING else NARROW_PADDING


def partial_width(rank: int) -> int:
    """R, the width of block_grad's partials: the rank ρ rounded up to whole stores of 128 bits."""
    return math.ceil(rank / PARTIAL_RANKS) * PARTIAL_RANKS


@functools.cache  # asked at every call of a layer
def granule_of(granularity: int, shape: tuple[int, ...]) -> int:
    """Adjacent coordinates that kernels take as one: `GRANULE` where blocks and sides consist of so many, else 1."""
    return 1 if any(size % GRANULE for size in (granularity, *shape)) else GRANULE


@dataclass(frozen=True)
class Config:
    """Launch parameters of a kernel. A tile is named by the dimension that it cuts; 0 where a kernel has none of it.

    Attributes:
        block_t: tokens, or pairs of a token and an expert.
        block_n: rows of W0.
        block_c: columns of W0.
        block_d: columns of W0 at a step that makes ΔW in registers.
        block_p: slots of a padded block.
        block_r: most ranks at a time.
        block: results of a sum.
        group_t: tiles of tokens that are walked together for the L2 cache.
        split: programs that share a sum; 0: as many as fill the device.
        wgmma: Hopper's tensor cores, which read shared memory while the program goes on, transposed half types too.
        num_warps: of a program.
        num_stages: steps of a loop whose loads are on their way at a time.
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
        """What is not 0, by name."""
        return {name: value for name, value in vars(self).items() if value}

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told at a launch. It may fuse a product and a sum: from Triton 3.10 on only if asked."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def on_amd(configs: Sequence[Config]) -> tuple[Config, ...]:
    """For 64 threads a warp and 64 KiB of shared memory: half the warps, two stages."""
    return tuple(
        replace(config, num_warps=max(1, config.num_warps // 2), num_stages=min(2, config.num_stages))
        for config in configs
    )


def tile_divides(config: Config, key: Key) -> bool:
    """Whether tiles of `block_n` rows and `block_c` columns divide the padded blocks."""
    return bool(key.padded_out % config.block_n == 0 and key.padded_in % config.block_c == 0)


@dataclass(frozen=True)
class Kernel:
    """One kernel as launches and the tuner see it.

    Attributes:
        name: in tuning tables.
        fn: the `@triton.jit` function.
        shipped: the configurations that ship for an architecture and a precision, largest tile first.
        fits: whether a configuration can run a key.
        choose: the one to launch where nothing was measured, of those that fit: from these, the key and the device's
            multiprocessors.
    """

    name: str
    fn: Any
    shipped: Callable[[Architecture, Precision], tuple[Config, ...]]
    fits: Callable[[Config, Key], bool] = lambda config, key: True
    choose: Callable[[Sequence[Config], Key, int], Config] = lambda fitting, key, multiprocessors: fitting[0]

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
