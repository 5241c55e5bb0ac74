"""Floating-point operations, bytes and launches of each way to run one layer, counted kernel by kernel.

A way is a list of parts, one for each kernel that a GPU would run. The same rules hold for ours and for the others:

- A matrix product (m, k)·(k, n) costs 2·m·k·n flops, reads each operand once and writes its result once.
- An elementwise pass reads each of its inputs and writes each of its outputs once. Eager layers are counted as
  their authors wrote them: PEFT's `result + lora_B(lora_A(x)) * scaling` is two products and two passes.
- A GEMM that accumulates onto its output reads that output after its last multiplication. The rate of a large
  GEMM was measured without such a read, so the read is a part of its own and overlaps with nothing.
- Scattered accesses move whole sectors (`sectors.py`), from memory and through the cache.
- Products run at the rate of a large GEMM, memory at that of a copy. Whatever goes to or from memory goes through the
  cache. Our own products, which no library computes, also read a tile of each operand through it at every step, and of
  an operand that they read in place (`Problem.in_place`) the sectors that the tile touches.
- The one-kernel form computes an operand in its main loop, and issuing those instructions may take longer than its
  products do. At few tokens it has few programs, and the multiprocessor that has most of them decides.
- A kernel takes its start, and then as long as the slowest of products, memory, cache and issue.

Not modelled: the last wave of the other kernels' programs (`block_grad`'s: benchmarks/bringup/predictions.py), split
sums over tokens, and how much kernels that use memory and cache at once are slowed by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..backends.algorithms import FUSED_MAX_RANK
from ..definition.precision import precision_of
from ..kernels.sizes import GRAD_TILE
from .gpus import Gpu, Rates
from .grad_tiling import gradient_parts, partial_bytes
from .matmul_tiling import matmul_tile
from .problem import Problem
from .sectors import GATHER_TILE, STEP, WARP, overfetch, touched

__all__ = ["WAYS", "Part", "Pass", "parts"]

Pass = Literal["forward", "backward"]

WAYS = ("frozen", "lora", "hira", "paper_dense", "merged", "split", "fused", "expanded")
"""The frozen layer, the methods we compare with, and our four ways."""

FUSED_EFFICIENCY = 0.65  # of a large GEMM's rate where issue is not the limit: a goal, not a measurement
FUSED_TOKENS = 16  # tokens of its smallest tile
FUSED_SPLIT, FUSED_FULL = (
    4,
    264,
)  # tiles of so few tokens share their sum over C among 4 programs, where less than 2 · 132


class Step(NamedTuple):
    """A step of the one-kernel form's main loop: its tile, and the instructions of a warp.

    Compiled for sm_90 with 16 ranks, B·A included; a test compiles them again. Other GPUs are assumed to be alike.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    y_instructions: int
    dx_instructions: int


def fused_step(precision: str, tokens: int) -> Step:
    """The step that runs at so many tokens, by name of the precision."""
    if precision in ("bf16", "fp16"):
        return Step(16, 64, 64, 4, 512, 517) if tokens <= FUSED_TOKENS else Step(32, 64, 64, 4, 533, 514)
    return Step(16, 64, 32, 4, 421, 452) if precision == "tf32" else Step(16, 16, 32, 2, 694, 749)


@dataclass(frozen=True)
class Part:
    """The work of one kernel.

    Attributes:
        name: what it computes.
        stage: "forward" or "backward".
        flops: floating-point operations.
        bytes: to and from memory.
        cache_bytes: between the last cache and the multiprocessors.
        efficiency: share of a large GEMM's rate at which it computes, where nothing else limits it.
        launches: how often it is launched; 0 where another part's launch does it.
        programs: among which it is divided, where that matters.
        instructions: that the warps of one program issue, where that matters.
    """

    name: str
    stage: Pass
    flops: int
    bytes: int
    cache_bytes: int
    efficiency: float = 1.0
    launches: int = 1
    programs: int = 0
    instructions: int = 0

    def seconds(self, rates: Rates) -> float:
        """Time on the device: its starts, and the longest of arithmetic, memory, cache and issue."""
        waves = math.ceil(self.programs / rates.multiprocessors)
        return self.launches * rates.start_seconds + max(
            self.flops / (self.efficiency * rates.flops_per_second),
            self.bytes / rates.bytes_per_second,
            self.cache_bytes / rates.cache_bytes_per_second,
            waves * self.instructions / rates.instructions_per_second,
        )


def parts(problem: Problem, algorithm: str, gpu: Gpu, *, ieee: bool = True) -> tuple[Part, ...]:
    """The kernels that `algorithm`, one of :data:`WAYS`, runs on `problem`: forward, then backward.

    `gpu` decides which tiles ship. `ieee`: float32 multiplies in IEEE float32 rather than TF32.
    """
    count = _Count(problem, gpu, ieee)
    _COUNTED[algorithm](count)
    return tuple(sorted(count.parts, key=lambda part: part.stage != "forward"))


@dataclass
class _Count:
    """Collects parts by the rules at the top of this file. Sizes are in elements."""

    p: Problem
    gpu: Gpu
    ieee: bool
    parts: list[Part] = field(default_factory=list)
    stage: Pass = "forward"

    def __post_init__(self) -> None:
        p = self.p
        self.x = p.tokens * p.in_features
        self.y = p.tokens * p.out_features
        self.w = p.weight_elements
        self.block_w = self.w // p.num_blocks  # the diagonal blocks
        self.touched = touched(p.num_blocks, p.dtype.itemsize, p.granule)
        self.touched_w = self.w * self.touched  # what reading them moves
        self.x_copied = p.gathers(p.in_features) or p.dropout > 0
        self.dy_copied = p.gathers(p.out_features)
        # What our products read: a copy in block order, or what there is.
        self.x_blocks = p.tokens * (p.padded(p.in_features) if self.x_copied else p.in_features)
        self.y_blocks = p.tokens * (p.padded(p.out_features) if self.dy_copied else p.out_features)
        self.product = p.unit_flops // p.num_blocks  # flops of all blocks' products
        self.factors = p.max_rank * (p.out_features + p.in_features)

    def overfetch(self, together: int) -> float:
        return overfetch(together, self.p.num_blocks, self.p.dtype.itemsize, self.p.granule)

    def add(
        self,
        name: str,
        flops: int,
        elements: float,
        *,
        cached: float | None = None,
        extra_bytes: int = 0,
        efficiency: float = 1.0,
        launches: int = 1,
        programs: int = 0,
        instructions: int = 0,
    ) -> None:
        """`elements` go to and from memory, `cached` (as many) through the cache, `extra_bytes` through both."""
        size = self.p.dtype.itemsize
        memory, cache = (
            round(n * size) + extra_bytes for n in (elements, elements if cached is None else cached)
        )
        self.parts.append(
            Part(name, self.stage, flops, memory, cache, efficiency, launches, programs, instructions)
        )

    def gemm(self, name: str, m: int, n: int, k: int) -> None:
        self.add(name, 2 * m * n * k, m * k + k * n + m * n)

    def elementwise(
        self, name: str, reads: float, writes: float, mask_bytes: int = 0, launches: int = 1
    ) -> None:
        self.add(name, round(reads), reads + writes, extra_bytes=mask_bytes, launches=launches)

    def base_forward(self) -> None:
        self.gemm("base GEMM", self.p.tokens, self.p.out_features, self.p.in_features)

    def base_backward(self) -> None:
        self.gemm("dX = dY·W", self.p.tokens, self.p.in_features, self.p.out_features)

    def build_weight(self) -> None:
        """W_eff = W0 ∘ (1 + s·mask·BA): reads W0 once and writes W_eff once."""
        self.add("build W_eff", 2 * self.w * self.p.max_rank, 2 * self.w + self.factors)

    def build_blocks(self) -> None:
        moved = self.touched_w + self.block_w + self.factors
        self.add("build ΔW blocks", 2 * self.block_w * self.p.max_rank, moved)

    def block_matmul(
        self, name: str, features: int, source: int, target: int, *, copied: bool, scattered: bool
    ) -> None:
        # Blocks are side by side on the same tokens: memory moves x once, copied or not. The cache moves it once for
        # each tile of rows, and ΔW for each tile of tokens.
        p, (tokens, rows) = self.p, matmul_tile(self.p, self.gpu, self.ieee, features)
        stored = self.overfetch(rows if p.in_place else WARP) if scattered else 1
        x = p.tokens * self.w // features * math.ceil(features / p.num_blocks / rows)
        x_moved = x if copied else x * self.overfetch(STEP)
        cached = x_moved + math.ceil(p.tokens / tokens) * self.block_w + target * stored
        self.add(name, self.product, source + self.block_w + target, cached=cached)

    def gather(self, name: str, features: int, *, dropout: bool = False, launches: int = 1) -> None:
        if self.p.gathers(features) or dropout:
            source, target = self.p.tokens * features, self.p.tokens * self.p.padded(features)
            cached = source * self.overfetch(GATHER_TILE) + target
            self.add(name, source, source + target, cached=cached, launches=launches)

    def factor_gradients(self) -> None:
        """Gather dY and x, accumulate G tile by tile, contract it with the factors, and sum the partials.

        Each part of the tokens reads W0's blocks and the factors again, and writes partials of its own. Blocks that
        read x and dY in place do so one after the other.
        """
        p, launches = self.p, len(gradient_parts(self.p))
        # Without dropout one launch gathers both, where both are gathered.
        alone = p.dropout > 0 or not (self.dy_copied and self.x_copied)
        self.gather("gather dY", p.out_features, launches=launches)
        self.gather("gather x", p.in_features, dropout=p.dropout > 0, launches=launches if alone else 0)
        partials, operands = (
            partial_bytes(p),
            ((self.x_blocks, self.x_copied), (self.y_blocks, self.dy_copied)),
        )
        moved = sum(size * (1 if copied else p.num_blocks * self.touched) for size, copied in operands)
        each = self.product / (2 * GRAD_TILE)  # once for each tile of the other
        cached = sum(each * (1 if copied else self.overfetch(GRAD_TILE)) for _, copied in operands)
        self.add(
            "block gradients",
            self.product + launches * 4 * self.block_w * p.max_rank,
            moved + launches * (self.touched_w + self.factors),
            cached=cached + launches * self.block_w * self.overfetch(WARP),
            extra_bytes=partials,
            launches=launches,
        )
        self.add("sum partials", partials // 4, self.factors, extra_bytes=partials)

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
    p, each = c.p, c.p.num_blocks
    product = 2 * c.block_w * p.max_rank
    c.base_forward()
    c.elementwise("zero ΔW", 0, c.w)
    c.add("B_k·A_k", product, c.block_w + c.factors, launches=each)
    c.elementwise("gather W0 blocks", c.touched_w, c.block_w, launches=each)
    c.elementwise("scale", c.block_w, c.block_w, launches=each)
    c.elementwise("∘ W0 blocks", 2 * c.block_w, c.block_w, launches=each)
    c.elementwise("scatter into ΔW", c.block_w, c.touched_w, launches=each)
    _dense_delta(c)
    c.elementwise("gather G blocks", c.touched_w, c.block_w, launches=each)
    c.elementwise("G_k ∘ W0_k", 2 * c.block_w, c.block_w, launches=each)
    c.elementwise("scale gradient", c.block_w, c.block_w, launches=each)
    c.add("dB_k", product, c.block_w + c.factors, launches=each)
    c.add("dA_k", product, c.block_w + c.factors, launches=each)


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
    """The adapter first, block by block; then the base GEMM accumulates onto its result, and a bias comes last."""
    c.build_blocks()
    c.gather("gather x", c.p.in_features, dropout=c.p.dropout > 0)
    c.block_matmul("block matmul", c.p.out_features, c.x_blocks, c.y, copied=c.x_copied, scattered=True)
    c.base_forward()
    c.add("y, read to accumulate", 0, c.y, launches=0)
    if c.p.bias:  # every other way adds it where it makes y
        c.elementwise("add bias", c.y, c.y)
    c.stage = "backward"
    c.factor_gradients()
    if c.p.dropout:
        c.gather("gather dY again", c.p.out_features)
        c.build_blocks()
        c.block_matmul(
            "block matmul of dX", c.p.in_features, c.y_blocks, c.x_blocks, copied=c.dy_copied, scattered=False
        )
        cached = c.x_blocks + c.x * c.overfetch(WARP)
        c.add("scatter dX, dropout", c.x_blocks, c.x_blocks + c.x, cached=cached)
        c.base_backward()
        c.add("dX, read to accumulate", 0, c.x, launches=0)
    else:
        c.merged_dx()


def _fused(c: _Count) -> None:
    """Base and adapter in one kernel: two products for each chunk of ranks."""
    p, chunks = c.p, math.ceil(c.p.max_rank / FUSED_MAX_RANK)
    step = fused_step(precision_of(p.dtype, c.ieee).name, p.tokens)
    tiles = math.ceil(p.tokens / step.tokens)

    def one_kernel(name: str, source: int, target: int, rows: int, columns: int, instructions: int) -> None:
        programs = chunks * tiles * math.ceil(rows / step.rows)
        split = FUSED_SPLIT if step.tokens == FUSED_TOKENS and programs < FUSED_FULL else 1
        steps = math.ceil(math.ceil(columns / step.columns) / split)
        # Programs of all tokens run side by side: W0 comes from memory once, and through the cache for each tile.
        c.add(
            name,
            2 * chunks * p.unit_flops,
            chunks * (source + c.w) + c.factors + target,
            cached=chunks * (tiles * c.w + p.tokens * c.w / step.rows) + target,
            extra_bytes=2 * 4 * split * target
            if split > 1
            else 0,  # float32 parts, which a second launch adds
            efficiency=FUSED_EFFICIENCY,
            launches=min(split, 2),
            programs=programs * split,
            instructions=steps * step.warps * instructions,
        )

    one_kernel("fused linear", c.x, c.y, p.out_features, p.in_features, step.y_instructions)
    c.stage = "backward"
    c.factor_gradients()
    one_kernel("fused dX", c.y, c.x, p.in_features, p.out_features, step.dx_instructions)


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
