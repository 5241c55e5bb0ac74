"""`python -m benchmarks.bringup`: runs the stages, each in a process of its own, and writes the page after each.

`--resume` goes on with a bring-up of the same commit; edits that are not committed do not count.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .state import ROOT, State, path_of

GRACE = 3.0  # seconds from a stage's own deadline to being interrupted, and from there to its end by force
PATIENCE = 10.0  # from Ctrl-C to the end by force: a compiler or a launch may have to end first
# Of one processor, for a rehearsal: as long as it takes alone on a machine, however many others it shares it with. The
# clock is told beside it; it judges nothing, for others make it run.
SMOKE_SECONDS = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when every stage is done (and a rehearsal in its time), else 1, 2 for a wrong call, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bringup", description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="folder of the JSON and the Markdown (default benchmarks/results)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with what is not done, at the same commit"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in Triton's interpreter on a CPU")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    begin = _seconds()
    out = options.out or ROOT / (".benchmarks/bringup" if options.smoke else "benchmarks/results")
    if options.smoke:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ["SMOA_CACHE"] = str(out.resolve() / "cache")
    import torch  # after the variables that the kernels read when they are defined

    if not (options.smoke or torch.cuda.is_available()):
        parser.error("there is no GPU here; --smoke rehearses on the CPU")
    from .page import page
    from .stages import STAGES

    if options.stage is not None:
        return _stage(options.stage, out, options.until, options.smoke)
    fresh = State.fresh(options.smoke)
    path = path_of(out, fresh.run)
    if options.resume and path.is_file():
        try:
            known = State.read(path)
            if _code(known) != _code(fresh):
                raise ValueError(f"{path} is of commit {known.run.commit}, here is {fresh.run.commit}")
        except ValueError as error:
            parser.error(f"{error}; without --resume it is written anew")
    else:
        fresh.write(path)
    for name, (_, seconds) in STAGES.items():
        state = State.read(path)
        if options.resume and state.stages.get(name, {}).get("status") == "done":
            print(f"{name}: done before", flush=True)
            continue
        start = time.monotonic()
        try:
            status = _in_process(name, out, seconds, options.smoke)
        except KeyboardInterrupt:
            taken = round(time.monotonic() - start, 1)
            status = {"status": "interrupted", "seconds": taken, "error": "by Ctrl-C"}
        state = State.read(path).with_stage(name, **status)
        state.write(path)
        _write(path.with_suffix(".md"), page(state))
        print(
            f"{name}: {status['status']} in {status['seconds']:.0f} s. {status['error']}".rstrip(), flush=True
        )
        if status["status"] == "interrupted":
            print(f"What was found is kept in {path}; the same command with --resume goes on from here.")
            return 130
    state = State.read(path)
    _write(path.with_suffix(".md"), page(state))
    print(f"written: {path} and {path.with_suffix('.md').name}")
    if options.smoke:
        used, elapsed = (now - then for now, then in zip(_seconds(), begin, strict=True))
        print(
            f"a rehearsal may take {SMOKE_SECONDS:.0f} s of processor time, this one took {used:.0f};"
            f" by the clock {elapsed:.0f}"
        )
        if used > SMOKE_SECONDS:
            return 1
    return 0 if all(found["status"] == "done" for found in state.stages.values()) else 1


def _code(state: State) -> str:
    """The commit; that it was edited does not count, for the page itself may be a file of it."""
    return str(state.run.commit).rstrip("+")


def _seconds() -> tuple[float, float]:
    """Processor time of all processes that this one started and that have ended, and the clock."""
    times = os.times()
    return times.children_user + times.children_system, times.elapsed


def _in_process(name: str, out: Path, seconds: float, smoke: bool) -> dict[str, object]:
    """Run a stage; its status, seconds and error."""
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.bringup", "--stage", name, "--out", str(out.resolve())]
    command += ["--until", str(time.time() + seconds), *(["--smoke"] if smoke else [])]
    # A session of its own, so that what the stage started ends with it: its children hold stderr open.
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=seconds)
            status = {0: "done", 3: "out of time"}.get(process.returncode, "failed")
        except subprocess.TimeoutExpired:
            errors = _end(process, GRACE)
            status = "out of time"
        except BaseException:
            _end(process, PATIENCE)
            raise
    lines = [line for line in errors.splitlines() if line.strip()]
    error = lines[-1] if lines and status != "done" else ""
    if status == "failed" and process.returncode < 0:
        error = f"ended by signal {-process.returncode}. {error}".strip()
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "error": error}


def _end(process: subprocess.Popen[str], seconds: float) -> str:
    """Interrupt a stage and all that it started, so that it notes what it was at, and end what is left; its stderr."""
    try:
        _signal(process, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=seconds)
    finally:  # a second Ctrl-C, too
        _signal(process, signal.SIGKILL)
    _, errors = process.communicate()
    return errors


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, number)


def _stage(name: str, out: Path, until: float, smoke: bool) -> int:
    """In the stage's own process: 0 done, 3 out of time, 1 failed; the reason is the last line of stderr."""
    deadline = time.monotonic() + until - time.time() - GRACE
    # A shell that starts the bring-up in the background has it, and what it starts, ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from .job import Job, OutOfTimeError
    from .stages import STAGES

    path = path_of(out, State.fresh(smoke).run)
    run, _ = STAGES[name]
    try:
        run(Job(State.read(path), lambda state: state.write(path), deadline, smoke))
    except OutOfTimeError as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted at work", file=sys.stderr)
        return 130
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return 1
    return 0


def _write(path: Path, text: str) -> None:
    from ..results import write

    write(path, text)


if __name__ == "__main__":
    sys.exit(main())
