"""What the fused weights of experts cost on a GPU: ours, PEFT's LoRA on them, and an ideal grouped LoRA.

The rules are those of `smoa_kernels/tuning/roofline.py`, and three more, for everyone alike:

- Pairs of a token and an expert are spread evenly. A product over an expert's pairs takes them a tile at a time, and
  the last tile is half empty. A tile has 128 pairs where an expert has 256, else 64; our own has 256 where an expert
  has 512 and blocks have no more than 16 ranks.
- A product over pairs reads the weights of the experts that have any. What builds weights builds all of them.
- PEFT's LoRA is counted as of PEFT 0.21: each forward builds W0 + s·BA of all experts, as if in one pass over them. The
  backward makes a dense gradient of it and multiplies that with A and with B. The ideal one adds x Aᵀ Bᵀ to y, and
  nothing that it computes is as large as W0.

Of ours, the adapter's part of `grouped_linear` builds an operand in its main loop, as the one-kernel form does, and its
products run at that form's share of a GEMM's rate. What the programs of `grouped_grad` add to dA is written over zeros,
and summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from smoa_kernels.tuning.gpus import Gpu
from smoa_kernels.tuning.roofline import FUSED_EFFICIENCY, Estimate, Part, Pass

__all__ = ["EXPERTS_WAYS", "MOE_MODELS", "ExpertsProblem", "estimate_experts", "model_seconds"]

EXPERTS_WAYS = ("frozen", "lora", "ideal lora", "smoa")
# Of a program: rows of its tile, pairs of a step, ranks at least.
ROWS, STEP, RANKS = 128, 64, 16


@dataclass(frozen=True)
class ExpertsProblem:
    """One fused weight and one batch.

    Attributes:
        pairs: of a token and one of its experts.
        experts: E.
        out_features: N.
        in_features: C.
        num_blocks: K, contiguous.
        rank: r of one expert, of all its blocks together.
    """

    pairs: int
    experts: int
    out_features: int
    in_features: int
    num_blocks: int = 4
    rank: int = 16

    @property
    def tile(self) -> int:
        """Pairs in a tile of a library's product."""
        return 128 if self.pairs >= 256 * self.experts else 64

    @property
    def max_rank(self) -> int:
        """ρ, the largest rank of a block under the even split."""
        return math.ceil(self.rank / self.num_blocks)

    @property
    def active(self) -> int:
        """Experts that have pairs."""
        return min(self.experts, self.pairs)


MOE_MODELS = {
    # experts, of which a token takes so many, and (N, C) of gate and up, and of down
    "Qwen3-30B-A3B": (128, 8, ((1536, 2048), (2048, 768))),
    "Mixtral-8x7B": (8, 2, ((28672, 4096), (4096, 14336))),
}
"""From the `config.json` that each model's authors publish."""


def model_seconds(model: str, tokens: int, way: str, gpu: Gpu, *, rank: int = 16) -> float:
    """Device time of forward and backward through the experts of one layer of a model in bf16, predicted."""
    experts, top_k, shapes = MOE_MODELS[model]
    problems = (ExpertsProblem(tokens * top_k, experts, *shape, rank=rank) for shape in shapes)
    return sum(estimate_experts(problem, gpu, way).device_seconds() for problem in problems)


def estimate_experts(problem: ExpertsProblem, gpu: Gpu, way: str) -> Estimate:
    """Predict the cost of one of `EXPERTS_WAYS` in bf16, of its kernels alone."""
    count = _Count(problem)
    _COUNTED[way](count)
    return Estimate(way, tuple(count.parts), gpu.rates(torch.bfloat16, ieee=False))


@dataclass
class _Count:
    p: ExpertsProblem
    parts: list[Part] = field(default_factory=list)
    stage: Pass = "forward"

    def __post_init__(self) -> None:
        p = self.p
        self.x, self.y = p.pairs * p.in_features, p.pairs * p.out_features
        self.one = p.out_features * p.in_features
        self.w, self.all_w = p.active * self.one, p.experts * self.one
        self.unit = self.product(p.tile)  # flops of the base's product

    def tiles(self, pairs: int) -> int:
        return round(self.p.pairs / pairs + self.p.active / 2)

    def product(self, tile: int) -> int:
        return 2 * self.tiles(tile) * tile * self.one

    def add(self, name: str, flops: float, elements: float, *, launches: int = 1) -> None:
        self.parts.append(Part(name, self.stage, flops, 2 * elements, launches))

    def base(self, name: str) -> None:
        self.add(name, self.unit, self.x + self.w + self.y)

    def grouped_linear(self, name: str) -> None:
        """The adapter's part over one block's columns, then the base's, in one launch."""
        p = self.p
        tile = 256 if p.pairs >= 512 * p.experts and p.max_rank <= RANKS else p.tile
        unit = self.product(tile)
        adapter = unit / p.num_blocks * (1 + RANKS / tile)
        self.add(f"{name}: adapter", adapter / FUSED_EFFICIENCY, 0, launches=0)
        self.add(f"{name}: base", unit, self.x + self.w + self.y)

    def grouped_grad(self) -> None:
        """The gradients of both factors: tiles of G, what ends each, and the sum of what programs add to dA."""
        p = self.p
        steps = round(p.pairs / p.active / STEP + 0.5)
        blocks = p.active * self.one / p.num_blocks
        flops = 2 * steps * STEP * blocks + 2 * 2 * RANKS * blocks
        self.add("dA and dB", flops, self.x + self.y + self.w / p.num_blocks)
        # float32, as two elements each: zeros, what programs write of them, and reading all.
        partials = 2 * p.experts * math.ceil(p.out_features / ROWS) * p.max_rank * p.in_features
        self.add("sum of dA", 0, (2 + 1 / p.num_blocks) * partials, launches=3)


def _frozen(c: _Count) -> None:
    c.base("base")
    c.stage = "backward"
    c.base("dX")


def _lora(c: _Count) -> None:
    factors = c.p.experts * c.p.rank * (c.p.out_features + c.p.in_features)
    small = 2 * c.all_w * c.p.rank
    c.add("W0 + s·BA", small, 2 * c.all_w + factors)
    c.base("base")
    c.stage = "backward"
    c.base("dX")
    c.add("dense gradient", c.unit, c.x + c.y + c.all_w)
    c.add("dB", small, c.all_w + factors)
    c.add("dA", small, c.all_w + factors)


def _ideal_lora(c: _Count) -> None:
    p = c.p
    h, factors = p.pairs * p.rank, p.active * p.rank
    narrow, wide = 2 * h * p.in_features, 2 * h * p.out_features
    c.base("base")
    c.add("h = x·Aᵀ", narrow, c.x + h + factors * p.in_features)
    c.add("y + h·Bᵀ", wide, 2 * c.y + h + factors * p.out_features)
    c.stage = "backward"
    c.add("dB", wide, c.y + h + factors * p.out_features)
    c.add("dh", wide, c.y + h + factors * p.out_features)
    c.add("dA", narrow, c.x + h + factors * p.in_features)
    c.base("dX")
    c.add("dX + dh·A", narrow, 2 * c.x + h + factors * p.in_features)


def _smoa(c: _Count) -> None:
    p = c.p
    c.grouped_linear("grouped linear")
    c.stage = "backward"
    c.grouped_grad()
    c.add("B along W0's rows", 0, 2 * p.experts * p.out_features * p.max_rank)
    c.grouped_linear("grouped dX")


_COUNTED: dict[str, Callable[[_Count], None]] = {
    "frozen": _frozen,
    "lora": _lora,
    "ideal lora": _ideal_lora,
    "smoa": _smoa,
}
