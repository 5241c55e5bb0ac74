"""Stage 1: every numerical test on this device, a pytest process for each file that has one.

A test says that it is numerical with a mark (`numerical`, or `gpu` where it has nothing to do elsewhere): then its
tensors are made on the GPU where there is one (tests/conftest.py). Every file without such a test is in `NOT_NUMERICAL`
with the reason.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..protocol import DEVICE
from .job import Job, OutOfTimeError
from .state import ROOT

TESTS = ROOT / "tests"
MARKS = ("numerical", "gpu")

# Files or folders of tests none of whose tests a GPU could make fail in another way than the CPU does; a test compares
# the list with the files.
NOT_NUMERICAL = {
    "bad_inputs/": "errors that are raised before anything is computed",
    "distributed/": "processes in a gloo group on the CPU: NCCL takes a GPU for each",
    "tuning/": "the tuner under a scripted clock, in the interpreter; stage 2 tunes for real",
    "peft/test_checkpoints.py": "files and their layout",
    "peft/test_fuzzed_files.py": "files and their layout",
    "peft/test_inspect_command.py": "a command that reads files on the CPU",
    "peft/test_offload.py": "base weights that wait on the CPU or on disk, for a computation on the CPU",
    "peft/test_refused.py": "errors that are raised before anything is computed",
    "peft/test_sorting.py": "weights in the CPU's memory: no others are sorted at once",
    "peft/test_spectrum_command.py": "a command that reads files on the CPU; its numbers: test_spectrum.py",
    "test_audit.py": "compiles for every architecture, without a GPU",
    "test_benchmark_protocol.py": "the clock and the gates of the benchmarks, on the CPU",
    "test_benchmark_report.py": "tables of made-up runs",
    "test_bringup.py": "the bring-up itself: stages, Ctrl-C, resume",
    "test_bringup_inputs.py": "the bring-up itself: which copies of the inputs a timed pass takes",
    "test_bringup_numerics.py": "the bring-up itself: this stage",
    "test_bringup_page.py": "the bring-up itself: cases, goals, page",
    "test_c_oracle.py": "an oracle that shares no code with the package",
    "test_classify_example.py": "an example that needs a model's package; the Trainer: peft/test_training.py",
    "test_cli.py": "what commands print",
    "test_cost.py": "the cost model's arithmetic",
    "test_devices.py": "a GPU's driver that is made up",
    "test_distributed_example.py": "processes in a gloo group on the CPU: NCCL takes a GPU for each",
    "test_docs.py": "links, names, and examples written for any machine",
    "test_doctests.py": "examples written for any machine",
    "test_faults.py": "exceptions at every operator of torch, which are those of any device",
    "test_files.py": "files",
    "test_finetune_example.py": "an example that needs a model's package, and files",
    "test_grad_share.py": "the cost model's arithmetic",
    "test_imports.py": "the source's text",
    "test_lost_runs.py": "processes that are killed, and files",
    "test_lost_work.py": "processes that are killed, and files",
    "test_native.py": "code compiled for CPUs",
    "test_packaging.py": "the wheel",
    "test_quality_data.py": "the quality study's questions and models",
    "test_quality_methods.py": "what the quality study trains",
    "test_quality_report.py": "the quality study's statistics and page",
    "test_quality_study.py": "the quality study's runs and files",
    "test_quality_words.py": "figures on pages, against records",
    "test_scaling.py": "the cost model's arithmetic",
    "test_workspace.py": "bytes that the interpreter allocates; a GPU's are stage 3's",
}

# What a rehearsal runs of two files, and a few seconds of it.
SMOKE_FILES = ("kernels/test_modulate.py", "kernels/test_permute.py")
SMOKE_TESTS = ("-k", "test_merges_in_place or test_no_tokens")

GPU_BYTES = 2 * 2**30  # of one process of tests: the context, the kernels that it loads, and its tensors

FileFinding = Mapping[str, Any]
"""Of one file: "status" ("done", "failed", "out of time" or "nothing ran"), "counts" of outcomes, "selected", how many
tests it has, "failures", a line for each, and "skipped", the reasons."""


def numerical_files() -> list[str]:
    """Names of the files that hold a numerical test; the kernels', which take longest, first."""
    marked = re.compile(rf"\bpytest\.mark\.({'|'.join(MARKS)})\b")
    found = [path for path in TESTS.rglob("test_*.py") if marked.search(path.read_text(encoding="utf-8"))]
    names = (path.relative_to(TESTS).as_posix() for path in found)
    return sorted(names, key=lambda name: (not name.startswith("kernels/"), name))


def run_tests(job: Job) -> None:
    """Run every file whose tests have not passed yet, some at once.

    Raises:
        AssertionError: a test failed.
        OutOfTimeError: some did not run, naming the files and how far they came.
    """
    names, select = numerical_files(), ["-m", " or ".join(MARKS)]
    if job.smoke:
        names, select = list(SMOKE_FILES), list(SMOKE_TESTS)
    state = job.state
    known: dict[str, FileFinding] = dict(state.findings.get("tests", {}))
    waiting = [name for name in names if known.get(name, {}).get("status") != "done"]
    running: dict[str, subprocess.Popen[bytes]] = {}
    most = at_once()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < most:
                name = waiting.pop(0)
                running[name] = _pytest(name, select, _output(folder, name))
            time.sleep(0.2)
            late = job.left < 5
            stopped = [name for name, process in running.items() if late and process.poll() is None]
            _stop([running[name] for name in stopped])
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                text = _output(folder, name).read_text(encoding="utf-8", errors="replace")
                known[name] = _finding(name, text, process.returncode, name in stopped)
                state = state.with_finding("tests", dict(known))
                job.save(state)
            if late:
                known |= {name: _finding(name, "", 0, True) for name in waiting}
                waiting.clear()
    job.save(state.with_finding("tests", known))
    failures = [line for found in known.values() for line in found["failures"]]
    if failures:
        raise AssertionError(f"{len(failures)} failures, the first: {failures[0].splitlines()[0]}")
    if unfinished := late_words(known):
        raise OutOfTimeError(f"not finished: {unfinished}")


def at_once() -> int:
    """How many files: one a processor that this process may use, and as many as the GPU has memory for now."""
    # Not everywhere; a container may be given a few of many.
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    if DEVICE.type == "cuda":
        free, _ = torch.cuda.mem_get_info(DEVICE)
        processors = min(processors, free // GPU_BYTES)
    return max(1, processors)


def late_words(known: Mapping[str, FileFinding]) -> str:
    """The files that time was too short for, each with how many of its tests ran."""
    return ", ".join(
        f"{name} ({sum(found['counts'].values())} of {found.get('selected') or '?'} tests ran)"
        for name, found in sorted(known.items())
        if found["status"] == "out of time"
    )


def idle_words(known: Mapping[str, FileFinding]) -> str:
    """The files none of whose tests ran, each with the reason."""
    return ", ".join(
        f"{name} ({'; '.join(found['skipped']) or 'no test of it is selected'})"
        for name, found in sorted(known.items())
        if found["status"] == "nothing ran"
    )


def _output(folder: str, name: str) -> Path:
    return Path(folder) / name.replace("/", ".")


def _pytest(name: str, select: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    options = ["-o", "addopts=--benchmark-disable", "-p", "no:cacheprovider", "-v", "-rfEs", "--tb=short"]
    with output.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", f"tests/{name}", *options, *select],
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """As Ctrl-C does, all at once, so that pytest says what it has; then for good."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + 2
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    for process in processes:
        process.kill()
        process.wait()


def _finding(name: str, text: str, code: int, late: bool) -> FileFinding:
    failures, counts = failed(text), Counter(outcomes(text).values())
    # 5: none of the file's tests was selected, or all of it was skipped.
    if not late and code not in (0, 1, 5):
        failures = [*failures, f"{name}: pytest ended with {code}: {text[-800:]}"]
    ran = set(counts) - {"skipped"}
    return {
        "status": "out of time" if late else "failed" if failures else "done" if ran else "nothing ran",
        "counts": dict(counts),
        "selected": selected(text),
        "failures": failures,
        "skipped": skipped(text),
    }


def selected(text: str) -> int:
    """How many tests a file has, from pytest's own words; 0 where it did not come so far."""
    found = re.search(r"^collected (?:.* )?(\d+) (?:items?|selected)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def outcomes(text: str) -> dict[str, str]:
    """Test to outcome, from `pytest -v`."""
    line = r"^(\S+\.py::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*\[ *\d+%\]$"
    return {name: outcome.lower() for name, outcome in re.findall(line, text, re.MULTILINE)}


def failed(text: str) -> list[str]:
    """A line for each test that failed, from pytest's summary."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+\.py.*)$", text, re.MULTILINE)


def skipped(text: str) -> list[str]:
    """Why tests or whole files were skipped, each reason once, from pytest's summary."""
    return list(dict.fromkeys(re.findall(r"^SKIPPED \[\d+\] \S+?\.py(?::\d+)?: (.+)$", text, re.MULTILINE)))
