"""Limits for reading a file, whatever is in it: reading ends, and its memory stays bounded."""

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

# Far longer than any call here takes on a slow machine: this detects a hang, not slowness.
HANG = 60


@contextmanager
def ends(seconds: float = HANG) -> Iterator[None]:
    """Fails at the line where the body hangs; kills the process if the body never returns to Python."""

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
    """The most bytes that Python held at once, tensors not counted."""

    bytes: int = 0


@contextmanager
def measured() -> Iterator[Peak]:
    """Measures the memory of the body; fails if it hangs."""
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
    """Returns the result of `call`; fails if it hangs, or takes more than `size` bytes twice.

    The second attempt is for a rare event: paths intern their parts, and Python now and then rebuilds its table of
    interned strings. With torch loaded that takes 4 or 8 MB.
    """
    for _ in range(2):
        with measured() as peak:
            result = call()
        if peak.bytes <= size:
            return result
    raise AssertionError(f"{peak.bytes} bytes at once, {size} are allowed")
