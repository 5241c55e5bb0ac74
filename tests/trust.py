"""The trust report: what share of its error budget each result uses up, for each backend, algorithm and dtype.

Shares are the worst of several random problems; the budget is `problems.error_over_budget`'s. It runs on the GPU where
there is one, else in Triton's interpreter. Exits 1 where a budget is exceeded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import conftest  # noqa: F401  # Triton must know before a kernel is defined whether it interprets
import torch
from problems import NAMES, Case, all_cases, budget_shares, error_over_budget

QUANTITIES = (*NAMES, "merged W")


def shares(case: Case, *, seed: int, quick: bool) -> dict[str, float]:
    """Budget fractions of one problem: every result of a run, and W_eff from `merge()`."""
    sizes = {"tokens": 24, "out_features": 48, "in_features": 64, "ranks": (3, 0, 2)}
    if not quick:
        sizes = {"tokens": 96, "out_features": 160, "in_features": 192, "ranks": (6, 4, 6)}
    p = case.problem(seed=seed, **sizes)
    found, exact = p.run(**case.options), p.to(torch.float64)
    layer = p.layer(partition=p.partition, backend="triton" if case.backend == "triton" else "eager")
    result = budget_shares(found, case, p)
    same, truth = p.weight + p.delta_weight(), exact.weight + exact.delta_weight()
    layer.merge()
    return result | {"merged W": error_over_budget(layer.weight.detach(), same, truth)}


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
        cells = [f"{row[quantity]:.2f}" for quantity in QUANTITIES]
        lines.append(f"| {' | '.join([*str(case).split('-'), *cells])} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print the report and write it to a file if asked; return 1 if a budget is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small problem")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    found = {}
    for case in all_cases():
        each = [shares(case, seed=seed, quick=options.quick) for seed in range(1 if options.quick else 3)]
        # NaN counts as the largest.
        found[case] = {q: max((one[q] for one in each), key=lambda s: (s != s, s)) for q in QUANTITIES}
    text = table(found)
    print(text, end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    exceeded = [f"{case} {q}" for case, row in found.items() for q, share in row.items() if not share <= 1]
    print(*exceeded, sep="\n", end="\n" if exceeded else "", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
