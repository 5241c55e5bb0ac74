"""What is tried for a kernel: the shipped configurations and their neighbours, less those that compile badly.

A neighbour differs from a shipped configuration in one number, by one step, or in two of which one makes up for the
other. Whether it spills, overflows shared memory or loads narrowly is known before anything is timed: the audit
compiles it for the architecture, without a GPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, replace
from itertools import combinations
from typing import Any

from ..audit.rules import broken_rules
from ..audit.run import run_audit
from ..definition.precision import PRECISIONS, Precision
from ..kernels import KERNELS
from ..kernels.architectures import Architecture, facts
from ..kernels.spec import ALGORITHM_KEYS, Config, Kernel, Key
from .tuner import Job

__all__ = ["SEARCH", "algorithm_job", "broken", "kernel_job", "search_space"]


def _searched(kernel: Kernel) -> Kernel:
    """The kernel with every configuration that may be tried in place of what ships."""

    def space(arch: Architecture, precision: Precision) -> tuple[Config, ...]:
        ships = kernel.shipped(arch, precision)
        alone = (neighbour for config in ships for neighbour in _neighbours(config, kernel.steps))
        paired = (neighbour for config in ships for neighbour in _paired(config, kernel.steps))
        return tuple(dict.fromkeys((*ships, *alone, *paired)))

    return replace(kernel, shipped=space)


def _neighbours(config: Any, steps: Mapping[str, tuple[int, ...]]) -> Iterator[Config]:
    """A step up or down in one number."""
    for field in fields(config):
        for by in (-1, 1):
            yield from _moved(config, steps, {field.name: by})


def _paired(config: Any, steps: Mapping[str, tuple[int, ...]]) -> Iterator[Config]:
    """A step in two numbers, of which either alone may spill, not fit, or leave the tensor cores idle.

    A tile that is longer on one side and shorter on the other, or larger for more warps, keeps the registers of a
    thread; one that is larger in fewer stages keeps the shared memory.
    """
    for one, other in combinations([field.name for field in fields(config)], 2):
        if one in _SIDES and other in (*_SIDES, "num_warps", "num_stages"):
            together = 1 if other == "num_warps" else -1
            for by in (-1, 1):
                yield from _moved(config, steps, {one: by, other: by * together})


_SIDES = ("block_t", "block_n", "block_c", "block_p")  # of a tile; `block_r` only bounds ranks


def _moved(config: Any, steps: Mapping[str, tuple[int, ...]], by: Mapping[str, int]) -> list[Config]:
    """The configuration with each of these numbers so many steps on; none where one has no such step."""
    changed = {}
    for name, distance in by.items():
        values, here = steps.get(name, ()), getattr(config, name)
        if here not in values or not 0 <= values.index(here) + distance < len(values):
            return []
        changed[name] = values[values.index(here) + distance]
    return [replace(config, **changed)]


SEARCH: Mapping[str, Kernel] = {name: _searched(kernel) for name, kernel in KERNELS.items()}
"""The kernels for the audit, with the whole search space in place of what ships."""


def search_space(kernel: str, arch: str, dtype: str) -> tuple[Config, ...]:
    """Every configuration that may be tried, the shipped ones first."""
    return SEARCH[kernel].shipped(facts(arch), PRECISIONS[dtype])


def _ships(kernel: str, arch: str, dtype: str) -> tuple[Config, ...]:
    return KERNELS[kernel].shipped(facts(arch), PRECISIONS[dtype])


def broken(
    pairs: Collection[tuple[str, str]],
    arch: str,
    *,
    processes: int | None = None,
    deadline: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, str, Config], str]:
    """(kernel, dtype, configuration) to the first audit rule that it breaks in any of the kernel's forms.

    Args:
        pairs: (kernel, dtype), names from `KERNELS` and `precision.KERNEL_PRECISIONS`.
        arch: an audited architecture.
        processes: that compile; one per core where None.
        deadline: by `time.monotonic()`; what does not ship and is not compiled by then counts as broken, too. What
            is compiled is kept, so that a second call comes further.
        progress: called with how many compilations are done, and how many are known of.
    """
    found: dict[tuple[str, str, Config], str] = {}
    compiled: Counter[tuple[str, str, Config]] = Counter()
    done = total = 0

    def late() -> bool:
        return deadline is not None and time.monotonic() >= deadline

    for dtype in sorted({dtype for _, dtype in pairs}):
        if late():
            break
        kernels = sorted(kernel for kernel, other in pairs if other == dtype)
        audit = run_audit(
            archs=[arch], kernels=kernels, dtypes=[dtype], jobs=processes, registry=f"{__name__}:SEARCH"
        )
        for left, record in audit:
            if record is None:
                total += left
                continue
            done += 1
            progress(done, total)
            choice = (record.kernel, dtype, KERNELS[record.kernel].config(**record.config))
            compiled[choice] += 1
            if rules := broken_rules(record):
                found.setdefault(choice, f"{record.variant}: {rules[0]}")
            if late():
                break
    if deadline is not None:
        found = dict.fromkeys(_unseen(pairs, arch, compiled), _LATE) | found
    return found


_LATE = "not compiled before half of the time was up"


def _unseen(
    pairs: Collection[tuple[str, str]], arch: str, compiled: Mapping[tuple[str, str, Config], int]
) -> Iterator[tuple[str, str, Config]]:
    """What does not ship and lacks a form."""
    for kernel, dtype in pairs:
        ships = _ships(kernel, arch, dtype)
        for config in search_space(kernel, arch, dtype):
            if config not in ships and compiled[kernel, dtype, config] < len(KERNELS[kernel].forms):
                yield kernel, dtype, config


def kernel_job(
    key: Key,
    arch: str,
    multiprocessors: int,
    *,
    ruled_out: Mapping[tuple[str, str, Config], str] | None = None,
    stand_in: str | None = None,
) -> Job:
    """What to try for a kernel's key on a device of the architecture `arch`.

    `ruled_out` is from :func:`broken`. Where it is None, only the shipped configurations are tried, which the audit has
    passed; else those of `stand_in`, the audited architecture that stands for `arch`.
    """
    kernel = KERNELS[key.kernel]
    default = kernel.default(key, arch, multiprocessors)
    if ruled_out is None:
        space = _ships(key.kernel, arch, key.dtype)
    else:
        space = search_space(key.kernel, stand_in or arch, key.dtype)
    candidates = dict.fromkeys((default, *(c for c in space if kernel.fits(c, key))))
    pruned = [(c, "does not divide the padded layout") for c in space if not kernel.fits(c, key)]
    for config in list(candidates):
        reason = (ruled_out or {}).get((key.kernel, key.dtype, config))
        if reason is not None and config != default:
            del candidates[config]
            pruned.append((config, reason))
    return Job(key, default, tuple(candidates), tuple(pruned))


def algorithm_job(key: Key, default: str) -> Job:
    """What to try where the choice is an algorithm; `default` is the cost model's."""
    others = [name for name in ALGORITHM_KEYS[key.kernel] if name != default]
    return Job(key, default, (default, *others))
