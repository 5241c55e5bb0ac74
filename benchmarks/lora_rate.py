"""Simulate the κ with which SMoA follows LoRA's learning rate: the table of docs/internals/learning_rate.md.

    python -m benchmarks.lora_rate

A layer has random W0 and x and a fixed gradient of the output. It takes sign steps on A and B, like Adam's first steps.
κ is LoRA's change of the output in the gradient's direction, divided by SMoA's at s = 1 and a W0 of rms 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .tables import table

STEPS = (1, 5, 20)
CASES: tuple[dict[str, Any], ...] = (
    *({"K": K} for K in (1, 2, 4, 8)),
    {"K": 2, "r": 32},
    {"K": 2, "common": 0.0},
    {"K": 2, "C": 1024},
)


def progress(
    method: str,
    seed: int,
    *,
    N: int = 256,
    C: int = 256,
    K: int = 2,
    r: int = 8,
    T: int = 256,
    common: float = 0.3,
) -> Tensor:
    """The change of the output in the gradient's direction after each step; `common` is the inputs' shared energy."""
    draw = torch.Generator().manual_seed(seed)
    mean = torch.randn(C, generator=draw)
    x = math.sqrt(common) * mean + math.sqrt(1 - common) * torch.randn(T, C, generator=draw)
    directions = torch.randn(N, 8, generator=draw) / 8**0.5
    features = torch.randn(C, 8, generator=draw) / C**0.5
    W0 = torch.randn(N, C, generator=draw)
    dy = (x @ features) @ directions.T / 8**0.5

    rank, width = (r, C) if method == "lora" else (r // K, C / K)
    A = (2 * torch.rand(rank, C, generator=draw) - 1) / width**0.5
    modulation = torch.ones(N, C)
    if method == "smoa":
        rows, cols = (torch.randint(K, (size,), generator=draw) for size in (N, C))
        modulation = (rows[:, None] == cols) * W0
    B, found = torch.zeros(N, rank), []
    for _ in range(max(STEPS)):
        H = (dy.T @ x) * modulation
        dB, dA = H @ A.T, B.T @ H
        B, A = B - 0.01 * dB.sign(), A - 0.01 * dA.sign()
        found.append(-(((x @ ((B @ A) * modulation).T) * dy).sum() / dy.norm() ** 2))
    return torch.stack(found)


def main() -> None:
    """Print κ after some steps, the ratio of means over four draws."""
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        lora, smoa = (
            torch.stack([progress(method, seed, **case) for seed in range(4)]).mean(0)
            for method in ("lora", "smoa")
        )
        kappa = lora / smoa
        named = ", ".join(f"{name}={value}" for name, value in case.items())
        rows.append((named, *(f"{kappa[step - 1]:.1f}" for step in STEPS)))
    print(table(("case", *(f"step {step}" for step in STEPS)), rows))


if __name__ == "__main__":
    main()
