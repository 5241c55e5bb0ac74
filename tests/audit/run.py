"""Compiles every kernel at every shipped configuration for every architecture, in separate processes.

No GPU is needed. Results are cached under a hash of all inputs.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton

from smoa_kernels.backends.algorithms import FUSED_MAX_RANK_IEEE
from smoa_kernels.checks import check_choices
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.files import cache_folder, replace_file
from smoa_kernels.kernels.architectures import ARCHITECTURES, Architecture
from smoa_kernels.kernels.spec import Config, Kernel

from .compile import Binary, Launch, compile_launch, representative_launch
from .forms import AUDITED, LOOKED_UP, representative
from .pointers import pointers_at
from .rules import UNKNOWN, Record, Traffic

__all__ = ["Task", "run_audit", "run_task", "tasks"]

SMOKE = ("sm_80", "sm_90", "sm_100")
KERNELS = "smoa_kernels.kernels:KERNELS"
_CACHE_SCHEMA = 7  # raised when a record gains a field or a parser reads something new


@dataclass(frozen=True)
class Task:
    """One compilation; `registry` is the "module:attribute" of a mapping from names to `spec.Kernel`."""

    kernel: str
    form: str
    config: int
    arch: str
    dtype: str
    registry: str = KERNELS

    def find(self) -> tuple[Kernel, Config, Record]:
        """The kernel, its configuration, and a record with the facts known before compiling."""
        kernel = _load(self.registry)[self.kernel]
        config = kernel.shipped(ARCHITECTURES[self.arch], PRECISIONS[self.dtype])[self.config]
        audited = AUDITED[self.kernel]
        known = self.kernel, self.form, audited.role, config.to_json(), self.arch, self.dtype
        return kernel, config, Record(*known, narrow={**LOOKED_UP, **audited.narrow})


def _load(registry: str) -> Mapping[str, Kernel]:
    module, _, attribute = registry.partition(":")
    known: Mapping[str, Kernel] = getattr(importlib.import_module(module), attribute)
    return known


def tasks(
    archs: Sequence[str] = (),
    kernels: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    *,
    extent: str = "shipped",
    registry: str = KERNELS,
) -> list[Task]:
    """All requested compilations, in the order of `archs`; an empty argument means all.

    Args:
        archs: names of `ARCHITECTURES`.
        kernels: names in the registry.
        dtypes: of `KERNEL_PRECISIONS`.
        extent: "shipped": the largest tile in every form, the others in the first; "every": all in every form; "smoke":
            the largest in its first form, on three architectures.
        registry: where kernels are.
    """
    known = _load(registry)
    check_choices("--arch", archs, ARCHITECTURES)
    check_choices("--dtype", dtypes, KERNEL_PRECISIONS)
    check_choices("--kernel", kernels, known)
    smoke = extent == "smoke"
    return [
        Task(kernel.name, form, index, arch, dtype, registry)
        for arch in archs or (SMOKE if smoke else ARCHITECTURES)
        for kernel in known.values()
        if not kernels or kernel.name in kernels
        for dtype in dtypes or (("bf16",) if smoke else KERNEL_PRECISIONS)
        if dtype != "tf32" or _knows_tf32(kernel, ARCHITECTURES[arch])
        for place, index in enumerate(_distinct(kernel.shipped(ARCHITECTURES[arch], PRECISIONS[dtype])))
        for form in _forms(kernel, extent, largest=place == 0)
        if not _loads_nothing_ahead(kernel, form, dtype, ARCHITECTURES[arch])
    ]


def _loads_nothing_ahead(kernel: Kernel, form: str, dtype: str, arch: Architecture) -> bool:
    """Whether a form is slow by design: IEEE float32 at a rank at which "auto" takes another algorithm."""
    many = representative(kernel.name, dtype, form).rank > FUSED_MAX_RANK_IEEE
    return kernel.name == "fused_linear" and dtype == "fp32" and not arch.is_amd and many


def _knows_tf32(kernel: Kernel, arch: Architecture) -> bool:
    """Whether TF32 differs from IEEE in the compiled code: not on AMD, nor in kernels that only copy."""
    return not arch.is_amd and (
        AUDITED[kernel.name].role != "copy" or "INPUT_PRECISION" in kernel.fn.arg_names
    )


def _forms(kernel: Kernel, extent: str, *, largest: bool) -> tuple[str, ...]:
    forms = AUDITED[kernel.name].forms
    if extent == "every" or (extent == "shipped" and largest):
        return forms
    return forms[:1] if extent == "shipped" or largest else ()


def _distinct(configs: Sequence[Config]) -> list[int]:
    """Indices of configurations that compile to different code; `split`, the programs per sum, changes nothing."""
    compiled = [replace(config, split=0) for config in configs]
    return [number for number, config in enumerate(compiled) if config not in compiled[:number]]


def run_audit(work: Sequence[Task], jobs: int) -> Iterator[Record]:
    """Each task's record as it finishes. A compiler crash ends its process and breaks the whole pool."""
    waiting = dict.fromkeys(work)
    while waiting:
        # Runs until a compiler crashes; the pool does not say which task it was.
        with _workers(jobs) as pool, suppress(BrokenProcessPool):
            pending = {pool.submit(run_task, task): task for task in waiting}
            for future in as_completed(pending):
                record = future.result()
                del waiting[pending[future]]
                yield record
        # Tasks start in order, so it is a running one (one per worker) or a queued one (one more than that).
        for task in list(waiting)[: 2 * jobs + 1]:
            del waiting[task]
            try:
                with _workers(1) as pool:
                    yield pool.submit(run_task, task).result()
            except BrokenProcessPool:
                yield replace(task.find()[2], error="the compiler ended its process")


def run_task(task: Task) -> Record:
    """Compile one configuration, or take it from the cache."""
    kernel, config, blank = task.find()
    arch = ARCHITECTURES[task.arch]
    try:
        launch = representative_launch(kernel, config, task.dtype, task.form, arch)
        path = cache_folder() / "audit" / f"{_key(kernel, launch, blank)}.json"
        if (cached := _read(path)) is not None:
            return cached
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton's deprecation warnings
            record = _record(blank, compile_launch(kernel.fn, launch, arch))
    except Exception as error:  # any error of a compiler is a finding about this configuration
        last = (str(error).strip().splitlines() or [""])[-1].strip()
        return replace(blank, error=f"{type(error).__name__}: {last}")
    with suppress(OSError):  # a full disk only loses the cache
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(record.to_json()).encode())
    return record


def _record(blank: Record, binary: Binary) -> Record:
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
            name = "|".join(sorted(pointers)) or UNKNOWN
            traffic[name, access.kind, access.bits, access.asynchronous, inside] += 1
    return replace(
        blank,
        registers=binary.registers,
        spilled=binary.spilled,
        stack=binary.stack,
        shared=binary.shared,
        warps=binary.warps,
        tensor_cores=dict(tensor_cores),
        early_writes=len(listing.early_writes()),
        traffic=tuple(Traffic(*key, count) for key, count in sorted(traffic.items())),
    )


def _key(kernel: Kernel, launch: Launch, blank: Record) -> str:
    """Hash of all that decides a record: source, launch, architecture, dtype, Triton, and this schema."""
    decides = [_CACHE_SCHEMA, triton.__version__, kernel.fn.cache_key, blank.to_json(), asdict(launch)]
    return hashlib.sha256(json.dumps(decides, default=str, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Record | None:
    try:
        return Record.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None  # missing, truncated or invalid: compile again and overwrite


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes that compile, each with its own Triton cache."""
    with tempfile.TemporaryDirectory(prefix="smoa-audit-") as folder:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_start_worker, initargs=(folder,))
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(triton_cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = triton_cache
    import torch

    torch.set_num_threads(1)
