"""Groups of processes that stay alive between tests, because starting one costs more than most tests.

Processes are forked from one that has imported PEFT.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Timeout of gloo: after a failure in one process the others wait this long.
TIMEOUT = datetime.timedelta(seconds=30)


class Processes:
    """`size` processes in one gloo group. They run the functions given to them; their errors are raised here."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: object) -> list[Any]:
        """Calls `function(*args)` in every process; returns their results."""
        if not self._connections:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        results, errors = [], []
        for rank, connection in enumerate(self._connections):
            try:
                error, result = connection.recv()
            except EOFError:
                error, result = "ended", None
            results.append(result)
            if error is not None:
                errors.append(f"process {rank} of {self.size}: {error}")
        if errors:
            self.stop()  # the processes no longer agree on the next collective
            raise AssertionError("\n".join(errors))
        return results

    def stop(self) -> None:
        """Ends the processes; the next `run` starts new ones."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(10)
            process.kill()
        self._connections, self._processes = [], []

    def _start(self) -> None:
        context = _context()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            connection, other_end = context.Pipe()
            process = context.Process(target=_serve, args=(other_end, rank, self.size, port), daemon=True)
            process.start()
            other_end.close()
            self._connections.append(connection)
            self._processes.append(process)


def killed(function: Callable[..., None], *args: object) -> None:
    """Calls `function(*args)` in a process of its own, which must end by SIGKILL."""
    process = _context().Process(target=function, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def _context() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["smoa_kernels.peft", "torch.distributed.checkpoint"])
    return context


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((None, function(*args)))
        except BaseException:
            connection.send((traceback.format_exc(), None))


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    group = Processes(2)
    yield group
    group.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    group = Processes(4)
    yield group
    group.stop()
