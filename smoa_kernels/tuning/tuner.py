"""The tuner: measures the fastest launch parameters and algorithms for layers that will be trained, on this GPU.

For each key that a training step looks up, a kernel's candidates are compiled. Those that spill registers or need too
much shared memory drop out; the others are ranked by the bytes that they move and by how evenly their programs fill the
multiprocessors. The best :data:`TIMED` are compared with torch's operators once and timed in a CUDA graph.

The table on disk is written after each key, so Ctrl-C keeps what was measured. Before a key's candidates are compiled,
and before a candidate runs, that is noted there: if it ends the process, the next run names and skips it. Nothing is
tuned while a model is trained, because ranks of a job would disagree.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton import AsyncCompileMode
from triton.testing import do_bench

from ..backends import eager, experts, triton
from ..backends.algorithms import choose_algorithm
from ..backends.probes import ALLOWED, distance
from ..checks import first_line
from ..definition.dropout import Dropout
from ..definition.experts import ExpertBlocks, ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.precision import PRECISIONS, multiplied_in
from ..kernels.architectures import architecture, limits, multiprocessors
from ..kernels.launch import Grid, Launch, launch_hook, on_device
from ..kernels.registry import KERNELS
from ..kernels.spec import ALGORITHM_KEYS, Config, Key, bucket
from ..kernels.sum_partials import SUM_PARTIALS
from ..kernels.table import Choice, keep, override

TIMED = 8  # candidates of a key
HANGS_SECONDS = 120  # a candidate that takes longer ends the process
COMPILING, ENDED = "compiling the candidates", "the process ended meanwhile"
MOST_FUSED_TOKENS = 1024  # well above those at which the fused kernel can win
META = torch.device("meta")

Timer: TypeAlias = Callable[[Choice, Callable[[], object]], float]
"""Median seconds of a call with a choice."""


@dataclass(frozen=True)
class Layer:
    """A layer to be trained: N, C, T (of experts: pairs), r of all blocks, K, whether blocks are slices, E or 0."""

    out_features: int
    in_features: int
    tokens: int
    dtype: str = "bf16"
    rank: int = 8
    blocks: int = 2
    contiguous: bool = False
    experts: int = 0
    factors: str = "fp32"


def training_step(layer: Layer, variant: bool, device: torch.device) -> Callable[[Any], list[Tensor]]:
    """Compute y, dX, dA and dB by a backend's module, on random operands that are the same at each call.

    Args:
        layer: whose step it is.
        variant: under dropout; of experts, with W0 transposed.
        device: of the operands; on "meta" they have no data.
    """
    N, C, K, E = layer.out_features, layer.in_features, layer.blocks, layer.experts
    rho, stack = -(-layer.rank // K), [E] if E else []
    tokens = bucket(-(-layer.tokens // max(E, 1))) * max(E, 1)
    numbers = None if device == META else torch.Generator(device).manual_seed(0)
    places = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: str = layer.dtype) -> Tensor:
        return torch.randn(shape, generator=numbers, device=device).to(PRECISIONS[dtype].dtype)

    def labels(features: int) -> Tensor:
        even = torch.arange(features) * K // features
        return even if layer.contiguous else even[torch.randperm(features, generator=places)]

    x, dy = random(tokens, C), random(tokens, N)
    operands: dict[str, Any] = {
        "weight": random(*stack, N, C) * C**-0.5,
        "A": random(*stack, rho, C, dtype=layer.factors),
        "B": random(*stack, N, rho, dtype=layer.factors),
        "ranks": torch.full((K,), rho, dtype=torch.int32, device=device),
        "scaling": torch.full((), rho**-0.5, device=device),
    }
    if E:
        ends = torch.randint(E, (tokens,), generator=places).bincount(minlength=E).cumsum(0).int().to(device)
        row_block, col_block = (torch.stack([labels(n) for _ in range(E)]) for n in (N, C))
        blocks = ExpertBlocks.from_labels(row_block, col_block, K)
        moved: Any = {name: t.to(device) for name, t in vars(blocks).items() if isinstance(t, Tensor)}
        of_experts = ExpertsAdapter(**operands, blocks=replace(blocks, **moved))
        if variant:
            of_experts, x, dy = of_experts.T, dy, x
        return lambda backend: [
            backend.experts_forward(x, ends, of_experts),
            *backend.experts_backward(dy, x, ends, of_experts, needs_x=True),
        ]
    partition = BlockPartition.from_labels(labels(N), labels(C), K).to(device)
    adapter = PackedAdapter(**operands, partition=partition, block_ranks=[rho] * K)
    dropout = Dropout(torch.zeros(1, dtype=torch.int64, device=device), 0.1) if variant else None
    return lambda backend: [
        backend.forward(x, None, adapter, "auto", dropout),
        *backend.backward(dy, x, adapter, dropout, needs_x=True),
    ]


@dataclass(frozen=True)
class Job:
    """A key to tune, and the first training step that looks it up."""

    key: Key
    candidates: tuple[Choice, ...]  # what runs without a table, then the others
    layer: Layer
    variant: bool
    others: Mapping[Key, Choice]  # the step's choices for other keys; none where tuned choices are used


def jobs(layers: Sequence[Layer], arch: str, processors: int) -> list[Job]:
    """A job for each key that training steps look up, by any algorithm; kernels before the algorithms that use them."""
    planned: dict[Key, Job] = {}

    def plan(layer: Layer, variant: bool, algorithm: str) -> None:
        choices: dict[Key, Choice] = {}

        def choose(key: Key) -> Choice:
            if key.kernel in ALGORITHM_KEYS:
                rule = choose_algorithm(key.tokens, key.rank, key.dtype, arch)
                job = Job(key, (rule, *triton.ALGORITHMS), layer, variant, {})
                choices[key] = algorithm
            else:
                kernel = KERNELS[key.kernel]
                configs = kernel.default(key, arch, processors), *kernel.candidates(key, arch)
                job = Job(key, configs, layer, variant, choices)
                # With the most parts of a sum, because the kernel that adds them asks for its own key.
                choices[key] = max(configs, key=lambda config: config.split)
            planned.setdefault(key, replace(job, candidates=tuple(dict.fromkeys(job.candidates))))
            return choices[key]

        with multiplied_in(layer.dtype), override(choose), launch_hook(lambda *_: True):
            training_step(layer, variant, META)(triton)

    for layer in layers:
        for variant in (False, True):
            for algorithm in triton.ALGORITHMS[: 1 if layer.experts or variant else None]:
                if algorithm != "fused" or layer.tokens <= MOST_FUSED_TOKENS:
                    plan(layer, variant, algorithm)
    return sorted(planned.values(), key=lambda job: job.key.kernel in ALGORITHM_KEYS)


class Trial:
    """A job's training step on a device, and without data to compile its kernels."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self._step = training_step(job.layer, job.variant, device)

    def run(self, choice: Choice, hook: Callable[..., object] = lambda *_: None) -> list[Tensor]:
        """The step's results with a choice; `hook` sees its launches."""
        choices = {**self.job.others, self.job.key: choice}
        with multiplied_in(self.job.layer.dtype), override(choices.get), launch_hook(hook):
            return self._step(triton)

    def compiled(self, config: Choice) -> tuple[Any, int]:
        """A configuration's compiled kernel, None in the interpreter, and its number of programs; runs nothing."""
        kernels: list[tuple[Any, int]] = []

        def compile_it(launch: Launch, grid: Grid, *arguments: Any) -> bool:
            if launch.config is config and not kernels:
                kernels.append((launch.compiled(grid, *arguments), math.prod(grid)))
            return True

        self.run(config, compile_it)
        return kernels[0]

    def score(self, config: Config) -> float:
        """Bytes that a candidate moves, times how unevenly it fills the GPU; infinite if it does not fit."""
        kernel, programs = self.compiled(config)
        traffic = KERNELS[self.job.key.kernel].traffic(config, self.job.key)
        if kernel is None:
            return traffic
        kernel._init_handles()  # loads it, as in Triton's tutorials: its registers are known then
        arch, shared = limits(architecture(self.device)), max(1, kernel.metadata.shared)
        if kernel.n_spills or shared > arch.shared_per_block:
            return math.inf
        threads = config.num_warps * arch.warp_size
        by_registers = 65536 // (threads * max(1, kernel.n_regs))
        resident = max(1, min(arch.shared_per_block // shared, by_registers, 16))
        waves = programs / (resident * multiprocessors(self.device))
        hidden = min(1.0, resident * threads / 256)  # fewer threads do not hide the latency of memory
        return float(traffic * math.ceil(waves) / waves / hidden)

    def shortlist(self) -> list[Choice]:
        """What runs without a table, then the candidates that should be fastest, :data:`TIMED` in all."""
        default, *others = self.job.candidates
        if len(others) < TIMED:
            return [default, *others]
        compile_ahead([self.job])
        scores: dict[Choice, float] = {}
        for config in others:
            with suppress(Exception):  # a candidate that does not compile
                scores[config] = self.score(config)  # type: ignore[arg-type]
        ranked = sorted((config for config in scores if scores[config] < math.inf), key=scores.__getitem__)
        return [default, *ranked[: TIMED - 1]]

    def reference(self) -> list[Tensor]:
        """The step's results by torch's operators."""
        with multiplied_in(self.job.layer.dtype):
            return self._step(experts if self.job.layer.experts else eager)

    def seconds(self, choice: Choice, expected: list[Tensor], timer: Timer) -> float:
        """Check a choice's results, then time its launches and those that add its partial results.

        An algorithm's are all of the step, and so are those of experts, whose partial results torch adds.
        """
        launches: list[Callable[[], object]] = []
        adds_next = False

        def collect(launch: Launch, *arguments: Any) -> None:
            nonlocal adds_next
            adds_next = launch.config is choice or (adds_next and launch.kernel is SUM_PARTIALS.fn)
            if adds_next:
                launches.append(partial(launch, *arguments))

        error = distance(tuple(self.run(choice, collect)), tuple(expected), ALLOWED[self.job.layer.dtype])
        if not error <= 1:
            raise ArithmeticError(f"wrong numbers: {error:.3g} times what rounding explains")
        if isinstance(choice, str) or self.job.layer.experts:
            return timer(choice, partial(self.run, choice))
        return timer(choice, lambda: [launch() for launch in launches])


def compile_ahead(planned: Sequence[Job]) -> int:
    """Compile the candidates of jobs for this GPU, in parallel; returns how many. Errors are left to the search."""
    kernels = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for job in planned:
            trial = Trial(job, META)
            for config in job.candidates:
                if isinstance(config, Config):
                    trial.compiled(config)
                    kernels += 1
    return kernels


def tune(
    planned: Sequence[Job], device: torch.device, timer: Timer | None = None
) -> Iterator[tuple[Job, dict[str, Any] | str]]:
    """Tune jobs in order; yield each with its entry of the table, or why it has none.

    Raises:
        OSError: the table cannot be written.
        RuntimeError: a candidate took the GPU's context with it. The next run skips it.
    """
    entries = keep(device, "choices", {})
    for job in planned:
        entry: Any = entries.get(str(job.key))
        entry = entry if isinstance(entry, dict) else {}
        kinds = {"seconds": float, "default_seconds": float, "refused": dict}
        complete = all(isinstance(entry.get(name), kind) for name, kind in kinds.items())
        if not complete or entry.get("choice") not in map(str, job.candidates):
            try:
                with on_device(device):
                    entry = _tune(job, device, timer or gpu_timer, entry.get("refused"))
            except Exception as error:
                if isinstance(error, OSError) or is_lost():
                    raise
                entry = reason(error)  # for example too little memory for the operands: go on with other jobs
        yield job, entry


def _tune(job: Job, device: torch.device, timer: Timer, refused: Any) -> dict[str, Any]:
    """Find and keep a key's entry. An error of what runs without a table is the key's."""
    refused = dict(refused) if isinstance(refused, dict) else {}

    def note(**fields: Any) -> dict[str, Any]:
        entry = {"choice": None, "refused": refused} | fields
        keep(device, "choices", {str(job.key): entry})
        return entry

    trial, timed = Trial(job, device), dict[Choice, float]()
    expected = trial.reference()
    note(refused=refused | {COMPILING: ENDED})
    try:
        choices = [job.candidates[0]] if COMPILING in refused else trial.shortlist()
    finally:
        note()
    for choice in choices:
        if str(choice) in refused:
            continue
        note(refused=refused | {str(choice): ENDED})
        faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True, file=sys.__stderr__ or 2)
        try:
            timed[choice] = trial.seconds(choice, expected, timer)
        except BaseException as error:
            if is_lost():  # the note stays
                raise
            note()
            if not timed or not isinstance(error, Exception) or "out of memory" in str(error).lower():
                raise
            refused[str(choice)] = reason(error)
        finally:
            faulthandler.cancel_dump_traceback_later()
    best = min(timed, key=timed.__getitem__)
    return note(choice=str(best), seconds=timed[best], default_seconds=next(iter(timed.values())))


def gpu_timer(choice: Choice, launch: Callable[[], object]) -> float:
    """Measure the median seconds of a launch in a CUDA graph, without Python's gaps; Triton flushes the caches."""
    launch()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return float(do_bench(graph.replay, return_mode="median")) / 1e3


def is_lost() -> bool:
    """Whether nothing more can run on the GPU in this process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {first_line(error).strip()[:400]}"
