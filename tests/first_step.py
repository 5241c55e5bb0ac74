"""Kernels compiled in the first training step of Llama-3-8B's layers from an empty cache: number and time.

Launches come from the backend on a pretended H100 (tests/launches.py). Triton then compiles each form for sm_90,
without a GPU, in as many processes as you ask for.

    python tests/first_step.py            # counts forms, as JSON
    python tests/first_step.py 2          # compiles them in two processes
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

import torch
from launches import passes
from torch._subclasses import FakeTensorMode

from benchmarks.bringup.ahead import compile_all, forget
from benchmarks.fake_gpu import FakeGpu, Form, adapter, install

SHAPES = (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)
ORDERS = {"spectral": 1, "granules of 8": 8}
TOKENS, OTHERS = 4096, (4000, 3072, 2500)  # a batch, and others that are a little shorter


def step(granule: int, tokens: int) -> None:
    """Forward and backward of one layer of each shape, bf16 under the float32 factors that PEFT keeps."""
    for shape in SHAPES:
        layer = adapter(*shape, "cuda:0", torch.float32, granule)
        for name, call in passes(layer, tokens):
            if name in ("auto", "backward"):
                call()


def forms(gpu: FakeGpu, granule: int) -> tuple[list[Form], int]:
    """The forms that one step compiles, in order, and how many more batches of other lengths compile."""
    forget(gpu)
    step(granule, TOKENS)
    first = list(gpu.compiled)
    for tokens in OTHERS:
        step(granule, tokens)
    return first, len(gpu.compiled) - len(first)


def main() -> None:
    """Prints the counts, and the seconds if processes are asked for."""
    processes = int((*sys.argv[1:], 0)[0])
    told: dict[str, dict[str, Any]] = {}
    gpu = install()
    for order, granule in ORDERS.items():
        with FakeTensorMode():
            found, more = forms(gpu, granule)
        names = sorted(kernel.__name__ for kernel, _ in found)
        told[order] = {"forms": len(found), "more for other lengths": more, "kernels": names}
        if processes:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["TRITON_CACHE_DIR"] = folder
                start = time.perf_counter()
                each = list(compile_all(found, processes))
                told[order] |= {"seconds": time.perf_counter() - start, "each": each}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
