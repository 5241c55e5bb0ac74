"""Kernels compiled in the first training step of Llama-3-8B's layers from an empty cache: number and time.

Launches come from the backend on a pretended H100 (tests/launches.py). Triton then compiles each form for sm_90,
without a GPU, in as many processes as you ask for.

    python tests/first_step.py            # counts forms, as JSON
    python tests/first_step.py 2          # compiles them in two processes
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import triton
from launches import adapter, passes
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.fake_gpu import install
from smoa_kernels.kernels import KERNELS, table

SHAPES = (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)
ORDERS = {"spectral": 1, "granules of 8": 8}
TOKENS, OTHERS = 4096, (4000, 3072, 2500)  # a batch, and others that are a little shorter

Compiled = list[tuple[Any, tuple[Any, ...]]]


def step(granule: int, tokens: int) -> None:
    """Forward and backward of one layer of each shape, bf16 under the float32 factors that PEFT keeps."""
    for shape in SHAPES:
        layer = adapter(*shape, "cuda:0", torch.float32, granule)
        for name, call in passes(layer, tokens):
            if name in ("auto", "backward"):
                call()


def forms(granule: int) -> tuple[Compiled, int]:
    """The forms that one step compiles, in order, and how many more batches of other lengths compile."""
    found: Compiled = []
    compile_nothing = JITFunction._do_compile

    def noted(
        self: Any, key: str, signature: Any, device: int, constexprs: Any, options: Any, *rest: Any
    ) -> Any:
        found.append((self, (signature, constexprs, rest[0], options)))
        return compile_nothing(self, key, signature, device, constexprs, options, *rest)

    JITFunction._do_compile = noted
    try:
        table.forget()
        for kernel in KERNELS.values():
            kernel.fn.device_caches.clear()
        step(granule, TOKENS)
        first = len(found)
        for tokens in OTHERS:
            step(granule, tokens)
    finally:
        JITFunction._do_compile = compile_nothing
    return found[:first], len(found) - first


def compile_one(job: tuple[Any, tuple[Any, ...]]) -> tuple[str, float]:
    """Compiles a form; returns its kernel and the seconds of CPU time, the assembler's included."""
    kernel, (signature, constexprs, attributes, options) = job
    start = sum(os.times()[:4])
    source = ASTSource(kernel, signature, constexprs, attributes)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(vars(options)))
    return kernel.__name__, sum(os.times()[:4]) - start


def compile_all(found: Compiled, processes: int) -> Iterator[tuple[str, float]]:
    """Compiles forms in forked processes. Processes get numbers, because forms cannot be pickled."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(_compile_number, range(len(found)))


def _compile_number(number: int) -> tuple[str, float]:
    return compile_one(_waiting[number])


_waiting: Compiled = []


def main() -> None:
    """Prints the counts, and the seconds if processes are asked for."""
    processes, told = int((*sys.argv[1:], 0)[0]), {}
    install()
    for order, granule in ORDERS.items():
        with FakeTensorMode():
            found, more = forms(granule)
        names = sorted(kernel.__name__ for kernel, _ in found)
        told[order] = {"forms": len(found), "more for other lengths": more, "kernels": names}
        if processes:
            _waiting[:] = found
            with tempfile.TemporaryDirectory() as folder:
                os.environ["TRITON_CACHE_DIR"] = folder
                start = time.perf_counter()
                each = list(compile_all(found, processes))
                told[order] |= {"seconds": time.perf_counter() - start, "each": each}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
