"""`make gpu` (benchmarks/bringup): eight minutes, files after every stage, --resume. CI rehearses all of it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from places import ctrl_c, ran  # noqa: F401

from benchmarks.bringup import __main__ as bringup
from benchmarks.bringup import stages
from benchmarks.cases import headline_cases, operator_cases
from benchmarks.providers import LORA, Case
from benchmarks.results import Result, Run, read
from smoa_kernels.kernels.launch import Launch, launch_hook

pytestmark = pytest.mark.slow

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "measured_on": "GPU", "cpu": "a CPU", "cores": 16, "threads": 16,
           "system": "Linux", "python": "3.11", "versions": {"torch": "2.13.0"}, "smoke": False}  # fmt: skip
NOTHING = Run(MACHINE, "abc", "2026-01-01", ())


def test_each_stage_fits_into_eight_minutes() -> None:
    assert list(bringup.SECONDS) == list(stages.STAGES)
    assert max(bringup.SECONDS.values()) + bringup.GRACE <= 480
    assert list(bringup.SECONDS.values())[:2] == [
        300,
        240,
    ]  # cold imports of torch, PEFT and transformers, too
    assert len(operator_cases(False)) == 24


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command, each stage with the status that it is given; return the exit code and the stages that ran."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "before"))  # undone later: the command sets its own

    def command(*options: str, **answers: str) -> tuple[int, list[str]]:
        asked: list[str] = []

        def stage(command: Sequence[str], log: Path, seconds: float) -> dict[str, object]:
            asked.append(command[command.index("--stage") + 1])
            status = answers.get(asked[-1], "done")
            return {"status": status, "seconds": 1.0, "error": "" if status == "done" else "why"}

        monkeypatch.setattr(bringup, "run_stage", stage)
        return bringup.main(["--smoke", "--out", str(tmp_path), *options]), asked

    return command


def test_a_stage_that_fails_does_not_stop_the_others_and_resume_repeats_it(run, tmp_path: Path) -> None:
    everything = list(bringup.SECONDS)
    assert run(tests="failed", headline="out of time") == (1, everything)
    (path,) = tmp_path.glob("bringup-*.json")
    statuses = {name: found["status"] for name, found in read(path).stages.items()}
    assert statuses == {"operator": "done", "headline": "out of time", "tests": "failed", "tune": "done"}
    assert "| headline | out of time | 1 | why |" in path.with_suffix(".md").read_text()
    assert run("--resume", headline="interrupted") == (130, ["headline"])  # Ctrl-C
    assert run("--resume") == (0, ["headline", "tests"])
    assert run("--resume") == (0, [])
    assert run() == (0, everything)


def test_resume_refuses_another_commits_bring_up_and_keeps_it(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    (path,) = tmp_path.glob("bringup-*.json")
    others = json.dumps(json.loads(path.read_text()) | {"commit": "0123456789"})
    for text, words in ((others, "is of commit 0123456789, here is"), ("{", "is not a run")):
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
    found = bringup.run_stage(["sh", "-c", script], log, 1.0 if "sleep" in script else 60.0)
    assert (found["status"], found["error"]) == (status, error)
    assert log.read_text().startswith("an earlier stage's words\n")


SOME_TESTS = """\
import pytest

@pytest.mark.parametrize("n", [1, 2, 3])
def test_one(n):
    assert n < 3, "too many"

def test_two():
    pytest.skip("no GPU")
"""


def test_what_became_of_the_tests_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in processes of their own, and so do those of the stage."""
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    monkeypatch.setattr(stages, "SMOKE_TESTS", (str(tmp_path),))
    saved: list[Run] = []
    with pytest.raises(RuntimeError, match="1 tests failed; pytest's exit code is 1"):
        stages.numerical_tests(stages.Job(NOTHING, saved.append, time.monotonic() + 60, True))
    found = saved[-1].findings["tests"]
    assert found["counts"] == {"failed": 1, "passed": 2, "skipped": 1}
    assert found["skipped"] == ["[1] Skipped: no GPU"]
    assert found["failed"] == ["test_some.py::test_one[3] - AssertionError: too many"]


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_kernels_are_compiled_in_at_most_half_of_a_stages_time(
    hip: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []
    told: dict[str, object] = {}

    def stage(command: Sequence[str], log: Path, seconds: float) -> dict[str, object]:
        asked.append((command[2], seconds))
        told.update(json.loads(command[-1]) if "--gpu" in command else {})
        return {"status": "done", "seconds": 100.0, "error": ""}

    gpu = SimpleNamespace(major=9, minor=4, multi_processor_count=304, gcnArchName="gfx942:sramecc+")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(bringup, "run_stage", stage)
    status = bringup._run("headline", tmp_path, tmp_path / "log", smoke=False)
    assert asked == [("benchmarks.bringup.ahead", 120.0), ("benchmarks.bringup", 140.0)]
    assert status["seconds"] == 200.0
    assert told.get("gcnArchName") == (hip and gpu.gcnArchName)


ON_ROCM = """\
from types import SimpleNamespace
import torch
torch.version.hip = "6.4"
from benchmarks import fake_gpu
from benchmarks.bringup.ahead import stage_forms
from triton.runtime import driver
found = SimpleNamespace(**vars(fake_gpu.H100) | {"gcnArchName": "gfx942:sramecc+", "multi_processor_count": 304})
gpu = fake_gpu.install(properties=found)
forms = stage_forms("operator", gpu, 1)
target = driver.active.get_current_target()
print(target.backend, target.arch, target.warp_size, len(forms) > 10, hasattr(forms[0][1][3], "matrix_instr_nonkdim"))
"""


def test_forms_for_an_amd_gpu_are_known_before_they_run() -> None:
    done = ran("-c", ON_ROCM, TRITON_INTERPRET=None, PYTHONWARNINGS="ignore")
    assert done.stdout.split() == ["hip", "gfx942", "64", "True", "True"], done.stderr


TESTS_FORMS = """\
from benchmarks.bringup.ahead import tested
from benchmarks.fake_gpu import H100, install
gpu = install()
tested(H100, ["-n", "0", "tests/kernels/test_permute.py"])
kernels, forms = zip(*gpu.compiled)
print(*{kernel.__name__ for kernel in kernels}, len(forms), *sorted({form[0]["x_ptr"] for form in forms}))
"""


def test_forms_of_the_numerical_tests_are_known_before_they_run() -> None:
    """Those of a kernel's tests, in the dtypes that they compute in."""
    done = ran("-c", TESTS_FORMS, TRITON_INTERPRET=None, PYTHONWARNINGS="ignore")
    assert done.stdout, done.stderr
    name, count, *dtypes = done.stdout.split()
    assert (name, dtypes) == ("permute_kernel", ["*bf16", "*fp16", "*fp32"])
    assert int(count) > len(dtypes)


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
        return [Result("layer", f"layer: {case}", case.record())], failed

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
    """Another bit by Triton's launches is an error."""
    monkeypatch.setattr(stages, "LAUNCHER_ROUNDS", 1)
    case = operator_cases(True)[1]
    assert stages.compare_launchers(*case).startswith("the same bits; ")
    launch = Launch.by_triton

    def spoiled(self: Launch, *arguments: Any) -> Any:
        found = launch(self, *arguments)
        if stopped and "out_ptr" in arguments[1]:
            arguments[1]["out_ptr"].view(-1)[0] += 1
        return found

    stopped: list[object] = []
    monkeypatch.setattr(Launch, "by_triton", spoiled)
    monkeypatch.setattr(stages, "launch_hook", lambda hook: stopped.append(hook) or launch_hook(hook))
    with pytest.raises(RuntimeError, match="different results"):
        stages.compare_launchers(*case)
