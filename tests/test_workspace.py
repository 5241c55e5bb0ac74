"""Predicted memory of a training pass (smoa_kernels/cost/workspace.py): hand counts, and what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smoa_kernels.cost import grad_tiling
from smoa_kernels.cost.estimate import Problem
from smoa_kernels.cost.workspace import backward_workspace, backward_workspace_bytes, peak_bytes

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def test_backward_workspace():
    p = Problem(8192, 14336, 4096, 4, 16)
    stages = backward_workspace(p)
    gathered = 2 * 8192 * (14336 + 4096)
    partials = 4 * 4 * (14336 * 8 + 4096 * 28)  # ρ = 4 of float32, one slice per 128-wide tile beside it
    assert gathered == 288 * 2**20
    assert stages["factor gradients"] == gathered // 2 + 2 * partials  # tokens in two parts
    assert stages["input gradient"] == 112 * 2**20
    assert backward_workspace_bytes(p) == max(stages.values()) < 400 * 2**20
    assert (
        backward_workspace(replace(p, tokens=8191))["factor gradients"] == gathered // 8192 * 8191 + partials
    )


@pytest.mark.parametrize(
    ("problem", "parts"),
    [
        (Problem(8192, 4096, 4096, 4, 16), (4096, 4096)),  # 128 MiB of copies, W_eff and dX take 96
        (Problem(8191, 4096, 4096, 4, 16), (8191,)),  # parts would be shorter than 64 steps
        (Problem(8193, 4096, 4096, 4, 16), (4160, 4033)),  # whole steps but for the last
        (Problem(8192, 4096, 14336, 4, 16), (8192,)),  # W_eff and dX take more than the copies
        (Problem(32768, 14336, 4096, 4, 16), (8192, 8192, 8192, 8192)),  # 1152 MiB over 368
        (Problem(8192, 4096, 4096, 4, 16, dropout=0.05), (8192,)),  # dX comes with copies of its own
        (Problem(8192, 14336, 4096, 2, 256), (8192,)),  # partials of 224 MiB, copies of 288
        (Problem(8192, 4096, 4096, 1, 16), (8192,)),  # nothing is copied
        (Problem(8192, 4096, 4096, 8, 16), (4096, 4096)),  # 128 tiles fill a GPU
        (Problem(8192, 4096, 3072, 8, 16), (8192,)),  # 96 do not: programs share their tokens already
        (Problem(0, 4096, 4096, 4, 16), (0,)),
    ],
    ids=str,
)
def test_into_how_many_parts_a_backward_gathers(problem, parts):
    assert grad_tiling.gradient_parts(problem) == parts


@pytest.mark.parametrize(("num_blocks", "rank"), [(4, 16), (2, 256), (4, 1024), (2, 0)])
def test_parts_take_no_more_than_dx_where_they_may_be_short_enough(num_blocks, rank, monkeypatch):
    for tokens in (8192, 16384, 100_001, 1 << 20):
        for shape in ((4096, 4096), (14336, 4096), (28672, 1024), (1024, 28672), (16390, 590)):
            p = Problem(tokens, *shape, num_blocks, rank)
            parts = grad_tiling.gradient_parts(p)
            assert sum(parts) == tokens
            assert min(parts[:-1], default=tokens) == max(parts)
            stages, dx = backward_workspace(p), 2 * tokens * p.in_features
            partials = grad_tiling.partial_bytes(p)
            copies = stages["factor gradients"] - partials
            step = 2 * grad_tiling.GRAD_STEP * sum(p.padded(n) for n in shape)  # parts are whole steps
            one = partials // len(parts)
            worth_more = len(parts) * copies >= (len(parts) + 1) ** 2 * one  # than another part's partials
            if len(parts) < tokens // grad_tiling.GRAD_PART_TOKENS and worth_more:
                assert copies <= stages["input gradient"] + dx + step
            with monkeypatch.context() as patch:
                patch.setattr(grad_tiling, "GRAD_PART_TOKENS", tokens)  # as a whole
                whole = backward_workspace(p)["factor gradients"]
            assert stages["factor gradients"] <= whole + step


def test_backward_workspace_counts_padding_and_dropout():
    aligned, odd = (backward_workspace(Problem(64, n, 512, 4, 16)) for n in (512, 516))
    # 129 rows per block take 256 padded ones; dY alone doubles
    assert odd["factor gradients"] - aligned["factor gradients"] >= 2 * 64 * 512
    p = Problem(8192, 4096, 4096, 4, 16, dropout=0.1)
    delta, gathered = 2 * 4096 * 4096 // 4, 2 * 8192 * 4096
    assert backward_workspace(p)["input gradient"] == delta + 2 * gathered


def test_one_block_that_fills_its_tiles_is_not_gathered():
    assert backward_workspace(Problem(8192, 4096, 4096, 1, 16))["factor gradients"] == 4 * 16 * 2 * 4096 * 32


def test_peaks_by_hand():
    """16-bit, T=8192: 64 MiB of x and of y; LoRA holds three of them at once, and tensors of rank 16."""
    p, mib = Problem(8192, 4096, 4096, 4, 16), 2**20
    assert peak_bytes(p, "frozen") == 128 * mib
    assert peak_bytes(p, "lora") == 192 * mib + 2 * 16 * 8192
    factors = 2 * 4 * 8192
    assert peak_bytes(p, "split") == 160 * mib + factors  # y, dX and W_eff
    short = Problem(4096, 4096, 4096, 4, 16)
    # y, dY and x gathered, the partials: as much as dX and W_eff, and a mebibyte
    assert peak_bytes(short, "split") == 96 * mib + factors + 4 * 4 * 2 * 4096 * 8


def memory_results():
    for path in sorted(RESULTS.glob("*.json")):
        for result in json.loads(path.read_text())["results"]:
            if result["kind"] == "memory" and not result["params"]["dropout"]:
                yield pytest.param(result, id=f"{path.stem} {result['title']}")


@pytest.mark.parametrize("result", list(memory_results()))
def test_what_lora_was_measured_to_hold(result):
    """Beyond the frozen layer: the committed figures, to a few scalars."""
    p = Problem(**result["params"] | {"dtype": getattr(torch, result["params"]["dtype"])})
    measured = {name: found["peak"] for name, found in result["bytes"].items()}
    predicted = peak_bytes(p, "lora") - peak_bytes(p, "frozen")
    assert measured["PEFT LoRA"] - measured["frozen"] == pytest.approx(predicted, abs=64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter allocates")
@pytest.mark.parametrize("way", ["frozen", "lora", "merged", "split"])
@pytest.mark.parametrize("size", [(128, 512, 256), (64, 256, 512), (300, 256, 256)], ids=str)
def test_what_a_pass_allocates(size, way, monkeypatch):
    """The kernels too, in the interpreter; it copies its arguments, which is no part of them."""
    pytest.importorskip("peft", reason="needs the peft extra")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from benchmarks.memory import footprint
    from benchmarks.providers import Case, frozen, lora, smoa

    executor = interpreter.GridExecutor
    monkeypatch.setattr(executor, "_init_args_hst", lambda self, args, kwargs: (list(args), kwargs))
    monkeypatch.setattr(executor, "_restore_args_dev", lambda self, *args: None)
    monkeypatch.setattr(grad_tiling, "GRAD_TILE", 64)  # block_grad's in IEEE float32
    case = Case(*size, num_blocks=2, rank=16)
    build = {"frozen": frozen, "lora": lora}.get(way) or smoa(way, "triton")
    predicted = peak_bytes(case.problem(), way)
    assert footprint(build(case), case).peak == pytest.approx(predicted, abs=64)


@pytest.mark.parametrize(
    ("problem", "way", "words"),
    [
        (Problem(1, 2, 2, 1, 1), "fused", "algorithm must be one of frozen, lora, merged, split"),
        (Problem(1, 2, 2, 1, 1, dropout=0.1), "lora", "dropout must be 0, got 0.1"),
    ],
)
def test_what_has_no_prediction(problem, way, words):
    with pytest.raises(ValueError, match=words):
        peak_bytes(problem, way)
