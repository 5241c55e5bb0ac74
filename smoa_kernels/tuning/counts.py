"""Counts the flops and bytes of each way to run one layer, kernel by kernel.

A way is a list of parts, one for each kernel that a GPU would run. The same rules hold for ours and for the others:

- A matrix product (m, k)·(k, n) costs 2·m·k·n flops, reads each operand once and writes its result once.
- An elementwise pass reads each of its inputs and writes each of its outputs once. Eager layers are counted as
  their authors wrote them: PEFT's `result + lora_B(lora_A(x)) * scaling` is two products and two passes.
- A GEMM that accumulates onto its output reads that output after its last multiplication, as a part of its own.
- Memory moves whole sectors of 32 bytes, so a block of scattered coordinates moves more of W0 than its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..backends import algorithms
from ..backends.algorithms import FUSED_MAX_RANK
from ..kernels.spec import GRANULE
from .gpus import Rates

__all__ = ["WAYS", "Part", "Pass", "Problem", "gradient_parts", "parts"]

Pass = Literal["forward", "backward"]

SECTOR = 32  # bytes
# Of a large GEMM's rate: the one-kernel form makes an operand in its main loop. An assumption, nobody has measured it.
FUSED_EFFICIENCY = 0.5


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
        bias: the layer has one.
        granule: adjacent coordinates that stay together, a partition's `granularity`: the size of contiguous blocks
            where all are as large. Where they are not it is smaller, and more is counted than they cost.
    """

    tokens: int
    out_features: int
    in_features: int
    num_blocks: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    bias: bool = False
    granule: int = 1

    @property
    def features(self) -> tuple[int, int]:
        """N and C."""
        return self.out_features, self.in_features

    @property
    def max_rank(self) -> int:
        """ρ, the largest rank of a block under the even split."""
        return math.ceil(self.rank / self.num_blocks)

    @property
    def weight_elements(self) -> int:
        """N·C."""
        return self.out_features * self.in_features

    @property
    def unit_flops(self) -> int:
        """2·T·N·C, the operations of the base layer's GEMM."""
        return 2 * self.tokens * self.weight_elements

    @property
    def touched(self) -> float:
        """The share of a row that moves when one block's coordinates of it are read: 1/K, or more if scattered."""
        run = self.granule * self.dtype.itemsize
        return min(1.0, max(1.0, SECTOR / run) / self.num_blocks)

    @property
    def in_place(self) -> bool:
        """Whether kernels read x and dY where they lie: N, C and all blocks consist of whole granules of `GRANULE`."""
        together = self.num_blocks == 1 or self.granule % GRANULE == 0
        return together and self.out_features % GRANULE == self.in_features % GRANULE == 0

    def padded(self, features: int) -> int:
        """Width of the padded block-major layout of N or C coordinates that are cut evenly."""
        return algorithms.padded(features, self.num_blocks)

    def gathers(self, features: int) -> bool:
        """Whether kernels read N or C coordinates from a copy in the padded block-major layout, without dropout."""
        return not self.in_place and (self.num_blocks > 1 or self.padded(features) != features)


@dataclass(frozen=True)
class Part:
    """The work of one kernel.

    Attributes:
        name: what it computes.
        stage: "forward" or "backward".
        flops: floating-point operations.
        bytes: to and from memory.
        launches: how often it is launched; 0 where another part's launch does it.
    """

    name: str
    stage: Pass
    flops: float
    bytes: float
    launches: int = 1

    def seconds(self, rates: Rates) -> float:
        """Time on the device: its starts, and the longer of arithmetic and memory."""
        work = max(self.flops / rates.flops_per_second, self.bytes / rates.bytes_per_second)
        return self.launches * rates.start_seconds + work


def parts(problem: Problem, way: str) -> tuple[Part, ...]:
    """The kernels that one of :data:`WAYS` runs on `problem`: forward, then backward."""
    count = _Count(problem)
    _WAYS[way](count)
    return tuple(count.parts)


def gradient_parts(p: Problem) -> tuple[int, ...]:
    """:func:`algorithms.gradient_parts`: one part under dropout, and where kernels read dY and x in place."""
    if p.dropout or not any(map(p.gathers, p.features)):
        return (p.tokens,)
    return algorithms.gradient_parts(p.tokens, p.features, p.num_blocks, p.max_rank, p.dtype.itemsize)


@dataclass
class _Count:
    """Collects parts by the rules at the top of this file. Sizes are in elements."""

    p: Problem
    parts: list[Part] = field(default_factory=list)
    stage: Pass = "forward"

    def __post_init__(self) -> None:
        p = self.p
        self.x, self.y, self.w = p.tokens * p.in_features, p.tokens * p.out_features, p.weight_elements
        self.block_w = self.w // p.num_blocks  # the diagonal blocks
        self.read_w = self.w * p.touched  # what reading them moves
        self.factors = p.max_rank * (p.out_features + p.in_features)
        self.product = p.unit_flops // p.num_blocks  # flops of all blocks' products
        # What our products read: a copy in block order, or what there is.
        self.x_copied = p.gathers(p.in_features) or p.dropout > 0
        self.dy_copied = p.gathers(p.out_features)
        self.x_blocks = p.tokens * p.padded(p.in_features) if self.x_copied else self.x
        self.dy_blocks = p.tokens * p.padded(p.out_features) if self.dy_copied else self.y

    def add(self, name: str, flops: float, elements: float, *, bytes: float = 0, launches: int = 1) -> None:
        """`elements` of the problem's dtype go to and from memory, and `bytes` of others."""
        moved = elements * self.p.dtype.itemsize + bytes
        self.parts.append(Part(name, self.stage, flops, moved, launches))

    def gemm(self, name: str, m: int, n: int, k: int) -> None:
        self.add(name, 2 * m * n * k, m * k + k * n + m * n)

    def elementwise(self, name: str, reads: float, writes: float, **more: int) -> None:
        self.add(name, reads, reads + writes, **more)

    def dropout(self, name: str) -> None:
        """A peer's: it keeps a mask of a byte each."""
        if self.p.dropout:
            self.elementwise(name, self.x, self.x, bytes=self.x)

    def base_forward(self) -> None:
        self.gemm("base GEMM", self.p.tokens, self.p.out_features, self.p.in_features)

    def base_backward(self) -> None:
        self.gemm("dX = dY·W", self.p.tokens, self.p.in_features, self.p.out_features)

    def build_weight(self) -> None:
        """W_eff = W0 ∘ (1 + s·mask·BA): reads W0 once and writes W_eff once."""
        self.add("build W_eff", 2 * self.w * self.p.max_rank, 2 * self.w + self.factors)

    def build_blocks(self) -> None:
        moved = self.read_w + self.block_w + self.factors
        self.add("build ΔW blocks", 2 * self.block_w * self.p.max_rank, moved)

    def block_matmul(self, name: str, source: float, target: float) -> None:
        # Blocks run side by side on the same tokens: memory moves x once, copied or not.
        self.add(name, self.product, source + self.block_w + target)

    def gather(self, name: str, source: float, target: float, copied: bool, launches: int = 1) -> None:
        if copied:
            self.add(name, source, source + target, launches=launches)

    def factor_gradients(self) -> None:
        """Gather dY and x, accumulate G tile by tile, contract it with the factors, and sum the partials.

        Each part of the tokens reads W0's blocks and the factors again, and writes partials of its own. Blocks that
        read x and dY in place do so one after the other, and all tokens of one are more than a cache holds.
        """
        p, launches = self.p, len(gradient_parts(self.p))
        self.gather("gather dY", self.y, self.dy_blocks, self.dy_copied, launches)
        self.gather("gather x", self.x, self.x_blocks, self.x_copied, launches)
        operands = (self.x_blocks, self.x_copied), (self.dy_blocks, self.dy_copied)
        moved = sum(size * (1 if copied else p.num_blocks * p.touched) for size, copied in operands)
        partials = launches * algorithms.partial_bytes(p.features, p.num_blocks, p.max_rank)
        flops = self.product + launches * 4 * self.block_w * p.max_rank
        again = launches * (self.read_w + self.factors)
        self.add("block gradients", flops, moved + again, bytes=partials, launches=launches)
        self.add("sum partials", partials // 4, self.factors, bytes=partials, launches=2)  # of dA and of dB

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
    c.dropout("dropout")
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
    c.dropout("dropout backward")
    c.base_backward()
    c.elementwise("add to dX", 2 * c.x, c.x)


def _hira(c: _Count) -> None:
    """PEFT: `result + F.linear(dropout(x), W0 * (Aᵀ Bᵀ)ᵀ)`; one block, whatever the problem's K."""
    N, C, r = c.p.out_features, c.p.in_features, c.p.rank
    c.base_forward()
    c.gemm("BA", N, C, r)
    c.elementwise("W0 ∘ BA", 2 * c.w, c.w)
    _dense_delta(c)
    c.elementwise("G ∘ W0", 2 * c.w, c.w)
    c.gemm("dB", N, r, C)
    c.gemm("dA", r, C, N)


def _paper_dense(c: _Count) -> None:
    """The paper's code: zeros (N, C), a scatter of s·B_k A_k ∘ W0_k for each block, then a second dense GEMM."""
    p, each = c.p, c.p.num_blocks
    product = 2 * c.block_w * p.max_rank
    c.base_forward()
    c.elementwise("zero ΔW", 0, c.w)
    c.add("B_k·A_k", product, c.block_w + c.factors, launches=each)
    c.elementwise("gather W0 blocks", c.read_w, c.block_w, launches=each)
    c.elementwise("scale", c.block_w, c.block_w, launches=each)
    c.elementwise("∘ W0 blocks", 2 * c.block_w, c.block_w, launches=each)
    c.elementwise("scatter into ΔW", c.block_w, c.read_w, launches=each)
    _dense_delta(c)
    c.elementwise("gather G blocks", c.read_w, c.block_w, launches=each)
    c.elementwise("G_k ∘ W0_k", 2 * c.block_w, c.block_w, launches=each)
    c.elementwise("scale gradient", c.block_w, c.block_w, launches=each)
    c.add("dB_k", product, c.block_w + c.factors, launches=each)
    c.add("dA_k", product, c.block_w + c.factors, launches=each)


def _dense_delta(c: _Count) -> None:
    """y + dropout(x)·ΔWᵀ and its backward up to the dense G = dYᵀ·dropout(x), with ΔW in memory."""
    T, N, C = c.p.tokens, c.p.out_features, c.p.in_features
    c.dropout("dropout")
    c.gemm("x·ΔWᵀ", T, N, C)
    c.elementwise("add to y", 2 * c.y, c.y)
    c.stage = "backward"
    c.base_backward()
    c.gemm("dY·ΔW", T, C, N)
    c.dropout("dropout backward")
    c.elementwise("add to dX", 2 * c.x, c.x)
    c.gemm("G = dYᵀ·x", N, C, T)


def _merged(c: _Count) -> None:
    """One GEMM with W_eff, in forward and for dX. Dropout is ignored: it has no merged form."""
    c.build_weight()
    c.base_forward()
    c.stage = "backward"
    c.factor_gradients()
    c.merged_dx()


def _split(c: _Count) -> None:
    """The adapter first, block by block; then the base GEMM accumulates onto its result, and a bias comes last."""
    c.build_blocks()
    c.gather("gather x", c.x, c.x_blocks, c.x_copied)
    c.block_matmul("block matmul", c.x_blocks, c.y)
    c.base_forward()
    c.add("y, read to accumulate", 0, c.y, launches=0)
    if c.p.bias:  # every other way adds it where it makes y
        c.elementwise("add bias", c.y, c.y)
    c.stage = "backward"
    c.factor_gradients()
    if not c.p.dropout:
        c.merged_dx()
        return
    c.gather("gather dY again", c.y, c.dy_blocks, c.dy_copied)
    c.build_blocks()
    c.block_matmul("block matmul of dX", c.dy_blocks, c.x_blocks)
    c.add("scatter dX, dropout", c.x_blocks, c.x_blocks + c.x)
    c.base_backward()
    c.add("dX, read to accumulate", 0, c.x, launches=0)


def _fused(c: _Count) -> None:
    """Base and adapter in one kernel: two products for each chunk of ranks, each of which reads W0 again."""
    chunks = max(1, math.ceil(c.p.max_rank / FUSED_MAX_RANK))  # a rank of 0 still reads W0
    flops = 2 * chunks * c.p.unit_flops / FUSED_EFFICIENCY
    c.add("fused linear", flops, chunks * (c.x + c.w) + c.factors + c.y)
    c.stage = "backward"
    c.factor_gradients()
    c.add("fused dX", flops, chunks * (c.y + c.w) + c.factors + c.x)


_WAYS: Mapping[str, Callable[[_Count], None]] = {
    "frozen": _frozen,
    "lora": _lora,
    "hira": _hira,
    "paper_dense": _paper_dense,
    "merged": _merged,
    "split": _split,
    "fused": _fused,
}
WAYS = tuple(_WAYS)
"""The frozen layer, the methods we compare with, and our three algorithms."""
