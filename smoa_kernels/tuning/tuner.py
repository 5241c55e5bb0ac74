"""The tuner: measures the fastest launch parameters and algorithms for layers that will be trained, on this GPU.

For each key that a training step looks up, a kernel's candidates are compiled. Those that spill registers or need too
much shared memory drop out; the others are ranked by the bytes that they move and by how evenly their programs fill the
multiprocessors. The best :data:`TIMED` are compared with torch's operators once and timed in a CUDA graph.

The table on disk is written after each key, so Ctrl-C keeps what was measured. A candidate is noted there before it
runs: if it ends the process, the next run names and skips it. Nothing is tuned while a model is trained, because ranks
of a job would disagree.
"""

from __future__ import annotations

import faulthandler
import importlib
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton import knobs

from ..backends import eager, experts, triton
from ..backends.algorithms import choose_algorithm
from ..backends.probes import ALLOWED, distance
from ..checks import first_line
from ..definition.dropout import Dropout
from ..definition.experts import ExpertBlocks, ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.precision import PRECISIONS
from ..kernels.architectures import architecture, identity, limits, multiprocessors
from ..kernels.launch import Arguments, Launch, launch_hook, on_device
from ..kernels.registry import KERNELS
from ..kernels.spec import ALGORITHM_KEYS, Config, Key, bucket
from ..kernels.sum_partials import SUM_PARTIALS
from ..kernels.table import Choice, Entry, keep, override

TIMED, REPEATS = 8, 30  # candidates of a key, and how often each is timed
HANGS_SECONDS = 120  # a candidate that takes longer ends the process
FLUSHED_BYTES = 2**30  # four times the largest last-level cache of a GPU, 256 MiB (MI300X)
ENDED = "the process ended while it ran"
MOST_FUSED_TOKENS = 1024  # far above those at which the fused kernel can win
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
    tokens, rho = bucket(layer.tokens), -(-layer.rank // K)
    dtype, factors = PRECISIONS[layer.dtype].dtype, PRECISIONS[layer.factors].dtype
    draw = torch.Generator("cpu" if device == META else device).manual_seed(0)
    order = torch.Generator().manual_seed(0)

    def random(*shape: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        if device == META:
            return torch.empty(shape, dtype=of, device=device)
        return (torch.randn(shape, generator=draw, device=device) * scale).to(of)

    def labels(features: int) -> Tensor:
        even = torch.arange(features) * K // features
        return even if layer.contiguous else even[torch.randperm(features, generator=order)]

    of_all = [E] if E else []
    operands: dict[str, Any] = {
        "weight": random(*of_all, N, C, scale=C**-0.5),
        "A": random(*of_all, rho, C, of=factors),
        "B": random(*of_all, N, rho, of=factors, scale=rho**-0.5),
        "ranks": torch.full((K,), rho, dtype=torch.int32, device=device),
        "scaling": torch.ones((), device=device),
    }
    if not E:
        x, dy, seed = random(tokens, C), random(tokens, N), torch.zeros(1, dtype=torch.int64, device=device)
        partition = BlockPartition.from_labels(labels(N), labels(C), K).to(device)
        adapter = PackedAdapter(**operands, partition=partition, block_ranks=[rho] * K)
        dropout = Dropout(seed, 0.1) if variant else None

        def run(backend: Any) -> list[Tensor]:
            y = backend.forward(x, None, adapter, "auto", dropout)
            return [y, *backend.backward(dy, x, adapter, dropout, needs_x=True)]

        return run
    pairs = E * bucket(-(-layer.tokens // E))  # a bucket of the average expert; the first experts have more
    ends = torch.tensor([pairs - pairs * (E - 1 - e) ** 2 // E**2 for e in range(E)]).int().to(device)
    x, dy = random(pairs, C), random(pairs, N)
    rows, cols = (torch.stack([labels(n) for _ in range(E)]) for n in (N, C))
    blocks = ExpertBlocks.from_labels(rows, cols, K)
    moved: dict[str, Any] = {
        name: one.to(device) for name, one in vars(blocks).items() if isinstance(one, Tensor)
    }
    of_experts = ExpertsAdapter(**operands, blocks=replace(blocks, **moved))
    if variant:
        of_experts, x, dy = of_experts.T, dy, x

    def run_experts(backend: Any) -> list[Tensor]:
        y = backend.experts_forward(x, ends, of_experts)
        return [y, *backend.experts_backward(dy, x, ends, of_experts, needs_x=True)]

    return run_experts


@contextmanager
def multiplied_in(precision: str) -> Iterator[None]:
    """Let PyTorch multiply float32 as one of `precision.KERNEL_PRECISIONS` says: in TF32 or in IEEE."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True)
class Job:
    """A key to tune.

    Attributes:
        key: the problem.
        candidates: what runs without a table, then the others.
        layer, variant: of the first training step that looks it up.
        answers: choices for other keys, without which the step does not launch the kernel.
    """

    key: Key
    candidates: tuple[Choice, ...]
    layer: Layer
    variant: bool
    answers: Mapping[Key, Choice]

    def __str__(self) -> str:
        fields = {"T≤": "tokens", "ρ=": "rank", "K=": "blocks", "granule=": "granule", "factors=": "factors"}
        words = [f"{sign}{value}" for sign, name in fields.items() if (value := getattr(self.key, name))]
        words += [name for name in ("transposed", "dropout") if getattr(self.key, name)]
        sizes = f"{self.key.out_features}x{self.key.in_features}"
        return " ".join((self.key.kernel, sizes, self.key.dtype, *words))


def jobs(layers: Sequence[Layer], arch: str, processors: int) -> list[Job]:
    """A job for each key that training steps look up, by any algorithm; kernels before the algorithms that use them."""
    found: dict[Key, Job] = {}
    for layer in layers:
        for variant in (False, True):
            for algorithm in ALGORITHM_KEYS["forward"][: 1 if layer.experts or variant else None]:
                if algorithm != "fused" or layer.tokens <= MOST_FUSED_TOKENS:
                    for job in _jobs_of(layer, variant, algorithm, arch, processors):
                        found.setdefault(job.key, job)
    return sorted(found.values(), key=lambda job: job.key.kernel in ALGORITHM_KEYS)


def _jobs_of(layer: Layer, variant: bool, algorithm: str, arch: str, processors: int) -> list[Job]:
    found: list[Job] = []
    answers: dict[Key, Choice] = {}

    def choose(key: Key) -> Choice:
        if key.kernel in ALGORITHM_KEYS:
            default = choose_algorithm(key.tokens, key.rank, key.dtype, arch)
            every = tuple(dict.fromkeys((default, *ALGORITHM_KEYS[key.kernel])))
            found.append(Job(key, every, layer, variant, {}))
            answers[key] = algorithm
            return algorithm
        kernel = KERNELS[key.kernel]
        configs = tuple(dict.fromkeys((kernel.default(key, arch, processors), *kernel.candidates(key, arch))))
        found.append(Job(key, configs, layer, variant, answers))
        splits = max(configs, key=lambda config: config.split)
        if splits.split > 1:  # another kernel adds the parts of a sum, so this asks for more keys
            answers[key] = splits
        return splits

    with multiplied_in(layer.dtype), override(choose), launch_hook(lambda *_: True):
        training_step(layer, variant, META)(triton)
    return found


class Trial:
    """A job's training step on a device."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device, self._step = job, device, training_step(job.layer, job.variant, device)

    def run(self, choice: Choice, hook: Callable[[Launch, Arguments], object] | None = None) -> list[Tensor]:
        """The step's results with a choice; `hook` sees its launches."""
        answers = {**self.job.answers, self.job.key: choice}
        with (
            multiplied_in(self.job.layer.dtype),
            override(answers.get),
            launch_hook(hook or (lambda *_: None)),
        ):
            return self._step(triton)

    def compiled(self, config: Choice) -> tuple[Any, int]:
        """A configuration's compiled kernel, None in the interpreter, and its number of programs; runs nothing."""
        found: list[tuple[Any, int]] = []

        def compile_it(launch: Launch, arguments: Arguments) -> bool:
            if launch.config is config and not found:
                found.append((launch.compiled(arguments), math.prod(arguments.grid)))
            return True

        self.run(config, compile_it)
        return found[0]

    def score(self, config: Config) -> float:
        """Bytes that a candidate moves, times how unevenly it fills the GPU; infinite if it does not fit."""
        compiled, programs = self.compiled(config)
        traffic = float(KERNELS[self.job.key.kernel].traffic(config, self.job.key))
        if compiled is None:
            return traffic
        arch = limits(architecture(self.device))
        compiled._init_handles()  # loads it, as in Triton's tutorials: its registers are known then
        shared, threads = max(1, compiled.metadata.shared), config.num_warps * arch.warp_size
        if compiled.n_spills or shared > arch.shared_per_block:
            return math.inf
        by_registers = 65536 // (threads * max(1, compiled.n_regs))
        resident = max(1, min(arch.shared_per_block // shared, by_registers, 16))
        waves = programs / (resident * multiprocessors(self.device))
        hidden = min(1.0, resident * threads / 256)  # fewer threads do not hide the latency of memory
        return float(traffic * math.ceil(waves) / waves / hidden)

    def shortlist(self) -> list[Choice]:
        """What runs without a table, then the candidates that should be fastest, :data:`TIMED` in all."""
        default, *others = self.job.candidates
        if len(others) < TIMED:
            return [default, *others]
        scores: dict[Choice, float] = {}
        for config in others:
            with suppress(Exception):  # a candidate that does not compile
                scores[config] = self.score(config)  # type: ignore[arg-type]
        ranked = sorted((one for one, score in scores.items() if score < math.inf), key=scores.__getitem__)
        return [default, *ranked[: TIMED - 1]]

    def seconds(self, choice: Choice, expected: list[Tensor], timer: Timer) -> float:
        """Check a choice's results, then time its launches and those that add its partial results.

        An algorithm's are all of the step, and so are those of experts, whose partial results torch adds.
        """
        launches: list[Callable[[], object]] = []
        adds_next = False

        def collect(launch: Launch, arguments: Arguments) -> None:
            nonlocal adds_next
            adds_next = launch.config is choice or (adds_next and launch.kernel is SUM_PARTIALS.fn)
            if adds_next:
                launches.append(partial(launch, *arguments))

        wrong = distance(tuple(self.run(choice, collect)), tuple(expected), ALLOWED[self.job.layer.dtype])
        if wrong is None or not wrong <= 1:
            raise ArithmeticError(f"wrong numbers: {wrong or math.nan:.3g} times what rounding explains")
        if isinstance(choice, str) or self.job.layer.experts:
            return timer(choice, partial(self.run, choice))
        return timer(choice, lambda: [launch() for launch in launches])

    def tune(self, entry: Entry, timer: Timer) -> tuple[Entry, float]:
        """The key's complete entry, and the seconds of what runs without a table, whose errors are the key's."""
        with multiplied_in(self.job.layer.dtype):
            expected = self._step(experts if self.job.layer.experts else eager)
        timed, refused = dict[Choice, float](), {**entry.refused}
        for choice in self.shortlist():
            if str(choice) in refused:
                continue
            keep(entry.identity, replace(entry, refused=refused | {str(choice): ENDED}))
            faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True, file=sys.__stderr__ or 2)
            try:
                timed[choice] = self.seconds(choice, expected, timer)
            except Exception as error:
                if is_lost():  # the note stays
                    raise
                keep(entry.identity, replace(entry, refused=refused))
                if not timed or "out of memory" in str(error).lower():
                    raise
                refused[str(choice)] = reason(error)
            except BaseException:
                keep(entry.identity, replace(entry, refused=refused))
                raise
            finally:
                faulthandler.cancel_dump_traceback_later()
        best = min(timed, key=timed.__getitem__)
        entry = replace(entry, choice=best, seconds=timed[best], refused=refused)
        keep(entry.identity, entry)
        return entry, next(iter(timed.values()))


def tune(
    planned: Sequence[Job], device: torch.device, timer: Timer | None = None
) -> Iterator[tuple[Job, Any]]:
    """Tune jobs in order; yield each with its entry and its default's seconds (None if known before), or its error.

    Raises:
        OSError: the table cannot be written.
        RuntimeError: a candidate took the GPU's context with it. The next run skips it.
    """
    now = identity(device)
    known = keep(now).entries
    for job in planned:
        entry = known.get(job.key) or Entry(job.key, now)
        if entry.choice is not None:
            yield job, (entry, None)
            continue
        try:
            with on_device(device):
                found = Trial(job, device).tune(entry, timer or gpu_timer)
        except Exception as error:  # for example operands that do not fit in memory: go on with other jobs
            if isinstance(error, OSError) or is_lost():
                raise
            yield job, reason(error)
        else:
            yield job, found


def gpu_timer(choice: Choice, launch: Callable[[], object]) -> float:
    """Measure the median seconds of a launch, caches flushed, in a CUDA graph, without Python's gaps (triton#10149)."""
    launch()  # compiles
    graph, flush = torch.cuda.CUDAGraph(), torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    with torch.cuda.graph(graph):
        launch()
    seconds: list[float] = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # takes longer than the host needs to start the graph
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def compile_ahead(planned: Sequence[Job], processes: int) -> int:
    """Compile the candidates of jobs for this GPU into Triton's cache on disk, in parallel; returns how many."""
    forms: set[tuple[str, str, str]] = set()

    def note(*, fn: Any, compile: Mapping[str, Any], **_: object) -> bool:
        forms.add((fn.module, fn.name, compile["specialization_data"]))
        return True  # Triton does not compile now

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        for job in planned:
            trial = Trial(job, META)
            for config in (one for one in job.candidates if isinstance(one, Config)):
                trial.compiled(config)
    finally:
        knobs.runtime.jit_cache_hook = before
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return sum(pool.map(_compile, forms))


def _compile(form: tuple[str, str, str]) -> bool:
    module, name, data = form
    with suppress(Exception):  # its trial meets the error again
        getattr(importlib.import_module(module), name).preload(data)
    return True


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
