"""What every stage is given, and how it says that time was short."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .state import State


@dataclass(frozen=True)
class Job:
    """What a stage is given.

    Attributes:
        state: of the bring-up so far.
        save: writes a newer one.
        deadline: by `time.monotonic()`.
        smoke: tiny sizes.
    """

    state: State
    save: Callable[[State], None]
    deadline: float
    smoke: bool

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


class OutOfTimeError(RuntimeError):
    """A stage ends with a part of its work."""
