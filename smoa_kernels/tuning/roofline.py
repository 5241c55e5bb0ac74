"""Predicts the cost of one adapted layer on one GPU, for SMoA and the methods beside it. Nothing is measured.

A way to run the layer is a list of parts, one for each kernel that a GPU would run, counted by the same rules for all:

- A matrix product (m, k)·(k, n) costs 2·m·k·n flops, reads each operand once and writes its result once.
- An elementwise pass reads each of its inputs and writes each of its outputs once; its flops do not count. Eager layers
  are counted as their authors wrote them: PEFT's `result + lora_B(lora_A(x)) * scaling` is two products and two passes.
- A GEMM that accumulates onto its output reads that output after its last multiplication, as a part of its own.
- Blocks of scattered coordinates spread over all of W0, so reading them moves all of it. Blocks of whole granules of 8
  move only themselves. Copies in block order count without their padding. Slices of one size are not copied.
- A part takes its start time plus the longer of its flops at the rate of a large GEMM and its bytes at that of a copy;
  in Triton at a lower rate of bytes.
- Host and device work side by side: a pass that Python launches kernel by kernel takes as long as the slower of them.
  In a CUDA graph only the device's time counts.

Not modelled: dropout, caches, the last wave of a kernel's programs, sums over tokens that programs share, and the
slowdown of kernels that are bound by both arithmetic and memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..backends.algorithms import FUSED_MAX_RANK
from ..definition.precision import PRECISIONS
from ..kernels.spec import GRANULE
from .gpus import START_SECONDS, Gpu

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")

# Share of a large GEMM's rate: the fused kernel makes an operand in its main loop. An assumption; not measured. Kernels
# in Triton that do so reach 0.56 to 0.66 (triton-lang/triton#11742).
FUSED_EFFICIENCY = 0.5
CONTRACTED_RANKS = 32  # with more ranks `contract` reads G and W0 again
# Python's time per launch, autograd included (measured on CPU), for PEFT's LoRA and HiRA and for ours
# (`make host-time`: 564 µs for the 9 launches of a forward and a backward).
LAUNCH_SECONDS = 17e-6
OUR_LAUNCH_SECONDS = 63e-6


@dataclass(frozen=True)
class Problem:
    """One adapted linear layer and one batch.

    Attributes:
        tokens: T, rows of x.
        out_features: N.
        in_features: C.
        num_blocks: K.
        rank: r, the budget of all blocks together.
        precision: of x and W0, one of `precision.PRECISIONS`.
        granule: adjacent coordinates that stay together, a partition's `granularity`: the size of contiguous blocks if
            all are equal. If they are not it is smaller, and the cost is overestimated.
        experts: E, of a layer of experts, whose tokens are pairs of token and expert; 0 for one weight. The tuner's.
        factors: precision of A and B, the tuner's too: PEFT keeps them in float32. Costs assume W0's.
    """

    tokens: int
    out_features: int
    in_features: int
    num_blocks: int
    rank: int
    precision: str = "bf16"
    granule: int = 1
    experts: int = 0
    factors: str = "fp32"

    @property
    def features(self) -> tuple[int, int]:
        """N and C."""
        return self.out_features, self.in_features

    @property
    def max_rank(self) -> int:
        """ρ, the largest rank of a block under the even split."""
        return math.ceil(self.rank / self.num_blocks)

    @property
    def in_granules(self) -> bool:
        """Whether N, C and all blocks consist of whole granules of `GRANULE`, which kernels read as one."""
        together = self.num_blocks == 1 or self.granule % GRANULE == 0
        return together and self.out_features % GRANULE == self.in_features % GRANULE == 0

    @property
    def in_place(self) -> bool:
        """Whether x and dY are multiplied where they lie: blocks are slices of one size."""
        (rows, short), (cols, narrow) = (divmod(n, self.num_blocks) for n in self.features)
        return self.num_blocks == 1 or (not short and not narrow and 1 < self.granule == math.gcd(rows, cols))

    @property
    def partial_bytes(self) -> int:
        """Bytes of the float32 partials of dA and dB: a slice for each of `contract`'s tiles on the other side."""
        tiles = zip(self.features, (64, 128), strict=True)
        row_tiles, col_tiles = (math.ceil(n / self.num_blocks / tile) for n, tile in tiles)
        return 4 * self.max_rank * (self.out_features * col_tiles + self.in_features * row_tiles)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of G, which is float32: the diagonal blocks."""
        return 4 * math.prod(self.features) // self.num_blocks


@dataclass(frozen=True)
class Part:
    """The work of one kernel.

    Attributes:
        name: what it computes.
        stage: "forward" or "backward".
        bytes: to and from memory.
        seconds: on the device: its starts, and the longer of arithmetic and memory.
        launches: how often it is launched; 0 where another part's launch does it.
    """

    name: str
    stage: Pass
    bytes: float
    seconds: float
    launches: int


def backward_workspace(p: Problem) -> int:
    """The most bytes that our backward holds beyond its inputs and results.

    For dA and dB it holds G, first with dY and x, if they are gathered, then with all partials. They are freed before
    dX is computed, which takes W_eff. A BLAS library's own memory is not counted.
    """
    gathered = 0 if p.in_place else p.tokens * sum(p.features)
    size = PRECISIONS[p.precision].dtype.itemsize
    return max(p.gradient_bytes + max(gathered * size, p.partial_bytes), math.prod(p.features) * size)


class Estimate:
    """The predicted cost of one way to run a problem on one GPU; `stages` are the passes that a method counts.

    Parts are added by the rules at the top of this file. Sizes are in elements.

    Args:
        problem: the layer and its batch.
        gpu: it runs on.
        way: one of :data:`WAYS`.

    Attributes:
        parts: the kernels that it runs, forward, then backward.
    """

    def __init__(self, problem: Problem, gpu: Gpu, way: str) -> None:
        self.p, self.gpu, self.way, p = problem, gpu, way, problem
        self.parts: list[Part] = []
        self.stage: Pass = "forward"
        self.T, (self.N, self.C), self.rank = p.tokens, p.features, p.rank
        self.x, self.y, self.w = self.T * self.C, self.T * self.N, self.N * self.C
        self.unit = 2 * self.T * self.w  # flops of the base layer's GEMM
        self.block_w = self.w // p.num_blocks  # the diagonal blocks, and the elements that reading them moves
        self.read_w = self.block_w if p.in_granules or p.in_place else self.w
        self.factors = p.max_rank * (self.N + self.C)
        _WAYS[way](self)

    def seconds(self, *stages: Pass) -> float:
        """Predicted time, launched kernel by kernel: of each pass the longer of host and device."""
        return sum(max(self.device_seconds(each), self.host_seconds(each)) for each in stages or PASSES)

    def device_seconds(self, *stages: Pass) -> float:
        """Predicted time of the kernels alone."""
        return sum(part.seconds for part in self.parts if part.stage in (stages or PASSES))

    def host_seconds(self, *stages: Pass) -> float:
        """Time that Python takes to launch them."""
        return self.launches(*stages) * (OUR_LAUNCH_SECONDS if self.way in OURS else LAUNCH_SECONDS)

    def launches(self, *stages: Pass) -> int:
        """Kernel launches."""
        return sum(part.launches for part in self.parts if part.stage in (stages or PASSES))

    def add(
        self,
        name: str,
        flops: float,
        elements: float,
        *,
        bytes: float = 0,
        launches: int = 1,
        triton: bool = False,
    ) -> None:
        """`elements` of the problem's dtype go to and from memory, and `bytes` of others."""
        moved = elements * PRECISIONS[self.p.precision].dtype.itemsize + bytes
        rate = self.gpu.triton_bytes_per_second if triton else self.gpu.bytes_per_second
        work = max(flops / self.gpu.flops_per_second(self.p.precision), moved / rate)
        self.parts.append(Part(name, self.stage, moved, launches * START_SECONDS + work, launches))

    def gemm(self, name: str, m: int, n: int, k: int) -> None:
        """A product (m, k)·(k, n)."""
        self.add(name, 2 * m * n * k, m * k + k * n + m * n)

    def base(self) -> None:
        """The pass's product with W0, or with W_eff."""
        if self.stage == "forward":
            self.gemm("base GEMM", self.T, self.N, self.C)
        else:
            self.gemm("dX = dY·W", self.T, self.C, self.N)

    def build_weight(self) -> None:
        """W_eff = W0 ∘ (1 + s·mask·BA): reads W0 once and writes W_eff once."""
        self.add("build W_eff", 2 * self.w * self.p.max_rank, 2 * self.w + self.factors, triton=True)

    def copy(self, name: str, features: int) -> None:
        """A copy to or from block order, where operands are not multiplied in place."""
        if not self.p.in_place:
            self.add(name, 0, 2 * self.T * features, triton=True)

    def factor_gradients(self) -> None:
        """Gather dY and x, multiply them block by block, contract G with W0 and the factors, and sum the partials."""
        p = self.p
        self.copy("gather dY", self.N)
        self.copy("gather x", self.C)
        self.add("G = dYᵀ·x", self.unit // p.num_blocks, self.x + self.y, bytes=p.gradient_bytes)
        again, moved = math.ceil(p.max_rank / CONTRACTED_RANKS), self.read_w + self.factors
        self.add(
            "contract G", 0, again * moved, bytes=again * p.gradient_bytes + p.partial_bytes, triton=True
        )
        # Of dA and of dB.
        self.add("sum partials", 0, self.factors, bytes=p.partial_bytes, launches=2, triton=True)


def _frozen(c: Estimate) -> None:
    c.base()
    c.stage = "backward"
    c.base()


def _lora(c: Estimate) -> None:
    """PEFT: `result = result + lora_B(lora_A(x)) * scaling`."""
    c.base()
    c.gemm("h = x·Aᵀ", c.T, c.rank, c.C)
    c.gemm("h·Bᵀ", c.T, c.N, c.rank)
    c.add("scale", 0, 2 * c.y)
    c.add("add to y", 0, 3 * c.y)
    c.stage = "backward"
    c.add("scale dY", 0, 2 * c.y)
    c.gemm("dB", c.N, c.rank, c.T)
    c.gemm("dh", c.T, c.rank, c.N)
    c.gemm("dA", c.rank, c.C, c.T)
    c.gemm("dh·A", c.T, c.C, c.rank)
    c.base()
    c.add("add to dX", 0, 3 * c.x)


def _lora_fused(c: Estimate) -> None:
    """A LoRA without passes of its own over y and dX: s scales h, and `addmm` adds onto the base's result."""
    c.base()
    c.gemm("h = x·Aᵀ", c.T, c.rank, c.C)
    c.gemm("y += h·Bᵀ", c.T, c.N, c.rank)
    c.add("y, read to accumulate", 0, c.y, launches=0)
    c.stage = "backward"
    c.gemm("dB", c.N, c.rank, c.T)
    c.gemm("dh", c.T, c.rank, c.N)
    c.gemm("dA", c.rank, c.C, c.T)
    c.base()
    c.gemm("dX += dh·A", c.T, c.C, c.rank)
    c.add("dX, read to accumulate", 0, c.x, launches=0)


def _hira(c: Estimate) -> None:
    """PEFT: `result + F.linear(x, W0 * (Aᵀ Bᵀ)ᵀ)`; always one block."""
    c.base()
    c.gemm("BA", c.N, c.C, c.rank)
    c.add("W0 ∘ BA", 0, 3 * c.w)
    c.gemm("x·ΔWᵀ", c.T, c.N, c.C)
    c.add("add to y", 0, 3 * c.y)
    c.stage = "backward"
    c.base()
    c.gemm("dY·ΔW", c.T, c.C, c.N)
    c.add("add to dX", 0, 3 * c.x)
    c.gemm("G = dYᵀ·x", c.N, c.C, c.T)
    c.add("G ∘ W0", 0, 3 * c.w)
    c.gemm("dB", c.N, c.rank, c.C)
    c.gemm("dA", c.rank, c.C, c.N)


def _merged(c: Estimate) -> None:
    """One GEMM with W_eff, in forward and for dX."""
    c.build_weight()
    c.base()
    _merged_backward(c)


def _split(c: Estimate) -> None:
    """The adapter first, block by block; then the base GEMM accumulates onto its result."""
    flops = 2 * c.block_w * c.p.max_rank
    c.add("build ΔW blocks", flops, c.read_w + c.block_w + c.factors, triton=True)
    c.copy("gather x", c.C)
    c.add("x·ΔWᵀ", c.unit // c.p.num_blocks, c.x + c.block_w + c.y)
    c.copy("scatter y", c.N)
    c.base()
    c.add("y, read to accumulate", 0, c.y, launches=0)
    _merged_backward(c)


def _merged_backward(c: Estimate) -> None:
    c.stage = "backward"
    c.factor_gradients()
    c.build_weight()
    c.base()


def _fused(c: Estimate) -> None:
    """Base and adapter in one kernel: two products for each chunk of ranks; each chunk reads W0 again."""
    chunks = max(1, math.ceil(c.p.max_rank / FUSED_MAX_RANK))  # a rank of 0 still reads W0
    flops = 2 * chunks * c.unit / FUSED_EFFICIENCY
    c.add("fused linear", flops, chunks * (c.x + c.w) + c.factors + c.y, triton=True)
    c.stage = "backward"
    c.factor_gradients()
    c.add("fused dX", flops, chunks * (c.y + c.w) + c.factors + c.x, triton=True)


OURS = ("merged", "split", "fused")
_COUNTS = (_frozen, _lora, _lora_fused, _hira, _merged, _split, _fused)
_WAYS = {count.__name__.removeprefix("_"): count for count in _COUNTS}
WAYS = tuple(_WAYS)
"""The frozen layer, the methods we compare with, and our three algorithms."""
