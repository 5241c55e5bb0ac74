"""Compiles every kernel at every shipped configuration for every architecture, in separate processes.

No GPU is needed.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.pool import ThreadPool
from typing import Any

import torch
import triton

from smoa_kernels.backends import miscompiled
from smoa_kernels.backends.algorithms import FUSED_MAX_RANK_IEEE
from smoa_kernels.checks import check_choices
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.kernels.architectures import ARCHITECTURES, Architecture
from smoa_kernels.kernels.registry import KERNELS
from smoa_kernels.kernels.spec import Config, Kernel

from .compile import Launch, compile_launch, representative_launch
from .forms import AUDITED, narrow_pointers, representative
from .listing import Listing
from .passed import key_of
from .pointers import pointers_at
from .rules import UNKNOWN, Record, Traffic

ALIKE = "fp16", "sm_89"
"""Compiled in the first form only. Of 54 pairs of bf16 and fp16 two differed in what the rules read, by a spill of 8
bytes; of 6 pairs of sm_86 and sm_89 none."""


@dataclass(frozen=True)
class Task:
    """One compilation."""

    kernel: str
    form: str
    config: int
    arch: str
    dtype: str

    def find(self) -> tuple[Kernel, Config, Record]:
        """The kernel, its configuration, and a record with the facts known before compiling."""
        kernel = KERNELS[self.kernel]
        arch = ARCHITECTURES[self.arch]
        config = kernel.shipped(arch, PRECISIONS[self.dtype])[self.config]
        known = self.kernel, self.form, AUDITED[self.kernel].role, config.to_json(), self.arch, self.dtype
        return kernel, config, Record(*known, narrow=narrow_pointers(self.kernel))


def tasks(archs: Sequence[str] = (), kernels: Sequence[str] = ()) -> list[Task]:
    """The largest tile in every form, the others in the first; in the order of `archs`. An empty argument means all.

    Args:
        archs: names of `ARCHITECTURES`.
        kernels: names in `KERNELS`.
    """
    check_choices("--arch", archs, ARCHITECTURES)
    check_choices("--kernel", kernels, KERNELS)
    return [
        Task(kernel.name, form, index, arch, dtype)
        for arch in archs or ARCHITECTURES
        for kernel in KERNELS.values()
        if not kernels or kernel.name in kernels
        for dtype in KERNEL_PRECISIONS
        for place, index in enumerate(_distinct(kernel.shipped(ARCHITECTURES[arch], PRECISIONS[dtype])))
        for form in AUDITED[kernel.name].forms[: 1 if place or dtype in ALIKE or arch in ALIKE else None]
        if _is_worth_it(kernel, form, dtype, ARCHITECTURES[arch])
    ]


def sample(work: Sequence[Task]) -> list[Task]:
    """A form of each kernel for two architectures, in bfloat16."""
    first: dict[tuple[str, str], Task] = {}
    for task in work:
        if task.arch in ("sm_90", "sm_100") and task.dtype == "bf16":
            first.setdefault((task.kernel, task.arch), task)
    return list(first.values())


def _is_worth_it(kernel: Kernel, form: str, dtype: str, arch: Architecture) -> bool:
    """Whether a form is worth compiling: no GPU runs what this Triton compiles wrongly (`backends.miscompiled`).

    TF32 is IEEE on AMD and in kernels that only copy. IEEE float32 is slow by design at a rank at which "auto" takes
    another algorithm.
    """
    if not arch.is_amd and miscompiled(int(arch.name.removeprefix("sm_")) // 10, dtype, triton.__version__):
        return False
    if dtype == "tf32":
        multiplies = AUDITED[kernel.name].role != "copy" or "INPUT_PRECISION" in kernel.fn.arg_names
        return multiplies and not arch.is_amd
    fused = kernel.name == "fused_linear" and dtype == "fp32" and not arch.is_amd
    return not fused or representative(kernel.name, dtype, form).rank <= FUSED_MAX_RANK_IEEE


def _distinct(configs: Sequence[Config]) -> list[int]:
    """Indices of configurations that compile to different code; `split`, the programs per sum, changes nothing."""
    compiled = [replace(config, split=0) for config in configs]
    return [number for number, config in enumerate(compiled) if config not in compiled[:number]]


def run_audit(work: Sequence[Task], jobs: int) -> Iterator[Record]:
    """Each task's record as it finishes, each compiled in a process of its own: a compiler may crash."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ThreadPool(jobs) as pool:
        yield from pool.imap_unordered(partial(_run_apart, context), work)


def _run_apart(context: BaseContext, task: Task) -> Record:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, task))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return replace(task.find()[2], error="the compiler ended its process")
    finally:
        process.join()


def _answer(sender: Connection, task: Task) -> None:
    torch.set_num_threads(1)
    sender.send(run_task(task))


def prepare(task: Task) -> tuple[Kernel, Launch, Record]:
    """The launch to compile, and its record with the fields that are known before, the key among them."""
    kernel, config, blank = task.find()
    launch = representative_launch(kernel, config, task.dtype, task.form, ARCHITECTURES[task.arch])
    return kernel, launch, replace(blank, key=key_of(kernel.fn, launch, blank))


def run_task(task: Task) -> Record:
    """Compile one configuration."""
    try:
        kernel, launch, blank = prepare(task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton's deprecation warnings
            figures, listing = compile_launch(kernel.fn, launch, ARCHITECTURES[task.arch])
        return replace(blank, **figures, **_judged(listing))
    except Exception as error:  # any error of a compiler is a finding about this configuration
        last = (str(error).strip().splitlines() or [""])[-1].strip()
        return replace(task.find()[2], error=f"{type(error).__name__}: {last}")


def _judged(listing: Listing) -> dict[str, Any]:
    """The fields of `Record` that come from the machine code."""
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
    return {
        "tensor_cores": dict(tensor_cores),
        "early_writes": listing.early_writes(),
        "traffic": tuple(Traffic(*key, count) for key, count in sorted(traffic.items())),
    }
