"""`smoa-kernels tune` and `info`'s lines on tables: the whole command in the interpreter, with a scripted clock."""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tuning_cases import CPU, needs_interpreter, scripted

from smoa_kernels.cli import info, main
from smoa_kernels.kernels.spec import Key
from smoa_kernels.kernels.table import Choice, select, user_table
from smoa_kernels.tuning import measure
from smoa_kernels.tuning.measure import Timer
from smoa_kernels.tuning.models import Decoder, read_config

pytestmark = needs_interpreter
command = importlib.import_module("smoa_kernels.cli.tune")  # `cli` exports the function under the same name

# One kernel and both algorithms of one small layer: three problems.
SMALL = ["--shape", "70x90", "--tokens", "17", "--dtype", "bf16", "--rank", "5", "--blocks", "2"]
KERNELS = ["--kernel", "modulated_weight", "--kernel", "forward", "--kernel", "input_gradient"]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["tune", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_without_a_gpu_it_says_so_and_offers_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    words = "no CUDA or ROCm GPU here to tune; add --dry-run to list what would be timed on an h100"
    assert words in fails(capsys)
    assert main(["tune", "--dry-run", "--kernel", "forward", *SMALL]) == 0  # algorithms need no compiler
    assert "What would be timed on h100 (sm_90)" in capsys.readouterr().out


def test_a_dry_run_lists_the_problems(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    arguments = ["--shape", "4096x4096", "--tokens", "3000", "--kernel", "permute", "--kernel", "forward"]
    assert main(["tune", "--dry-run", "--gpu", "a100", *arguments]) == 0
    out = capsys.readouterr().out
    for words in (
        "permute 4096 columns T≤4096 K=4 bf16",
        "t=64 p=128 warps=2 stages=1",
        "on a100 (sm_80)",
    ):
        assert words in out
    assert "candidates of 3 problems. Nothing was measured." in out  # one of them under dropout
    assert not cache.exists()


def test_kernels_of_experts_are_tuned_where_a_layer_has_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """For row-major and for column-major weights."""
    arguments = [
        "--dry-run",
        "--gpu",
        "h100",
        "--kernel",
        "grouped_linear",
        "--granule",
        "8",
        "--tokens",
        "8192",
    ]
    assert "no layer asks for grouped_linear" in fails(capsys, *arguments)
    assert main(["tune", *arguments, "--experts", "8", "--shape", "28672x4096"]) == 0
    out = capsys.readouterr().out
    for shape in ("28672x4096", "4096x28672"):
        assert out.count(f"grouped_linear {shape} T≤1024 ρ=4 K=4 bf16 fp32 factors") == 2
    assert out.count("transposed") == 2
    assert "of 4 problems" in out


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Timer], None]:
    """The interpreter in place of a GPU, with a given timer."""

    def prepare(timer: Timer) -> None:
        monkeypatch.setattr(command, "_device_here", lambda: CPU)
        monkeypatch.setattr(measure, "gpu_timer", timer)

    return prepare


SECONDS = {"merged": 3e-6, "split": 2e-6, "fused": 1e-6}


def script(choice: Choice) -> float:
    """Seconds by choice: "fused" is the fastest algorithm, the smallest block_n the fastest configuration."""
    return SECONDS[choice] if isinstance(choice, str) else choice.block_n * 1e-6


def test_the_winner_is_shown_in_force_and_not_measured_again(
    gpu: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[Choice] = []
    gpu(scripted(script, timed))
    assert main(["tune", *SMALL, *KERNELS]) == 0
    out = capsys.readouterr().out
    for problem, choice, seconds in (
        ("modulated_weight 70x90 ρ=3 K=2 bf16 fp32 factors", "n=16 c=", "16.0"),
        ("forward 70x90 T≤32 ρ=3 K=2 bf16 fp32 factors", "fused", "1.0"),
        ("input_gradient 70x90 T≤32 ρ=3 K=2 bf16 fp32 factors", "fused", "1.0"),
    ):
        (row,) = (line for line in out.splitlines() if f" {problem} " in line)
        assert f" {choice}" in row
        assert f" {seconds} " in row
    assert "0.25" in out  # relative to the heuristic's time
    assert f"Kept in {user_table('cpu')}" in out
    assert select(Key("modulated_weight", "bf16", 3, 2, 70, 90, factors="fp32"), CPU).block_n == 16
    timed.clear()
    assert main(["tune", *SMALL, *KERNELS]) == 0
    assert timed == []


def test_ctrl_c_keeps_the_results_and_a_rerun_goes_on(
    gpu: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(choice: Choice, launch: Callable[[], object]) -> float:
        if choice == "split":
            raise KeyboardInterrupt
        return scripted(script)(choice, launch)

    gpu(interrupted)
    assert main(["tune", *SMALL, *KERNELS]) == 130
    assert "Interrupted: what was found is kept" in capsys.readouterr().out
    timed: list[Choice] = []
    gpu(scripted(script, timed))
    assert main(["tune", *SMALL, *KERNELS]) == 0
    assert timed == ["split", "fused", "merged", "split"]  # then dX, whose default is fused
    assert "failed" not in capsys.readouterr().out


def test_failures_and_a_spent_budget_are_told(
    gpu: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def timer(choice: Choice, launch: Callable[[], object]) -> float:
        if choice == "fused":
            raise RuntimeError("[out of] resources")
        return script(choice)

    gpu(timer)
    assert main(["tune", *SMALL, "--kernel", "forward"]) == 0
    told = "at fused: RuntimeError: [out of] resources"
    assert f"failed: forward 70x90 T≤32 ρ=3 K=2 bf16 fp32 factors {told}" in capsys.readouterr().out
    assert main(["tune", *SMALL, "--kernel", "input_gradient", "--budget", "0"]) == 0
    assert (
        "not done: input_gradient 70x90 T≤32 ρ=3 K=2 bf16 fp32 factors: no time was left"
        in capsys.readouterr().out
    )


def test_a_table_that_cannot_be_written_is_told_before_anything_runs(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(scripted(lambda choice: 1 / 0))
    monkeypatch.setenv("SMOA_CACHE", os.devnull)
    assert "Not a directory" in fails(capsys, *SMALL)


@pytest.mark.parametrize("nested", [False, True])
def test_shapes_of_a_model_on_disk(nested: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes} if nested else sizes))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == Decoder(64, 160, 4, 4)


def test_why_the_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "triton_obstacle", lambda device: "x is on the CPU, where")
    if not torch.cuda.is_available():
        assert str(info.backends()["triton"]).startswith("no CUDA or ROCm device")
    monkeypatch.setattr(info, "triton_obstacle", lambda device: "triton is not installed")
    assert info.backends()["triton"] == "triton is not installed"
