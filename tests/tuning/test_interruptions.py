"""What ends a run, Ctrl-C, a kill, a lost GPU, another process: nothing found is lost, nothing healthy ruled out."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuning_cases import (
    CPU,
    PERMUTE,
    SPEED,
    Notebook,
    entry,
    kept,
    needs_interpreter,
    permute_job,
    scripted,
)

from smoa_kernels.kernels import lookup
from smoa_kernels.kernels.entries import (
    GIVEN_UP,
    INTERRUPTED,
    UNFINISHED,
    Choice,
    Entry,
    Trial,
)
from smoa_kernels.kernels.launch import PERMUTE_CONFIGS
from smoa_kernels.kernels.store import update, user_table
from smoa_kernels.tuning.tuner import DeviceLostError, Run, tune

pytestmark = needs_interpreter

FIRST, SECOND, THIRD = PERMUTE_CONFIGS


def reasons(entry: Entry) -> dict[Choice, str | None]:
    return {trial.choice: trial.reason for trial in entry.trials}


def test_a_rerun_after_an_interruption_does_only_what_is_left() -> None:
    notebook = Notebook()

    def interrupted(run: Run) -> float:
        if run.choice == SECOND:
            raise KeyboardInterrupt
        return scripted(notebook.seconds)(run)

    with pytest.raises(KeyboardInterrupt):
        notebook.tune([permute_job()], timer=interrupted)
    last = notebook.saved[-1]
    assert [t.choice for t in last.trials if t.settled] == [FIRST]
    assert not last.complete
    notebook.timed.clear()
    (tuned,) = notebook.tune([permute_job()])
    assert notebook.timed == [SECOND, THIRD]
    assert tuned.entry is not None
    assert tuned.entry.best().choice == SECOND  # type: ignore[union-attr]


class Interrupted:
    """A notebook's `save` that Ctrl-C meets at one call, before anything of that call is written."""

    def __init__(self, notebook: Notebook, call: int) -> None:
        self.notebook, self.call, self.calls = notebook, call, 0

    def __call__(self, entry: Entry) -> None:
        self.calls += 1
        if self.calls == self.call:
            raise KeyboardInterrupt
        self.notebook.saved.append(entry)


# The third and fourth are the second candidate's: its mark, and its time.
@pytest.mark.parametrize(("call", "expected"), [(3, INTERRUPTED), (4, None)])
def test_ctrl_c_while_the_table_is_written(call: int, expected: str | None) -> None:
    notebook = Notebook()
    with pytest.raises(KeyboardInterrupt):
        notebook.tune([permute_job()], save=Interrupted(notebook, call))
    assert reasons(notebook.saved[-1]) == {FIRST: None, SECOND: expected}
    notebook.timed.clear()
    (tuned,) = notebook.tune([permute_job()])
    assert notebook.timed == ([SECOND, THIRD] if expected else [THIRD])
    assert tuned.entry is not None
    assert {t.choice: t.seconds for t in tuned.entry.trials} == SPEED


def test_ctrl_c_ends_the_run_where_nothing_can_be_written_any_more() -> None:
    notebook = Notebook()
    full: list[bool] = []

    def save(entry: Entry) -> None:
        if full:
            raise OSError("No space left on device")
        notebook.saved.append(entry)

    def timer(run: Run) -> float:
        full.append(True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        notebook.tune([permute_job()], timer=timer, save=save)
    assert reasons(notebook.saved[-1]) == {FIRST: UNFINISHED}
    full.clear()
    notebook.tune([permute_job()])
    assert notebook.timed == [FIRST, SECOND, THIRD]


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
from tuning_cases import CPU, permute_job
from smoa_kernels.kernels.launch import PERMUTE_CONFIGS
from smoa_kernels.kernels import lookup
from smoa_kernels.kernels.store import read, user_table
from smoa_kernels.tuning.tuner import tune
def timer(run):
    run()
    if run.choice == PERMUTE_CONFIGS[1]:
        os.kill(os.getpid(), signal.{signal})
    return 1.0
tune([permute_job()], device=CPU, timer=timer, known=read(user_table("cpu")), save=lookup.keep)
"""


def killed(by: signal.Signals) -> Entry:
    """What is in the table of a process that a signal ended at the second candidate."""
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", KILLED.format(here=str(here), signal=by.name)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here.parents[1])
    assert process.returncode == -by, process.stderr
    return kept()[PERMUTE]


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_candidate_at_which_the_process_ended_is_tried_once_more(by: signal.Signals) -> None:
    notebook = Notebook()
    notebook.saved = [killed(by)]
    assert reasons(notebook.saved[-1]) == {FIRST: None, SECOND: UNFINISHED}
    (tuned,) = notebook.tune([permute_job()])
    assert notebook.timed == [SECOND, THIRD]
    assert tuned.entry is not None
    assert reasons(tuned.entry) == dict.fromkeys(PERMUTE_CONFIGS)


def test_a_candidate_that_kills_the_process_is_not_tried_for_ever() -> None:
    killed(signal.SIGKILL)
    notebook = Notebook()
    notebook.saved = [killed(signal.SIGKILL)]
    (tuned,) = notebook.tune([permute_job()])
    assert notebook.timed == [THIRD]
    assert tuned.entry is not None
    assert reasons(tuned.entry) == {FIRST: None, SECOND: GIVEN_UP, THIRD: None}
    assert tuned.entry.complete


@pytest.mark.parametrize(
    "found",
    [Trial(THIRD, reason=INTERRUPTED), Trial(THIRD, reason="wrong numbers"), Trial(THIRD, 2.0)],
    ids=["interrupted", "failed", "measured"],
)
def test_a_mark_that_another_process_has_replaced_does_not_come_back(found: Trial) -> None:
    """This one read the table while the other was at its third candidate."""
    known = entry(seconds={FIRST: 3.0}, complete=False).with_trial(Trial(THIRD, reason=UNFINISHED))
    update(user_table("cpu"), [known])

    def timer(run: Run) -> float:
        update(user_table("cpu"), [entry(seconds={FIRST: 3.0}, complete=False).with_trial(found)])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(
            [permute_job()],
            device=CPU,
            timer=timer,
            known={(PERMUTE, known.identity): known},
            save=lookup.keep,
        )
    assert {t.choice: t for t in kept()[PERMUTE].trials}[THIRD] == found


def test_a_mark_does_not_hide_what_another_process_found() -> None:
    """Both are at one candidate: one ends it, then the other is interrupted or killed."""
    done = entry(seconds={FIRST: 3.0}, complete=False).with_trial(Trial(SECOND, reason="wrong numbers"))
    update(user_table("cpu"), [done])
    for mark in (UNFINISHED, GIVEN_UP, INTERRUPTED):
        update(user_table("cpu"), [replace(done, trials=(Trial(SECOND, reason=mark),))])
    assert kept()[PERMUTE] == done


def test_a_lost_gpu_ends_the_run_with_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook()

    def synchronize() -> None:
        if len(notebook.timed) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(DeviceLostError, match=r"illegal memory access.*run the same command again"):
        notebook.tune([permute_job()])
    assert [t.choice for t in notebook.saved[-1].trials] == [FIRST, SECOND]
