"""What tests take from hypothesis, and where that is not installed the same kinds of problems from seeds.

A machine that brings a GPU up has torch, triton and pytest, and is to check problems that nobody picked all the same.
Seeds draw no extremes on purpose and nothing is made smaller.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

__all__ = ["PROFILES", "HealthCheck", "assume", "example", "given", "settings", "share", "st"]

PROFILES = {"ci": 300, "nightly": 10_000}
"""How many problems are drawn for the C oracle in all (test_fuzz.py, test_fuzz_layers.py, peft/test_fuzzed_merge.py),
how many adapter folders, how many tuning tables; the variable HYPOTHESIS_PROFILE chooses."""


class _UnsuitableError(Exception):
    """What was drawn is outside of what a test is about."""


_Strategy = Callable[[random.Random], Any]


def _integers(low: int, high: int) -> _Strategy:
    return lambda rng: rng.randint(low, high)


def _lists(element: _Strategy, *, min_size: int = 0, max_size: int) -> _Strategy:
    return lambda rng: [element(rng) for _ in range(rng.randint(min_size, max_size))]


def _composite(build: Callable[..., Any]) -> Callable[..., _Strategy]:
    return lambda *args, **kwargs: lambda rng: build(lambda strategy: strategy(rng), *args, **kwargs)


def _sampled_from(values: Sequence[Any]) -> _Strategy:
    return lambda rng: rng.choice(values)


def _booleans() -> _Strategy:
    return lambda rng: rng.random() < 0.5


class _Settings:
    """Of what hypothesis knows only how many problems are drawn."""

    def __init__(self, *, max_examples: int | None = None, **of_hypothesis: object) -> None:
        profile = PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "ci")]
        self.max_examples = profile if max_examples is None else max_examples

    def __call__(self, test: Any) -> Any:
        test.max_examples = self.max_examples
        return test


def _example(**values: Any) -> Callable[[Any], Any]:
    def applied(test: Any) -> Any:
        test.examples = [values, *getattr(test, "examples", ())]
        return test

    return applied


def _given(**strategies: _Strategy) -> Callable[[Any], Any]:
    def drawing(test: Any) -> Any:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            for values in getattr(run, "examples", ()):
                test(*args, **kwargs, **values)
            suitable = 0
            for seed in range(run.max_examples):  # type: ignore[attr-defined]
                rng = random.Random(seed)
                drawn = {name: strategy(rng) for name, strategy in strategies.items()}
                try:
                    test(*args, **kwargs, **drawn)
                    suitable += 1
                except _UnsuitableError:
                    continue
                except BaseException:
                    print(f"drawn by seed {seed}: {drawn}")
                    raise
            assert suitable, "nothing that was drawn is what the test is about"

        # pytest takes parameters for fixtures: those that are drawn are none.
        signature = inspect.signature(test)
        left = [p for name, p in signature.parameters.items() if name not in strategies]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return drawing


def _assume(condition: object) -> None:
    if not condition:
        raise _UnsuitableError


if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, assume, example, given, settings
    from hypothesis import strategies as st
else:
    assume, example, given, settings = _assume, _example, _given, _Settings
    HealthCheck = SimpleNamespace(function_scoped_fixture=None)
    st = SimpleNamespace(
        booleans=_booleans,
        composite=_composite,
        integers=_integers,
        lists=_lists,
        sampled_from=_sampled_from,
    )


def share(part: float) -> Any:
    """So much of all that the profile draws."""
    return settings(max_examples=round(part * settings().max_examples))
