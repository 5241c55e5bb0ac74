"""What reading a file may cost at most, whatever is in it: so much memory, and it ends."""

from __future__ import annotations

import faulthandler
import signal
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest

__all__ = ["ends", "measured", "within"]

# Far more than anything here takes on a slow machine: it tells a hang, and says nothing of speed.
HANG = 60


@contextmanager
def ends(seconds: float = HANG) -> Iterator[None]:
    """Fails where the body hangs, at the line that it is at; what never comes back to Python ends the process."""

    def fail(*_: object) -> None:
        pytest.fail(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@dataclass
class Peak:
    """The most bytes that Python held at once for what was done, tensors not counted."""

    bytes: int = 0


@contextmanager
def measured() -> Iterator[Peak]:
    """What the body takes; fails where it hangs."""
    peak = Peak()
    tracemalloc.start()
    try:
        with ends():
            yield peak
        _, peak.bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


T = TypeVar("T")


def within(size: int, call: Callable[[], T]) -> T:
    """What `call` returns; fails where it takes more than `size` bytes, and does so again, or hangs.

    Again, because paths intern their parts, and now and then Python makes the table of all interned strings anew: 4 or
    8 MB in a process that has loaded torch, whatever is read.
    """
    for _ in range(2):
        with measured() as peak:
            result = call()
        if peak.bytes <= size:
            return result
    raise AssertionError(f"{peak.bytes} bytes at once, {size} are allowed")
