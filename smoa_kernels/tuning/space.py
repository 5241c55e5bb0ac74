"""What is tried for a kernel: the shipped configurations and their neighbours, less those that compile badly.

A neighbour differs from a shipped configuration in one number, by one step. Whether it spills, overflows shared memory
or loads narrowly is known before anything is timed: the audit compiles it for the architecture, without a GPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from ..audit.registry import KERNELS, KernelSpec
from ..audit.rules import Record, broken_rules
from ..audit.run import run_audit
from ..kernels.heuristic import ALGORITHM_KEYS, CONFIGS, Key, fits, heuristic, shipped
from ..kernels.launch import Config
from .tuner import Job

__all__ = ["SEARCH", "algorithm_job", "broken", "kernel_job", "search_space"]

# Numbers that a field may take; what is not listed stays as it ships.
_STEPS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "modulated_weight": {"block_n": (16, 32, 64), "block_c": (64, 128, 256), "num_warps": (4, 8)},
    "modulated_blocks": {"block_n": (16, 32, 64), "block_c": (64, 128, 256), "num_warps": (4, 8)},
    "permute": {"block_t": (32, 64, 128), "block_p": (64, 128, 256), "num_warps": (2, 4, 8)},
    "block_matmul": {
        "block_t": (32, 64, 128, 256),
        "block_n": (32, 64, 128),
        "group_t": (4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "fused_linear": {
        "block_n": (16, 32, 64, 128),
        "block_r": (16, 32, 64),
        "split": (1, 2, 4, 8),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
    },
    "block_grad": {
        "block_n": (32, 64, 128),
        "block_c": (64, 128),
        "block_t": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "sum_parts": {"block": (512, 1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)},
    "sum_partials": {"block": (512, 1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)},
}


def search_space(kernel: str, arch: str, dtype: str) -> tuple[Config, ...]:
    """Every configuration that may be tried, the shipped ones first.

    Args:
        kernel: one of `heuristic.CONFIGS`.
        arch: for example "sm_90".
        dtype: one of `heuristic.DTYPES`.
    """
    ships = shipped(Key(kernel, dtype), arch)
    neighbours = [neighbour for config in ships for neighbour in _neighbours(config, _STEPS[kernel])]
    return tuple(dict.fromkeys((*ships, *neighbours)))


def _neighbours(config: Config, steps: Mapping[str, tuple[int, ...]]) -> list[Config]:
    found: list[Config] = []
    for field in fields(config):
        values, here = steps.get(field.name, ()), getattr(config, field.name)
        if here in values:
            at = values.index(here)
            changes: list[Any] = [
                {field.name: value} for value in values[max(at - 1, 0) : at + 2] if value != here
            ]
            found += [replace(config, **change) for change in changes]
    return found


def _searched(spec: KernelSpec) -> Callable[[str, str, str], tuple[Any, ...]]:
    return lambda arch, dtype, variant: search_space(spec.name, arch, dtype)


SEARCH: tuple[KernelSpec, ...] = tuple(
    replace(spec, configurations=_searched(spec)) for spec in KERNELS if spec.name in CONFIGS
)
"""The registry of kernels for the audit, with the whole search space in place of what ships."""


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
        pairs: (kernel, dtype), names from `heuristic.CONFIGS` and `heuristic.DTYPES`.
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
            choice = (record.kernel, dtype, _config(record))
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
    forms = {spec.name: len(spec.variants) for spec in SEARCH}
    for kernel, dtype in pairs:
        ships = shipped(Key(kernel, dtype), arch)
        for config in search_space(kernel, arch, dtype):
            if config not in ships and compiled[kernel, dtype, config] < forms[kernel]:
                yield kernel, dtype, config


def _config(record: Record) -> Config:
    return CONFIGS[record.kernel](**record.config)


def kernel_job(
    key: Key,
    arch: str,
    multiprocessors: int,
    *,
    ruled_out: Mapping[tuple[str, str, Config], str] | None = None,
    stand_in: str | None = None,
) -> Job:
    """What to try for a kernel's key.

    Args:
        key: the problem.
        arch: of the device.
        multiprocessors: of the device.
        ruled_out: from :func:`broken`; None tries the shipped configurations only, which the audit has passed.
        stand_in: the audited architecture that stands for `arch`, whose space is searched.
    """
    default = heuristic(key, arch, multiprocessors)
    if ruled_out is None:
        space: tuple[Config, ...] = shipped(key, arch)
    else:
        space = search_space(key.kernel, stand_in or arch, key.dtype)
    candidates = dict.fromkeys((default, *(c for c in space if fits(c, key))))
    pruned = [(c, "does not divide the padded layout") for c in space if not fits(c, key)]
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
