"""Processes to kill and a disk without room, for tests of saving."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE / "tuning"), str(HERE.parent), str(HERE.parent / "examples")]


def surroundings(changed: dict[str, str | None]) -> dict[str, str]:
    """Variables with the paths of these tests, and one thread: tests share the machine. None unsets a variable."""
    path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    given = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changed}
    return {name: value for name, value in given.items() if value is not None}


def started(*command: object, **environment: str | None) -> "subprocess.Popen[str]":
    """Starts a command."""
    pipe, env = subprocess.PIPE, surroundings(environment)
    return subprocess.Popen([*map(str, command)], stdout=pipe, stderr=pipe, text=True, env=env)


def python(program: str, *arguments: object, **environment: str | None) -> "subprocess.Popen[str]":
    """Starts a Python program."""
    return started(sys.executable, "-c", program, *arguments, **environment)


def ran(
    *arguments: object, cwd: Path | None = None, **environment: str | None
) -> "subprocess.CompletedProcess[str]":
    """Runs Python with these arguments to its end."""
    command, env = [sys.executable, *map(str, arguments)], surroundings(environment)
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=900)


def kill_at(process: "subprocess.Popen[str]", line: str) -> None:
    """Sends SIGKILL as soon as the process prints `line`."""
    assert process.stdout is not None
    with process:
        for said in process.stdout:
            if said == f"{line}\n":
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait(timeout=60)
        assert process.returncode == -signal.SIGKILL, process.stderr and process.stderr.read()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Lets interrupts arrive here and in children: a shell ignores them for tests that it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Limits the size of every file, as a full disk does: a longer write is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 20))


def adapted(r: int, name: str = "default", **settings: float) -> Any:
    # Children that need none of it start sooner.
    from peft import get_peft_model

    from smoa_kernels.peft import SMoAConfig

    config = SMoAConfig(r=r, num_blocks=2, target_modules=["0"], init_weights=False, **settings)
    return get_peft_model(base(), config, name)
