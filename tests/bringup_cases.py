"""A bring-up so far, made up: what its stages found on a GPU that is not here."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.bringup.cases import SQUARE, SQUARE_HIRA
from benchmarks.bringup.job import Job
from benchmarks.bringup.state import State
from benchmarks.providers import FROZEN, PAPER, Case
from benchmarks.results import Result, Run

MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "measured_on": "GPU",
    "cpu": "a CPU",
    "cores": 16,
    "threads": 16,
    "system": "Linux",
    "python": "3.11",
    "versions": {"torch": "2.13.0"},
    "smoke": False,
}


def layer(case: Case, **seconds: float) -> Result:
    """A steady comparison: five rounds of the same seconds."""
    rounds = {name.replace("_", " "): [value] * 5 for name, value in seconds.items()}
    phases = dict.fromkeys(("both", "forward", "backward"), rounds)
    return Result("layer", f"layer: {case}", case.record(), FROZEN, [0.0, 0.0], phases)


def memory(case: Case, **peaks: int) -> Result:
    sizes = {
        name.replace("_", " "): {"saved": 0, "peak": peak, "forward_workspace": 0, "backward_workspace": 0}
        for name, peak in peaks.items()
    }
    return Result("memory", f"memory: {case}", case.record(), bytes=sizes)


def measured() -> State:
    """Every figure of the first column; the split form misses LoRA's goal."""
    at_4 = layer(
        SQUARE,
        **{
            FROZEN: 1.0,
            "PEFT_LoRA": 1.4,
            "PEFT_HiRA": 2.8,
            PAPER: 2.8,
            "SMoA_merged": 1.3,
            "SMoA_split": 1.75,
        },
    )
    at_1 = layer(SQUARE_HIRA, **{FROZEN: 1.0, "PEFT_HiRA": 2.8, "SMoA_merged": 1.6, "SMoA_split": 2.2})
    peaks = memory(SQUARE, **{FROZEN: 100, "PEFT_LoRA": 200, "SMoA_split": 180})
    state = State(Run(MACHINE, "abc", "2026-01-01", ())).with_results(at_4, at_1, peaks)
    predict = {
        "flops_per_second": 7e14,
        "bytes_per_second": 3e12,
        "block_grad": {str(SQUARE): {"seconds": 1.0, "share": 0.7}},
    }
    return state.with_finding("predict", predict)


def job(tmp_path: Path, seconds: float) -> tuple[Job, list[State]]:
    saved: list[State] = []
    state = State(Run(MACHINE, "abc", "", ()))
    return Job(state, saved.append, time.monotonic() + seconds, True), saved
