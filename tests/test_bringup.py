"""`make gpu` (benchmarks/bringup): eight minutes, files after every stage, --resume. CI rehearses all of it."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import ctrl_c  # noqa: F401

from benchmarks.bringup import __main__ as bringup
from benchmarks.bringup import stages
from benchmarks.bringup.cases import SQUARE, headline_cases, operator_cases
from benchmarks.bringup.page import page
from benchmarks.bringup.state import State, path_of
from benchmarks.providers import FROZEN, HIRA, LORA, PAPER, Case
from benchmarks.report import page as report_page
from benchmarks.results import Result, Run, read
from benchmarks.rotation import rotated
from smoa_kernels.kernels.launch import short_way

pytestmark = pytest.mark.slow

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "measured_on": "GPU", "cpu": "a CPU", "cores": 16, "threads": 16,
           "system": "Linux", "python": "3.11", "versions": {"torch": "2.13.0"}, "smoke": False}  # fmt: skip
NOTHING = State(Run(MACHINE, "abc", "2026-01-01", ()))


def test_each_stage_fits_into_eight_minutes() -> None:
    assert set(bringup.SECONDS) == {"tests", *stages.STAGES}
    assert max(bringup.SECONDS.values()) + bringup.GRACE <= 480
    assert list(bringup.SECONDS.values())[:2] == [60, 240]
    assert len(operator_cases(False)) == 24


OUTPUT = "[gw0] [ 50%] PASSED tests/test_a.py::test_one\n[gw1] [100%] FAILED tests/test_a.py::test_two[x y]\n"


class Script:
    """Replaces the stages' processes: gives each its status, and notes which ran."""

    def __init__(self, **answers: str) -> None:
        self.answers, self.asked = answers, list[str]()

    def __call__(self, command: Sequence[str], log: Path, seconds: float) -> tuple[dict[str, object], str]:
        name = "tests" if "pytest" in command else command[command.index("--stage") + 1]
        self.asked.append(name)
        status = self.answers.get(name, "done")
        return {
            "status": status,
            "seconds": 1.0,
            "error": "" if status == "done" else "why",
        }, OUTPUT


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command with scripted stages; return its exit code and the stages that ran."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "before"))  # undone later: the command sets its own

    def command(*options: str, **answers: str) -> tuple[int, list[str]]:
        script = Script(**answers)
        monkeypatch.setattr(bringup, "run_stage", script)
        return bringup.main(["--smoke", "--out", str(tmp_path), *options]), script.asked

    return command


def test_a_stage_that_fails_does_not_stop_the_others_and_resume_repeats_it(run, tmp_path: Path) -> None:
    everything = list(bringup.SECONDS)
    assert run(tests="failed", headline="out of time") == (1, everything)
    (path,) = tmp_path.glob("bringup-*.json")
    statuses = {name: found["status"] for name, found in json.loads(path.read_text())["stages"].items()}
    assert statuses == {"operator": "done", "headline": "out of time", "tests": "failed", "tune": "done"}
    text = path.with_suffix(".md").read_text()
    assert "| tests | failed | 1 | why |" in text
    assert "1 failed, 1 passed\n- failed: `tests/test_a.py::test_two[x y]`" in text
    assert run("--resume") == (0, ["headline", "tests"])
    assert run("--resume") == (0, [])
    assert run() == (0, everything)


def test_ctrl_c_keeps_what_was_found(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(headline="interrupted") == (130, ["operator", "headline"])
    (path,) = tmp_path.glob("bringup-*.json")
    assert "| headline | interrupted | 1 | why |" in path.with_suffix(".md").read_text()
    assert capsys.readouterr().out.splitlines()[-1].endswith("with --resume to continue.")
    assert run("--resume") == (0, ["headline", "tests", "tune"])


def test_resume_refuses_another_commits_bring_up_and_keeps_it(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    (path,) = tmp_path.glob("bringup-*.json")
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"commit": data["commit"].rstrip("+") + "+"}))
    assert run("--resume") == (0, [])  # uncommitted edits do not count
    for text, words in (
        (json.dumps(data | {"commit": "0123456789"}), f"{path} is of commit 0123456789, here is"),
        ("{", f"{path} is not a bring-up"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            run("--resume")
        assert words in capsys.readouterr().err
        assert path.read_text() == text  # a wrong option must not overwrite minutes of GPU time


@pytest.mark.parametrize(
    ("script", "status", "error"),
    [
        ("sleep 60", "out of time", "stopped after 1 s"),
        ("trap '' INT; sleep 60", "out of time", "stopped after 1 s"),
        ("echo first; echo; echo last >&2; exit 1", "failed", "last"),
        ("echo why; kill -9 $$", "failed", "ended by signal 9. why"),
        ("echo 3 of 9 are left; exit 3", "out of time", "3 of 9 are left"),
        ("echo noise", "done", ""),
    ],
)
@pytest.mark.usefixtures("ctrl_c")
def test_however_a_stages_process_ends(
    script: str, status: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringup, "GRACE", 1.0)
    log = tmp_path / "log"
    log.write_text("an earlier stage's words\n")
    found, output = bringup.run_stage(["sh", "-c", script], log, 1.0 if "sleep" in script else 60.0)
    assert (found["status"], found["error"]) == (status, error)
    assert log.read_text() == f"an earlier stage's words\n{output}"


def test_what_pytest_says_is_read(tmp_path: Path) -> None:
    """The text is from a real run; a new version of pytest may word it differently."""
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_one(): pass\ndef test_two(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_three(): pass\n"
    )
    command = [
        *bringup._command("tests", tmp_path, 60.0, smoke=True)[:-1],
        str(tmp_path),
        "-p",
        "no:cacheprovider",
    ]
    found, output = bringup.run_stage(command, tmp_path / "log", 100.0)
    assert found["status"] == "failed"
    finding = bringup.pytest_finding(output)
    assert finding["counts"] == {"failed": 1, "passed": 1, "skipped": 1}
    assert [line.endswith("::test_two - assert 1 == 2") for line in finding["failed"]] == [True]
    assert [line.endswith(": no GPU") for line in finding["skipped"]] == [True]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit):
        bringup.main([])
    assert "there is no GPU here; --smoke rehearses on the CPU" in capsys.readouterr().err


# Comparisons


def layer(case: Case, **seconds: float) -> Result:
    """A stable comparison: five rounds of the same seconds."""
    rounds = {name.replace("_", " "): [value] * 5 for name, value in seconds.items()}
    phases = dict.fromkeys(("both", "forward", "backward"), rounds)
    return Result("layer", f"layer: {case}", case.record(), FROZEN, [0.0, 0.0], phases)


def test_comparing_keeps_what_it_has_and_repeats_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = headline_cases(True)
    outcomes: dict[Case, dict[str, str] | None] = {first: None, second: {LORA: "wrong numbers"}}
    asked: list[Case] = []
    saved: list[State] = [NOTHING]

    def one(case: Case, smoke: bool) -> tuple[list[Result], dict[str, str]]:
        asked.append(case)
        failed = outcomes[case]
        if failed is None:
            raise RuntimeError("out of memory\nmore")
        return [layer(case, frozen=1.0)], failed

    def compare(seconds: float = 60.0) -> None:
        stages.headline(stages.Job(saved[-1], saved.append, time.monotonic() + seconds, True))

    monkeypatch.setattr(stages, "_compare_one", one)
    with pytest.raises(stages.OutOfTimeError, match="2 of 2 cases are left"):
        compare(0.0)
    with pytest.raises(
        RuntimeError, match=r"^2 providers failed, the first: all of them at .*: out of memory$"
    ):
        compare()
    assert len(saved[-1].run.results) == 1
    outcomes = {first: {}, second: {}}
    compare()
    assert asked == [first, second, first, second]
    assert saved[-1].findings["headline"] == {}
    compare()
    assert len(asked) == 4  # nothing is left to do


def test_both_launchers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_way, "obstacle", "")
    build = stages.smoa("split", "triton", "random")

    def fails(case: Case) -> torch.nn.Module:
        """A layer in whose first pass our launcher fails."""
        layer = build(case)
        layer.register_forward_hook(
            lambda *_: setattr(short_way, "obstacle", short_way.obstacle or "TypeError: no")
        )
        return layer

    monkeypatch.setattr(stages, "smoa", lambda *_: fails)
    found = stages.compare_launchers(*operator_cases(True)[1])
    assert short_way.obstacle == "TypeError: no"
    text = page(NOTHING.with_finding("launchers", found))
    assert "gives the same bits, and takes the host" in text
    assert "Ours is not used: TypeError: no." in text


@pytest.mark.skipif(torch.version.hip is not None, reason="only for NVIDIA's GPUs")
def test_compiling_ahead_takes_half_of_the_time_and_stops_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def no_process(*_: object, timeout: float, **__: object) -> None:
        limits.append(timeout)
        raise OSError("no process")

    gpu = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(bringup.subprocess, "run", no_process)
    bringup._compile_ahead("operator", time.monotonic() + 60)
    assert limits == [pytest.approx(30, abs=1)]


def test_a_provider_that_crashes_is_named_and_the_others_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(case: Case) -> torch.nn.Module:
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(stages, "providers", lambda case: {FROZEN: stages.frozen, LORA: broken})
    stages._gated.cache_clear()
    (timed, memory), failed = stages._compare_one(headline_cases(True)[0], smoke=True)
    stages._gated.cache_clear()
    assert failed == {LORA: "RuntimeError: out of memory"}
    assert set(timed.seconds["both"]) == set(memory.bytes) == {FROZEN}


@pytest.mark.parametrize("copies", [0, 2, 40])
def test_between_two_passes_on_one_copy_more_is_read_than_a_cache_holds(copies: int) -> None:
    case = Case(9, 48, 40, 2, 4)
    pair = 4 * 9 * (48 + 40)  # bytes of x and dY
    cache = copies * pair + 1
    inputs = rotated(case, cache)
    found = list(islice(inputs, copies + 2))
    assert next(inputs) is found[0]
    assert len({t.data_ptr() for both in found for t in both}) == 2 * len(found)
    assert cache < (len(found) - 1) * pair <= cache + pair


# The page


def measured() -> State:
    """A comparison at 4096² with K=4, and its memory."""
    at_4 = layer(
        SQUARE, **{FROZEN: 1.0, LORA: 1.4, HIRA: 2.8, PAPER: 2.8, "SMoA merged": 1.3, "SMoA split": 1.75}
    )
    peaks = {name: {"saved": 0, "peak": peak, "forward_workspace": 0, "backward_workspace": 0}
             for name, peak in ((FROZEN, 100), (LORA, 200), ("SMoA split", 180))}  # fmt: skip
    weighed = Result("memory", f"memory: {SQUARE}", SQUARE.record(), bytes=peaks)
    rates = {"flops_per_second": 7e14, "bytes_per_second": 3e12}
    return NOTHING.with_results(at_4, weighed).with_finding("rates", rates)


def test_the_page_shows_what_was_measured_beside_what_is_predicted() -> None:
    text = page(measured())
    (row,) = (line for line in text.splitlines() if line.startswith("| T=8192") and "(1.54)" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["1.00 (1.00)", "1.40 (1.50)", "2.80 (2.83)", "1.30 (1.33)", "1.75 (1.54)"]
    assert "measured on GPU NVIDIA H100 80GB HBM3" in text
    assert "700 TFLOP/s" in text
    assert "Nothing was compared." in page(NOTHING)


def test_the_file_comes_back_and_is_a_run_of_the_suite(tmp_path: Path) -> None:
    state = measured().with_stage("headline", status="done", seconds=1.0, error="")
    path = path_of(tmp_path, state.run)
    assert path.name == "bringup-gpu-nvidia-h100-80gb-hbm3.json"
    state.write(path)
    assert page(State.read(path)) == page(state)
    assert "measured on GPU NVIDIA H100 80GB HBM3" in report_page([read(path)])
    again = state.with_results(replace(state.run.results[0], load=[1.0, 1.0]))
    assert len(again.run.results) == len(state.run.results)
