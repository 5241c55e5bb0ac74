"""What test_theory.py takes from hypothesis, and where that is not installed the same kinds of problems from seeds.

A machine that brings a GPU up has torch, triton and pytest, and is to check the theory all the same. Seeds draw no
extremes on purpose and nothing is made smaller; test_fuzz.py and kernels/test_random_shapes.py, each of whose problems
compiles kernels on a GPU, are skipped there.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

__all__ = ["assume", "given", "settings", "st"]


class _UnsuitableError(Exception):
    """What was drawn is outside of what a test is about."""


_Strategy = Callable[[random.Random], Any]


def _integers(low: int, high: int) -> _Strategy:
    return lambda rng: rng.randint(low, high)


def _lists(element: _Strategy, *, min_size: int, max_size: int) -> _Strategy:
    return lambda rng: [element(rng) for _ in range(rng.randint(min_size, max_size))]


def _composite(build: Callable[..., Any]) -> Callable[..., _Strategy]:
    return lambda *args: lambda rng: build(lambda strategy: strategy(rng), *args)


def _settings(*, max_examples: int, deadline: None) -> Callable[[Any], Any]:
    def applied(test: Any) -> Any:
        test.max_examples = max_examples
        return test

    return applied


def _given(**strategies: _Strategy) -> Callable[[Any], Any]:
    def drawing(test: Any) -> Any:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
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
    from hypothesis import assume, given, settings
    from hypothesis import strategies as st
else:
    assume, given, settings = _assume, _given, _settings
    st = SimpleNamespace(composite=_composite, integers=_integers, lists=_lists)
