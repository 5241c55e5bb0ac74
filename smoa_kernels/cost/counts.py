"""Floating-point operations and bytes of each way to run one layer, counted kernel by kernel.

A way is a list of parts, one for each kernel that a GPU would run. The same rules hold for ours and for the others:

- A matrix product (m, k)·(k, n) costs 2·m·k·n flops, reads each operand once and writes its result once.
- An elementwise pass reads each of its inputs and writes each of its outputs once. Eager layers are counted as
  their authors wrote them: PEFT's `result + lora_B(lora_A(x)) * scaling` is two products and two passes.
- A GEMM that accumulates onto its output reads that output after its last multiplication. The rate of a large
  GEMM was measured without such a read, so the read is a part of its own and overlaps with nothing.
- Gathers and builds of W_eff run at full bandwidth, and products at the rate of a large GEMM. The one-kernel form
  is slower, since it computes an operand in its main loop (`FUSED_EFFICIENCY`).
- Launches cost nothing. That favours ways of many parts where launches dominate, at a few tokens, so the number of
  tokens up to which the one-kernel form wins is an underestimate.

By these rules the write of the adapter's y hides behind the block product: split takes 1.46 times as long as frozen for
4096². Counting the write and the read in full would give 1.49.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .grad_tiling import gradient_parts, partial_bytes
from .problem import Problem

__all__ = ["WAYS", "Part", "Pass", "parts"]

Pass = Literal["forward", "backward"]

WAYS = ("frozen", "lora", "hira", "paper_dense", "merged", "split", "fused", "expanded")
"""The frozen layer, the methods we compare with, and our four ways."""

FUSED_EFFICIENCY = 0.65  # of a large GEMM's rate: a goal, not a measurement
# Above these ρ the one-kernel form cuts the rank into chunks, and reads W0 again for each.
FUSED_MAX_RANK = 64
FUSED_MAX_RANK_IEEE = 16  # float32 products in IEEE hold their whole depth in registers
FUSED_TOKEN_TILE = 32  # the one-kernel form recomputes B·A for each tile of this many tokens


@dataclass(frozen=True)
class Part:
    """The work of one kernel.

    Attributes:
        name: what it computes.
        stage: "forward" or "backward".
        flops: floating-point operations.
        bytes: to and from memory.
        efficiency: share of a large GEMM's rate at which it computes.
    """

    name: str
    stage: Pass
    flops: int
    bytes: int
    efficiency: float = 1.0

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Time at a large GEMM's rate and the memory's bandwidth: the longer of arithmetic and memory."""
        return max(self.flops / (self.efficiency * flops_per_second), self.bytes / bytes_per_second)


def parts(problem: Problem, algorithm: str) -> tuple[Part, ...]:
    """The kernels that `algorithm`, one of :data:`WAYS`, runs on `problem`: forward, then backward."""
    count = _Count(problem)
    _COUNTED[algorithm](count)
    return tuple(sorted(count.parts, key=lambda part: part.stage != "forward"))


@dataclass
class _Count:
    """Collects parts by the rules at the top of this file. Sizes are in elements."""

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
        """W_eff = W0 ∘ (1 + s·mask·BA): reads W0 once and writes W_eff once."""
        self.add("build W_eff", 2 * self.w * self.p.max_rank, 2 * self.w + self.factors)

    def build_blocks(self) -> None:
        self.add("build ΔW blocks", 2 * self.block_w * self.p.max_rank, 2 * self.block_w + self.factors)

    def block_matmul(self, name: str, source: int, target: int) -> None:
        self.add(name, self.p.unit_flops // self.p.num_blocks, source + self.block_w + target)

    def gather(self, name: str, features: int, dropout: bool = False) -> None:
        if self.p.gathers(features) or dropout:
            self.elementwise(name, self.p.tokens * features, self.p.tokens * self.p.padded(features))

    def factor_gradients(self) -> None:
        """Gather dY and x, accumulate G tile by tile, contract it with the factors, and sum the partials.

        Each part of the tokens reads W0 and the factors again, and writes partials of its own.
        """
        p, launches = self.p, len(gradient_parts(self.p))
        self.gather("gather dY", p.out_features)
        self.gather("gather x", p.in_features, dropout=p.dropout > 0)
        partials = partial_bytes(p)
        self.add(
            "block gradients",
            p.unit_flops // p.num_blocks + launches * 4 * self.block_w * p.max_rank,
            self.x_blocks + self.y_blocks + launches * (self.block_w + self.factors),
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
    """One GEMM with W_eff, in forward and for dX. Dropout is ignored: it has no merged form."""
    c.build_weight()
    c.base_forward()
    c.stage = "backward"
    c.factor_gradients()
    c.merged_dx()


def _split(c: _Count) -> None:
    """The adapter first, block by block; then the base GEMM accumulates onto its result."""
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
    """Base and adapter in one kernel: two products for each chunk of ranks, and B·A again for each tile of tokens."""
    p = c.p
    tiles, chunks = math.ceil(p.tokens / FUSED_TOKEN_TILE), math.ceil(p.max_rank / FUSED_MAX_RANK)
    flops = 2 * p.unit_flops * chunks + 2 * c.w * p.max_rank * tiles
    reads = chunks * (c.x + c.w) + c.factors
    c.add("fused linear", flops, reads + c.y, efficiency=FUSED_EFFICIENCY)
    c.stage = "backward"
    c.factor_gradients()
    c.add("fused dX", flops, chunks * (c.y + c.w) + c.factors + c.x, efficiency=FUSED_EFFICIENCY)


def _expanded(c: _Count) -> None:
    """One GEMM over (1 + r)·T rows, which reads W0 once; the factors' gradients are as in the other ways."""
    T, N, C, r = c.p.tokens, c.p.out_features, c.p.in_features, c.p.rank
    c.elementwise("x ∘ Ã", c.x + r * C, r * c.x)
    c.gemm("expanded GEMM", (1 + r) * T, N, C)
    c.elementwise("Σ B̃ ∘", (1 + r) * c.y + r * N, c.y)
    c.stage = "backward"
    c.factor_gradients()
    c.elementwise("dY ∘ B̃", c.y + r * N, r * c.y)
    c.gemm("expanded GEMM of dX", (1 + r) * T, C, N)
    c.elementwise("Σ Ã ∘", (1 + r) * c.x + r * C, c.x)


_COUNTED: dict[str, Callable[[_Count], None]] = {
    "frozen": _frozen,
    "lora": _lora,
    "hira": _hira,
    "paper_dense": _paper_dense,
    "merged": _merged,
    "split": _split,
    "fused": _fused,
    "expanded": _expanded,
}
