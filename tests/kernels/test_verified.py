"""Kernels with wrong results or errors, on a simulated GPU: one warning, then eager's numbers.

The simulated GPU is the CPU with Triton's interpreter; Triton's own code says what it would compile for an H100.
"""

import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import triton
from expert_problems import ExpertsProblem
from expert_problems import make_problem as make_experts
from problems import DEVICE, Case, LinearProblem, assert_within_budget, make_problem
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, compute_cache_key

from benchmarks.fake_gpu import FakeDriver, FakeGpu
from smoa_kernels.backends import experts, verified
from smoa_kernels.backends.probes import ALLOWED, _like, distance
from smoa_kernels.definition.precision import PRECISIONS, multiplied_in, precision_of
from smoa_kernels.kernels import fused_linear, modulate, spec, table
from smoa_kernels.kernels.architectures import identity

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(DEVICE.type != "cpu", reason="a pretended GPU runs in Triton's interpreter"),
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the PTX emulator has other launches"),
    pytest.mark.filterwarnings("error::UserWarning"),  # outside `warned`
]
Result = TypeVar("Result")
CPU = torch.device("cpu")
MERGED = Case("triton", "merged", torch.bfloat16)
SPLIT, FUSED, DROPOUT = (replace(MERGED, algorithm=name) for name in ("split", "fused", "dropout"))
SIZES = {"tokens": 20, "out_features": 48, "in_features": 40, "ranks": (3, 2)}
ROUNDING = "times what rounding explains"


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The state of a fresh process on a GPU; yields the path of its file of verdicts."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setattr(verified, "_is_verified", lambda device: True)
    monkeypatch.setattr(verified, "FEW", 17)  # a tile and a tail: the interpreter is slow
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    start_anew()
    yield tmp_path / "tuning" / "cpu.json"
    start_anew()


def start_anew() -> None:
    table.clear_cache()
    verified.verdicts.cache_clear()


@cache
def compiled_twin(kernel: InterpretedFunction) -> JITFunction:
    return JITFunction(kernel.fn, **kernel.kwargs)


class Gpu:
    """What was launched, for probes and for users; `spoil` is called with a launch's tensors, or raised before it."""

    def __init__(self) -> None:
        self.probes: list[str] = []
        self.users: list[str] = []
        self.name, self.spoil = "", None
        self._run = InterpretedFunction.run

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        twin = compiled_twin(kernel)
        _, keys, _, _, binder = twin.device_caches[0]
        _, specialization, parsed = binder(*args, debug=False, **options)
        form = compute_cache_key(keys, specialization, parsed) + twin.src
        compiled = SimpleNamespace(hash=hashlib.sha256(form.encode()).hexdigest())
        spoiled = kernel.__name__ == self.name
        if spoiled and isinstance(self.spoil, Exception):
            raise self.spoil
        if warmup:
            return compiled
        (self.probes if spec.STAND_INS else self.users).append(f"{kernel.__name__} {compiled.hash}")
        self._run(kernel, *args, grid=grid, warmup=False, **options)
        if spoiled:
            self.spoil([one for one in args if isinstance(one, Tensor)][-1])
        return None

    def names(self) -> set[str]:
        """Of the kernels that users launched."""
        return {form.partition(" ")[0] for form in self.users}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    found = Gpu()

    def run(kernel, *args, **given):
        return found.run(kernel, *args, **given)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    triton.runtime.driver.set_active(FakeDriver(FakeGpu(1)))
    yield found
    triton.runtime.driver._active = None
    known = verified.verdicts(CPU)
    assert {form for form in found.users if known.kernels.get(form) != ""} == set()  # nobody used another


def warned(run: Callable[[], Result]) -> tuple[Result, list[str]]:
    """What a call returns, and its warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")  # NumPy's, in the interpreter of Triton 3.6
        warnings.simplefilter("always", UserWarning)
        result = run()
    return result, [str(warning.message) for warning in found]


def kept(file: Path) -> dict[str, str]:
    return json.loads(file.read_bytes())[identity(CPU)]["verdicts"]


def one_in_a_thousand(out: Tensor) -> None:
    flat = out.view(-1)
    flat[::1000] += 2 * out.float().square().mean().sqrt().to(out.dtype)


def test_right_kernels_are_compared_once(file: Path, gpu: Gpu) -> None:
    p = FUSED.problem(**SIZES)
    assert_within_budget(p.run(**FUSED.options), FUSED, p)
    p.forward(**DROPOUT.options)
    assert set(kept(file)) == set(gpu.probes) == set(gpu.users)
    assert set(kept(file).values()) == {""}
    gpu.probes.clear()
    start_anew()  # another process, with another number of tokens
    for case in (FUSED, DROPOUT):
        replace(p, x=p.x[:19]).forward(**case.options)
    assert gpu.probes == []


# Right kernels are accepted

GRADIENTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "random": (1, lambda y: (y * torch.randn_like(y)).sum()),
    "sum": (1, torch.sum),
    "mean": (1, torch.mean),
    "last token of one sequence": (1, lambda y: y[:, -1].float().square().sum()),
    "last tokens of two sequences": (2, lambda y: y[:, -1].float().square().sum()),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_gradient_of_the_user_makes_a_right_kernel_wrong(
    gradient: str, dtype: torch.dtype, gpu: Gpu
) -> None:
    """dX of few rows, or of equal rows, cancels."""
    sequences, loss = GRADIENTS[gradient]
    adapter = make_problem(dtype=dtype, out_features=96, in_features=64, ranks=(3, 2)).adapter()
    y = torch.randn(sequences, 66 // sequences, 96, dtype=dtype).requires_grad_()
    (dy,) = torch.autograd.grad(loss(y), y)
    verified.backward(dy.flatten(0, 1), None, adapter, None, needs_x=True)
    assert gpu.names() == {"modulated_weight_kernel"}


def test_a_weight_or_activations_that_prove_nothing(gpu: Gpu) -> None:
    p = MERGED.problem(**SIZES)
    for nothing in (0.0, torch.nan):
        start_anew()
        replace(p, weight=p.weight * nothing, x=p.x * nothing).forward(**MERGED.options)
    assert len(gpu.users) == 2


# Wrong kernels are refused

FAULTS = {
    "a sign": (modulate, "w + w * modulation", "w - w * modulation"),
    "a tile's tail": (modulate, "col_inside = cols < C", "col_inside = cols < C // BLOCK_C * BLOCK_C"),
    "a mask": (modulate, "row_block[:, None] == col_block[None, :]", "row_block[:, None] >= 0"),
    "a tail of tokens": (fused_linear, "tokens < T", "tokens < T // BLOCK_T * BLOCK_T"),
}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused(
    fault: str, precision: str, file: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sixteen tokens are whole tiles, so a probe must have a tail of its own."""
    module, right, wrong = FAULTS[fault]
    name = module.__name__.rpartition(".")[2]
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert right in source
    path = tmp_path / f"{name}.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    found = importlib.util.spec_from_file_location(f"{module.__package__}.planted", path)
    assert found is not None and found.loader is not None  # noqa: PT018
    planted = importlib.util.module_from_spec(found)
    found.loader.exec_module(planted)
    kernel = "modulated_weight_kernel" if module is modulate else "fused_linear_kernel"
    monkeypatch.setattr(module, kernel, getattr(planted, kernel))
    case = replace(MERGED if module is modulate else FUSED, dtype=PRECISIONS[precision].dtype)
    p = case.problem(tokens=16, out_features=16, in_features=140 if module is modulate else 40, ranks=(3, 2))
    with multiplied_in(precision):
        y, (message,) = warned(lambda: p.forward(**case.options))
    torch.testing.assert_close(y, p.run_reference()[0], rtol=2**-6, atol=2**-6)
    assert kernel in message and ROUNDING in message and gpu.users == []  # noqa: PT018
    assert all(ROUNDING in reason for reason in kept(file).values())


@pytest.mark.parametrize(
    ("kernel", "case", "spoil"),
    [
        ("permute_kernel", DROPOUT, one_in_a_thousand),
        ("modulated_blocks_kernel", SPLIT, lambda out: out.view(-1)[0].fill_(torch.inf)),
        ("modulated_weight_kernel", MERGED, lambda out: out.view(-1)[0].fill_(torch.nan)),
    ],
)
def test_a_refused_kernel_never_runs(kernel: str, case: Case, spoil: Any, file: Path, gpu: Gpu) -> None:
    p = case.problem(**SIZES)
    gpu.name, gpu.spoil = kernel, spoil
    for _ in range(2):  # another process launches no refused kernel either, and warns once more
        y, (message,) = warned(lambda: p.forward(**case.options))
        torch.testing.assert_close(y, case.definition(p)[0], rtol=2**-6, atol=2**-6)
        assert message.startswith("torch's operators compute instead of a GPU kernel: ")
        assert kernel in message and ROUNDING in message and "Triton" in message  # noqa: PT018
        assert torch.equal(p.forward(**case.options), y)  # without a warning
        probes = len(gpu.probes)
        start_anew()
    assert (len(gpu.probes), kernel in gpu.names()) == (probes, False)


def test_a_wrong_kernel_of_dx_refuses_none_of_the_factors(file: Path, gpu: Gpu) -> None:
    p = MERGED.problem(**SIZES | {"tokens": 66})
    gpu.name, gpu.spoil = "modulated_weight_kernel", one_in_a_thousand
    given = p.dy.flatten(0, -2), p.x.flatten(0, -2), p.adapter(), None
    _, messages = warned(lambda: verified.backward(*given, needs_x=True))
    assert [gpu.name in message for message in messages] == [True]
    assert "contract_kernel" in gpu.names()
    assert {name.partition(" ")[0] for name, reason in kept(file).items() if reason} == {gpu.name}


def test_gradients_whose_kernels_have_all_run_are_one_call(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    p = MERGED.problem(**SIZES)
    given = p.dy.flatten(0, -2), p.x.flatten(0, -2), p.adapter(), None
    expected = verified.backward(*given, needs_x=True)
    monkeypatch.setattr(verified, "launch_hook", lambda hook, new: nullcontext())  # no launch is new
    monkeypatch.setattr(verified, "_gradients", None)
    assert all(map(torch.equal, verified.backward(*given, needs_x=True), expected))


def test_what_is_compared_was_launched_like_later_calls(gpu: Gpu) -> None:
    """A `Launch` calls a kernel that it knows by itself; the first time Triton launches."""
    gpu.name, gpu.spoil = "modulated_weight_kernel", lambda out: len(gpu.probes) == 2 and out.zero_()
    _, (message,) = warned(lambda: MERGED.problem(**SIZES).forward(**MERGED.options))
    assert ROUNDING in message


def test_merging(gpu: Gpu) -> None:
    gpu.name, gpu.spoil = "modulated_weight_kernel", one_in_a_thousand
    p = MERGED.problem(**SIZES)
    layer = replace(p, weight=p.weight.clone()).layer(partition=p.partition, backend="triton")
    _, (message,) = warned(layer.merge)
    assert ROUNDING in message
    exact = p.to(torch.float64)
    merged = exact.weight + exact.delta_weight()
    torch.testing.assert_close(layer.weight.double(), merged, rtol=2**-8, atol=2**-9)


# What Triton compiles is verified before it is used; `gpu` looks after every test

OTHERS: dict[str, tuple[Case, Callable[[LinearProblem], LinearProblem]]] = {
    "a column-major W0": (MERGED, lambda p: replace(p, weight=p.weight.T.contiguous().T)),
    "a column-major W0, few tokens": (FUSED, lambda p: replace(p, weight=p.weight.T.contiguous().T)),
    "no bias": (FUSED, lambda p: replace(p, bias=None)),
    "sizes that 16 does not divide": (MERGED, lambda p: MERGED.problem(**SIZES | {"out_features": 52})),
    "rows that 16 does not divide": (FUSED, lambda p: replace(p, x=torch.cat([p.x, p.x[:, 7:]], 1)[:, :48])),
    "an odd address": (
        FUSED,
        lambda p: replace(p, x=torch.cat([p.x.flatten()[:1], p.x.flatten()])[1:].view_as(p.x)),
    ),
    "equal numbers": (FUSED, lambda p: replace(p, x=p.x[0, 0].expand(p.x.shape))),
    "granules": (SPLIT, lambda p: make_problem(dtype=torch.bfloat16, granule=8, **SIZES)),
    "float32 factors": (MERGED, lambda p: p.to(torch.bfloat16, torch.float32)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_kernel_is_compared_before_it_runs(other: str, gpu: Gpu) -> None:
    case, change = OTHERS[other]
    p = case.problem(**SIZES | {"in_features": 48})
    p.forward(**case.options)
    before, probes = set(gpu.users), len(gpu.probes)
    change(p).forward(**case.options)
    assert set(gpu.users) > before
    assert len(gpu.probes) > probes


def test_dropout_is_compared_by_itself(gpu: Gpu) -> None:
    p = SPLIT.problem(**SIZES)
    p.forward(**SPLIT.options)
    gpu.name, gpu.spoil = "permute_kernel", one_in_a_thousand
    _, (message,) = warned(lambda: p.forward(**DROPOUT.options))
    assert ROUNDING in message
    gpu.name = ""
    users = len(gpu.users)
    p.forward(**SPLIT.options)  # without dropout the kernels go on
    assert len(gpu.users) > users


@pytest.mark.parametrize("covered", [True, False])
def test_a_probe_of_few_tokens_is_launched_like_the_call(
    covered: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a probe of all tokens follows. Up to 16 tokens `fused_linear` has another tile."""
    rows: list[int] = []
    draw = verified.probe
    monkeypatch.setattr(verified, "probe", lambda *given: rows.append(given[3]) or draw(*given))
    monkeypatch.setattr(verified, "FEW", 5)
    if not covered:
        monkeypatch.setattr(verified, "override", lambda **tokens: nullcontext())
    FUSED.problem(**SIZES).forward(**FUSED.options)
    assert rows == [5] * 3 + [20] * 3 * (not covered)  # the kernels twice, and torch's operators
    assert gpu.users


LAYOUTS = {
    "equal numbers": torch.randn(()).expand(9, 48),
    "column-major": torch.randn(40, 9).T,
    "padded rows": torch.randn(9, 4000)[:, :40],
    "odd padding and address": torch.randn(9, 4001)[:, 3:43],
    "one row of many": torch.randn(70000).as_strided((1, 48), (68000, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_probe_is_small_and_specialised_alike(layout: str) -> None:
    given = LAYOUTS[layout]
    found = _like(torch.Generator(), given, 37)
    assert found.shape == (37, given.shape[1])
    assert found.untyped_storage().size() <= 4 * (2 * found.numel() + 100 * found.shape[1])
    assert len(found.unique()) > 75
    kinds = [[(n == 1, n % 16) for n in (*t.stride(), t.data_ptr())] for t in (given, found)]
    assert kinds[0] == kinds[1]


# What is kept, and for how long

FAILURES = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    OSError(28, "No space left on device"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    OutOfResources(300, 227, "shared memory"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: str(error)[:20])
def test_a_failure_holds_for_the_process(error: Exception, file: Path, gpu: Gpu) -> None:
    p = MERGED.problem(**SIZES)
    gpu.name, gpu.spoil = "modulated_weight_kernel", error
    y, (message,) = warned(lambda: p.forward(**MERGED.options))
    torch.testing.assert_close(y, p.run_reference()[0], rtol=2**-6, atol=2**-6)
    assert str(error)[:20] in message
    gpu.name = ""
    p.forward(**MERGED.options)
    assert (gpu.users, gpu.probes, file.exists()) == ([], [], False)
    start_anew()
    p.forward(**MERGED.options)
    assert gpu.names() == {"modulated_weight_kernel"}


def test_a_failure_holds_for_calls_of_that_layout_alone(gpu: Gpu) -> None:
    p = MERGED.problem(**SIZES)
    gpu.name, gpu.spoil = "modulated_weight_kernel", RuntimeError("no such instruction")
    warned(lambda: p.forward(**MERGED.options))
    gpu.name = ""
    replace(p, weight=p.weight.T.contiguous().T).forward(**MERGED.options)
    assert gpu.names() == {"modulated_weight_kernel"}


def test_a_call_without_tokens_refuses_nothing(gpu: Gpu) -> None:
    p = MERGED.problem(**SIZES)
    for tokens in (0, 1):
        few = replace(p, x=p.x[:tokens], dy=p.dy[:tokens])
        for algorithm in ("merged", "split"):
            options = {"backend": "triton", "algorithm": algorithm}
            _, messages = warned(partial(few.forward, **options))
            assert messages == []


def test_a_lack_of_memory_holds_for_the_call(file: Path, gpu: Gpu) -> None:
    p = MERGED.problem(**SIZES)
    gpu.name, gpu.spoil = "modulated_weight_kernel", torch.OutOfMemoryError("40 GiB")
    for _ in range(2):
        y, (message,) = warned(lambda: p.forward(**MERGED.options))
        torch.testing.assert_close(y, p.run_reference()[0], rtol=2**-6, atol=2**-6)
        assert "OutOfMemoryError: 40 GiB" in message
    assert not file.exists()
    gpu.name = ""
    p.forward(**MERGED.options)
    assert gpu.names() == {"modulated_weight_kernel"}


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_a_job_writes_once(rank: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    written: list[object] = []
    keep = verified.keep
    monkeypatch.setattr(verified, "keep", lambda *given, **more: written.append(more) or keep(*given, **more))
    FUSED.problem(**SIZES).forward(**FUSED.options)
    assert (len(written), file.exists()) == (1 - rank, rank == 0)
    assert set(verified.verdicts(CPU).kernels.values()) == {""}


def test_a_damaged_file_is_ignored_and_what_it_holds_of_others_stays(file: Path) -> None:
    file.parent.mkdir()
    others = {"schema": 3, "machines": {"other": 1}}
    wrong_verdicts = json.dumps(others | {identity(CPU): {"verdicts": {"form": 5}}})
    p = MERGED.problem(**SIZES)
    for text, is_table in (("{", False), ("[]", False), (wrong_verdicts, True)):
        file.write_text(text)
        start_anew()
        _, messages = warned(lambda: p.forward(**MERGED.options))
        assert bool(messages) != is_table
        assert all(f"tuning table {file}" in message for message in messages)
        assert set(kept(file).values()) - {5} == {""}
    assert json.loads(file.read_bytes()).items() >= others.items()


# CUDA graphs


@pytest.mark.parametrize("state", ["is_current_stream_capturing", "is_compiling"])
def test_unverified_kernels_are_not_captured(
    state: str, file: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = torch.compiler if state == "is_compiling" else torch.cuda
    p = MERGED.problem(**SIZES)
    for _ in range(2):  # also if they are verified on disk, and not loaded
        with monkeypatch.context() as patch:
            patch.setattr(owner, state, lambda: True)
            y, (message,) = warned(lambda: p.forward(**MERGED.options))
        assert "did not run before the capture" in message
        torch.testing.assert_close(y, p.run_reference()[0], rtol=2**-6, atol=2**-6)
        assert gpu.users == []
        warm = p.forward(**MERGED.options)
        gpu.users.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, state, lambda: True)
            assert torch.equal(p.forward(**MERGED.options), warm)
        assert gpu.users
        gpu.users.clear()
        start_anew()


@pytest.mark.slow
def test_a_compiled_decode_step_is_captured_after_its_first_call(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like `torch.compile(mode="reduce-overhead")`: the first call is not captured, the second is."""
    p = SPLIT.problem(**SIZES | {"tokens": 1, "out_features": 16})
    layer = p.layer(partition=p.partition, backend="triton")
    decode = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = decode(p.x)
        gpu.users.clear()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured = decode(p.x)
    assert torch.equal(first, captured)
    assert "fused_linear_kernel" in gpu.names()


EXPERTS: dict[str, Any] = {"dtype": torch.float32, "pairs": (0, 3), "rows": 16, "cols": 16}


def test_refused_experts(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.name, gpu.spoil = "grouped_linear_kernel", lambda out: out[..., 0].neg_()
    e = make_experts(blocks="contiguous", **EXPERTS)
    found, messages = warned(lambda: e.operator("triton"))
    assert [gpu.name in message for message in messages] == [True, True]  # y, and then dX
    e.assert_within_budget(found)
    messages = captured_experts(e, gpu, monkeypatch)
    assert [ROUNDING in message for message in messages] == [True, True]


@pytest.mark.parametrize("blocks", ["own", "contiguous"])
def test_experts_that_were_not_verified(blocks: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = captured_experts(make_experts(blocks=blocks, **EXPERTS), gpu, monkeypatch)
    assert ["before the capture" in message for message in messages] == [True, True]


def captured_experts(e: ExpertsProblem, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of experts that a CUDA graph captures; the host does not wait, and no kernel is launched."""
    gpu.users.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(experts, "spans", lambda ends: pytest.fail("the host waited"))
    found, messages = warned(lambda: e.operator("triton"))
    e.assert_within_budget(found)
    assert gpu.users == []
    return [message for message in messages if "every expert multiplies all pairs" in message]


def test_the_capture_asked_about_is_that_of_the_tensors_device(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[torch.device] = []
    asked: list[bool] = []

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        current.append(device)
        try:
            yield
        finally:
            current.pop()

    for module in (verified, verified.triton):
        monkeypatch.setattr(module, "on_device", on_device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(bool(current)))
    gpu.name, gpu.spoil = "fused_linear_kernel", one_in_a_thousand
    for case in (MERGED, FUSED):
        warned(lambda case=case: case.problem(**SIZES).forward(**case.options))
    assert asked == [True] * 3  # before each first launch, and by what replaces the kernels


# Distances, and the switch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_wrong_number_shows_among_millions(dtype: torch.dtype) -> None:
    """Two right results that round differently pass. A few channels of the activations are large."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(512, 400, generator=generator), torch.randn(4096, 400, generator=generator)
    x[:, :3] *= 100
    allowed = ALLOWED[precision_of(dtype, ieee=True).name]
    exact = x.to(dtype).double() @ w.to(dtype).double().T
    found, expected = exact.to(dtype), (x @ w.to(dtype).float().T).to(dtype)
    assert distance(found, expected, allowed) <= 1
    usual = max(numbers.square().mean().sqrt() for numbers in (exact[300], exact[:, 2000]))
    found[300, 2000] += 8 * allowed * usual
    assert distance(found, expected, allowed) > 1


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for value, is_verified in ((None, True), ("0", False)):
        verified._is_verified.cache_clear()
        if value is not None:
            monkeypatch.setenv("SMOA_VERIFY", value)
        assert verified._is_verified(torch.device("cuda")) is is_verified
    verified._is_verified.cache_clear()
    assert not verified._is_verified(CPU)


def test_info_lists_the_verdicts(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer", reason="needs the cli extra")
    from smoa_kernels.cli import info

    MERGED.problem(**SIZES).forward(**MERGED.options)
    gpu.name, gpu.spoil = "fused_linear_kernel", one_in_a_thousand
    warned(lambda: FUSED.problem(**SIZES).forward(**FUSED.options))
    start_anew()
    monkeypatch.setattr(info, "_gpus", lambda: [CPU, CPU])
    said = info._kernels()
    versions = r"cpu, cpu, 1 multiprocessors, Triton [\d.]+, no ptxas, kernels \w+"
    assert re.fullmatch(versions, said["cpu, identity"])
    assert "modulated_weight_kernel (1 forms)" in said["cpu, verified"]
    assert said["cpu, refused"].startswith("fused_linear_kernel ")
    assert ROUNDING in said["cpu, refused"]
    assert "grouped_grad_kernel" in said["cpu, untried"]
    assert "fused_linear" not in said["cpu, untried"]
