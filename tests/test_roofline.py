"""The roofline (smoa_kernels/tuning/roofline.py): totals and memory counted by hand, and the rule of "auto"."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.bringup.predictions import peak_bytes
from smoa_kernels.backends import algorithms
from smoa_kernels.backends.algorithms import admissible, choose_algorithm
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.kernels.architectures import ARCHITECTURES
from smoa_kernels.tuning.gpus import GPUS, Gpu
from smoa_kernels.tuning.roofline import (
    LAUNCH_SECONDS,
    Problem,
    backward_workspace,
    estimate,
    gradient_parts,
    parts,
)

H100 = GPUS["h100"]
DIRECTIONS = ("forward", "input_gradient")
SQUARE = Problem(tokens=8192, out_features=4096, in_features=4096, num_blocks=4, rank=16)
CONTIGUOUS = replace(SQUARE, granule=1024)
ROOT = Path(__file__).resolve().parents[1]
GPU_PAGE, RESULTS = ROOT / "docs" / "gpu.md", ROOT / "benchmarks" / "results"


def device(problem: Problem, way: str, gpu: Gpu = H100) -> float:
    return estimate(problem, gpu, way).device_seconds()


def over_frozen(problem: Problem, way: str) -> float:
    return estimate(problem, H100, way).seconds() / estimate(problem, H100, "frozen").seconds()


def test_totals_by_hand() -> None:
    """T=8192, 4096², K=4, r=16, bf16 on an H100, in µs. Parts below 1 % of a pass's bytes are left out."""
    unit, start = 2 * 8192 * 4096**2 / 700e6, 2.3  # a GEMM, a launch
    frozen = 2 * (unit + start)
    x, w = 64 * 2**20 / 2.9e6, 32 * 2**20 / 2.9e6  # a pass over x or y, and over W0, at a copy's rate
    build, gather = 2 * w, 2 * x
    # Passes, forward: x·Aᵀ and h·Bᵀ one each, scaling 2, the sum 3; backward: scaling 2, four products, the sum 3.
    lora = (1 + 1 + 2 + 3) * x + (2 + 4 + 3) * x
    assert over_frozen(SQUARE, "lora") == pytest.approx(1 + (lora + 10 * start) / frozen, rel=2e-3)
    # Two parts, each of two gathers and a product, then two sums. Scattered blocks read all of W0, two times.
    grads = max(unit / 4, 2 * x + 2 * w) + 2 * gather + (2 * 3 + 2) * start
    merged = build + grads + build + 2 * start
    assert over_frozen(SQUARE, "merged") == pytest.approx(1 + merged / frozen, rel=5e-3)
    forward = 1.25 * w + gather + unit / 4 + x + 3 * start  # the base GEMM reads y again
    split = forward + grads + build + start
    assert over_frozen(SQUARE, "split") == pytest.approx(1 + split / frozen, rel=5e-3)
    # Contiguous blocks need no gather and read a quarter of W0 once.
    grads = max(unit / 4, 2 * x + w / 4) + 3 * start
    merged, split = (2 * build + grads + 2 * start, w / 2 + unit / 4 + x + 2 * start + grads + build + start)
    assert over_frozen(CONTIGUOUS, "merged") == pytest.approx(1 + merged / frozen, rel=5e-3)
    assert over_frozen(CONTIGUOUS, "split") == pytest.approx(1 + split / frozen, rel=5e-3)


def test_the_page_shows_what_is_predicted() -> None:
    rows = re.findall(
        r"^\| (\d), (spectral|contiguous) \|(.+)\|$", GPU_PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) == 3
    for blocks, order, cells in rows:
        granule = 1 if order == "spectral" else 4096 // int(blocks)
        problem = replace(SQUARE, num_blocks=int(blocks), granule=granule)
        found = [f"{over_frozen(problem, way):.2f}" for way in ("lora", "hira", "merged", "split")]
        assert cells.split(" | ") == [f" {found[0]}", *found[1:-1], f"{found[-1]} "]


def test_flop_floors() -> None:
    """Without memory traffic: 1 + 1/(2K) merged, 1 + 1/K split."""
    infinite = replace(H100, memory_tbps=1e9)
    for blocks in (1, 2, 4, 8):
        p = replace(SQUARE, tokens=1 << 20, num_blocks=blocks)
        frozen = device(p, "frozen", infinite)
        assert device(p, "merged", infinite) / frozen == pytest.approx(1 + 1 / (2 * blocks), rel=1e-3)
        assert device(p, "split", infinite) / frozen == pytest.approx(1 + 1 / blocks, rel=1e-3)
        assert device(p, "hira", infinite) / frozen == pytest.approx(2.5, rel=1e-3)


def test_launches() -> None:
    """The launches that a profiler counts at T=256."""
    p, q = (replace(found, tokens=256) for found in (SQUARE, CONTIGUOUS))
    found, in_place = (
        [
            [estimate(of, H100, way).launches(stage) for stage in ("forward", "backward")]
            for way in ("frozen", "lora", "merged", "split", "fused")
        ]
        for of in (p, q)
    )
    assert found == [[1, 1], [5, 7], [2, 7], [4, 7], [1, 6]]
    assert in_place == [[1, 1], [5, 7], [2, 5], [3, 5], [1, 4]]


def test_a_pass_takes_the_longer_of_host_and_device() -> None:
    few, many = estimate(replace(SQUARE, tokens=64), H100, "lora"), estimate(SQUARE, H100, "lora")
    assert few.seconds() == few.host_seconds() == pytest.approx(12 * LAUNCH_SECONDS)
    assert many.seconds() == pytest.approx(many.device_seconds())
    assert many.device_seconds() > many.host_seconds()


@pytest.mark.parametrize(
    ("change", "in_place"),
    [
        ({"granule": 24}, True),
        ({"granule": 12}, False),
        ({"granule": 8, "in_features": 4100}, False),
        ({"num_blocks": 1, "in_features": 4000}, True),
        ({"num_blocks": 1, "in_features": 4004}, False),
    ],
    ids=str,
)
def test_what_is_read_in_place(change: dict[str, int], in_place: bool) -> None:
    p = replace(SQUARE, **change)
    assert p.in_place == in_place
    for way in ("merged", "split"):
        assert in_place != any(q.name.startswith("gather") for q in parts(p, way))


def test_dropout_splits_dx_and_copies_x() -> None:
    assert [q.name for q in parts(replace(CONTIGUOUS, dropout=0.1), "split")] == [
        *("build ΔW blocks", "gather x", "block matmul", "base GEMM", "y, read to accumulate"),
        *("gather x", "block gradients", "sum partials", "build ΔW blocks", "block matmul of dX"),
        *("scatter dX, dropout", "dX = dY·W", "dX, read to accumulate"),
    ]


# Memory


def test_the_backwards_workspace_by_hand() -> None:
    p, mib = replace(SQUARE, out_features=14336), 2**20
    stages, gathered = backward_workspace(p), 288 * mib
    partials = 4 * 4 * (14336 * 8 + 4096 * 28)  # float32, ρ = 4; a slice per 128-wide tile of the other side
    assert stages["factor gradients"] == gathered // 2 + 2 * partials  # two parts of the tokens
    assert stages["input gradient"] == 112 * mib
    odd = backward_workspace(replace(p, tokens=8191))  # which are gathered at once
    assert odd["factor gradients"] == gathered // 8192 * 8191 + partials
    # Granules are read in place: only partials and W_eff remain. With dropout x is copied, and dX needs its blocks.
    granules = replace(SQUARE, granule=8)
    partials, w_eff, x = 4 * 4 * 2 * 4096 * 8, 32 * mib, 64 * mib
    assert backward_workspace(granules) == {"factor gradients": partials, "input gradient": w_eff}
    wet = {"factor gradients": x + partials, "input gradient": w_eff // 4 + x}
    assert backward_workspace(replace(granules, dropout=0.1)) == wet
    # One block that fills its tiles is not gathered.
    one = backward_workspace(replace(SQUARE, num_blocks=1))
    assert one["factor gradients"] == 4 * 16 * 2 * 4096 * 32


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (4096, 4096)),  # 128 MiB of copies; W_eff and dX take 96
        ({"tokens": 8191}, (8191,)),  # parts would be shorter than 64 steps
        ({"tokens": 8193}, (4160, 4033)),  # whole steps except for the last part
        ({"in_features": 14336}, (8192,)),  # W_eff and dX take more than the copies
        ({"tokens": 32768, "out_features": 14336}, (8192, 8192, 8192, 8192)),  # 1152 MiB over 368
        ({"dropout": 0.05}, (8192,)),  # dX has copies of its own
        (
            {"out_features": 14336, "num_blocks": 2, "rank": 256},
            (8192,),
        ),  # partials of 224 MiB, copies of 288
        ({"num_blocks": 1}, (8192,)),  # nothing is copied
        ({"num_blocks": 8}, (4096, 4096)),  # 128 tiles fill a GPU
        ({"num_blocks": 8, "in_features": 3072}, (8192,)),  # 96 do not: programs share the tokens already
        ({"tokens": 0}, (0,)),
        ({"granule": 8}, (8192,)),  # dY and x are read in place
        ({"granule": 12}, (4096, 4096)),
    ],
    ids=str,
)
def test_into_how_many_parts_a_backward_gathers(change: dict[str, int], expected: tuple[int, ...]) -> None:
    assert gradient_parts(replace(SQUARE, **change)) == expected


def test_peaks_by_hand() -> None:
    """16-bit: x and y take 64 MiB each. LoRA holds three such tensors at once, and tensors of rank 16."""
    mib, factors = 2**20, 2 * 4 * 8192
    assert peak_bytes(SQUARE, "frozen") == 128 * mib
    assert peak_bytes(SQUARE, "lora") == 192 * mib + 2 * 16 * 8192
    assert peak_bytes(SQUARE, "split") == 160 * mib + factors  # y, dX and W_eff
    short = replace(SQUARE, tokens=4096)
    # y; gathered dY and x, together as large as dX and W_eff; one MiB of partials
    assert peak_bytes(short, "split") == 96 * mib + factors + 4 * 4 * 2 * 4096 * 8
    assert peak_bytes(replace(short, granule=8), "split") == 96 * mib + factors  # no gathers


def test_what_lora_was_measured_to_hold() -> None:
    """The committed figures minus the frozen layer's, up to a few scalars."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    found = [one for run in runs for one in run["results"] if one["kind"] == "memory"]
    assert found
    for one in found:
        p = Problem(**one["params"] | {"dtype": getattr(torch, one["params"]["dtype"])})
        if not p.dropout:
            measured = one["bytes"]["PEFT LoRA"]["peak"] - one["bytes"]["frozen"]["peak"]
            predicted = peak_bytes(p, "lora") - peak_bytes(p, "frozen")
            assert measured == pytest.approx(predicted, abs=64), one["title"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter allocates")
@pytest.mark.parametrize("way", ["frozen", "lora", "merged", "split"])
@pytest.mark.parametrize("size", [(128, 512, 256), (64, 256, 512), (300, 256, 256)], ids=str)
def test_what_a_pass_allocates(size: tuple[int, int, int], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Includes the kernels' memory, in the interpreter. The interpreter's copies of arguments are left out."""
    pytest.importorskip("peft", reason="needs the peft extra")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from benchmarks.memory import footprint
    from benchmarks.providers import Case, frozen, lora, smoa

    executor = interpreter.GridExecutor
    monkeypatch.setattr(executor, "_init_args_hst", lambda self, args, kwargs: (list(args), kwargs))
    monkeypatch.setattr(executor, "_restore_args_dev", lambda self, *args: None)
    monkeypatch.setattr(algorithms, "GRAD_TILE", 64)  # block_grad's tile in IEEE float32
    case = Case(*size, num_blocks=2, rank=16)
    build = {"frozen": frozen, "lora": lora}.get(way) or smoa(way, "triton")
    assert footprint(build(case), case).peak == pytest.approx(peak_bytes(case.problem(), way), abs=64)


# The rule of "auto"


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_999"])
@pytest.mark.parametrize("dtype", KERNEL_PRECISIONS)
def test_auto_never_rounds_the_forwards_weight(arch, dtype):
    for tokens, rank in itertools.product((0, 1, 16, 100, 8192, 1 << 17), (1, 16, 256)):
        for stage in DIRECTIONS:
            assert choose_algorithm(stage, tokens, rank, dtype, arch) in admissible(stage, dtype)
    many = [choose_algorithm(stage, 8192, 4, dtype, arch) for stage in DIRECTIONS]
    assert many == ["merged" if dtype == "fp32" else "split", "merged"]


@pytest.mark.parametrize(
    ("dtype", "limits", "rank"), [("bf16", (64, 16), 64), ("tf32", (32, 8), 64), ("fp32", (16, 4), 16)]
)
def test_few_tokens_are_fused(dtype, limits, rank):
    """On an A100 and a B200. A rank that would need W0 twice is not fused."""
    for arch, limit in zip(("sm_80", "sm_100"), limits, strict=True):
        for stage in DIRECTIONS:
            assert choose_algorithm(stage, limit, rank, dtype, arch) == "fused"
            assert choose_algorithm(stage, limit + 1, rank, dtype, arch) != "fused"
            assert choose_algorithm(stage, 1, rank + 1, dtype, arch) != "fused"


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("dtype", "most"), [("bf16", 1.02), ("tf32", 1.02), ("fp32", 1.4)])
def test_the_roofline_justifies_fused(gpu, dtype, most):
    """Below the limit, fused is predicted to take at most `most` times the alternative, at r = 16."""
    precision = PRECISIONS[dtype]

    def seconds(p: Problem, way: str, stage: str) -> float:
        found = estimate(p, gpu, way, ieee=precision.ieee)
        if stage == "forward":
            return found.device_seconds("forward")
        names = ("fused dX",) if way == "fused" else ("build W_eff", "dX = dY·W")
        return sum(p.seconds(found.rates) for p in found.parts if p.name in names)

    for stage, (n, c) in itertools.product(DIRECTIONS, ((2048, 2048), (8192, 8192), (4096, 14336))):
        tokens = 1
        while choose_algorithm(stage, tokens, SQUARE.max_rank, dtype, gpu.arch) == "fused":
            p = replace(SQUARE, tokens=tokens, out_features=n, in_features=c, dtype=precision.dtype)
            other = "merged" if "merged" in admissible(stage, dtype) else "split"
            assert seconds(p, "fused", stage) <= most * seconds(p, other, stage), (tokens, stage)
            tokens *= 2
        assert tokens > 1
