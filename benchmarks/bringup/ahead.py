"""Compiles a stage's kernels in parallel, before the stage runs. Without a GPU it reports how long that takes.

    python -m benchmarks.bringup.ahead              # every stage for an H100, in two processes; `make gpu-dry-run`
    python -m benchmarks.bringup.ahead headline     # a stage on a GPU starts with this; Triton's cache keeps the result

A stage's launches come from the backend on a pretended GPU (benchmarks/fake_gpu.py), those of the tests from the tests.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import triton
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton.compiler import ASTSource
from triton.runtime import driver

from smoa_kernels.backends import triton as backend
from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.kernels import table
from smoa_kernels.kernels.architectures import architecture_of
from smoa_kernels.kernels.registry import KERNELS
from smoa_kernels.kernels.spec import ALGORITHM_KEYS, GRANULE
from smoa_kernels.tuning.tuner import META, Trial, jobs

from ..cases import GATE_TOKENS, ORDERS, headline_cases, operator_cases, tuned_layers
from ..fake_gpu import H100, FakeGpu, Form, adapter, install
from ..providers import Case
from ..results import ROOT
from .__main__ import SECONDS
from .stages import NUMERICAL_TESTS

CORES = 16  # about as many as a machine with a GPU has


def clear_caches(gpu: FakeGpu) -> None:
    """Drop the cached plans and compiled forms, so that the next launches compile again."""
    table.clear_cache()
    for kernel in KERNELS.values():
        kernel.fn.device_caches.clear()
    gpu.compiled.clear()


def stage_forms(stage: str, gpu: FakeGpu, processes: int) -> list[Form]:
    """The forms that a stage compiles on the pretended GPU."""
    clear_caches(gpu)
    if stage == "tests":
        tested(gpu.properties, ["-n", str(processes), *NUMERICAL_TESTS])
    elif stage == "tune":
        _tuned(gpu.properties)
    else:
        with FakeTensorMode():
            for call in _operator() if stage == "operator" else _headline():
                call()
    return list(gpu.compiled)


def _operator() -> Iterator[Callable[[], object]]:
    for case, order in operator_cases(smoke=False):
        yield from _pass(_layer(case, order), case.tokens, "auto")


def _headline() -> Iterator[Callable[[], object]]:
    for case in headline_cases(smoke=False):
        for order in ORDERS:
            layer = _layer(case, order)
            for tokens in {case.tokens, min(case.tokens, GATE_TOKENS)}:
                for algorithm in ("auto", "merged", "split"):
                    yield from _pass(layer, tokens, algorithm)


def _tuned(properties: SimpleNamespace) -> None:
    """Run every candidate of every kernel, on operands without data."""
    for job in jobs(tuned_layers(smoke=False), architecture_of(properties), properties.multi_processor_count):
        if job.key.kernel not in ALGORITHM_KEYS:  # algorithms compile nothing more
            trial = Trial(job, META)
            for config in job.candidates:
                trial.compiled(config)


def tested(properties: SimpleNamespace, chosen: Sequence[str]) -> None:
    """Give Triton every form that tests launch, as forms.py notes them in pytest's processes.

    Args:
        properties: of the pretended GPU.
        chosen: the tests, as pytest's arguments.
    """
    plugin = ("-p", "benchmarks.bringup.forms", "--assert=plain", "--tb=no")  # its findings mean nothing
    with tempfile.TemporaryDirectory() as folder:
        variables = {"BRINGUP_FORMS": json.dumps({"folder": folder, "gpu": vars(properties)})}
        subprocess.run(
            [sys.executable, "-m", "pytest", *plugin, *chosen],
            cwd=ROOT,
            env=os.environ | variables | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        noted = {line for file in Path(folder).iterdir() for line in file.read_text("utf-8").splitlines()}
    kernels = {kernel.fn.__name__: kernel.fn for kernel in KERNELS.values()}
    for line in sorted(noted):
        name, _, form = line.partition(" ")
        if name in kernels:  # not a test's own
            kernels[name].preload(form)


def _layer(case: Case, order: str) -> PackedAdapter:
    granule = GRANULE if order == "contiguous" else 1
    features = case.out_features, case.in_features
    return adapter(*features, "cuda:0", case.dtype, granule, case.dtype, case.num_blocks)


def _pass(layer: PackedAdapter, tokens: int, algorithm: str) -> Iterator[Callable[[], object]]:
    def activations(features: int) -> Tensor:
        return layer.weight.new_empty(tokens, features)

    N, C = layer.weight.shape
    yield lambda: backend.forward(activations(C), None, layer, algorithm, None)
    yield lambda: backend.backward(activations(N), activations(C), layer, None, needs_x=True)


def compile_all(forms: Sequence[Form], processes: int) -> Iterator[tuple[str, float]]:
    """Compile forms in forked processes; yield each kernel's name and seconds of CPU time, the assembler's included.

    Processes get numbers, because forms cannot be pickled.
    """
    _waiting[:] = forms
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(_compile, range(len(forms)))


def _compile(number: int) -> tuple[str, float]:
    kernel, (signature, constexprs, attributes, options) = _waiting[number]
    start = sum(os.times()[:4])
    source = ASTSource(kernel, signature, constexprs, attributes)
    try:
        triton.compile(source, target=driver.active.get_current_target(), options=dict(vars(options)))
    except Exception as error:  # the stage meets it again, and reports it
        print(f"{kernel.__name__}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
    return kernel.__name__, sum(os.times()[:4]) - start


_waiting: list[Form] = []


def main() -> None:
    """Compile one stage into Triton's cache, or all stages, each into a temporary cache."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.bringup.ahead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("stage", nargs="?", choices=tuple(SECONDS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpu", type=json.loads, default={}, help="properties in JSON, where not an H100's")
    given = parser.parse_args()
    gpu = install(properties=SimpleNamespace(**vars(H100) | given.gpu))
    if given.stage is not None:
        for _ in compile_all(stage_forms(given.stage, gpu, given.jobs), given.jobs):
            pass
        return
    for stage, limit in SECONDS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            start, before = time.perf_counter(), sum(os.times()[:4])
            forms = stage_forms(stage, gpu, given.jobs)
            finding = sum(os.times()[:4]) - before
            compiling = sum(each for _, each in compile_all(forms, given.jobs))
        print(
            f"{stage}: {len(forms)} forms, found in {finding:.0f} s of CPU and compiled in {compiling:.0f} s, "
            f"{(finding + compiling) / CORES:.0f} s on {CORES} cores of the stage's {limit:.0f} "
            f"({time.perf_counter() - start:.0f} s here)",
            flush=True,
        )


if __name__ == "__main__":
    main()
