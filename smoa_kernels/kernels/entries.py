"""One measured choice: its key, what was tried and how fast it was. Plain data in, plain data out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from ..checks import check_choice, check_kind
from .heuristic import ALGORITHM_KEYS, CONFIGS, Key, check_key, fits
from .identity import Identity
from .launch import Config

__all__ = ["GIVEN_UP", "INTERRUPTED", "UNFINISHED", "Choice", "Entry", "Trial", "merged"]

Choice: TypeAlias = Config | str
"""Launch parameters of a kernel, or the name of an algorithm."""

INTERRUPTED = "interrupted"
UNFINISHED = "did not finish: the process ended while it ran"
GIVEN_UP = "did not finish, twice: the process ended while it ran"
_MARKS = (INTERRUPTED, UNFINISHED, GIVEN_UP)


@dataclass(frozen=True)
class Trial:
    """One candidate: the seconds it took, or why it has none.

    Attributes:
        choice: what was tried.
        seconds: median; None where it was not timed.
        reason: why not.

    Raises:
        TypeError, ValueError: naming the attribute, what was given and what is allowed.

    Example:
        >>> Trial("split", seconds=1e-3).settled, Trial("fused", reason=INTERRUPTED).settled
        (True, False)
    """

    choice: Choice
    seconds: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        value = self.seconds
        if value is not None and (type(value) not in (int, float) or not 0 < value <= sys.float_info.max):
            raise ValueError(f"seconds must be positive and finite, got {value!r}")
        if self.reason is not None and type(self.reason) is not str:
            raise ValueError(f"reason must be text, got {self.reason!r}")

    @property
    def settled(self) -> bool:
        """Whether it need not be tried again; the process may have ended once for a reason of its own."""
        return self.reason not in (INTERRUPTED, UNFINISHED)

    @property
    def found(self) -> bool:
        """Whether it ran to its end: a time, or what is wrong with it."""
        return self.reason not in _MARKS


@dataclass(frozen=True)
class Entry:
    """What was found for one key on one machine.

    Attributes:
        key: the problem.
        identity: what it was measured on.
        default: what would run without the entry.
        trials: everything that was tried.
        complete: nothing is left to try.

    Raises:
        TypeError, ValueError: naming the attribute, what was given and what is allowed.

    Example:
        >>> key = Key("forward", "bf16", 8, 2, 4096, 4096, 512)
        >>> machine = Identity("a GPU", "sm_90", 132, "2.13.0", "3.9.0", "0123456789abcdef")
        >>> entry = Entry(key, machine, "split", (Trial("split", seconds=2e-3), Trial("fused", seconds=1e-3)))
        >>> entry.best().choice, Entry.from_json(entry.to_json()) == entry
        ('fused', True)
    """

    key: Key
    identity: Identity
    default: Choice
    trials: tuple[Trial, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        check_key(self.key)
        check_kind("identity", self.identity, Identity)
        check_kind("trials", self.trials, tuple)
        check_kind("complete", self.complete, bool)
        # A table with another choice would be set aside, with all that it holds, by whoever reads it.
        _check_choice("default", self.key, self.default)
        for trial in self.trials:
            check_kind("trials", trial, Trial)
            _check_choice("choice", self.key, trial.choice)

    def best(self, allowed: Sequence[Choice] | None = None) -> Trial | None:
        """The fastest trial, among `allowed` choices where given; None where nothing was timed."""
        timed = [t for t in self.trials if t.seconds is not None and (allowed is None or t.choice in allowed)]
        return min(timed, key=lambda trial: trial.seconds or 0.0, default=None)

    def trial(self, choice: Choice) -> Trial | None:
        """What became of a choice; None where it is still to be tried."""
        return next((t for t in self.trials if t.choice == choice and t.settled), None)

    def with_trial(self, trial: Trial) -> Entry:
        """The entry with one more trial, in the place of an earlier one of the same choice."""
        check_kind("trial", trial, Trial)
        others = tuple(t for t in self.trials if t.choice != trial.choice)
        return replace(self, trials=(*others, trial))

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` is its inverse."""
        trials = [
            {"choice": _plain(t.choice)}
            | ({"reason": t.reason} if t.seconds is None else {"seconds": t.seconds})
            for t in self.trials
        ]
        return {
            "key": self.key._asdict(),
            "identity": asdict(self.identity),
            "default": _plain(self.default),
            "complete": self.complete,
            "trials": trials,
        }

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """From plain data.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: something is missing, unknown, of another type or out of
                range.
        """
        key = Key(**data["key"])
        check_key(key)
        trials = tuple(
            Trial(_choice(key, trial["choice"]), trial.get("seconds"), trial.get("reason"))
            for trial in data["trials"]
        )
        identity = Identity.from_json(data["identity"])
        return cls(key, identity, _choice(key, data["default"]), trials, data["complete"])


def merged(older: Entry, newer: Entry) -> Entry:
    """Of two entries for one key and identity the newer, with the trials of the older.

    Of two trials of one choice the newer, unless the older knows more: a time before a failure, which comes before the
    mark that a process leaves where it begins, or was interrupted.

    Args:
        older: that is in a table.
        newer: that is put there.

    Raises:
        TypeError: one of them is no entry.
        ValueError: they are of different keys or identities.

    Example:
        >>> machine = Identity("a GPU", "sm_90", 132, "2.13.0", "3.9.0", "0123456789abcdef")
        >>> older = Entry(Key("forward", "bf16"), machine, "split", (Trial("split", seconds=2e-3),))
        >>> newer = Entry(Key("forward", "bf16"), machine, "split", (Trial("fused", seconds=1e-3),))
        >>> [trial.choice for trial in merged(older, newer).trials]
        ['split', 'fused']
    """
    check_kind("older", older, Entry)
    check_kind("newer", newer, Entry)
    for name in ("key", "identity"):
        if getattr(older, name) != getattr(newer, name):
            raise ValueError(
                f"newer must have the {name} of older, {getattr(older, name)}, got {getattr(newer, name)}"
            )
    trials = {trial.choice: trial for trial in older.trials}
    for trial in newer.trials:
        known = trials.get(trial.choice)
        if known is None or _knowledge(trial) >= _knowledge(known):
            trials[trial.choice] = trial
    return replace(newer, trials=tuple(trials.values()), complete=older.complete or newer.complete)


def _knowledge(trial: Trial) -> tuple[bool, bool]:
    return trial.seconds is not None, trial.found


def _plain(choice: Choice) -> Any:
    return choice if isinstance(choice, str) else asdict(choice)


# What a field of a configuration may be at most; a launch beyond it fails, which no table may bring about.
_MOST = {"block": 8192, "group_t": 64, "split": 64, "num_warps": 16, "num_stages": 8}
_MOST_TILE = 256


def _choice(key: Key, data: Any) -> Choice:
    """From plain data; :func:`_plain` is its inverse."""
    choice: Choice = data if key.kernel in ALGORITHM_KEYS else CONFIGS[key.kernel](**data)
    return choice


def _check_choice(name: str, key: Key, choice: Choice) -> None:
    """Whether it may be launched: of the right kind, its numbers powers of two (split and stages any count)."""
    if key.kernel in ALGORITHM_KEYS:
        check_choice(name, choice, ALGORITHM_KEYS[key.kernel])  # type: ignore[arg-type]  # which is what it checks
        return
    check_kind(name, choice, CONFIGS[key.kernel])
    assert not isinstance(choice, str)
    for field, value in vars(choice).items():
        least = 0 if field == "split" and key.kernel == "block_grad" else 1
        least = 16 if field.startswith("block_") else least  # `tl.dot` takes no fewer
        free = field in ("split", "num_stages")
        in_range = type(value) is int and least <= value <= _MOST.get(field, _MOST_TILE)
        if not in_range or not (free or value & (value - 1) == 0):
            raise ValueError(f"{name}: {field} = {value!r} is no launch parameter of {key.kernel}")
    if not fits(choice, key):
        raise ValueError(f"{name}: {choice} does not divide the layout of {key}")
