"""The predictions (benchmarks/predict): totals counted by hand, the published tables, and the limit of "auto"."""

import itertools
import re
from pathlib import Path

import pytest

from benchmarks.predict.__main__ import app
from benchmarks.predict.gpus import GPUS
from benchmarks.predict.roofline import Estimate, Problem
from benchmarks.predict.scaling import METHODS, MODELS, Plan, predict
from smoa_kernels.backends.algorithms import choose_algorithm
from smoa_kernels.definition.precision import KERNEL_PRECISIONS
from smoa_kernels.kernels.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
H100 = GPUS["h100"]
SQUARE = Problem(tokens=8192, out_features=4096, in_features=4096, num_blocks=4, rank=16)
CONTIGUOUS = SQUARE._replace(granule=1024)


def over_frozen(problem: Problem, way: str) -> float:
    return Estimate(problem, H100, way).seconds() / Estimate(problem, H100, "frozen").seconds()


def test_totals_by_hand() -> None:
    """T=8192, 4096², K=4, r=16, bf16 on an H100, in µs. The sums leave out parts below 1 % of a pass's bytes."""
    unit, start = 2 * 8192 * 4096**2 / 700e6, 2.3  # a GEMM, a launch
    frozen = 2 * (unit + start)
    x = 64 * 2**20 / 2.9e6  # a pass over x or y at a copy's rate
    # In Triton: of x, over W0, over G.
    copy, w, g = (passes * 2**20 / (0.8 * 3.35e6) for passes in (128, 32, 16))
    # Passes, forward: x·Aᵀ and h·Bᵀ one each, scaling 2, the sum 3; backward: scaling 2, four products, the sum 3.
    lora = (1 + 1 + 2 + 3) * x + (2 + 4 + 3) * x
    assert over_frozen(SQUARE, "lora") == pytest.approx(1 + (lora + 10 * start) / frozen, rel=2e-3)
    fused = (1 + 2) * x + (3 + 2) * x
    assert over_frozen(SQUARE, "lora_fused") == pytest.approx(1 + (fused + 6 * start) / frozen, rel=2e-3)
    # Two gathers, a product, its contraction and two sums. Scattered blocks read all of W0.
    grads = 2 * copy + unit / 4 + g + w + 6 * start
    merged = 2 * w + grads + 2 * w + 2 * start
    assert over_frozen(SQUARE, "merged") == pytest.approx(1 + merged / frozen, rel=5e-3)
    forward = 1.25 * w + 2 * copy + unit / 4 + x + 4 * start  # the base GEMM reads y again
    split = forward + grads + 2 * w + start
    assert over_frozen(SQUARE, "split") == pytest.approx(1 + split / frozen, rel=5e-3)
    # Contiguous blocks need no copies and read a quarter of W0 once.
    grads = unit / 4 + g + w / 4 + 4 * start
    merged = 4 * w + grads + 2 * start
    split = w / 2 + unit / 4 + x + 2 * start + grads + 2 * w + start
    assert over_frozen(CONTIGUOUS, "merged") == pytest.approx(1 + merged / frozen, rel=5e-3)
    assert over_frozen(CONTIGUOUS, "split") == pytest.approx(1 + split / frozen, rel=5e-3)


def test_the_page_shows_the_predictions() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d), r=(\d+), (spectral|contiguous) \|(.+)\|$", page, re.MULTILINE)
    assert ("2", "8", "spectral") in [row[:3] for row in rows]  # the recommended setting
    for blocks, rank, order, cells in rows:
        granule = 1 if order == "spectral" else 4096 // int(blocks)
        problem = SQUARE._replace(num_blocks=int(blocks), rank=int(rank), granule=granule)
        ways = "lora", "lora_fused", "hira", "merged", "split"
        assert cells.strip().split(" | ") == [f"{over_frozen(problem, way):.2f}" for way in ways]


def test_pages_about_hardware_show_the_predictions() -> None:
    """PEFT's LoRA is 1. The README has some of the rows."""
    page, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/hardware.md", "README.md"))
    rows = dict(re.findall(r"^\| (\w+) \| (.+(?: \| .+){3}) \|$", page, re.MULTILINE))
    for gpu in set(GPUS) - {"a40"}:
        cases = (SQUARE._replace(num_blocks=k, rank=8, granule=g) for k, g in ((2, 1), (2, 2048), (4, 1024)))
        seconds = [Estimate(case, GPUS[gpu], "merged").seconds() for case in cases]
        lora, hira = (Estimate(SQUARE._replace(rank=8), GPUS[gpu], way).seconds() for way in ("lora", "hira"))
        spectral, _, contiguous, _ = shown = [f"{time / lora:.2f}" for time in (*seconds, hira)]
        assert rows[gpu.upper()] == " | ".join(shown)
        name = gpu.upper().replace("RTX", "RTX ")
        if name in readme:
            assert re.search(rf"\| {name} \| .* \| {spectral} \| {contiguous} \|", readme)


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_999"])
@pytest.mark.parametrize("dtype", KERNEL_PRECISIONS)
def test_many_tokens_are_merged(arch, dtype):
    """Thresholds round W_eff so that small updates survive."""
    for tokens, rank in itertools.product((100, 8192, 1 << 17), (1, 16, 256)):
        assert choose_algorithm(tokens, rank, dtype, arch) == "merged"


@pytest.mark.parametrize(
    ("dtype", "limits", "rank"), [("bf16", (64, 16), 64), ("tf32", (32, 8), 64), ("fp32", (16, 4), 16)]
)
def test_few_tokens_are_fused(dtype, limits, rank):
    """On an A100 and a B200. A rank that would need W0 twice is not fused."""
    for arch, limit in zip(("sm_80", "sm_100"), limits, strict=True):
        assert choose_algorithm(limit, rank, dtype, arch) == "fused"
        assert choose_algorithm(limit + 1, rank, dtype, arch) != "fused"
        assert choose_algorithm(1, rank + 1, dtype, arch) != "fused"


def plans(model: str, gpus: int, parallel: str, **options: int) -> dict:
    return {m: predict(m, MODELS[model], H100, gpus, fsdp=parallel == "fsdp", **options) for m in METHODS}


def sent(plan: Plan) -> float:
    return sum(plan.traffic.values())


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),  # as the authors publish them
        ("llama-3-70b", 70_553_706_496),
        ("llama-3-405b", 405_853_388_800),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_counts_published_parameters(model: str, parameters: int) -> None:
    assert plans(model, 1, "ddp")["full"].trained_parameters == parameters


def test_ddp_sends_the_factors_bytes_twice_around() -> None:
    found = plans("llama-3-8b", 8, "ddp")
    for method in ("lora", "smoa"):
        assert sent(found[method]) == pytest.approx(2 * 7 / 8 * 4 * found[method].trained_parameters)
    assert found["lora"].trained_parameters == 2 * found["smoa"].trained_parameters
    # r=8 on q, k, v, o, gate, up and down of 32 layers
    sizes = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3
    assert found["lora"].trained_parameters == 32 * 8 * sizes
    assert found["smoa"].memory["optimizer"] == 2 * found["smoa"].memory["gradients"]
    assert found["smoa"].memory["block labels"] == 32 * 9 * sizes


def test_fully_sharded_gathers_layers_twice_and_the_rest_once() -> None:
    plan = plans("llama-3-8b", 8, "fsdp")["lora"]
    layer = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    norms, rest = (2 * 32 + 1) * 4096, 2 * 128256 * 4096  # embedding and head
    factors = 4 * plan.trained_parameters
    assert plan.traffic["gather"] == 7 / 8 * (2 * (2 * (32 * layer + norms) + factors) + 2 * rest)
    assert plan.memory["gathered layers"] == 2 * (2 * layer + factors / 32) + 2 * rest


def test_the_commands_print_the_pages(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    python -m benchmarks.predict (.*)$", page, flags=re.MULTILINE)
    app(command.split(), standalone_mode=False)
    assert capsys.readouterr().out.strip() in page
    for size in ("8b", "70b", "405b"):
        model = MODELS[f"llama-3-{size}"]
        lora, smoa = (predict(way, model, H100, 8, fsdp=False) for way in ("lora", "smoa"))
        times = smoa.compute_seconds / lora.compute_seconds
        assert re.search(rf"{times:.2f} times (?:as long as LoRA's )?\({size.upper()}\)", page)
    app(["roofline", "--rank", "16", "--blocks", "4"], standalone_mode=False)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    (chosen,) = (row for row in rows if row[0] == "| merged*")
    assert chosen[4:] == ["1.36", "0.91", "1.09", "predicted |"]  # over frozen, PEFT's LoRA and a fused one
    with pytest.raises(ValueError, match="--gpu must be one of h100"):
        app(["plan", "--gpu", "h1000"], standalone_mode=False)
