"""The trust report: what share of its error budget each result uses up, for each backend, algorithm and dtype.

A result passes where `torch.testing.assert_close` finds it as close to the float64 truth as its budget says: no element
may be further off than twice the furthest of the same-dtype reference. (By their norms the tests ask the same:
problems.error_over_budget.) In float64 the reference is the truth, and the budget a few roundings. Shares are the worst
of several random problems. It runs on the GPU where there is one, else in Triton's interpreter. Exits 1 where a budget
is exceeded, and says of which result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import conftest  # noqa: F401  # Triton interprets where there is no GPU, decided before a kernel is defined
import torch
import torch.nn.functional as F
from problems import DEVICE, TINY, LinearProblem, make_problem, obstacle
from torch import Tensor

from smoa_kernels.backends import load_backend, triton_obstacle
from smoa_kernels.cost.problem import padding_multiple
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import PackedAdapter, scaling_tensor
from smoa_kernels.definition.reference import reference_delta_weight

QUANTITIES = ("y", "dX", "dA", "dB", "dbias", "merged W")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """One row of the report."""

    backend: str
    algorithm: str
    dtype: torch.dtype


class Found(NamedTuple):
    """One result of one problem: its share of the budget, and what torch.testing says where that is exceeded."""

    share: float
    complaint: str | None


def cases() -> Iterator[Case]:
    """Every algorithm of every backend that runs here, in every dtype that it takes; the reference has one."""
    algorithms = {"reference": ("auto",), "eager": load_backend("eager").ALGORITHMS, "native": ("merged",)}
    if triton_obstacle(DEVICE) is None:
        algorithms["triton"] = load_backend("triton").ALGORITHMS
    for backend, ways in algorithms.items():
        for dtype in DTYPES:
            if obstacle(backend, dtype) is None:
                yield from (Case(backend, way, dtype) for way in (*ways, "dropout"))


def examine(case: Case, problem: LinearProblem) -> dict[str, Found]:
    """Every quantity of one problem."""
    options: dict[str, object] = {"algorithm": case.algorithm, "backend": case.backend}
    rounded = problem.to(case.dtype)
    mask = None
    if case.algorithm == "dropout":
        dropout = Dropout(torch.tensor(5, device=DEVICE), 0.3)
        options |= {"algorithm": "auto", "dropout_p": dropout.p, "dropout_seed": dropout.seed}
        mask = kept(case.backend, rounded, dropout) * dropout.scale
    found = (*rounded.run(**options), merged(case.backend, rounded))
    same = definition(rounded, mask)
    truth = definition(rounded.to(torch.float64), mask)
    return {name: judge(*three) for name, *three in zip(QUANTITIES, found, same, truth, strict=True)}


def judge(ours: Tensor, theirs: Tensor, truth: Tensor) -> Found:
    """A result beside the same-dtype reference's."""
    allowed = 2 * furthest(theirs, truth) + TINY[theirs.dtype] * float(truth.abs().max())
    complaint = None
    try:
        assert ours.dtype == theirs.dtype, f"it must be {theirs.dtype}, is {ours.dtype}"
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=allowed)
    except AssertionError as error:
        complaint = str(error)
    return Found(furthest(ours, truth) / allowed, complaint)


def furthest(value: Tensor, truth: Tensor) -> float:
    """The largest error of an element; NaN where there is one."""
    return float((value.double() - truth).abs().max())


def kept(backend: str, problem: LinearProblem, dropout: Dropout) -> Tensor:
    """What of x a backend's mask keeps, ones in float64: the kernels' is read off by gathering ones."""
    ones = torch.ones_like(problem.x)
    if backend != "triton":
        return (dropout.multiplier(ones) != 0).double()
    from smoa_kernels.kernels.common import padded_width  # which need triton
    from smoa_kernels.kernels.permute import gather_columns, scatter_columns

    blocks = problem.partition
    width = padded_width(blocks.col_sizes, padding_multiple(blocks.col_sizes))
    gathered = gather_columns(ones, blocks.col_index, blocks.col_offsets, width, dropout=dropout)
    mask = scatter_columns(gathered, blocks.col_index, blocks.col_offsets, torch.empty_like(ones))
    return (mask != 0).double()


def merged(backend: str, problem: LinearProblem) -> Tensor:
    """W_eff as `merge()` makes it; the reference has no way of its own."""
    p = problem
    adapter = PackedAdapter(p.weight, p.A, p.B, p.partition, p.ranks, scaling_tensor(p.scaling, p.x.device))
    maker = load_backend("triton" if backend == "triton" else "eager")
    weight: Tensor = maker.modulated_weight(adapter)
    return weight


def definition(problem: LinearProblem, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Every quantity by the definition, in the problem's dtype, gradients by autograd."""
    p = problem
    assert p.bias is not None
    x, A, B, bias = (t.detach().clone().requires_grad_() for t in (p.x, p.A, p.B, p.bias))
    delta = reference_delta_weight(p.weight, A, B, p.partition, p.ranks, scaling=p.scaling)
    dropped = x if mask is None else x * mask.to(x.dtype)
    y = F.linear(x, p.weight, bias) + F.linear(dropped, delta)
    gradients = torch.autograd.grad(y, (x, A, B, bias), p.dy)
    return y.detach(), *gradients, p.weight + delta.detach()


def drawn(*, quick: bool) -> list[LinearProblem]:
    """The problems: one small one, or three larger ones."""
    if quick:
        return [make_problem(tokens=24, out_features=48, in_features=64, ranks=(3, 0, 2))]
    sizes = {"tokens": 96, "out_features": 160, "in_features": 192}
    return [make_problem(**sizes, ranks=(6, 4, 6), seed=seed) for seed in range(3)]


def report(problems: Sequence[LinearProblem]) -> dict[Case, dict[str, Found]]:
    """By case and quantity: the worst of the problems, one that is exceeded before any other."""
    found = {}
    for case in cases():
        each = [examine(case, problem) for problem in problems]
        found[case] = {
            name: max((one[name] for one in each), key=lambda it: (it.complaint is not None, it.share))
            for name in QUANTITIES
        }
    return found


def table(found: dict[Case, dict[str, Found]]) -> str:
    """The report as Markdown."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, Triton interpreted"
    lines = [
        f"Share of the error budget used up ({where}, torch {torch.__version__}); at most 1 is asked.",
        "",
        "| backend | algorithm | dtype | " + " | ".join(QUANTITIES) + " |",
        "|---|---|---|" + "---|" * len(QUANTITIES),
    ]
    for case, row in found.items():
        name = str(case.dtype).removeprefix("torch.")
        cells = " | ".join(f"{row[quantity].share:.2f}" for quantity in QUANTITIES)
        lines.append(f"| {case.backend} | {case.algorithm} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print the report, write it where asked; 1 where a budget is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small problem")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    found = report(drawn(quick=options.quick))
    text = table(found)
    print(text, end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    complaints = [
        f"{case.backend}, {case.algorithm}, {case.dtype}, {name}: {result.complaint}"
        for case, row in found.items()
        for name, result in row.items()
        if result.complaint is not None
    ]
    print(*complaints, sep="\n", end="\n" if complaints else "", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
