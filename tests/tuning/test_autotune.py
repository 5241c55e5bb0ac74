"""`SMOA_AUTOTUNE=1`: when something is timed, for how long, and what happens where it fails."""

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from tuning_cases import (
    CPU,
    FORWARD,
    PERMUTE,
    PERMUTE_CONFIGS,
    ask,
    entry,
    forget,
    kept,
    needs_interpreter,
    scripted,
)

from smoa_kernels.backends import triton as backend
from smoa_kernels.kernels import table
from smoa_kernels.kernels.block_matmul import BlockMatmulConfig
from smoa_kernels.kernels.fused_linear import FusedLinearConfig
from smoa_kernels.kernels.modulate import ModulateConfig
from smoa_kernels.kernels.table import Choice, tuned_algorithm, update, user_table
from smoa_kernels.tuning import autotune, tuner

pytestmark = needs_interpreter

FIRST, SECOND, THIRD = PERMUTE_CONFIGS


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """What was timed; the script makes the first the fastest. Autotuning is on."""
    found: list[Choice] = []

    def seconds(choice: Choice) -> float:
        found.append(choice)
        return float(len(found))

    monkeypatch.setattr(autotune, "timer", scripted(seconds))
    monkeypatch.setattr(autotune, "_spent", 0.0)
    monkeypatch.setattr(table, "measure_unknown", backend._autotune)
    return found


@pytest.mark.parametrize(
    ("value", "on"),
    [(None, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("0", False), ("1", True)))],
)
def test_only_the_variable_hooks_the_tuner_into_the_table(value: str | None, on: bool) -> None:
    program = (
        "import sys; from smoa_kernels.kernels import table; import smoa_kernels.backends.triton as backend\n"
        "assert not any(name.startswith('smoa_kernels.tuning') for name in sys.modules)\n"
        "print(table.measure_unknown is not None)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "SMOA_AUTOTUNE"}
    environment |= {} if value is None else {"SMOA_AUTOTUNE": value}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{on}\n"


def test_each_problem_is_measured_once_and_kept(timed: list[Choice]) -> None:
    assert ask() == FIRST
    assert timed == [FIRST, SECOND, THIRD]
    ask()
    forget()
    ask()  # from the table
    assert len(timed) == 3
    assert kept()[PERMUTE].complete


def test_autotune_goes_on_where_an_earlier_run_stopped(timed: list[Choice]) -> None:
    """A default that was compared with nothing is no choice."""
    update(user_table("cpu"), [entry(seconds={FIRST: 9.0}, complete=False)])
    assert ask() == SECOND
    assert timed == [SECOND, THIRD]
    assert kept()[PERMUTE].complete


@pytest.mark.slow
def test_algorithms_are_compared_with_kernels_that_were_measured(
    timed: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines, tune = [], autotune.tune

    def watched(jobs: Any, **settings: Any) -> Any:
        deadlines.append(settings["deadline"])
        return tune(jobs, **settings)

    monkeypatch.setattr(autotune, "tune", watched)
    assert tuned_algorithm(FORWARD, CPU, ("split", "fused")) is not None
    assert len(deadlines) > 1
    assert set(deadlines) == {deadlines[0]}  # one cap for an algorithm and the kernels that come up in it
    for algorithm, kernel in (
        ("merged", ModulateConfig),
        ("split", BlockMatmulConfig),
        ("fused", FusedLinearConfig),
    ):
        configs = [place for place, choice in enumerate(timed) if isinstance(choice, kernel)]
        assert configs[0] < timed.index(algorithm)
    assert kept()[FORWARD].complete


@pytest.mark.slow
def test_what_is_first_asked_under_capture_is_measured_after_it(
    timed: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = ("split", "fused")
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_available", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert ask() == FIRST
        assert tuned_algorithm(FORWARD, CPU, allowed) is None
        assert timed == []
    ask()
    assert timed == [FIRST, SECOND, THIRD]
    assert tuned_algorithm(FORWARD, CPU, allowed) is not None


def test_what_fails_keeps_the_default_with_a_warning(
    timed: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(autotune, "timer", scripted(lambda choice: 1 / 0))
        with pytest.warns(UserWarning, match="permute keeps its default: no candidate could be timed"):
            assert ask() == FIRST
    with monkeypatch.context() as failing:
        failing.setattr(tuner, "workload", lambda key, device: 1 / 0)
        with pytest.warns(
            UserWarning, match="permute keeps its default: ZeroDivisionError: division by zero"
        ):
            assert ask(16) == FIRST
    assert not user_table("cpu").exists()
    ask()
    ask(16)
    assert timed == []  # not tried again in this process


def test_what_cannot_be_written_is_in_force_in_this_process(
    timed: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", os.devnull)
    monkeypatch.setattr(autotune, "timer", scripted(lambda choice: 1.0 if choice == THIRD else 2.0))
    with pytest.warns(UserWarning, match="cannot be read"), pytest.warns(UserWarning, match="is not kept"):
        assert ask() == THIRD


def test_one_cap_for_all_that_a_process_measures(
    timed: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def seconds(choice: Choice) -> float:
        clock[0] += 30
        return 1.0

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(autotune, "timer", scripted(seconds))
    monkeypatch.setattr(autotune, "SECONDS", 100.0)
    ask(8)
    ask(16)
    with pytest.warns(
        UserWarning, match="the 100 s of this run are spent; what else comes up is measured in the next"
    ):
        ask(32)
    assert clock == [120.0]  # three candidates of the first problem, one of the second
    assert {key.tokens: tuned.complete for key, tuned in kept().items()} == {8: True, 16: False}
