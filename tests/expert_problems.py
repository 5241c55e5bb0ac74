"""Random problems for tests of experts: fused weights, blocks of every kind, and pairs sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from problems import DEVICE, shares
from torch import Tensor

from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.definition.experts import ExpertBlocks, ExpertsAdapter, reference_experts_linear
from smoa_kernels.operators.experts import experts_linear

RULES = {"rule": ("random", 4), "granules": ("random", 8), "contiguous granules": ("contiguous", 8)}
"""Blocks like those of a configuration: their order and granule. The kernels read whole granules of 8 in place."""


@dataclass(frozen=True)
class ExpertsProblem:
    """Arguments of `experts_linear`, and dY for the backward."""

    x: Tensor
    ends: Tensor
    adapter: ExpertsAdapter
    dy: Tensor

    def to(self, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> ExpertsProblem:
        """The same values, rounded."""
        a, factors = self.adapter, factor_dtype or dtype
        a = replace(a, weight=a.weight.to(dtype), A=a.A.to(factors), B=a.B.to(factors))
        return ExpertsProblem(self.x.to(dtype), self.ends, a, self.dy.to(dtype))

    def run(self, function: Callable[[Tensor, Tensor, ExpertsAdapter], Tensor]) -> tuple[Tensor, ...]:
        """y, dX, dA and dB."""
        x, A, B = (t.detach().requires_grad_() for t in (self.x, self.adapter.A, self.adapter.B))
        y = function(x, self.ends, replace(self.adapter, A=A, B=B))
        return (y.detach(), *torch.autograd.grad(y, (x, A, B), self.dy))

    def operator(self, backend: str) -> tuple[Tensor, ...]:
        """The results of a backend for this problem."""
        return self.run(lambda *given: experts_linear(*given, backend))

    def assert_within_budget(self, found: Sequence[Tensor]) -> None:
        """Every error is at most twice the definition's error in its dtype."""
        same = self.run(reference_experts_linear)
        truth = self.to(torch.float64).run(reference_experts_linear)
        used = shares(found, same, truth)
        assert all(share <= 1 for share in used.values()), used


def make_blocks(
    kind: str, experts: int, shape: tuple[int, int], num_blocks: int, generator: torch.Generator
) -> ExpertBlocks:
    """Blocks of `RULES`, or of uneven sizes: "contiguous", "shared", each expert's "own", or "empty" some of them."""
    if kind in RULES:
        partitions = [
            BlockRule(num_blocks, *RULES[kind], block_seed=seed).of_shape(shape, "cpu")
            for seed in range(experts)
        ]
        return ExpertBlocks.from_labels(
            *(torch.stack([getattr(p, side) for p in partitions]) for side in ("row_block", "col_block")),
            num_blocks,
        )
    count = 1 if kind in ("contiguous", "shared") else experts
    sides = []
    for size in shape:
        labels = torch.randint(num_blocks - (kind == "empty"), (count, size), generator=generator)
        sides.append(labels.sort(1).values if kind == "contiguous" else labels)
    return ExpertBlocks.from_labels(*sides, num_blocks)


def make_problem(
    *,
    pairs: Sequence[int] = (3, 0, 1, 7, 0),
    rows: int = 33,
    cols: int = 57,
    ranks: Sequence[int] = (3, 0, 2),
    blocks: str = "own",
    dtype: torch.dtype = torch.float64,
    transposed: bool = False,
    seed: int = 0,
) -> ExpertsProblem:
    """A problem with nonzero B and `pairs` of each expert. Padding rows of A and B hold rubbish."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        experts, total, rho = len(pairs), sum(pairs), max(ranks)
        weight = randn(experts, cols, rows).transpose(1, 2) if transposed else randn(experts, rows, cols)
        made = make_blocks(blocks, experts, (rows, cols), len(ranks), generator)
        problem = ExpertsProblem(
            x=randn(total, cols),
            ends=torch.tensor(pairs).cumsum(0).int(),
            adapter=ExpertsAdapter(
                weight / cols**0.5,
                randn(experts, rho, cols),
                randn(experts, rows, rho) * 0.3,
                made,
                torch.tensor(ranks, dtype=torch.int32),
                torch.tensor(0.7, dtype=torch.float64),
            ),
            dy=randn(total, rows),
        ).to(dtype)
    return problem if DEVICE.type == "cpu" else on(problem, DEVICE)


def on(problem: ExpertsProblem, device: torch.device) -> ExpertsProblem:
    """The same problem on another device."""

    def moved(owner: object) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in vars(owner).items() if isinstance(value, Tensor)}

    adapter = problem.adapter
    adapter = replace(adapter, blocks=replace(adapter.blocks, **moved(adapter.blocks)), **moved(adapter))
    return replace(problem, adapter=adapter, **moved(problem))
