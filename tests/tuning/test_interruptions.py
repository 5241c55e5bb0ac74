"""Ctrl-C, a kill, a lost GPU: what was found is kept, and a candidate that ends the process is not tried for ever."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tuning_cases import (
    CPU,
    PERMUTE,
    PERMUTE_CONFIGS,
    SPEED,
    Notebook,
    entry,
    kept,
    needs_interpreter,
    permute_job,
    scripted,
)

from smoa_kernels.kernels.table import (
    INTERRUPTED,
    UNFINISHED,
    Choice,
    Entry,
    Trial,
    keep,
    read,
    update,
    user_table,
)
from smoa_kernels.tuning.tuner import DeviceLostError, Run, tune

pytestmark = needs_interpreter

FIRST, SECOND, THIRD = PERMUTE_CONFIGS


def reasons(entry: Entry) -> dict[Choice, str | None]:
    return {trial.choice: trial.reason for trial in entry.trials}


def interrupt(run: Run) -> float:
    raise KeyboardInterrupt


def test_a_rerun_after_ctrl_c_does_only_what_is_left() -> None:
    notebook = Notebook()

    def timer(run: Run) -> float:
        return (interrupt if run.choice == SECOND else scripted(notebook.seconds))(run)

    with pytest.raises(KeyboardInterrupt):
        notebook.tune([permute_job()], timer=timer)
    assert reasons(notebook.entry()) == {FIRST: None, SECOND: INTERRUPTED}
    assert not notebook.entry().complete
    notebook.timed.clear()
    notebook.tune([permute_job()])
    assert notebook.timed == [SECOND, THIRD]
    assert {t.choice: t.seconds for t in notebook.entry().trials} == SPEED


# The third and fourth are the second candidate's: its mark, and its time.
@pytest.mark.parametrize(("call", "expected"), [(3, INTERRUPTED), (4, None)])
def test_ctrl_c_while_the_table_is_written(call: int, expected: str | None) -> None:
    notebook = Notebook()
    calls: list[Entry] = []

    def save(entry: Entry) -> None:
        calls.append(entry)
        if len(calls) == call:
            raise KeyboardInterrupt
        notebook.table.add(entry)

    with pytest.raises(KeyboardInterrupt):
        notebook.tune([permute_job()], save=save)
    assert reasons(notebook.entry()) == {FIRST: None, SECOND: expected}


def test_ctrl_c_ends_the_run_where_nothing_can_be_written_any_more() -> None:
    saved: list[Entry] = []

    def save(entry: Entry) -> None:
        if saved:
            raise OSError("No space left on device")
        saved.append(entry)

    with pytest.raises(KeyboardInterrupt):
        Notebook().tune([permute_job()], timer=interrupt, save=save)


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}]
from tuning_cases import CPU, PERMUTE_CONFIGS, permute_job
from smoa_kernels.kernels.table import keep, read, user_table
from smoa_kernels.tuning.tuner import tune
def timer(run):
    run()
    if run.choice == PERMUTE_CONFIGS[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0
tune([permute_job()], device=CPU, timer=timer, known=read(user_table("cpu")), save=keep)
"""


def test_a_candidate_that_kills_the_process_is_not_tried_for_ever() -> None:
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", KILLED.format(here=str(here))]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here.parents[1])
    assert process.returncode == -signal.SIGKILL, process.stderr
    notebook = Notebook(kept()[PERMUTE])
    assert reasons(notebook.entry()) == {FIRST: None, SECOND: UNFINISHED}
    notebook.tune([permute_job()])
    assert notebook.timed == [THIRD]
    assert reasons(notebook.entry()) == {FIRST: None, SECOND: UNFINISHED, THIRD: None}
    assert notebook.entry().complete


@pytest.mark.parametrize(
    "found",
    [Trial(THIRD, reason=INTERRUPTED), Trial(THIRD, reason="wrong numbers"), Trial(THIRD, 2.0)],
    ids=["interrupted", "failed", "measured"],
)
def test_a_mark_that_another_process_has_replaced_does_not_come_back(found: Trial) -> None:
    """This one read the table while the other was at its third candidate."""
    known = entry(seconds={FIRST: 3.0}, complete=False).add(Trial(THIRD, reason=UNFINISHED))
    update(user_table("cpu"), [known])

    def timer(run: Run) -> float:
        update(user_table("cpu"), [entry(seconds={FIRST: 3.0}, complete=False).add(found)])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune([permute_job()], device=CPU, timer=timer, known=read(user_table("cpu")), save=keep)
    assert {t.choice: t for t in kept()[PERMUTE].trials}[THIRD] == found


def test_a_lost_gpu_ends_the_run_with_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook()

    def synchronize() -> None:
        if len(notebook.timed) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(DeviceLostError, match=r"illegal memory access.*run the same command again"):
        notebook.tune([permute_job()])
    assert [t.choice for t in notebook.entry().trials] == [FIRST, SECOND]
