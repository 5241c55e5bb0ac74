"""Prints as JSON the launches of the triton backend on pretended GPUs, and the forms they would compile.

It runs in its own process because the tests' process interprets kernels. Triton's driver is a fake
(benchmarks/fake_gpu.py), and so is every operand: torch's fake tensors have a device, shapes and strides, but no data.
The code under test is the package's own and Triton's.

    python tests/launches.py devices           # or another of the functions named at the end
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from triton.runtime.jit import JITFunction

from benchmarks.bringup.ahead import clear_caches
from benchmarks.fake_gpu import BLOCKS, RANK, FakeGpu, FakeKernel, adapter, install
from smoa_kernels.backends import triton as backend
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.experts import ExpertBlocks, ExpertsAdapter
from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.kernels import table
from smoa_kernels.kernels.launch import launch_hook
from smoa_kernels.tuning import tuner

BF16, COMPILE = torch.bfloat16, JITFunction._do_compile
TOKENS = (1, 2, 16, 100, 256, 1000, 2048, 8192)
MI300X = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304, name="MI300X")
# (N, C) of the linear layers of Llama-3.2-1B and of SmolLM2-135M.
MODELS = {
    "Llama-3.2-1B": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "SmolLM2-135M": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
}


def passes(layer: PackedAdapter, tokens: int, offset: int = 0) -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls of a training step and a merge, by name; x and dY begin `offset` numbers into their memory."""
    (out_features, in_features), device = layer.weight.shape, layer.weight.device
    x, dy = (
        torch.empty(tokens, features + offset, dtype=BF16, device=device).narrow(1, offset, features)
        for features in (in_features, out_features)
    )
    bias = torch.empty(out_features, dtype=BF16, device=device)
    dropout = Dropout(torch.empty((), dtype=torch.int64, device=device), 0.1)
    for algorithm in backend.ALGORITHMS:
        yield algorithm, lambda algorithm=algorithm: backend.forward(x, bias, layer, algorithm, None)
    yield "auto", lambda: backend.forward(x, bias, layer, "auto", None)
    yield "backward", lambda: backend.backward(dy, x, layer, None, needs_x=True)
    yield "dropout", lambda: backend.forward(x, bias, layer, "auto", dropout)
    yield "dropout's backward", lambda: backend.backward(dy, x, layer, dropout, needs_x=True)
    yield "merge", lambda: backend.modulated_weight(layer)


def experts_passes(device: str, pairs: int = 300) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of a layer of experts, by name."""

    def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    experts, (out_features, in_features) = 4, (256, 512)
    offsets = [empty(1, BLOCKS + 1, dtype=torch.int32) for _ in range(2)]
    layer = ExpertsAdapter(
        empty(experts, out_features, in_features),
        empty(experts, RANK, in_features),
        empty(experts, RANK, out_features).transpose(1, 2),
        ExpertBlocks(*offsets, granule=8),
        empty(BLOCKS, dtype=torch.int32),
        empty((), dtype=torch.float32),
    )
    ends, x, dy = empty(experts, dtype=torch.int32), empty(pairs, in_features), empty(pairs, out_features)
    yield "experts", lambda: backend.experts_forward(x, ends, layer)
    # dX alone: without CUDA, torch cannot fake the copies of dA and of a B with other strides.
    yield "experts' backward", lambda: backend.experts_backward(dy, None, ends, layer, needs_x=True)


def devices(gpu: FakeGpu) -> list[dict[str, Any]]:
    """Every pass and a tuning, of a layer and of experts, on cuda:1 while cuda:0 is the current device."""
    found = []
    layer = adapter(256, 512, "cuda:1", BF16)
    for name, call in (*passes(layer, 300), *experts_passes("cuda:1"), ("tuning", tune)):
        gpu.launches.clear()
        call()
        found += [
            {"pass": name, "kernel": launch.kernel, "device": launch.device, "stream": launch.stream}
            for launch in gpu.launches
        ]
        assert gpu.current == 0, f"{name} left another device current"
    return found


def tune() -> None:
    """Tunes one key; operands hold no data and results are not compared."""
    device, layer = torch.device("cuda", 1), tuner.Layer(256, 512, 300, contiguous=True)
    weight = adapter(256, 512, "cuda:1", BF16)
    with unset_fake_temporarily():  # blocks are made from labels, which are read
        job, *_ = tuner.jobs([layer], "sm_90", 132)
    tuner.training_step = lambda *_: lambda _: [backend.modulated_weight(weight)]  # type: ignore[assignment]
    tuner.distance = lambda *_: 0.0
    tuner.keep = lambda *_: {}  # type: ignore[assignment]
    few = [replace(job, candidates=job.candidates[:2])]
    ((_, found),) = tuner.tune(few, device, lambda _, launch: (launch(), 1.0)[1])
    assert not isinstance(found, str), found


def ahead(gpu: FakeGpu) -> list[object]:
    """How many kernels the tuner compiles ahead for sm_90, of how many keys, and how many are in Triton's cache."""
    JITFunction._do_compile = COMPILE
    with unset_fake_temporarily(), tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        planned = [
            replace(job, candidates=job.candidates[:2])
            for job in tuner.jobs([tuner.Layer(256, 512, 300)], "sm_90", 132)
            if job.key.kernel == "modulated_weight"
        ]
        return [tuner.compile_ahead(planned), len(planned), len(list(Path(folder).rglob("*.cubin")))]


def forms(gpu: FakeGpu) -> dict[str, dict[str, list[int]]]:
    """For each kernel of a model at all token counts: the number of compiled forms, and of chosen settings."""
    found = {}
    for model, shapes in MODELS.items():
        gpu.launches.clear()
        for shape, granule in itertools.product(shapes, (1, 8)):
            layer = adapter(*shape, "cuda:0", torch.float32, granule)
            for tokens in TOKENS:
                for name, call in passes(layer, tokens):
                    if name in ("auto", "backward", "merge"):
                        call()
        by_form = Counter(kernel for kernel, _ in {(one.kernel, one.form) for one in gpu.launches})
        chosen = Counter(kernel for kernel, _ in {(one.kernel, one.constants) for one in gpu.launches})
        found[model] = {kernel: [count, chosen[kernel]] for kernel, count in by_form.items()}
    return found


def cached_plans(gpu: FakeGpu) -> dict[str, list[str]]:
    """Launches with a new plan each time, and with cached plans: form, numbers and device."""
    layers = [
        adapter(out_features, in_features, "cuda:0", factors)
        for out_features, in_features in ((256, 512), (250, 512), (256, 1), (1, 64))
        for factors in (BF16, torch.float32)
    ]
    first = layers[0]
    A, B = first.A.new_empty, first.B.new_empty
    layers += [  # each differs from the first in one respect
        replace(first, weight=torch.empty(512, 256, dtype=BF16, device="cuda:0").T),
        replace(first, A=A(4, 640).narrow(1, 0, 512), B=B(256, 8).narrow(1, 4, 4)),
        replace(first, A=A(5, 512), B=B(256, 5)),
        adapter(256, 512, "cuda:1", BF16),
        adapter(256, 512, "cuda:0", BF16, granule=8),
    ]
    sizes = itertools.product(layers, (1, 16, 17, 300), (0, 1))
    calls = [call for each in sizes for _, call in passes(*each)]

    def sweep(anew: bool) -> list[str]:
        gpu.launches.clear()
        for call in calls:
            if anew:
                table.clear_cache()
            call()
        return [f"{launch.form} {launch.numbers} {launch.device}" for launch in gpu.launches]

    new = sweep(anew=True)
    sweep(anew=False)
    return {"new": new, "cached": sweep(anew=False)}


def beyond_2_gib(gpu: FakeGpu) -> list[list[str]]:
    """Forms on AMD's GPU of calls whose x, or W0, lies in less than 2 GiB of memory, in 2 GiB, and in less again."""
    torch.version.hip, gpu.properties = "6.4", MI300X  # type: ignore[assignment]
    few, many = (torch.empty(rows, 512, dtype=BF16, device="cuda:0") for rows in (300, 2**21))
    layer, found = adapter(256, 512, "cuda:0", BF16), []
    for x, weight in ((few, few), (many, few), (few, many), (few, few)):
        layer.weight.data = weight.narrow(0, 0, 256)
        gpu.launches.clear()
        for algorithm in backend.ALGORITHMS:
            backend.forward(x.narrow(0, 0, 300), None, layer, algorithm, None)
        found.append([launch.form for launch in gpu.launches])
    return found


def hooks(gpu: FakeGpu) -> list[list[bool]]:
    """Whether cached plans' direct launches pass Triton's metadata and a profiler's enter and exit hooks."""
    calls = [call for _, call in passes(adapter(256, 512, "cuda:0", BF16), 300)]
    found: list[list[bool]] = []
    # Before the first launch, because a form keeps its launcher.
    setattr(FakeKernel, "_record", lambda self, *given: found.append([one is not None for one in given[6:9]]))  # noqa: B010
    for call in calls * 2:
        call()
    return found


def buckets(gpu: FakeGpu) -> dict[str, list[int]]:
    """How often Triton's own launcher is asked, by pass, at 300 tokens, again, at 257 and 511 tokens, and at 513."""
    layer, found = adapter(256, 512, "cuda:0", BF16), {}
    for tokens in (300, 300, 257, 511, 513):
        for name, call in (*passes(layer, tokens), *experts_passes("cuda:0", tokens)):
            asked[0] = 0
            call()
            found.setdefault(name, []).append(asked[0])
    return found


def new_forms(gpu: FakeGpu) -> list[list[str]]:
    """Kernels that a hook sees as new in two rounds, and kernels that are launched meanwhile.

    x and dY are aligned, then begin at an odd address, and then are aligned again with another bias.
    """
    layer, found = adapter(256, 512, "cuda:0", BF16), []
    for offset in (0, 1, 0):
        calls = [call for _, call in passes(layer, 300, offset)]
        for _ in range(2):
            hooked: list[str] = []
            gpu.launches.clear()

            def hook(launch: Any, *arguments: Any, hooked: list[str] = hooked) -> None:
                compiled, before = launch.compiled(*arguments), len(gpu.launches)
                hooked.append(f"{compiled.name} {compiled.form}")
                assert len(gpu.launches) == before

            with launch_hook(hook, new=True):
                for call in calls:
                    call()
            found.append([hooked, [f"{launch.kernel} {launch.form}" for launch in gpu.launches]])
    return found


FIRST_STEP, OTHERS = 4096, (4000, 3072, 2500)  # tokens of a batch, and of others that are a little shorter


def first_step(gpu: FakeGpu) -> dict[str, list[int]]:
    """How many forms the first training step of Llama-3-8B's layers compiles, and how many more other lengths compile.

    bf16 under the float32 factors that PEFT keeps.
    """

    def step(granule: int, tokens: int) -> int:
        for shape in (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336):
            for name, call in passes(adapter(*shape, "cuda:0", torch.float32, granule), tokens):
                if name in ("auto", "backward"):
                    call()
        return len(gpu.compiled)

    report: dict[str, list[int]] = {}
    for order, granule in (("spectral", 1), ("granules of 8", 8)):
        clear_caches(gpu)
        first = step(granule, FIRST_STEP)
        report[order] = [first, [step(granule, tokens) for tokens in OTHERS][-1] - first]
    return report


if __name__ == "__main__":
    pretended, asked, run = install(devices=2), [0], JITFunction.run

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        asked[0] += 1
        return run(self, *arguments, **options)

    JITFunction.run = counted
    with FakeTensorMode():
        functions = (ahead, devices, forms, cached_plans, beyond_2_gib, hooks, buckets, new_forms, first_step)
        what = {function.__name__: function for function in functions}[sys.argv[1]]
        print(json.dumps(what(pretended)))
