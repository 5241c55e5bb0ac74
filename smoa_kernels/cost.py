"""Cost model: floating-point operations, bytes and predicted time of each way to run one layer.

Every way is a list of parts, one per kernel that a GPU would run, and every part is counted by the same
rules, ours and the peers' alike:

    time(part) = max(flops / rate, bytes / bandwidth),   time(way) = Σ time(part)

- A matrix product (m, k)·(k, n) costs 2·m·k·n flops, reads each operand once and writes its result once.
- An elementwise pass reads each of its inputs and writes each of its outputs once. Eager layers are counted
  as their authors wrote them: PEFT's `result + lora_B(lora_A(x)) * scaling` is two products and two passes.
- A GEMM that accumulates onto its output reads that output in its epilogue, after the last multiplication.
  The achieved rate was measured on GEMMs without such a read, so it is a part of its own that hides behind
  nothing.
- Gathers and builds of W_eff run at full bandwidth, products at the rate of a large GEMM, except those of the
  one-kernel form, which computes an operand inside its main loop (`FUSED_EFFICIENCY`). Launches cost nothing:
  at a few tokens, where they dominate, that flatters whatever has many parts, so the threshold for the
  one-kernel form errs on the low side.

Counting the adapter's y traffic (one write, one read) in full would give split 1.49 over frozen for 4096² where
this gives 1.46: by the rules above the write hides behind the block product.

Nothing here is measured. Every number is a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import torch

from .gpus import Gpu

__all__ = [
    "ALGORITHMS",
    "Estimate",
    "Part",
    "Problem",
    "backward_workspace",
    "backward_workspace_bytes",
    "choose_algorithm",
    "estimate",
    "fused_token_limit",
    "parts",
]

Pass = Literal["forward", "backward"]

ALGORITHMS = ("frozen", "lora", "hira", "paper_dense", "merged", "split", "fused", "expanded")
"""The frozen layer, the peers, and our four ways."""

BLOCK_PADDING = 128  # the padded block-major layout rounds each block up to a multiple of the widest tile,
NARROW_PADDING = 64  # or of this where no block is larger
FUSED_EFFICIENCY = 0.65  # of a large GEMM's rate: a goal, not a measurement
# above these ρ the one-kernel form cuts the rank into chunks and reads W0 for each of them
FUSED_MAX_RANK = 64
FUSED_MAX_RANK_IEEE = 16  # float32 products in IEEE hold their whole depth in registers
FUSED_TOKEN_TILE = 32  # the one-kernel form recomputes B·A once per tile of so many tokens
PARTIAL_RANKS = 16  # rows of block_grad's partials are padded to so many ranks
GRAD_TILE = 128  # block_grad writes one rank-sized partial per tile of so many rows or columns


@dataclass(frozen=True)
class Problem:
    """One adapted linear layer and one batch.

    Attributes:
        tokens: T, rows of x.
        out_features: N.
        in_features: C.
        num_blocks: K.
        rank: r, the budget of all blocks together.
        dtype: of x, W0 and the factors.
        dropout: probability, 0 where dropout is off or the layer is evaluating.

    Raises:
        ValueError: a size or probability out of range, or a dtype that is not floating point.

    Example:
        >>> problem = Problem(8192, 4096, 4096, num_blocks=4, rank=16)
        >>> problem.max_rank, problem.unit_flops
        (4, 274877906944)
    """

    tokens: int
    out_features: int
    in_features: int
    num_blocks: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        lowest = {"tokens": 0, "out_features": 1, "in_features": 1, "num_blocks": 1, "rank": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point, got {self.dtype}")

    @property
    def max_rank(self) -> int:
        """ρ, the rank of the largest block under the default split."""
        return math.ceil(self.rank / self.num_blocks)

    @property
    def weight_elements(self) -> int:
        """N·C."""
        return self.out_features * self.in_features

    @property
    def unit_flops(self) -> int:
        """2·T·N·C, one base GEMM."""
        return 2 * self.tokens * self.weight_elements

    def padded(self, features: int) -> int:
        """Width of the padded block-major layout of `features` evenly cut coordinates.

        Args:
            features: N or C.
        """
        widest = math.ceil(features / self.num_blocks)
        multiple = BLOCK_PADDING if widest > NARROW_PADDING else NARROW_PADDING
        return self.num_blocks * math.ceil(widest / multiple) * multiple

    def gathers(self, features: int) -> bool:
        """Whether the block-major layout is a copy: one block that fills its tiles is its own.

        Args:
            features: N or C.
        """
        return self.num_blocks > 1 or self.padded(features) != features


@dataclass(frozen=True)
class Part:
    """One kernel's worth of work.

    Attributes:
        name: what it computes.
        stage: "forward" or "backward".
        flops: floating-point operations.
        bytes: to and from memory.
        efficiency: share of a large GEMM's rate at which it computes.

    Example:
        >>> [part.name for part in parts(Problem(8192, 4096, 4096, num_blocks=4, rank=16), "frozen")]
        ['base GEMM', 'dX = dY·W']
    """

    name: str
    stage: Pass
    flops: int
    bytes: int
    efficiency: float = 1.0

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The longer of arithmetic and memory.

        Args:
            flops_per_second: a large GEMM's rate.
            bytes_per_second: memory's bandwidth.
        """
        return max(self.flops / (self.efficiency * flops_per_second), self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Estimate:
    """What one way to run a problem is predicted to cost on one GPU.

    Attributes:
        algorithm: one of :data:`ALGORITHMS`.
        parts: forward, then backward.
        flops_per_second: a large GEMM's rate.
        bytes_per_second: memory's bandwidth.

    Example:
        >>> from smoa_kernels.gpus import GPUS
        >>> problem = Problem(8192, 4096, 4096, num_blocks=4, rank=16)
        >>> split, frozen = (estimate(problem, GPUS["h100"], way) for way in ("split", "frozen"))
        >>> round(split.seconds() / frozen.seconds(), 2)
        1.46
    """

    algorithm: str
    parts: tuple[Part, ...]
    flops_per_second: float
    bytes_per_second: float

    def select(self, stage: Pass | Literal["both"]) -> tuple[Part, ...]:
        """The parts of the forward pass, the backward pass, or both.

        Args:
            stage: "forward", "backward" or "both".
        """
        return tuple(p for p in self.parts if stage in ("both", p.stage))

    def seconds(self, stage: Pass | Literal["both"] = "both") -> float:
        """Predicted time.

        Args:
            stage: "forward", "backward" or "both".
        """
        return sum(p.seconds(self.flops_per_second, self.bytes_per_second) for p in self.select(stage))

    def flops(self, stage: Pass | Literal["both"] = "both") -> int:
        """Floating-point operations.

        Args:
            stage: "forward", "backward" or "both".
        """
        return sum(p.flops for p in self.select(stage))

    def bytes(self, stage: Pass | Literal["both"] = "both") -> int:
        """Bytes to and from memory.

        Args:
            stage: "forward", "backward" or "both".
        """
        return sum(p.bytes for p in self.select(stage))


def estimate(problem: Problem, gpu: Gpu, algorithm: str, *, ieee: bool = True) -> Estimate:
    """Predict one algorithm on one GPU.

    Args:
        problem: the layer and the batch.
        gpu: one of :data:`smoa_kernels.gpus.GPUS` or :func:`smoa_kernels.gpus.match_gpu`'s answer.
        algorithm: one of :data:`ALGORITHMS`.
        ieee: float32 multiplies in IEEE float32 rather than TF32; half types and float64 ignore it.

    Raises:
        ValueError: an unknown algorithm, or a dtype that no GPU's table has.

    Example:
        >>> from smoa_kernels.gpus import GPUS
        >>> found = estimate(Problem(8192, 4096, 4096, num_blocks=4, rank=16), GPUS["h100"], "merged")
        >>> f"{found.seconds('forward') * 1e3:.2f} ms, predicted"
        '0.41 ms, predicted'
    """
    rate = gpu.flops_per_second(problem.dtype, ieee)
    return Estimate(algorithm, parts(problem, algorithm), rate, gpu.bytes_per_second)


def parts(problem: Problem, algorithm: str) -> tuple[Part, ...]:
    """The kernels that `algorithm` runs on `problem`, forward then backward.

    Args:
        problem: the layer and the batch.
        algorithm: one of :data:`ALGORITHMS`.

    Raises:
        ValueError: an unknown algorithm.

    Example:
        >>> problem = Problem(8192, 4096, 4096, num_blocks=4, rank=16)
        >>> [part.name for part in parts(problem, "split") if part.stage == "forward"]
        ['build ΔW blocks', 'gather x', 'block matmul', 'base GEMM', 'y, read to accumulate']
    """
    if algorithm not in _WAYS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    count = _Count(problem)
    _WAYS[algorithm](count)
    return tuple(sorted(count.parts, key=lambda part: part.stage != "forward"))


@dataclass
class _Count:
    """Collects parts by the rules at the top of this file; sizes are in elements."""

    p: Problem
    parts: list[Part] = field(default_factory=list)
    stage: Pass = "forward"

    def __post_init__(self) -> None:
        p = self.p
        self.x = p.tokens * p.in_features
        self.y = p.tokens * p.out_features
        self.w = p.weight_elements
        self.block_w = self.w // p.num_blocks  # the diagonal blocks
        self.x_blocks = p.tokens * p.padded(p.in_features)
        self.y_blocks = p.tokens * p.padded(p.out_features)
        self.factors = p.max_rank * (p.out_features + p.in_features)

    def add(
        self, name: str, flops: int, elements: int, extra_bytes: int = 0, efficiency: float = 1.0
    ) -> None:
        size = elements * self.p.dtype.itemsize + extra_bytes
        self.parts.append(Part(name, self.stage, flops, size, efficiency))

    def gemm(self, name: str, m: int, n: int, k: int) -> None:
        self.add(name, 2 * m * n * k, m * k + k * n + m * n)

    def elementwise(self, name: str, reads: int, writes: int, mask_bytes: int = 0) -> None:
        self.add(name, reads, reads + writes, mask_bytes)

    def base_forward(self) -> None:
        self.gemm("base GEMM", self.p.tokens, self.p.out_features, self.p.in_features)

    def base_backward(self) -> None:
        self.gemm("dX = dY·W", self.p.tokens, self.p.in_features, self.p.out_features)

    def build_weight(self) -> None:
        """W_eff = W0 ∘ (1 + s·mask·BA): one read, one write."""
        self.add("build W_eff", 2 * self.w * self.p.max_rank, 2 * self.w + self.factors)

    def build_blocks(self) -> None:
        self.add("build ΔW blocks", 2 * self.block_w * self.p.max_rank, 2 * self.block_w + self.factors)

    def block_matmul(self, name: str, source: int, target: int) -> None:
        self.add(name, self.p.unit_flops // self.p.num_blocks, source + self.block_w + target)

    def gather(self, name: str, features: int, dropout: bool = False) -> None:
        if self.p.gathers(features) or dropout:
            self.elementwise(name, self.p.tokens * features, self.p.tokens * self.p.padded(features))

    def factor_gradients(self) -> None:
        """Gather dY and x, accumulate G tile by tile, contract, and sum the rank-sized partials."""
        p = self.p
        self.gather("gather dY", p.out_features)
        self.gather("gather x", p.in_features, dropout=p.dropout > 0)
        partials = _partial_bytes(p)
        self.add(
            "block gradients",
            p.unit_flops // p.num_blocks + 4 * self.block_w * p.max_rank,
            self.x_blocks + self.y_blocks + self.block_w + self.factors,
            partials,
        )
        self.add("sum partials", partials // 4, self.factors, partials)

    def merged_dx(self) -> None:
        self.build_weight()
        self.base_backward()


def _frozen(c: _Count) -> None:
    c.base_forward()
    c.stage = "backward"
    c.base_backward()


def _lora(c: _Count) -> None:
    """PEFT: `result = result + lora_B(lora_A(dropout(x))) * scaling`."""
    T, N, C, r = c.p.tokens, c.p.out_features, c.p.in_features, c.p.rank
    c.base_forward()
    if c.p.dropout:
        c.elementwise("dropout", c.x, c.x, mask_bytes=c.x)
    c.gemm("h = x·Aᵀ", T, r, C)
    c.gemm("h·Bᵀ", T, N, r)
    c.elementwise("scale", c.y, c.y)
    c.elementwise("add to y", 2 * c.y, c.y)
    c.stage = "backward"
    c.elementwise("scale dY", c.y, c.y)
    c.gemm("dB", N, r, T)
    c.gemm("dh", T, r, N)
    c.gemm("dA", r, C, T)
    c.gemm("dh·A", T, C, r)
    if c.p.dropout:
        c.elementwise("dropout backward", c.x, c.x, mask_bytes=c.x)
    c.base_backward()
    c.elementwise("add to dX", 2 * c.x, c.x)


def _hira(c: _Count) -> None:
    """PEFT: `result + F.linear(dropout(x), W0 * (Aᵀ Bᵀ)ᵀ)`, K = 1 whatever the problem says."""
    N, C, r = c.p.out_features, c.p.in_features, c.p.rank
    c.base_forward()
    c.gemm("BA", N, C, r)
    c.elementwise("W0 ∘ BA", 2 * c.w, c.w)
    _dense_delta(c)
    c.elementwise("G ∘ W0", 2 * c.w, c.w)
    c.gemm("dB", N, r, C)
    c.gemm("dA", r, C, N)


def _paper_dense(c: _Count) -> None:
    """The paper's: zeros (N, C), one scatter of s·B_k A_k ∘ W0_k per block, then a second dense GEMM."""
    p = c.p
    c.base_forward()
    c.elementwise("zero ΔW", 0, c.w)
    c.add("B_k·A_k", 2 * c.block_w * p.max_rank, c.block_w + c.factors)
    c.elementwise("gather W0 blocks", c.block_w, c.block_w)
    c.elementwise("scale", c.block_w, c.block_w)
    c.elementwise("∘ W0 blocks", 2 * c.block_w, c.block_w)
    c.elementwise("scatter into ΔW", c.block_w, c.block_w)
    _dense_delta(c)
    c.elementwise("gather G blocks", c.block_w, c.block_w)
    c.elementwise("G_k ∘ W0_k", 2 * c.block_w, c.block_w)
    c.elementwise("scale gradient", c.block_w, c.block_w)
    c.add("dB_k", 2 * c.block_w * p.max_rank, c.block_w + c.factors)
    c.add("dA_k", 2 * c.block_w * p.max_rank, c.block_w + c.factors)


def _dense_delta(c: _Count) -> None:
    """y + dropout(x)·ΔWᵀ and its backward up to the dense G = dYᵀ·dropout(x), with ΔW in memory."""
    T, N, C = c.p.tokens, c.p.out_features, c.p.in_features
    if c.p.dropout:
        c.elementwise("dropout", c.x, c.x, mask_bytes=c.x)
    c.gemm("x·ΔWᵀ", T, N, C)
    c.elementwise("add to y", 2 * c.y, c.y)
    c.stage = "backward"
    c.base_backward()
    c.gemm("dY·ΔW", T, C, N)
    if c.p.dropout:
        c.elementwise("dropout backward", c.x, c.x, mask_bytes=c.x)
    c.elementwise("add to dX", 2 * c.x, c.x)
    c.gemm("G = dYᵀ·x", N, C, T)


def _merged(c: _Count) -> None:
    """One GEMM with W_eff, forward and for dX; dropout has no merged form, so it is ignored."""
    c.build_weight()
    c.base_forward()
    c.stage = "backward"
    c.factor_gradients()
    c.merged_dx()


def _split(c: _Count) -> None:
    """Adapter first, block by block, then the base GEMM accumulates onto it."""
    c.build_blocks()
    c.gather("gather x", c.p.in_features, dropout=c.p.dropout > 0)
    c.block_matmul("block matmul", c.x_blocks, c.y)
    c.base_forward()
    c.add("y, read to accumulate", 0, c.y)
    c.stage = "backward"
    c.factor_gradients()
    if c.p.dropout:
        c.gather("gather dY again", c.p.out_features)
        c.build_blocks()
        c.block_matmul("block matmul of dX", c.y_blocks, c.x_blocks)
        c.elementwise("scatter dX, dropout", c.x_blocks, c.x)
        c.base_backward()
        c.add("dX, read to accumulate", 0, c.x)
    else:
        c.merged_dx()


def _fused(c: _Count) -> None:
    """Base and adapter in one kernel: two accumulations for each chunk of ranks, B·A anew for each tile of tokens."""
    p = c.p
    tiles, chunks = math.ceil(p.tokens / FUSED_TOKEN_TILE), math.ceil(p.max_rank / FUSED_MAX_RANK)
    flops = 2 * p.unit_flops * chunks + 2 * c.w * p.max_rank * tiles
    reads = chunks * (c.x + c.w) + c.factors
    c.add("fused linear", flops, reads + c.y, efficiency=FUSED_EFFICIENCY)
    c.stage = "backward"
    c.factor_gradients()
    c.add("fused dX", flops, chunks * (c.y + c.w) + c.factors + c.x, efficiency=FUSED_EFFICIENCY)


def _expanded(c: _Count) -> None:
    """One GEMM over (1 + r)·T rows, W0 read once; factor gradients as elsewhere."""
    T, N, C, r = c.p.tokens, c.p.out_features, c.p.in_features, c.p.rank
    c.elementwise("x ∘ Ã", c.x + r * C, r * c.x)
    c.gemm("expanded GEMM", (1 + r) * T, N, C)
    c.elementwise("Σ B̃ ∘", (1 + r) * c.y + r * N, c.y)
    c.stage = "backward"
    c.factor_gradients()
    c.elementwise("dY ∘ B̃", c.y + r * N, r * c.y)
    c.gemm("expanded GEMM of dX", (1 + r) * T, C, N)
    c.elementwise("Σ Ã ∘", (1 + r) * c.x + r * C, c.x)


_WAYS: dict[str, Callable[[_Count], None]] = {
    "frozen": _frozen,
    "lora": _lora,
    "hira": _hira,
    "paper_dense": _paper_dense,
    "merged": _merged,
    "split": _split,
    "fused": _fused,
    "expanded": _expanded,
}


@lru_cache(maxsize=4096)
def choose_algorithm(problem: Problem, gpu: Gpu, ieee: bool) -> str:
    """What `algorithm="auto"` runs on the triton backend: "merged", "split" or "fused".

    1. Dropout active: "split". The adapter sees another x than the base, so no single weight stands for both.
    2. At most :func:`fused_token_limit` tokens: "fused", one kernel that reads W0 once. Never above the ranks at
       which its loop over W0 is still pipelined (64; 16 where float32 multiplies in IEEE): such a launch is no
       shipped configuration, though a user can force it.
    3. The GEMM multiplies in IEEE float32 or float64: "merged", one GEMM.
    4. Otherwise (bf16, fp16, TF32): "split". W_eff rounded to a half type loses a small update altogether, so
       "merged" is never chosen there; only a user can force it.

    Args:
        problem: the layer and the batch; `dtype` is the dtype that the GEMM multiplies.
        gpu: from :func:`smoa_kernels.gpus.match_gpu` or :data:`smoa_kernels.gpus.GPUS`.
        ieee: the GEMM multiplies in IEEE float32 or float64. False for half types, whatever is given here
            for them, and for float32 under TF32 or autocast.

    Example:
        >>> from smoa_kernels.gpus import GPUS
        >>> problem = Problem(8192, 4096, 4096, num_blocks=4, rank=16)
        >>> choose_algorithm(problem, GPUS["h100"], ieee=False)
        'split'
        >>> choose_algorithm(replace(problem, tokens=16), GPUS["h100"], ieee=False)
        'fused'
    """
    if problem.dropout:
        return "split"
    if problem.tokens <= fused_token_limit(replace(problem, tokens=0), gpu, ieee):
        return "fused"
    return _many_tokens(problem.dtype, ieee)


def _many_tokens(dtype: torch.dtype, ieee: bool) -> str:
    half = dtype in (torch.bfloat16, torch.float16)
    return "merged" if ieee and not half else "split"


def _fused_max_rank(dtype: torch.dtype, ieee: bool) -> int:
    return FUSED_MAX_RANK_IEEE if ieee and dtype.itemsize >= 4 else FUSED_MAX_RANK


@lru_cache(maxsize=1024)
def fused_token_limit(problem: Problem, gpu: Gpu, ieee: bool) -> int:
    """Most tokens at which one kernel's forward is predicted no slower than merged's or split's; 0 if none.

    While W0's read hides its doubled arithmetic the one kernel wins, since it builds nothing; past that it
    loses and stays behind. `problem.tokens` is ignored.

    Args:
        problem: the layer; its `dtype` is the dtype that the GEMM multiplies.
        gpu: as in :func:`choose_algorithm`.
        ieee: likewise.

    Example:
        >>> from smoa_kernels.gpus import GPUS
        >>> problem = Problem(0, 4096, 4096, num_blocks=4, rank=16)
        >>> 100 < fused_token_limit(problem, GPUS["h100"], ieee=False) < 1000
        True
        >>> fused_token_limit(replace(problem, rank=1024), GPUS["h100"], ieee=False)
        0
    """
    if problem.max_rank > _fused_max_rank(problem.dtype, ieee):
        return 0
    other = _many_tokens(problem.dtype, ieee)

    def fused_wins(tokens: int) -> bool:
        at = replace(problem, tokens=tokens)
        one, many = (estimate(at, gpu, way, ieee=ieee).seconds("forward") for way in ("fused", other))
        return one <= many

    if not fused_wins(1):
        return 0
    low, high = 1, 2
    while fused_wins(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fused_wins(middle) else (low, middle)
    return low


def _partial_bytes(p: Problem) -> int:
    """float32 partials of dA and dB: one (R, tile) slice per tile of the other side, within each block.

    R is ρ rounded up to 16. A problem with fewer tiles than a GPU has multiprocessors splits its tokens too and
    writes that many times more, of a size that is small then.
    """
    rows, cols = (p.padded(n) // p.num_blocks for n in (p.out_features, p.in_features))
    slices = p.out_features * math.ceil(cols / GRAD_TILE) + p.in_features * math.ceil(rows / GRAD_TILE)
    return 4 * math.ceil(p.max_rank / PARTIAL_RANKS) * PARTIAL_RANKS * slices


def backward_workspace(problem: Problem) -> Mapping[str, int]:
    """Bytes that each stage of the backward holds beyond its inputs and results.

    "factor gradients": gathered dY and x, and the partials. They are freed before "input gradient", which
    holds W_eff; under dropout it holds the ΔW blocks, dY gathered anew, and dX's share by block instead.

    Args:
        problem: the layer and the batch.

    Example:
        >>> stages = backward_workspace(Problem(8192, 14336, 4096, num_blocks=4, rank=16))
        >>> {stage: size >> 20 for stage, size in stages.items()}
        {'factor gradients': 302, 'input gradient': 112}
    """
    p, size = problem, problem.dtype.itemsize
    rows, cols = p.padded(p.out_features), p.padded(p.in_features)
    dy = p.tokens * rows * size * p.gathers(p.out_features)
    x = p.tokens * cols * size * (p.gathers(p.in_features) or p.dropout > 0)
    dx = p.weight_elements * size
    if p.dropout:
        dx = rows * cols // p.num_blocks * size + dy + p.tokens * cols * size
    return MappingProxyType({"factor gradients": dy + x + _partial_bytes(p), "input gradient": dx})


def backward_workspace_bytes(problem: Problem) -> int:
    """Peak bytes that a backward holds beyond its inputs and results: the larger of its two stages.

    Args:
        problem: the layer and the batch.

    Example:
        >>> backward_workspace_bytes(Problem(8192, 14336, 4096, num_blocks=4, rank=16)) >> 20  # 288 are gathered copies
        302
    """
    return max(backward_workspace(problem).values())
