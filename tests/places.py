"""Processes to kill and places without write access or room, for tests of saving."""

import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from smoa_kernels.peft import SMoAConfig

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE / "tuning"), str(HERE.parent), str(HERE.parent / "examples")]
FullDisk = tuple[Path, Callable[[], AbstractContextManager[None]]]
"""A folder, and a context in which nothing of more than a few kilobytes can be written there."""


def started(*command: object, **environment: str) -> "subprocess.Popen[str]":
    """Starts a command with the paths of these tests, on one thread: tests share the machine."""
    path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    pipe = subprocess.PIPE
    given = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([*map(str, command)], stdout=pipe, stderr=pipe, text=True, env=given)


def python(program: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """Starts a Python program."""
    return started(sys.executable, "-c", program, *arguments, **environment)


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


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory, mounted by a process that lives as long as the block.

    The process uses a mount namespace of its own, which needs no root. Where users may not have one, it mounts
    globally.
    """
    folder.mkdir(exist_ok=True)
    mount = shlex.join(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)])
    umount = shlex.join(["umount", "--lazy", str(folder)])
    script = f"{mount} && echo mounted && {{ read line; {umount}; }}"
    refusals = []
    for namespace in (["unshare", "-rm"], []):
        try:
            keeper = subprocess.Popen(
                [*namespace, "sh", "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError as error:
            refusals.append(str(error))
            continue
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        with keeper:
            if keeper.stdout.readline() == "mounted\n":
                # /proc/PID/root shows the file system with the mounts of that process.
                yield Path(f"/proc/{keeper.pid}/root{folder}")
                return
            refusals.append(keeper.stderr.read().strip())
    pytest.skip(f"a file system may not be mounted here: {'; '.join(refusals)}")


@pytest.fixture(params=["file limit", "small disk"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FullDisk]:
    if request.param == "file limit":
        yield tmp_path, lambda: file_limit(2000)
        return
    with mounted(tmp_path / "disk", "size=1m") as disk:

        @contextmanager
        def filled() -> Iterator[None]:
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as stream, suppress(OSError):
                while True:
                    stream.write(bytes(4096))
            yield
            filler.unlink()

        yield disk, filled


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 20))


def adapted(r: int, **settings: float) -> PeftModel:
    config = SMoAConfig(r=r, num_blocks=2, target_modules=["0"], init_weights=False, **settings)
    return get_peft_model(base(), config)
