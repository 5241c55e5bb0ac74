"""Kernels with wrong results or errors, on a simulated GPU: one warning, then eager's numbers.

The simulated GPU is the CPU with Triton's interpreter; the tests break its launches.
"""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from expert_problems import make_problem as make_experts
from places import ran
from problems import DEVICE, Case, assert_within_budget
from torch import Tensor
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from smoa_kernels.backends import eager, experts, verified
from smoa_kernels.definition.precision import precision_of
from smoa_kernels.kernels import table
from smoa_kernels.kernels.launch import _listener as listener
from smoa_kernels.kernels.launch import short_way

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(DEVICE.type != "cpu", reason="a pretended GPU runs in Triton's interpreter"),
    pytest.mark.filterwarnings("error::UserWarning"),  # outside `warned`
]
Result = TypeVar("Result")
CPU = torch.device("cpu")
SPLIT = Case("triton", "split", torch.bfloat16)
SIZES = {"tokens": 70, "out_features": 96, "in_features": 80, "ranks": (3, 2)}
Spoil = Callable[[Tensor], object] | float | Exception
ROUNDING = "times what rounding explains"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The state of a fresh process on a GPU; yields the path of its file of verdicts."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setattr(verified, "_is_verified", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    start_anew()
    yield tmp_path / "tuning" / "cpu.json"
    start_anew()


def start_anew() -> None:
    table.forget()
    verified.verdicts.cache_clear()
    verified._answers.clear()
    short_way.taken, short_way.obstacle = False, ""


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Spoil a kernel's last argument, or raise. Returns a list that fills with the names of launched kernels.

    A number replaces the argument's first.
    """
    if not knobs.runtime.interpret:
        pytest.skip("it replaces launches of Triton's interpreter; the PTX emulator has others")
    launch = InterpretedFunction.__getitem__

    def breaks(name: str = "", spoil: Spoil = 0.0) -> list[str]:
        launched: list[str] = []

        def launcher(kernel: Any, grid: Any) -> Any:
            def run(*args: Any, **options: Any) -> None:
                launched.append(kernel.__name__)
                launch(kernel, grid)(*args, **options)
                if kernel.__name__ != name:
                    return
                if isinstance(spoil, Exception):
                    raise spoil
                out = [one for one in args if isinstance(one, Tensor)][-1]
                if isinstance(spoil, float):
                    out.view(-1)[0] = spoil
                else:
                    spoil(out)

            return run

        monkeypatch.setattr(InterpretedFunction, "__getitem__", launcher)
        return launched

    return breaks


def one_in_a_thousand(out: Tensor) -> None:
    flat = out.view(-1)
    flat[::1000] += 2 * out.float().square().mean().sqrt().to(out.dtype)


def warned(run: Callable[[], Result]) -> tuple[Result, list[str]]:
    """What a call returns, and its warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = run()
    return result, [str(warning.message) for warning in found]


@pytest.mark.parametrize("algorithm", ["split", "dropout", "merged", "fused"])
def test_right_kernels_are_compared_once(
    algorithm: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(SPLIT, algorithm=algorithm)
    p = case.problem(**SIZES)
    assert_within_budget(p.run(**case.options), case, p)
    (forms,) = json.loads(cache.read_bytes())["verdicts"].values()
    assert set(forms.values()) == {""}
    assert {"block_grad_kernel", "sum_partials_kernel"} < {form.split(" ")[0] for form in forms}
    for name in ("forward", "backward", "modulated_weight"):
        monkeypatch.setattr(eager, name, lambda *_, **__: pytest.fail("compared again"))
    p.run(**case.options)
    start_anew()  # another process, with other shapes of the same forms
    p.run(**case.options)
    case.problem(**SIZES | {"out_features": 90}).run(**case.options)


@pytest.mark.parametrize(
    ("kernel", "algorithm", "spoil", "words"),
    [
        ("block_matmul_kernel", "split", one_in_a_thousand, ROUNDING),
        ("block_matmul_kernel", "dropout", one_in_a_thousand, ROUNDING),
        ("modulated_blocks_kernel", "split", one_in_a_thousand, ROUNDING),
        ("permute_kernel", "dropout", one_in_a_thousand, ROUNDING),
        ("fused_linear_kernel", "fused", one_in_a_thousand, ROUNDING),
        ("block_grad_kernel", "split", one_in_a_thousand, ROUNDING),
        ("modulated_weight_kernel", "split", torch.nan, "by nan times"),
        ("block_matmul_kernel", "split", torch.inf, ROUNDING),
        ("block_matmul_kernel", "split", OutOfResources(300, 227, "shared memory"), "OutOfResources"),
        ("block_grad_kernel", "split", CompilationError("", None, "no layout"), "CompilationError"),
        ("fused_linear_kernel", "fused", RuntimeError("PassManager::run failed"), "PassManager"),
        ("permute_kernel", "dropout", RuntimeError("Triton Error [CUDA]: invalid argument"), "invalid"),
    ],
)
def test_a_broken_kernel_is_refused(
    kernel: str, algorithm: str, spoil: Spoil, words: str, broken: Any
) -> None:
    """All results are right, also if other kernels of the pass still run, and with dropout."""
    case = replace(SPLIT, algorithm=algorithm)
    p = case.problem(**SIZES)
    launched = broken(kernel, spoil)
    found, told = warned(lambda: p.run(**case.options))
    assert_within_budget(found, case, p)
    for message in told:
        assert message.startswith("a GPU kernel is refused, torch's operators compute instead")
        assert words in message and kernel in message and "Triton" in message  # noqa: PT018
    assert len(told) in ((1, 2) if kernel == "permute_kernel" else (1,))  # two forms: gather and scatter
    launched.clear()
    assert_within_budget(p.run(**case.options), case, p)  # without a warning
    assert kernel not in launched
    start_anew()  # another process: it launches no refused form, and warns once more
    found, told = warned(lambda: p.run(**case.options))
    assert told
    assert_within_budget(found, case, p)
    assert kernel not in launched or kernel == "permute_kernel"  # permute also gathers dY, without a mask


def test_the_direct_call_is_compared_once(broken: Any) -> None:
    """The interpreter has no direct call, so this test says that it was taken."""
    launched = broken()
    passes = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        p = replace(SPLIT, dtype=dtype).problem(**SIZES)
        short_way.taken = True
        launched.clear()
        p.forward(**SPLIT.options)
        passes.append(launched.count("block_matmul_kernel"))
    assert passes == [3, 2, 2]  # the last pass of each is the user's own


def test_a_wrong_direct_call_is_not_taken(cache: Path, broken: Any) -> None:
    def spoil(out: Tensor) -> None:
        if short_way.taken and listener.hear is None and not short_way.obstacle:
            one_in_a_thousand(out)

    broken("block_matmul_kernel", spoil)
    p = SPLIT.problem(**SIZES)
    short_way.taken = True
    found, told = warned(lambda: p.run(**SPLIT.options))
    assert ["launched by Triton's own launcher" in message for message in told] == [True]
    assert_within_budget(found, SPLIT, p)
    (forms,) = json.loads(cache.read_bytes())["verdicts"].values()
    assert ROUNDING in forms.pop(verified.LAUNCHER)
    assert set(forms.values()) == {""}


PROGRAM = """
import sys, torch
from triton.runtime.interpreter import InterpretedFunction
from smoa_kernels.backends import verified
from problems import Case
verified._is_verified = lambda device: True
torch.cuda.is_current_stream_capturing = lambda: False
launch = InterpretedFunction.__getitem__
def launcher(kernel, grid):
    def run(*args, **options):
        print(kernel.__name__)
        launch(kernel, grid)(*args, **options)
        if sys.argv[1] == "broken":
            args[kernel.arg_names.index("out_ptr")].fill_(1)
    return run
InterpretedFunction.__getitem__ = launcher
case = Case("triton", "fused", torch.float32)
case.problem(tokens=64, out_features=96, in_features=80, ranks=(3, 2)).forward(**case.options)
"""


def test_a_second_process_reads_the_verdict(cache: Path) -> None:
    found = []
    for state in ("broken", "sound"):
        done = ran("-c", PROGRAM, state, TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stderr
        found.append((done.stdout.split(), done.stderr.count("a GPU kernel is refused")))
    assert found[0][0]
    assert found == [(found[0][0], 1), ([], 1)]


def test_a_damaged_file_is_ignored_and_one_of_another_version_left_where_it_is(cache: Path) -> None:
    cache.parent.mkdir()
    wrong_verdicts = '{"schema": 2, "entries": [], "verdicts": {"Triton": 1, "other": {"form": 5}}}'
    for text, is_table in (("{", False), ("[]", False), (wrong_verdicts, True)):
        cache.write_text(text)
        start_anew()
        _, told = warned(lambda: SPLIT.problem(**SIZES).forward(**SPLIT.options))
        assert bool(told) != is_table
        assert all(f"tuning table {cache}" in message for message in told)
        (verdicts,) = json.loads(cache.read_bytes())["verdicts"].values()
        assert set(verdicts.values()) == {""}
    before = sorted(cache.parent.iterdir())
    cache.write_text(text := '{"schema": 99, "entries": []}')
    start_anew()
    warned(lambda: SPLIT.problem(**SIZES).forward(**SPLIT.options))
    assert cache.read_text() == text
    assert sorted(cache.parent.iterdir()) == before  # nothing more was set aside


@pytest.mark.parametrize("state", ["is_current_stream_capturing", "is_compiling"])
def test_unverified_kernels_are_not_captured(
    state: str, cache: Path, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = broken()
    owner = torch.compiler if state == "is_compiling" else torch.cuda
    p = SPLIT.problem(**SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(owner, state, lambda: True)
        captured = p.run(**SPLIT.options)
        assert_within_budget(captured, SPLIT, p)
    assert not launched
    assert not cache.exists()
    warm = p.run(**SPLIT.options)
    launched.clear()
    monkeypatch.setattr(owner, state, lambda: True)
    for ours, same in zip(p.run(**SPLIT.options), warm, strict=True):
        assert torch.equal(ours, same)
    assert launched


def test_a_compiled_decode_step_is_captured_after_its_first_call(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like `torch.compile(mode="reduce-overhead")`: the first call is not captured, the second is."""
    launched = broken()
    p = SPLIT.problem(**SIZES | {"tokens": 1})
    layer = p.layer(partition=p.partition, backend="triton")
    decode = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = decode(p.x)
        launched.clear()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured = decode(p.x)
    assert torch.equal(first, captured)
    assert "fused_linear_kernel" in launched


@pytest.mark.parametrize(("blocks", "refused"), [("own", False), ("contiguous", False), ("contiguous", True)])
def test_experts_that_were_not_verified_are_captured_without_waiting(
    blocks: str, refused: bool, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = broken("grouped_linear_kernel" if refused else "", torch.nan)
    e = make_experts(dtype=torch.float32, pairs=(30, 0, 40, 7), blocks=blocks)
    if refused:
        warned(lambda: e.operator("triton"))
        launched.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(experts, "spans", lambda ends: pytest.fail("the host waited"))
    found, told = warned(lambda: e.operator("triton"))
    e.assert_within_budget(found)
    assert not launched
    assert all("every expert multiplies all pairs" in message for message in told)
    assert ["are refused" in message for message in told] == [refused] * 2
    assert ["before the capture" in message for message in told] == [not refused] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_wrong_number_shows_among_millions(dtype: torch.dtype) -> None:
    """Two right results that round differently pass. A few channels of the activations are large."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(512, 400, generator=generator), torch.randn(4096, 400, generator=generator)
    x[:, :3] *= 100
    allowed = verified.ALLOWED[precision_of(dtype, ieee=True).name]
    exact = x.to(dtype).double() @ w.to(dtype).double().T
    found, expected = exact.to(dtype), (x @ w.to(dtype).float().T).to(dtype)
    assert verified.distance(found, expected, allowed) <= 1
    usual = max(numbers.square().mean().sqrt() for numbers in (exact[300], exact[:, 2000]))
    found[300, 2000] += 8 * allowed * usual
    assert verified.distance(found, expected, allowed) > 1


def test_it_can_be_turned_off(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert verified._is_verified(torch.device("cuda"))
    assert not verified._is_verified(CPU)
    monkeypatch.setenv("SMOA_VERIFY", "0")
    assert not verified._is_verified(torch.device("cuda"))


def test_zeros_and_overflow_say_nothing(cache: Path) -> None:
    p = SPLIT.problem(**SIZES)
    for scale in (0.0, torch.inf):
        _, told = warned(lambda: replace(p, x=p.x * scale).forward(**SPLIT.options))  # noqa: B023
        assert not [message for message in told if "refused" in message]
        assert not cache.exists()


def test_no_memory_to_compare(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process uses eager; the next one tries again."""
    p = SPLIT.problem(**SIZES)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("40 GiB")

    monkeypatch.setattr(verified, "distance", full)
    _, (message,) = warned(lambda: p.forward(**SPLIT.options))
    assert ": there is no memory to verify" in message
    p.forward(**SPLIT.options)
    assert not cache.exists()


def test_merging_and_experts(cache: Path, broken: Any) -> None:
    broken("modulated_weight_kernel", one_in_a_thousand)
    p = SPLIT.problem(**SIZES)
    layer = replace(p, weight=p.weight.clone()).layer(partition=p.partition, backend="triton")
    _, told = warned(layer.merge)
    assert len(told) == 1
    exact = p.to(torch.float64)
    torch.testing.assert_close(
        layer.weight.double(), exact.weight + exact.delta_weight(), rtol=2**-8, atol=2**-9
    )
    e = make_experts(dtype=torch.float32, pairs=(30, 0, 40, 7), blocks="contiguous")
    broken("grouped_linear_kernel", one_in_a_thousand)
    found, told = warned(lambda: e.operator("triton"))
    assert len(told) == 2  # y, and then dX
    e.assert_within_budget(found)


def test_info_lists_the_verdicts(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer", reason="needs the cli extra")
    from smoa_kernels.cli import info

    broken("block_grad_kernel", torch.nan)
    warned(lambda: SPLIT.problem(**SIZES).run(**SPLIT.options))
    short_way.obstacle = "TypeError: another signature"
    verified.verdicts(CPU).add({})
    start_anew()
    monkeypatch.setattr(info, "_gpus", lambda: [CPU, CPU])
    said = info._kernels()
    assert re.fullmatch(r"Triton [\d.]+, no ptxas, kernels \w+", said["cpu, versions"])
    assert "modulated_weight_kernel (1 forms)" in said["cpu, verified"]
    assert said["cpu, refused"].startswith("block_grad_kernel bfloat16")
    assert said["cpu, refused"].count("what rounding explains") == 3  # sum_partials' two forms were new too
    assert "grouped_grad_kernel" in said["cpu, untried"]
    assert "block_grad" not in said["cpu, untried"]
    assert said["cpu, launches"] == short_way.obstacle == "TypeError: another signature"
