"""`smoa-kernels plan` and its model: totals that can be counted by hand, and the page with the results."""

import itertools
import re
from pathlib import Path

import pytest

from smoa_kernels.cli import main
from smoa_kernels.cli.plan import LABELS, PARALLEL, WHOLE
from smoa_kernels.tuning.gpus import GPUS
from smoa_kernels.tuning.scaling import Plan, predict

H100 = GPUS["h100"]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"


def plans(model: str, gpus: int, parallel: str, **options: int) -> dict:
    return {m: predict(m, WHOLE[model], H100, gpus, fsdp=parallel == "fsdp", **options) for m in LABELS}


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


def test_one_gpu_sends_nothing_however_it_is_called() -> None:
    for parallel, model in itertools.product(PARALLEL, WHOLE):
        for plan in plans(model, 1, parallel).values():
            assert sent(plan) == 0 < sum(plan.memory.values())


def test_ddp_sends_the_factors_bytes_twice_around() -> None:
    found = plans("llama-3-8b", 8, "ddp")
    for method in ("lora", "smoa"):
        assert sent(found[method]) == pytest.approx(2 * 7 / 8 * 4 * found[method].trained_parameters)
    assert found["lora"].trained_parameters == 4 * found["smoa"].trained_parameters
    # r=16 on q, k, v, o, gate, up and down of 32 layers
    sizes = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3
    assert found["lora"].trained_parameters == 32 * 16 * sizes
    assert found["smoa"].memory["optimizer"] == 2 * found["smoa"].memory["gradients"]
    assert found["smoa"].memory["labels"] == 32 * 9 * sizes


def test_fully_sharded_memory_adds_up_to_one_copy() -> None:
    for method, plan in plans("llama-3-70b", 64, "fsdp").items():
        whole = plans("llama-3-70b", 64, "ddp")[method]
        for part in ("weights", "gradients", "optimizer"):
            assert 64 * plan.memory[part] == pytest.approx(whole.memory[part])
        assert plan.memory["labels"] == whole.memory["labels"]  # replicated


def test_fully_sharded_gathers_layers_twice_and_the_rest_once() -> None:
    plan = plans("llama-3-8b", 8, "fsdp")["lora"]
    layer = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    norms, rest = (2 * 32 + 1) * 4096, 2 * 128256 * 4096  # embedding and head
    factors = 4 * plan.trained_parameters
    assert plan.traffic["gather"] == 7 / 8 * (2 * (2 * (32 * layer + norms) + factors) + 2 * rest)
    assert plan.memory["gathered layers"] == 2 * (2 * layer + factors / 32) + 2 * rest


def test_padding_is_not_trained() -> None:
    """Rank 16 over 3 blocks is 6, 5 and 5; each is stored and sent as 6."""
    even, uneven = (plans("llama-3-8b", 8, "ddp", rank=r, num_blocks=3)["smoa"] for r in (18, 16))
    assert sent(uneven) == sent(even)
    assert uneven.trained_parameters == round(even.trained_parameters * 16 / 18)


def test_the_page_is_the_commands_output(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^    smoa-kernels (plan .*)$", page, flags=re.MULTILINE)
    assert commands
    for command in commands:
        assert main([*command.split(), "--markdown"]) == 0
        assert capsys.readouterr().out in page, command
