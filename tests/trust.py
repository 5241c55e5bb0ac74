"""The trust report: what share of its error budget each result uses up, for each backend, algorithm and dtype.

The numbers are those that the tests assert to be at most 1: the error against the float64 truth over twice the
same-dtype reference's error (problems.error_over_budget), here the worst of several random problems. It runs on the GPU
where there is one, else in Triton's interpreter. Exits 1 where a budget is exceeded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import conftest  # noqa: F401  # Triton interprets where there is no GPU, decided before a kernel is defined
import torch
from problems import DEVICE, LinearProblem, error_over_budget, make_problem
from torch import Tensor

from smoa_kernels import eager
from smoa_kernels.backends import load_backend, triton_obstacle
from smoa_kernels.packed import PackedAdapter, scaling_tensor
from smoa_kernels.reference import reference_delta_weight

QUANTITIES = ("y", "dX", "dA", "dB", "dbias", "merged W")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """One row of the report."""

    backend: str
    algorithm: str
    dtype: torch.dtype


def cases() -> Iterator[Case]:
    """Every algorithm of every backend that runs here; float64 has no wider truth to be judged by."""
    for dtype in DTYPES:
        yield from (Case("eager", algorithm, dtype) for algorithm in (*eager.ALGORITHMS, "dropout"))
    if triton_obstacle(DEVICE) is None:
        algorithms = load_backend("triton").ALGORITHMS
        yield from (Case("triton", way, dtype) for dtype in DTYPES for way in algorithms)


def shares(case: Case, problem: LinearProblem) -> dict[str, float]:
    """Share of the budget by quantity; 1 is all of it."""
    options: dict[str, object] = {"algorithm": case.algorithm, "backend": case.backend}
    dropout: dict[str, object] = {}
    if case.algorithm == "dropout":
        dropout = {"dropout_p": 0.3, "dropout_seed": torch.tensor(5, device=DEVICE)}
        options |= {"algorithm": "split", **dropout}
    rounded = problem.to(case.dtype)
    exact = rounded.to(torch.float64)
    found = (*rounded.run(**options), merged(case.backend, rounded))
    same = (*rounded.run_reference(**dropout), definition(rounded))
    truth = (*exact.run_reference(**dropout), definition(exact))
    return {
        name: error_over_budget(*three) for name, *three in zip(QUANTITIES, found, same, truth, strict=True)
    }


def merged(backend: str, problem: LinearProblem) -> Tensor:
    """W_eff as `merge()` makes it."""
    p = problem
    adapter = PackedAdapter(p.weight, p.A, p.B, p.partition, p.ranks, scaling_tensor(p.scaling, p.x.device))
    weight: Tensor = load_backend(backend).modulated_weight(adapter)
    return weight


def definition(problem: LinearProblem) -> Tensor:
    """W_eff by the definition, in the problem's dtype."""
    p = problem
    return p.weight + reference_delta_weight(p.weight, p.A, p.B, p.partition, p.ranks, scaling=p.scaling)


def report(*, quick: bool) -> dict[Case, dict[str, float]]:
    """The worst share over the problems, by case and quantity."""
    sizes = {"tokens": 24, "out_features": 48, "in_features": 64, "ranks": (3, 0, 2)}
    if not quick:
        sizes = {"tokens": 96, "out_features": 160, "in_features": 192, "ranks": (6, 4, 6)}
    problems = [make_problem(**sizes, seed=seed) for seed in range(1 if quick else 3)]  # type: ignore[arg-type]
    found = {}
    for case in cases():
        each = [shares(case, problem) for problem in problems]
        found[case] = {name: max(one[name] for one in each) for name in QUANTITIES}
    return found


def table(found: dict[Case, dict[str, float]]) -> str:
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
        cells = " | ".join(f"{row[quantity]:.2f}" for quantity in QUANTITIES)
        lines.append(f"| {case.backend} | {case.algorithm} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print the report, write it where asked; 1 where a budget is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small problem")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    found = report(quick=options.quick)
    text = table(found)
    print(text, end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    # NaN is no share within a budget.
    return 0 if all(share <= 1 for row in found.values() for share in row.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
