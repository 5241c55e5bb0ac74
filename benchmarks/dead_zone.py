"""Draw the dead zones of half precision: how much of a small update's output survives a bf16 or fp16 forward.

    python -m benchmarks.dead_zone      # docs/dead_zone.svg

Survival is the projection of `y - y_base` on the exact adapter output, both in float64: 1 if the whole adapter output
arrives, 0 if rounding removes it. δ is the update's size relative to the weights, in rms. Measured on the machine that
runs it; the layer is 1024 x 1024, K = 1, 2048 tokens, and PEFT's HiRA computes the same update. torch's operators
multiply, because the compiled code of some processors would widen the halves to float32 (docs/cpu.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from smoa_kernels import BlockPartition, smoa_linear

from .plots import svg
from .results import ROOT, write
from .tables import table

FEATURES, TOKENS, RANK = 1024, 2048, 8
DELTAS = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


def survival(run: Callable[[Tensor], Tensor], B: Tensor, truth: Tensor) -> float:
    """Projection of the output's change on the exact one."""
    change = run(B).double() - run(torch.zeros_like(B)).double()
    return float((change * truth).sum() / truth.square().sum())


def curves(dtype: torch.dtype) -> dict[str, list[float]]:
    """Survival by δ for each way to compute the forward."""
    torch.manual_seed(0)
    base = nn.Linear(FEATURES, FEATURES).requires_grad_(False).to(dtype)
    x = torch.randn(TOKENS, FEATURES, dtype=dtype)
    A, direction = torch.randn(RANK, FEATURES), torch.randn(FEATURES, RANK)
    partition = BlockPartition.from_weight(base.weight, 1)
    ranks = torch.tensor([RANK], dtype=torch.int32)

    def ours(algorithm: str) -> Callable[[Tensor], Tensor]:
        options: dict[str, Any] = {"scaling": 1.0, "algorithm": algorithm, "backend": "eager"}
        return lambda B: smoa_linear(x, base.weight, base.bias, A, B, partition, ranks, **options)

    config = peft.HiraConfig(r=RANK, target_modules=["0"])
    hira = peft.inject_adapter_in_model(config, nn.Sequential(base))[0]

    def peft_hira(B: Tensor) -> Tensor:
        hira.hira_A["default"].data, hira.hira_B["default"].data = A.to(dtype), B.to(dtype)
        y: Tensor = hira(x)
        return y.detach()

    def nearest(B: Tensor) -> Tensor:
        return F.linear(x, (base.weight.float() * (1 + B @ A)).to(dtype), base.bias)

    ways = {
        "W_eff rounded by thresholds (merged)": ours("merged"),
        "adapter first, base accumulates (split)": ours("split"),
        "W_eff rounded to nearest": nearest,
        "added to the rounded base (PEFT HiRA)": peft_hira,
    }
    relative = (direction @ A).square().mean().sqrt()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for delta in DELTAS:
        B = direction * (delta / relative)
        truth = x.double() @ ((B.double() @ A.double()) * base.weight.double()).T
        for name, run in ways.items():
            found[name].append(survival(run, B, truth))
    return found


def main() -> None:
    """Measure, print the table and draw the figure."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, dtype in zip(axes, (torch.bfloat16, torch.float16), strict=True):
        name = str(dtype).removeprefix("torch.")
        found = curves(dtype)
        rows = [(way, *(f"{value:.2f}" for value in values)) for way, values in found.items()]
        print(table((f"{name}, δ", *(f"{delta:.0e}" for delta in DELTAS)), rows))
        for way, values in found.items():
            axis.semilogx(DELTAS, values, marker="o", label=way)
        axis.set(title=name, xlabel="relative size of the update, δ (rms)", ylim=(-0.1, 1.25))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the adapter's output\nthat survives the forward")
    axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(0.0, 0.62))
    write(ROOT / "docs" / "dead_zone.svg", svg(figure))


if __name__ == "__main__":
    main()
