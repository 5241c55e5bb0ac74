"""`python -m benchmarks.bringup`: runs each stage in a process of its own and writes the files after each.

`--resume` continues a bring-up of the same commit; uncommitted edits do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..machine import EDITED, commit, describe
from ..results import RESULTS, ROOT, Run, compact, read, write

GRACE = 5.0  # seconds between interrupting a stage and killing it
SECONDS = {"operator": 300.0, "headline": 240.0, "tests": 475.0, "tune": 475.0}
"""The stages in order, each with its time limit, which includes the start of its process."""
OUT_OF_TIME = 3  # exit code of a stage that noticed by itself that its time was short
SMOKE_PATIENCE = 4  # a rehearsal's limits are longer, because it may share the machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages; 0 when every stage is done, else 1; 2 for a wrong call, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bringup", description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON, Markdown and log (default benchmarks/results)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="run the stages that are not done, at the same commit"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in Triton's interpreter on a CPU")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out = options.out or (ROOT / ".benchmarks" / "bringup" if options.smoke else RESULTS)
    if options.smoke:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ["SMOA_CACHE"] = str(out.resolve() / "cache")
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("there is no GPU here; --smoke rehearses on the CPU")
    run = Run(describe(options.smoke), commit(), time.strftime("%Y-%m-%d"), ())
    path = out / f"bringup-{run.slug}.json"
    if options.stage is not None:
        return _in_stage(options.stage, path, options.until, options.smoke)
    if options.resume and path.is_file():
        try:
            known = read(path)
            if known.commit.removesuffix(EDITED) != run.commit.removesuffix(EDITED):
                raise ValueError(f"{path} is of commit {known.commit}, here is {run.commit}")
        except ValueError as error:
            parser.error(f"{error}; without --resume it is overwritten")
        run = known
    write(path, compact(run))
    from .page import page  # imports the kernels, which read TRITON_INTERPRET when they are defined

    for name in SECONDS:
        if run.stages.get(name, {}).get("status") == "done":
            print(f"{name}: done before", flush=True)
            continue
        status = _run(name, out, path.with_suffix(".log"), options.smoke)
        run = read(path)
        run = replace(run, stages={**run.stages, name: status})
        write(path, compact(run))
        write(path.with_suffix(".md"), page(run))
        print(
            f"{name}: {status['status']} in {status['seconds']:.0f} s. {status['error']}".rstrip(), flush=True
        )
        if status["status"] == "interrupted":
            print(f"What was found is in {path}; run the same command with --resume to continue.")
            return 130
    print(f"written: {path}, and .md and .log beside it")
    return 0 if all(found["status"] == "done" for found in run.stages.values()) else 1


def _run(name: str, out: Path, log: Path, smoke: bool) -> dict[str, Any]:
    """Run a stage within its time, as `run_stage` does.

    Its kernels are compiled first, in at most half of the time. The stage compiles the rest.
    """
    left, before = SECONDS[name] * (SMOKE_PATIENCE if smoke else 1), 0.0
    if not smoke:
        found = torch.cuda.get_device_properties(0)
        names = "major", "minor", "multi_processor_count", *["gcnArchName"] * (torch.version.hip is not None)
        gpu = {name: getattr(found, name) for name in names}
        command = [sys.executable, "-m", "benchmarks.bringup.ahead", name, "--gpu", json.dumps(gpu)]
        status = run_stage(command, log, left / 2)
        if status["status"] == "interrupted":
            return status
        before = status["seconds"]
    command = [sys.executable, "-m", "benchmarks.bringup", "--stage", name, "--out", str(out.resolve())]
    command += ["--until", str(time.time() + left - before - GRACE), *["--smoke"] * smoke]
    status = run_stage(command, log, left - before)
    return {**status, "seconds": status["seconds"] + before}


def run_stage(command: Sequence[str], log: Path, seconds: float) -> dict[str, Any]:
    """Run a command with a time limit, appending its output to a log.

    Returns:
        Its status ("done", "failed", "out of time" or "interrupted"), seconds and error.
    """
    start, limit_passed = time.monotonic(), False
    with log.open("ab") as stream:
        begin = stream.tell()
        # A session of its own, so that the stage's child processes end with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            status = {0: "done", OUT_OF_TIME: "out of time"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            status, limit_passed = "out of time", True
        except KeyboardInterrupt:
            status = "interrupted"
        finally:
            _end(process)
    output = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line for line in output.splitlines() if line.strip()] or [""]
    error = "" if status == "done" else lines[-1].strip("= ")
    if limit_passed:
        error = f"stopped after {seconds:.0f} s"
    elif status == "failed" and process.returncode < 0:
        error = f"ended by signal {-process.returncode}. {error}".strip()
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "error": error}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its children, so that they can save their results; then kill those that remain."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE)
    finally:  # after a second Ctrl-C, too
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _in_stage(name: str, path: Path, until: float, smoke: bool) -> int:
    """Run a stage in its own process; an exception ends the process, and its text is the stage's error."""
    from .stages import STAGES, Job, OutOfTimeError

    deadline = time.monotonic() + until - time.time()
    try:
        STAGES[name](Job(read(path), lambda run: write(path, compact(run)), deadline, smoke))
    except OutOfTimeError as error:
        print(error, file=sys.stderr)
        return OUT_OF_TIME
    return 0


if __name__ == "__main__":
    # A shell that starts this in the background makes it and its children ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
