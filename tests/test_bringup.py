"""`make gpu` (benchmarks/bringup): eight minutes, files after every stage, --resume. CI rehearses all of it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from places import ctrl_c  # noqa: F401

from benchmarks.bringup import __main__ as bringup
from benchmarks.bringup import stages
from benchmarks.bringup.cases import SQUARE, headline_cases, operator_cases
from benchmarks.bringup.page import page
from benchmarks.bringup.state import path_of, with_finding, with_results
from benchmarks.providers import FROZEN, HIRA, LORA, PAPER, Case
from benchmarks.report import page as report_page
from benchmarks.results import Result, Run, compact, read
from smoa_kernels.kernels.launch import short_way

pytestmark = pytest.mark.slow

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "measured_on": "GPU", "cpu": "a CPU", "cores": 16, "threads": 16,
           "system": "Linux", "python": "3.11", "versions": {"torch": "2.13.0"}, "smoke": False}  # fmt: skip
NOTHING = Run(MACHINE, "abc", "2026-01-01", ())


def test_each_stage_fits_into_eight_minutes() -> None:
    assert set(bringup.SECONDS) == {"tests", *stages.STAGES}
    assert max(bringup.SECONDS.values()) + bringup.GRACE <= 480
    assert list(bringup.SECONDS.values())[:2] == [60, 240]
    assert len(operator_cases(False)) == 24


OUTPUT = "[gw0] [ 50%] PASSED tests/test_a.py::test_one\n[gw1] [100%] FAILED tests/test_a.py::test_two[x y]\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command, each stage with the status that it is given; return the exit code and the stages that ran."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "before"))  # undone later: the command sets its own

    def command(*options: str, **answers: str) -> tuple[int, list[str]]:
        asked: list[str] = []

        def stage(command: Sequence[str], log: Path, seconds: float) -> tuple[dict[str, object], str]:
            asked.append("tests" if "pytest" in command else command[command.index("--stage") + 1])
            status = answers.get(asked[-1], "done")
            return {"status": status, "seconds": 1.0, "error": "" if status == "done" else "why"}, OUTPUT

        monkeypatch.setattr(bringup, "run_stage", stage)
        return bringup.main(["--smoke", "--out", str(tmp_path), *options]), asked

    return command


def test_a_stage_that_fails_does_not_stop_the_others_and_resume_repeats_it(run, tmp_path: Path) -> None:
    everything = list(bringup.SECONDS)
    assert run(tests="failed", headline="out of time") == (1, everything)
    (path,) = tmp_path.glob("bringup-*.json")
    statuses = {name: found["status"] for name, found in read(path).stages.items()}
    assert statuses == {"operator": "done", "headline": "out of time", "tests": "failed", "tune": "done"}
    assert (
        "1 failed, 1 passed\n- failed: `tests/test_a.py::test_two[x y]`"
        in path.with_suffix(".md").read_text()
    )
    assert run("--resume", headline="interrupted") == (130, ["headline"])  # Ctrl-C
    assert run("--resume") == (0, ["headline", "tests"])
    assert run("--resume") == (0, [])
    assert run() == (0, everything)


def test_resume_refuses_another_commits_bring_up_and_keeps_it(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    (path,) = tmp_path.glob("bringup-*.json")
    for text, words in (
        (
            json.dumps(json.loads(path.read_text()) | {"commit": "0123456789"}),
            "is of commit 0123456789, here is",
        ),
        ("{", "is not a run"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            run("--resume")
        assert f"{path} {words}" in capsys.readouterr().err
        assert path.read_text() == text  # a wrong option must not overwrite minutes of GPU time


@pytest.mark.parametrize(
    ("script", "status", "error"),
    [
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
    command = bringup._command("tests", tmp_path, 60.0, smoke=True)[:-1]
    _, output = bringup.run_stage(
        [*command, str(tmp_path), "-p", "no:cacheprovider"], tmp_path / "log", 100.0
    )
    finding = bringup.pytest_finding(output)
    assert finding["counts"] == {"failed": 1, "passed": 1, "skipped": 1}
    assert [line.endswith("::test_two - assert 1 == 2") for line in finding["failed"]] == [True]
    assert [line.endswith(": no GPU") for line in finding["skipped"]] == [True]


# Comparisons


def layer(case: Case, **seconds: float) -> Result:
    """A stable comparison: five rounds of the same seconds."""
    rounds = {name: [value] * 5 for name, value in seconds.items()}
    phases = dict.fromkeys(("both", "forward", "backward"), rounds)
    return Result("layer", f"layer: {case}", case.record(), FROZEN, [0.0, 0.0], phases)


def test_comparing_keeps_its_results_and_repeats_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = headline_cases(True)
    outcomes: dict[Case, dict[str, str] | None] = {first: None, second: {LORA: "wrong numbers"}}
    asked: list[Case] = []
    saved: list[Run] = [NOTHING]

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
    assert len(saved[-1].results) == 1
    outcomes = {first: {}, second: {}}
    compare()
    compare()  # nothing is left to do
    assert asked == [first, second, first, second]
    assert saved[-1].findings["headline"] == {}


def test_both_launchers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_way, "obstacle", "")
    build = stages.smoa("split", "triton", "random")

    def fails(case: Case) -> torch.nn.Module:
        """A layer in whose first pass our launcher fails."""
        layer = build(case)
        failed = short_way.obstacle or "TypeError: no"
        layer.register_forward_hook(lambda *_: setattr(short_way, "obstacle", failed))
        return layer

    monkeypatch.setattr(stages, "smoa", lambda *_: fails)
    found = stages.compare_launchers(*operator_cases(True)[1])
    assert short_way.obstacle == "TypeError: no"
    text = page(with_finding(NOTHING, "launchers", found))
    assert "gives the same bits, and takes the host" in text
    assert "Ours is not used: TypeError: no." in text


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


def test_the_file_is_a_run_of_the_suite_and_the_page_shows_predictions_beside_it(tmp_path: Path) -> None:
    seconds = {FROZEN: 1.0, LORA: 1.4, HIRA: 2.8, PAPER: 2.8, "SMoA merged": 1.3, "SMoA split": 1.75}
    run = with_results(NOTHING, layer(SQUARE, **seconds))
    path = path_of(tmp_path, run)
    assert path.name == "bringup-gpu-nvidia-h100-80gb-hbm3.json"
    path.write_text(compact(run))
    again = read(path)
    assert "measured on GPU NVIDIA H100 80GB HBM3" in report_page([again])
    assert len(with_results(again, *run.results).results) == 1
    (row,) = (line for line in page(again).splitlines() if line.startswith("| T=8192") and "(1.54)" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["1.00 (1.00)", "1.40 (1.50)", "2.80 (2.83)", "1.30 (1.33)", "1.75 (1.54)"]
