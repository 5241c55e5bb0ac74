"""The host's time for a layer's forward and backward on the triton backend: Python, torch and Triton's launch.

    python -m benchmarks.host_time

Calls pass verification, as on a GPU whose kernels have all been compared. It runs on a CPU with a pretended GPU
(fake_gpu.py), so CUDA's own share of a launch and of torch's operators is missing. The layer is so small that its
products take little time. The algorithm is that for many tokens, merged. Rows are measured in turns, many calls of each
in a round. The table shows the thread's own time: the median of a round's calls, in the calmest round, because other
programs share this machine's caches. nn.Linear computes three products on the CPU, SMoA the same and a batched one.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from smoa_kernels import FusedSMoALinear

from .fake_gpu import FakeGpu, install, pretend_cpu
from .protocol import Turns

TOKENS, FEATURES, BLOCKS, RANK = 16, 128, 4, 16
WARM_UP, CALLS = 10, 60  # in a round
GOAL = 110  # microseconds of forward and backward above nn.Linear's


def pretend() -> FakeGpu:
    """For the life of the process, treat the CPU's tensors as a GPU's, and few tokens as many."""
    gpu = install()
    pretend_cpu("sm_90", 132)
    setattr(importlib.import_module("smoa_kernels.backends.triton"), "choose_algorithm", lambda *_: "merged")  # noqa: B010
    return gpu


def measure(rounds: int) -> tuple[dict[str, float], list[str]]:
    """Microseconds by row, and the launches of a forward and a backward."""
    gpu = pretend()
    torch.manual_seed(0)
    base = nn.Linear(FEATURES, FEATURES)
    layer = FusedSMoALinear.from_linear(
        nn.Linear(FEATURES, FEATURES), r=RANK, num_blocks=BLOCKS, backend="triton"
    )
    x = torch.randn(TOKENS, FEATURES, requires_grad=True)
    dy = torch.randn(TOKENS, FEATURES)

    gpu.launches.clear()
    layer(x).backward(dy)
    launches = [launch.kernel for launch in gpu.launches]
    gpu.recording = False
    verified: Any = importlib.import_module("smoa_kernels.backends.verified")
    verified._is_verified, verified.verdicts = lambda _: True, lambda _: SimpleNamespace(withheld={})
    rows: dict[str, Callable[[], object]] = {
        "nn.Linear, forward": lambda: base(x),
        "nn.Linear, both": lambda: base(x).backward(dy),
        "SMoA, forward": lambda: layer(x),
        "SMoA, both": lambda: layer(x).backward(dy),
    }
    turns = Turns({name: partial(host_seconds, run) for name, run in rows.items()}, "nn.Linear, both")
    for _ in range(rounds):
        turns.round()
    found = turns.comparisons()["host"].seconds
    return {name: 1e6 * min(found[name]) for name in rows}, launches


def host_seconds(run: Callable[[], object]) -> dict[str, float]:
    """The thread's own time for a call: the median of many."""
    seconds = []
    for _ in range(WARM_UP + CALLS):
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return {"host": statistics.median(seconds[WARM_UP:])}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="one round: does it run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # memory that no kernel wrote may hold denormals, which are slow
    found, launches = measure(1 if args.smoke else 60)
    print(
        f"Host time, measured on a CPU with a pretended GPU: T={TOKENS}, {FEATURES}x{FEATURES}, K={BLOCKS}, float32"
    )
    for name, microseconds in found.items():
        print(f"{name:>34} {microseconds:7.0f} µs")
    print(f"{len(launches)} kernels and three GEMMs, one batched: {', '.join(launches)}")
    print(
        f"{'above nn.Linear':>34} {found['SMoA, both'] - found['nn.Linear, both']:7.0f} µs (goal: {GOAL} µs)"
    )


if __name__ == "__main__":
    main()
