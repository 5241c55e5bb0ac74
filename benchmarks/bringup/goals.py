"""The goals for an H100, each with the roofline's prediction and what a bring-up measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from smoa_kernels.tuning.gpus import Gpu
from smoa_kernels.tuning.roofline import estimate

from ..providers import FROZEN, HIRA, LORA, PAPER, SMOA, Case
from .cases import DOWN, DOWN_HIRA, SQUARE, SQUARE_HIRA
from .predictions import peak_bytes
from .state import State

__all__ = ["COLUMNS", "GOALS", "WAYS", "Goal", "Row"]


class Column(NamedTuple):
    """A column of the goals' table: its case at K=4, and at K=1 for HiRA."""

    heading: str
    case: Case
    one_block: Case


COLUMNS = (Column("4096×4096", SQUARE, SQUARE_HIRA), Column("N=4096, C=14336", DOWN, DOWN_HIRA))

WAYS = {
    FROZEN: "frozen",
    LORA: "lora",
    HIRA: "hira",
    PAPER: "paper_dense",
    f"{SMOA} merged": "merged",
    f"{SMOA} split": "split",
}
"""Every provider that the roofline knows, and its name there."""


@dataclass(frozen=True)
class Row:
    """One goal in one column.

    Attributes:
        goal: at most this.
        predicted: by the roofline; bytes by `predictions.py`.
        measured: None if it was not.
        noisy: whether the machine was too unsteady to quote it.
    """

    goal: float
    predicted: float
    measured: float | None
    noisy: bool = False


@dataclass(frozen=True)
class Goal:
    """A line of the goals' table.

    Attributes:
        text: the bounded quantity.
        limits: one for each column.
        row: makes the row from a column, its limit, the GPU and the state.
    """

    text: str
    limits: tuple[float, float]
    row: Callable[[Column, float, Gpu, State], Row]

    def met(self, row: Row) -> bool | None:
        """Whether the goal is met; None if nothing was measured, or on an unsteady machine."""
        if row.measured is None or row.noisy:
            return None
        return row.measured <= row.goal


def _time(ours: str, peer: str, *, hira: bool = False) -> Callable[[Column, float, Gpu, State], Row]:
    """Forward and backward of ours over a peer's, pair by pair; at K=1 if `hira`."""

    def row(column: Column, limit: float, gpu: Gpu, state: State) -> Row:
        case = column.one_block if hira else column.case
        seconds = [estimate(case.problem(), gpu, WAYS[name]).seconds() for name in (ours, peer)]
        result = state.run.find("layer", **case.record())
        if result is None or not {ours, peer} <= set(result.seconds["both"]):
            return Row(limit, seconds[0] / seconds[1], None)
        found = result.comparison("both")
        return Row(limit, seconds[0] / seconds[1], found.ratio(ours, peer).median, found.noisy)

    return row


def _peak(ours: str) -> Callable[[Column, float, Gpu, State], Row]:
    """Peak memory beyond the frozen layer's, over LoRA's."""

    def row(column: Column, limit: float, gpu: Gpu, state: State) -> Row:
        problem = column.case.problem()
        frozen, *peaks = (peak_bytes(problem, WAYS[name]) for name in (FROZEN, ours, LORA))
        predicted = (peaks[0] - frozen) / (peaks[1] - frozen)
        result = state.run.find("memory", **column.case.record())
        if result is None or not {ours, LORA, FROZEN} <= set(result.bytes):
            return Row(limit, predicted, None)
        extra = [result.bytes[name]["peak"] - result.bytes[FROZEN]["peak"] for name in (ours, LORA)]
        return Row(limit, predicted, extra[0] / extra[1] if extra[1] > 0 else None)

    return row


GOALS = (
    Goal("fwd+bwd over PEFT LoRA, merged", (1.00, 1.10), _time(f"{SMOA} merged", LORA)),
    Goal("fwd+bwd over PEFT LoRA, split (default)", (1.15, 1.25), _time(f"{SMOA} split", LORA)),
    Goal("fwd+bwd over PEFT HiRA at K=1, merged", (0.70, 0.70), _time(f"{SMOA} merged", HIRA, hira=True)),
    Goal("fwd+bwd over PEFT HiRA at K=1, split", (0.85, 0.85), _time(f"{SMOA} split", HIRA, hira=True)),
    Goal("fwd+bwd over the paper's dense way, merged", (0.50, 0.50), _time(f"{SMOA} merged", PAPER)),
    Goal("fwd+bwd over the paper's dense way, split", (0.60, 0.60), _time(f"{SMOA} split", PAPER)),
    Goal("peak extra memory over PEFT LoRA, split", (1.0, 1.0), _peak(f"{SMOA} split")),
)
