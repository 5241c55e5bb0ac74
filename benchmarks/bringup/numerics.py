"""Stage 1: the kernels' numerical tests on this device, a pytest process for each file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .job import Job, OutOfTimeError
from .state import ROOT

# What a rehearsal runs of two files, and a few seconds of it.
SMOKE_FILES = ("test_modulate", "test_permute")
SMOKE_TESTS = ("-k", "test_merges_in_place or test_no_tokens")


def run_tests(job: Job) -> None:
    """Every numerical test of the kernels on this device, a process for each file.

    Raises:
        AssertionError: a test failed.
        OutOfTimeError: some did not run.
    """
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    select: list[str] = []
    if job.smoke:
        files, select = [file for file in files if file.stem in SMOKE_FILES], list(SMOKE_TESTS)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    unfinished = []
    with tempfile.TemporaryDirectory() as folder:
        waiting, running = list(files), dict[Path, subprocess.Popen[bytes]]()
        at_once = max(1, (os.cpu_count() or 2) // 2)
        while waiting or running:
            while waiting and len(running) < at_once:
                running[waiting[0]] = _pytest(waiting[0], select, Path(folder))
                waiting.pop(0)
            time.sleep(0.2)
            late = job.left < 5
            for file, process in list(running.items()):
                if process.poll() is None and not late:
                    continue
                if late:
                    _stop(process)
                    unfinished.append(file.name)
                del running[file]
                text = (Path(folder) / file.stem).read_text(encoding="utf-8", errors="replace")
                counts.update(outcomes(text).values())
                failures += failed(text)
                if not late and process.returncode not in (0, 1, 5):
                    failures.append(f"{file.name}: pytest ended with {process.returncode}: {text[-800:]}")
            if late:
                unfinished += [file.name for file in waiting]
                waiting.clear()
    finding = {"counts": dict(counts), "failures": failures, "unfinished": sorted(unfinished)}
    job.save(job.state.with_finding("tests", finding))
    if failures:
        raise AssertionError(f"{len(failures)} failures, the first: {failures[0].splitlines()[0]}")
    if unfinished:
        raise OutOfTimeError(f"not finished: {', '.join(sorted(unfinished))}")


def _pytest(file: Path, select: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    options = ["-o", "addopts=--benchmark-disable", "-v", "--tb=short", "-p", "no:cacheprovider", *select]
    with (folder / file.stem).open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", str(file.relative_to(ROOT)), *options],
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that pytest says what it has; then for good."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(2)
        return
    process.kill()
    process.wait()


def outcomes(text: str) -> dict[str, str]:
    """Test to outcome, from `pytest -v`."""
    line = r"^(\S+\.py::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*\[ *\d+%\]$"
    return {name: outcome.lower() for name, outcome in re.findall(line, text, re.MULTILINE)}


def failed(text: str) -> list[str]:
    """A line for each test that failed, from pytest's summary."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+\.py.*)$", text, re.MULTILINE)
