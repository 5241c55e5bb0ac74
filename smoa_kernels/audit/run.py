"""Compile every kernel at every shipped configuration for every architecture, and judge what comes out.

No GPU is needed. The parent process never imports Triton: workers do, without `TRITON_INTERPRET`, so that an
audit runs from a process that interprets. Results are cached by everything that decides them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks import check_choices
from ..definition.precision import KERNEL_PRECISIONS, PRECISIONS
from ..files import cache_folder, replace_file
from ..kernels.architectures import ARCHITECTURES, Architecture, occupancy
from .pointers import pointers_at
from .rules import Record, Traffic

if TYPE_CHECKING:
    from .compile import Binary, Config, Kernel, Launch

__all__ = ["Task", "run_audit", "run_task", "tasks"]

DEFAULT_REGISTRY = "smoa_kernels.kernels:KERNELS"
_CACHE_SCHEMA = 5  # raised whenever a record gains a field or a parser changes what it reads

# More than any machine has cores for; the pool starts as many as it has work for.
MOST_WORKERS = 1024


@dataclass(frozen=True)
class Task:
    """One compilation: indices into a registry that workers import by name."""

    registry: str
    kernel: str
    variant: str
    config: int
    arch: str
    dtype: str


def run_audit(
    *,
    archs: Sequence[str] = tuple(ARCHITECTURES),
    kernels: Sequence[str] | None = None,
    dtypes: Sequence[str] = KERNEL_PRECISIONS,
    jobs: int | None = None,
    registry: str = DEFAULT_REGISTRY,
) -> Iterator[tuple[int, Record | None]]:
    """Audit in worker processes. A compilation that ends its process twice is one that failed.

    `registry` is the "module:attribute" of a mapping from names to `spec.Kernel`; `kernels` are some of its names.

    Yields:
        First (number of compilations, None), then (how many are left, record) as they finish.
    """
    check_choices("arch", archs, ARCHITECTURES)
    check_choices("dtype", dtypes, KERNEL_PRECISIONS)
    with _workers(1) as pool:
        work = pool.submit(tasks, registry, tuple(archs), kernels, tuple(dtypes)).result()
    yield len(work), None
    yield from zip(range(len(work) - 1, -1, -1), _records(work, _count(jobs)), strict=True)


def _records(work: Sequence[Task], jobs: int) -> Iterator[Record]:
    """Each task's, as they finish. A compiler that crashes takes its process with it, and so the whole pool."""
    waiting = dict.fromkeys(work)
    while waiting:
        # Until one crashes; which of those that were begun it was, nobody says.
        with _workers(jobs) as pool, suppress(BrokenProcessPool):
            pending = {pool.submit(run_task, task): task for task in waiting}
            for future in as_completed(pending):
                record = future.result()
                del waiting[pending[future]]
                yield record
        # In order: one in each worker, and in the pool's queue as many and one more.
        begun = 2 * jobs + 1
        for task in list(waiting)[:begun]:
            del waiting[task]
            yield _alone(task)


def _alone(task: Task) -> Record:
    try:
        with _workers(1) as pool:
            return pool.submit(run_task, task).result()
    except BrokenProcessPool:
        with _workers(1) as pool:
            blank = pool.submit(_blank, task).result()
        return Record(**{**vars(blank), "error": "the compiler ended its process"})


def tasks(
    registry: str, archs: Sequence[str], kernels: Sequence[str] | None, dtypes: Sequence[str]
) -> list[Task]:
    """Every compilation asked for, in the order of `archs`; all forms of a configuration before the next one's.

    A tuner that runs out of time then has all forms of some, not some forms of all.
    """
    known = _load(registry)
    check_choices("kernel", kernels or (), known)
    return [
        Task(registry, kernel.name, form, index, arch, dtype)
        for arch in archs
        for kernel in known.values()
        if kernels is None or kernel.name in kernels
        for dtype in dtypes
        if not (dtype == "tf32" and ARCHITECTURES[arch].is_amd)  # AMD multiplies float32 in IEEE
        for index in range(len(kernel.shipped(ARCHITECTURES[arch], PRECISIONS[dtype])))
        for form in kernel.forms
    ]


def run_task(task: Task) -> Record:
    """Compile one configuration, or take it from the cache. Runs where Triton compiles."""
    from .compile import compile_launch, representative_launch

    kernel, arch, blank = _kernel(task), ARCHITECTURES[task.arch], _blank(task)
    try:
        launch = representative_launch(kernel, _config(task), task.dtype, task.variant, arch)
        path = cache_folder() / "audit" / f"{_key(kernel, launch, blank)}.json"
        cached = _read(path)
        if cached is not None:
            return cached
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton's notices about its own future
            record = _record(blank, compile_launch(kernel.fn, launch, arch), arch)
    except Exception as error:  # whatever a compiler throws is a finding about this configuration
        first = str(error).strip().splitlines() or [""]
        return Record(**{**vars(blank), "error": f"{type(error).__name__}: {first[-1].strip()}"})
    _write(path, record)
    return record


def _kernel(task: Task) -> Kernel:
    return _load(task.registry)[task.kernel]


def _config(task: Task) -> Config:
    return _kernel(task).shipped(ARCHITECTURES[task.arch], PRECISIONS[task.dtype])[task.config]


def _blank(task: Task) -> Record:
    """What is known before anything is compiled."""
    kernel = _kernel(task)
    return Record(
        kernel=kernel.name,
        variant=task.variant,
        role=kernel.role,
        config=asdict(_config(task)),
        arch=task.arch,
        dtype=task.dtype,
        narrow=dict(kernel.narrow),
    )


def _load(registry: str) -> Mapping[str, Kernel]:
    module, _, attribute = registry.partition(":")
    known: Mapping[str, Kernel] = getattr(importlib.import_module(module), attribute)
    return known


def _record(blank: Record, binary: Binary, arch: Architecture) -> Record:
    listing = binary.listing
    main_loop = set(listing.main_loop())
    tensor_cores: Counter[str] = Counter()
    traffic: Counter[tuple[str, str, int, bool, bool]] = Counter()
    for index, instruction in enumerate(listing.instructions):
        inside = index in main_loop
        if (core := listing.tensor_core(instruction)) and inside:
            tensor_cores[core] += 1
        if access := listing.access(instruction):
            pointers = pointers_at(*access.location, access.kind) if access.location else frozenset()
            if not pointers and binary.pointers:
                pointers = binary.pointers[index]
            name = "|".join(sorted(pointers)) or "?"
            traffic[name, access.kind, access.bits, access.asynchronous, inside] += 1
    filled = {
        "registers": binary.registers,
        "spilled": binary.spilled,
        "stack": binary.stack,
        "shared": binary.shared,
        "warps": binary.warps,
        "blocks_per_multiprocessor": occupancy(
            arch, registers=binary.registers, shared=binary.shared, warps=binary.warps
        ),
        "binary_bytes": binary.size,
        "instructions": len(listing.instructions),
        "loop_instructions": len(main_loop),
        "tensor_cores": dict(tensor_cores),
        "traffic": tuple(Traffic(*key, count) for key, count in sorted(traffic.items())),
    }
    return Record(**{**vars(blank), **filled})


def _key(kernel: Kernel, launch: Launch, blank: Record) -> str:
    """Hash of everything that decides a record: source, launch, architecture, dtype, Triton, this schema."""
    import triton

    parts = [
        _CACHE_SCHEMA,
        triton.__version__,
        kernel.fn.cache_key,
        sorted(launch.arguments.items()),
        sorted(launch.constexprs.items()),
        sorted(launch.options.items()),
        blank.to_json(),
    ]
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Record | None:
    try:
        return Record.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None  # absent, truncated or foreign: compile again and overwrite


def _write(path: Path, record: Record) -> None:
    """A full disk costs only the cache."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(record.to_json()).encode())


def _count(jobs: int | None) -> int:
    return min(jobs or os.cpu_count() or 1, MOST_WORKERS)


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile: spawned, so that nothing imported here leaks into them."""
    with tempfile.TemporaryDirectory(prefix="smoa-audit-") as folder:
        pool = ProcessPoolExecutor(
            jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(folder,),
        )
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(triton_cache: str) -> None:
    """Before Triton is imported: compile, do not interpret, and keep its own cache out of the user's."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = triton_cache
    import torch

    torch.set_num_threads(1)
