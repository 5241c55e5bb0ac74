"""The GPU bring-up (benchmarks/bringup): stages that fail alone, Ctrl-C, resume. CI rehearses the whole."""

import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bringup_cases import job, layer
from places import ctrl_c  # noqa: F401

from benchmarks.bringup import __main__ as bringup
from benchmarks.bringup import stages
from benchmarks.bringup.cases import comparison_cases
from benchmarks.bringup.job import OutOfTimeError
from benchmarks.bringup.state import ROOT
from benchmarks.providers import FROZEN, LORA, Case
from benchmarks.results import Result
from smoa_kernels.kernels.entries import INTERRUPTED, UNFINISHED

pytestmark = pytest.mark.slow


def test_all_stages_fit_into_eight_minutes() -> None:
    assert sum(seconds + bringup.GRACE for _, seconds in stages.STAGES.values()) <= 480


class Script:
    """Stands for the stages' processes: what each answers, and which were asked for."""

    def __init__(self, **answers: str) -> None:
        self.answers, self.asked = answers, list[str]()

    def __call__(self, name: str, out: Path, seconds: float, smoke: bool) -> dict[str, object]:
        self.asked.append(name)
        status = self.answers.get(name, "done")
        return {"status": status, "seconds": 1.0, "error": "" if status == "done" else "why"}


def test_a_stage_that_fails_does_not_stop_the_rest_and_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "before"))  # restored: the command sets its own
    script = Script(tests="failed", compare="out of time")
    monkeypatch.setattr(bringup, "_in_process", script)
    call = ["--smoke", "--out", str(tmp_path)]
    assert bringup.main(call) == 1
    assert script.asked == list(stages.STAGES)
    (path,) = tmp_path.glob("bringup-*.json")
    statuses = {name: found["status"] for name, found in json.loads(path.read_text())["stages"].items()}
    assert statuses == {"tests": "failed", "tune": "done", "compare": "out of time", "predict": "done"}
    assert "| tests | failed | 1 | why |" in path.with_suffix(".md").read_text()
    assert "tests: failed in 1 s. why" in capsys.readouterr().out

    again = Script()
    monkeypatch.setattr(bringup, "_in_process", again)
    assert bringup.main([*call, "--resume"]) == 0
    assert again.asked == ["tests", "compare"]
    fresh = Script()
    monkeypatch.setattr(bringup, "_in_process", fresh)
    bringup.main(call)
    assert fresh.asked == list(stages.STAGES)


def test_a_rehearsal_that_takes_more_than_two_minutes_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of processor time, the clock beside it: a machine that is shared with others makes nothing fail."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "before"))
    used = SimpleNamespace(
        user=900.0, system=900.0, children_user=900.0, children_system=900.0, elapsed=900.0
    )
    monkeypatch.setattr(os, "times", lambda: used)

    def busy(name: str, *rest: object) -> dict[str, object]:
        used.children_user += next(seconds)
        used.children_system += 10.0
        used.elapsed += 100.0
        return Script()(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bringup, "_in_process", busy)
    seconds = iter([19.0] * 4 + [21.0] * 4)
    call = ["--smoke", "--out", str(tmp_path)]
    assert [bringup.main(call), bringup.main(call)] == [0, 1]
    words = "a rehearsal may take 120 s of processor time, this one took {}; by the clock 400"
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("a rehearsal")]
    assert told == [words.format(116), words.format(124)]


def test_ctrl_c_keeps_what_was_found_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "before"))
    script = Script()

    def interrupted(name: str, *rest: object) -> dict[str, object]:
        if name == "compare":
            raise KeyboardInterrupt
        return script(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bringup, "_in_process", interrupted)
    call = ["--smoke", "--out", str(tmp_path)]
    assert bringup.main(call) == 130
    (path,) = tmp_path.glob("bringup-*.json")
    assert "| compare | interrupted | 0 | by Ctrl-C |" in path.with_suffix(".md").read_text()
    assert capsys.readouterr().out.splitlines()[-1].endswith("with --resume goes on from here.")
    again = Script()
    monkeypatch.setattr(bringup, "_in_process", again)
    assert bringup.main([*call, "--resume"]) == 0
    assert again.asked == ["compare", "predict"]


# Stands for python: the bring-up itself, whose first candidate is timed for ever.
TIMING = f"""#!{sys.executable}
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.bringup import __main__ as bringup, stages
stages.interpreter_timer = lambda launch: time.sleep(600)
sys.exit(bringup.main(sys.argv[3:]))
"""


@pytest.mark.usefixtures("ctrl_c")
def test_what_ctrl_c_cuts_short_is_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: a candidate that takes the process with it is not tried again, one that was cut is."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "before"))
    monkeypatch.setattr(stages, "STAGES", {"tune": (stages.tune_shapes, 100.0)})
    stand_in = tmp_path / "python"
    stand_in.write_text(TIMING)
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    folder, seen = tmp_path / "cache" / "tuning", list[str]()

    def press() -> None:
        while not (
            entries := [e for path in folder.glob("*.json") for e in json.loads(path.read_text())["entries"]]
        ):
            time.sleep(0.1)
        seen.extend(trial["reason"] for trial in entries[0]["trials"])
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    presser = threading.Thread(target=press, daemon=True)
    presser.start()
    assert bringup.main(["--smoke", "--out", str(tmp_path)]) == 130
    presser.join()
    assert seen == [UNFINISHED]
    (path,) = tmp_path.glob("bringup-*.json")
    (entry,) = json.loads(path.read_text())["findings"]["tune"]["table"]["entries"]
    assert [trial["reason"] for trial in entry["trials"]] == [INTERRUPTED]
    assert json.loads(path.read_text())["stages"]["tune"]["status"] == "interrupted"


def test_resume_goes_on_with_the_same_commits_bring_up_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "before"))
    monkeypatch.setattr(bringup, "_in_process", Script())
    call = ["--smoke", "--out", str(tmp_path)]
    bringup.main(call)
    (path,) = tmp_path.glob("bringup-*.json")
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"commit": data["commit"].rstrip("+") + "+"}))
    script = Script()
    monkeypatch.setattr(bringup, "_in_process", script)
    assert bringup.main([*call, "--resume"]) == 0
    assert script.asked == []
    for text, words in (
        (json.dumps(data | {"commit": "0123456789"}), f"{path} is of commit 0123456789, here is"),
        ("{", f"{path} is not a bring-up"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            bringup.main([*call, "--resume"])
        told = capsys.readouterr().err
        assert words in told
        assert told.endswith("without --resume it is written anew\n")
        assert path.read_text() == text  # what a GPU took half an hour for is not lost by a wrong option
        assert script.asked == []
    assert bringup.main(call) == 0
    assert script.asked == list(stages.STAGES)
    assert json.loads(path.read_text())["commit"] == data["commit"]


@pytest.mark.parametrize(
    ("script", "status", "error"),
    [
        ("sleep 60", "out of time", ""),
        ("trap '' INT; sleep 60", "out of time", ""),
        ("trap 'echo noted >&2; exit 1' INT; while :; do sleep 0.1; done", "out of time", "noted"),
        ("echo; echo first >&2; echo last >&2; exit 1", "failed", "last"),
        ("echo why >&2; kill -9 $$", "failed", "ended by signal 9. why"),
        ("echo 3 of 9 are left >&2; exit 3", "out of time", "3 of 9 are left"),
        ("echo noise >&2", "done", ""),
    ],
)
@pytest.mark.usefixtures("ctrl_c")
def test_however_a_stages_process_ends(
    script: str, status: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(bringup, "GRACE", 1.0)
    found = bringup._in_process("tests", tmp_path, 1.0 if "sleep" in script else 60.0, True)
    assert (found["status"], found["error"]) == (status, error)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit):
        bringup.main([])
    assert "there is no GPU here; --smoke rehearses on the CPU" in capsys.readouterr().err


def test_comparing_stops_in_time_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_compare_one", lambda case, smoke: ([layer(case, frozen=1.0)], {}))
    todo, saved = job(tmp_path, 0.0)
    with pytest.raises(OutOfTimeError, match="2 of 2 cases are left"):
        stages.compare(todo)
    todo, saved = job(tmp_path, 60.0)
    stages.compare(todo)
    assert len(saved[-1].run.results) == 2
    again = replace(todo, state=saved[-1])
    count = len(saved)
    stages.compare(again)
    assert len(saved) == count  # nothing is left to do


def test_a_provider_that_fails_is_told_and_the_others_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: Case) -> torch.nn.Module:
        raise RuntimeError("out of memory\nmore")

    real = {FROZEN: stages.frozen, LORA: broken}
    monkeypatch.setattr(stages, "providers", lambda case: real)
    stages._gated.cache_clear()
    todo, saved = job(tmp_path, 60.0)
    with pytest.raises(AssertionError, match="2 providers failed"):
        stages.compare(todo)
    stages._gated.cache_clear()
    assert list(saved[-1].findings["compare"].values()) == [{LORA: "RuntimeError: out of memory"}] * 2
    assert [set(r.seconds["both"]) for r in saved[-1].run.select("layer")] == [{FROZEN}] * 2


def test_what_failed_is_compared_again_after_what_is_new_and_then_it_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = comparison_cases(True)
    asked: list[Case] = []
    outcomes: list[dict[str, str] | None] = []

    def one(case: Case, smoke: bool) -> tuple[list[Result], dict[str, str]]:
        asked.append(case)
        red = outcomes.pop(0)
        if red is None:
            raise RuntimeError("out of memory")
        return [layer(case, frozen=float(len(asked)))], red

    monkeypatch.setattr(stages, "_compare_one", one)
    todo, saved = job(tmp_path, 60.0)
    outcomes[:] = [None, {LORA: "wrong numbers"}]
    words = f"2 providers failed, the first: all of them at {first}: RuntimeError: out of memory"
    with pytest.raises(AssertionError, match=f"^{re.escape(words)}$"):
        stages.compare(todo)
    assert asked == [first, second]
    assert saved[0].run.find("layer", **first.record()) is None
    seen = json.loads(json.dumps(saved[-1].findings["compare"]))

    outcomes[:] = [{LORA: "wrong numbers"}, {}]
    with pytest.raises(AssertionError, match="1 providers failed"):  # the second is right now
        stages.compare(replace(todo, state=saved[-1].with_finding("compare", seen)))
    assert saved[-1].findings["compare"] == {str(first): {LORA: "wrong numbers"}}

    untried = replace(saved[-1], run=replace(saved[-1].run, results=saved[-1].run.results[:1]))
    outcomes[:], asked[:] = [{}, {}], []
    stages.compare(replace(todo, state=untried))
    assert asked == [second, first]
    assert saved[-1].findings["compare"] == {}
    outcomes[:], asked[:] = [], []
    stages.compare(replace(todo, state=saved[-1]))
    assert asked == []
