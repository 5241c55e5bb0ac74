"""From layers and batches to the keys that a training step will ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..backends import MOST_TRITON_RANKS
from ..backends.algorithms import choose_algorithm
from ..definition.precision import KERNEL_PRECISIONS, PRECISIONS
from ..kernels import KERNELS
from ..kernels.architectures import ARCHITECTURES, architecture, multiprocessors
from ..kernels.common import block_width
from ..kernels.sizes import GRANULE, bucket
from ..kernels.spec import ALGORITHM_KEYS, Config, Key
from .gpus import Gpu, device_gpu
from .grad_tiling import gradient_parts
from .problem import Problem
from .space import algorithm_job, kernel_job
from .tuner import Job

__all__ = ["TUNABLE", "Layer", "Target", "job", "jobs", "keys"]

TUNABLE = (*KERNELS, *ALGORITHM_KEYS)
"""What can be tuned, algorithms last: they are timed with the launch parameters that won."""

# Far above where the one-kernel form can win; at more tokens its launch parameters do not matter.
MOST_FUSED_TOKENS = 1024


@dataclass(frozen=True)
class Layer:
    """One adapted layer and one batch.

    Attributes:
        out_features: N.
        in_features: C.
        tokens: T.
        dtype: one of `precision.KERNEL_PRECISIONS`.
        rank: r, the budget of all blocks.
        blocks: K.
        granule: adjacent coordinates that blocks keep together.
    """

    out_features: int
    in_features: int
    tokens: int
    dtype: str = "bf16"
    rank: int = 16
    blocks: int = 4
    granule: int = 1

    def __post_init__(self) -> None:
        for name in ("out_features", "in_features", "tokens", "rank", "blocks", "granule"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in KERNEL_PRECISIONS:
            raise ValueError(f"dtype must be one of {', '.join(KERNEL_PRECISIONS)}, got {self.dtype!r}")
        if self.blocks > min(self.out_features, self.in_features):
            raise ValueError(
                f"blocks must be at most {min(self.out_features, self.in_features)} for a layer of "
                f"{self.out_features}x{self.in_features}, got {self.blocks}"
            )
        if self.max_rank > MOST_TRITON_RANKS:
            raise ValueError(
                f"rank must be at most {MOST_TRITON_RANKS * self.blocks} in {self.blocks} blocks, of which the "
                f"kernels take {MOST_TRITON_RANKS} each, got {self.rank}"
            )

    @property
    def max_rank(self) -> int:
        """ρ."""
        return -(-self.rank // self.blocks)


def keys(layer: Layer) -> Iterator[Key]:
    """What one training step of a layer asks for, dropout and none."""
    n, c, t = layer.out_features, layer.in_features, bucket(layer.tokens)
    rows, cols = (block_width((-(-features // layer.blocks),)) for features in (n, c))
    common = (layer.dtype, layer.max_rank, layer.blocks)
    # What copies knows float32, not how it is multiplied.
    copied = "fp32" if layer.dtype == "tf32" else layer.dtype
    problem = Problem(
        layer.tokens,
        n,
        c,
        layer.blocks,
        layer.rank,
        PRECISIONS[layer.dtype].dtype,
        granule=layer.granule,
    )
    granule = GRANULE if problem.in_place else 1
    # What is gathered in the backward is gathered in parts where a batch is long, but under dropout.
    parts = gradient_parts(problem)
    yield Key("modulated_weight", *common, n, c)
    yield Key("modulated_blocks", *common, n, c, 0, rows, cols, granule=granule)
    yield Key("permute", copied, 0, layer.blocks, 0, c, t, 0, cols, granule=granule)
    if not problem.in_place:
        yield Key("permute", copied, 0, layer.blocks, 0, n, t, 0, rows)
        for tokens in dict.fromkeys(map(bucket, parts)):
            yield Key("permute", copied, 0, layer.blocks, 0, c, tokens, 0, cols)
            yield Key("permute", copied, 0, layer.blocks, 0, n, tokens, 0, rows)
    yield Key("block_matmul", *common, n, c, t, rows, cols, granule=granule)
    yield Key("block_matmul", *common, c, n, t, cols, rows, True, granule=granule)
    if t <= MOST_FUSED_TOKENS:
        yield Key("fused_linear", *common, n, c, t)
        yield Key("fused_linear", *common, c, n, t, transposed=True)
        for features in (n, c):
            yield Key("sum_partials", copied, out_features=features, tokens=t)
    for tokens in dict.fromkeys((t, bucket(parts[0]))):
        yield Key("block_grad", *common, n, c, tokens, rows, cols, granule=granule)
    # Factors are kept in the layer's dtype, or in float32 as PEFT does.
    for factors in (copied, "fp32"):
        for features in (n, c):
            yield Key("sum_partials", factors, out_features=layer.max_rank, tokens=bucket(features))
    yield Key("forward", *common, n, c, t, granule=granule)
    yield Key("input_gradient", *common, n, c, t, granule=granule)


@dataclass(frozen=True)
class Target:
    """What is tuned for.

    Attributes:
        gpu: for the cost model.
        arch: as the compiler spells it.
        multiprocessors: of the device, of which `gpu` may be only the nearest published one.
    """

    gpu: Gpu
    arch: str
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """A device that is here."""
        return cls(device_gpu(device), architecture(device), multiprocessors(device))

    @classmethod
    def published(cls, gpu: Gpu) -> Target:
        """A GPU that is not here."""
        return cls(gpu, gpu.arch, gpu.multiprocessors)

    @property
    def audited(self) -> str:
        """The audited architecture that stands for its own."""
        return self.arch if self.arch in ARCHITECTURES else self.gpu.arch


RuledOut = Mapping[tuple[str, str, Config], str]
"""From `space.broken`."""


def jobs(
    layers: Sequence[Layer],
    target: Target,
    *,
    kernels: Sequence[str] = TUNABLE,
    ruled_out: RuledOut | None = None,
) -> list[Job]:
    """One job a distinct key of the layers, kernels before algorithms.

    What is in `ruled_out` is not timed. Where it is None, only the shipped configurations are tried.
    """
    wanted = dict.fromkeys(key for layer in layers for key in keys(layer) if key.kernel in kernels)
    ordered = sorted(wanted, key=lambda key: key.kernel in ALGORITHM_KEYS)
    return [job(key, target, ruled_out) for key in ordered]


def job(key: Key, target: Target, ruled_out: RuledOut | None = None) -> Job:
    """What to try for one key; arguments as for :func:`jobs`."""
    if key.kernel in ALGORITHM_KEYS:
        return algorithm_job(key, choose_algorithm(key.kernel, key.tokens, key.rank, key.dtype, target.arch))
    return kernel_job(key, target.arch, target.multiprocessors, ruled_out=ruled_out, stand_in=target.audited)
