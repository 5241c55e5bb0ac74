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

Not modelled: the host, for which the device waits with few tokens outside of a CUDA graph; dropout, caches, the last
wave of a kernel's programs, sums over tokens that programs share, and the slowdown of kernels that are bound by both
arithmetic and memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from smoa_kernels.backends.algorithms import FUSED_MAX_RANK
from smoa_kernels.definition.precision import PRECISIONS
from smoa_kernels.kernels.spec import GRANULE

from .gpus import START_SECONDS, Gpu

PASSES = "forward", "backward"

# Share of a large GEMM's rate: the fused kernel makes an operand in its main loop. An assumption; not measured. Kernels
# in Triton that do so reach 0.56 to 0.66 (triton-lang/triton#11742).
FUSED_EFFICIENCY = 0.5
CONTRACTED_RANKS = 32  # with more ranks `contract` reads G and W0 again


class Problem(NamedTuple):
    """A linear layer of N rows and C columns with K blocks of r ranks together, and T rows of x."""

    tokens: int
    out_features: int
    in_features: int
    num_blocks: int
    rank: int
    precision: str = "bf16"  # of all operands, one of `precision.PRECISIONS`
    granule: int = (
        1  # adjacent coordinates that stay together: the size of contiguous blocks, if all are equal
    )

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


class Part(NamedTuple):
    """The work of one kernel."""

    name: str
    stage: str
    bytes: float  # to and from memory
    seconds: float  # its starts, and the longer of arithmetic and memory


def gradient_bytes(p: Problem) -> int:
    """Bytes of G, which is float32: the diagonal blocks."""
    return 4 * math.prod(p.features) // p.num_blocks


def partial_bytes(p: Problem) -> int:
    """Bytes of the float32 partials of dA and dB: a slice for each of `contract`'s tiles on the other side."""
    row_tiles, col_tiles = (
        math.ceil(n / p.num_blocks / tile) for n, tile in ((p.out_features, 64), (p.in_features, 128))
    )
    return 4 * p.max_rank * (p.out_features * col_tiles + p.in_features * row_tiles)


def backward_workspace(p: Problem) -> int:
    """The most bytes that our backward holds beyond inputs and results: G, first with gathered dY and x, then with all
    partials; these are freed before dX takes W_eff. A BLAS library's own memory is not counted."""
    gathered = 0 if p.in_place else p.tokens * sum(p.features)
    size = PRECISIONS[p.precision].dtype.itemsize
    return max(gradient_bytes(p) + max(gathered * size, partial_bytes(p)), math.prod(p.features) * size)


class Estimate:
    """The predicted cost of a problem on one GPU, run in one of :data:`WAYS`: `parts` are its kernels, added by the
    rules at the top of this file. Sizes are in elements."""

    def __init__(self, problem: Problem, gpu: Gpu, way: str) -> None:
        self.p, self.gpu, p = problem, gpu, problem
        self.parts: list[Part] = []
        self.stage: str = "forward"
        self.T, (self.N, self.C), self.rank = p.tokens, p.features, p.rank
        self.x, self.y, self.w = self.T * self.C, self.T * self.N, self.N * self.C
        self.unit = 2 * self.T * self.w  # flops of the base layer's GEMM
        self.block_w = self.w // p.num_blocks  # the diagonal blocks, and the elements that reading them moves
        self.read_w = self.block_w if p.in_granules or p.in_place else self.w
        self.factors = p.max_rank * (self.N + self.C)
        _WAYS[way](self)

    def seconds(self, *stages: str) -> float:
        """Predicted time of both passes or of one."""
        return sum(part.seconds for part in self.parts if part.stage in (stages or PASSES))

    def add(
        self, name: str, flops: float, size: float, *, bytes: float = 0, starts: int = 1, triton: bool = False
    ) -> None:
        """`size` elements of the problem's dtype go to and from memory, and `bytes` of others."""
        moved = size * PRECISIONS[self.p.precision].dtype.itemsize + bytes
        arithmetic = flops / self.gpu.flops_per_second(self.p.precision)
        work = max(arithmetic, moved / self.gpu.bytes_per_second(triton=triton))
        self.parts.append(Part(name, self.stage, moved, starts * START_SECONDS + work))

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
        self.add("G = dYᵀ·x", self.unit // p.num_blocks, self.x + self.y, bytes=gradient_bytes(p))
        again, moved = math.ceil(p.max_rank / CONTRACTED_RANKS), self.read_w + self.factors
        read = again * gradient_bytes(p) + partial_bytes(p)
        self.add("contract G", 0, again * moved, bytes=read, triton=True)
        # Of dA and of dB.
        self.add("sum partials", 0, self.factors, bytes=partial_bytes(p), starts=2, triton=True)


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
    c.add("y, read to accumulate", 0, c.y, starts=0)
    c.stage = "backward"
    c.gemm("dB", c.N, c.rank, c.T)
    c.gemm("dh", c.T, c.rank, c.N)
    c.gemm("dA", c.rank, c.C, c.T)
    c.base()
    c.gemm("dX += dh·A", c.T, c.C, c.rank)
    c.add("dX, read to accumulate", 0, c.x, starts=0)


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
    c.add("y, read to accumulate", 0, c.y, starts=0)
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


_COUNTS = (_frozen, _lora, _lora_fused, _hira, _merged, _split, _fused)
_WAYS = {count.__name__.removeprefix("_"): count for count in _COUNTS}
WAYS = tuple(_WAYS)
"""The frozen layer, the methods we compare with, and our three algorithms."""
