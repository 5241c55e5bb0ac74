"""The predictions behind the bring-up's goals (benchmarks/bringup/predictions.py), by hand and against measurements."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.bringup.predictions import peak_bytes
from smoa_kernels.backends import algorithms
from smoa_kernels.tuning.roofline import Problem

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def test_peaks_by_hand():
    """16-bit, T=8192: x and y take 64 MiB each. LoRA holds three such tensors at once, and tensors of rank 16."""
    p, mib = Problem(8192, 4096, 4096, 4, 16), 2**20
    assert peak_bytes(p, "frozen") == 128 * mib
    assert peak_bytes(p, "lora") == 192 * mib + 2 * 16 * 8192
    factors = 2 * 4 * 8192
    assert peak_bytes(p, "split") == 160 * mib + factors  # y, dX and W_eff
    assert peak_bytes(replace(p, granule=1024), "split") == 160 * mib + factors
    short = Problem(4096, 4096, 4096, 4, 16)
    # y; gathered dY and x, together as large as dX and W_eff; one MiB of partials
    assert peak_bytes(short, "split") == 96 * mib + factors + 4 * 4 * 2 * 4096 * 8
    assert peak_bytes(replace(short, granule=8), "split") == 96 * mib + factors  # no gathers


def memory_results():
    for path in sorted(RESULTS.glob("*.json")):
        for result in json.loads(path.read_text())["results"]:
            if result["kind"] == "memory" and not result["params"]["dropout"]:
                yield pytest.param(result, id=f"{path.stem} {result['title']}")


@pytest.mark.parametrize("result", list(memory_results()))
def test_what_lora_was_measured_to_hold(result):
    """The committed figures minus the frozen layer's, up to a few scalars."""
    p = Problem(**result["params"] | {"dtype": getattr(torch, result["params"]["dtype"])})
    measured = {name: found["peak"] for name, found in result["bytes"].items()}
    predicted = peak_bytes(p, "lora") - peak_bytes(p, "frozen")
    assert measured["PEFT LoRA"] - measured["frozen"] == pytest.approx(predicted, abs=64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter allocates")
@pytest.mark.parametrize("way", ["frozen", "lora", "merged", "split"])
@pytest.mark.parametrize("size", [(128, 512, 256), (64, 256, 512), (300, 256, 256)], ids=str)
def test_what_a_pass_allocates(size, way, monkeypatch):
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
    predicted = peak_bytes(case.problem(), way)
    assert footprint(build(case), case).peak == pytest.approx(predicted, abs=64)
