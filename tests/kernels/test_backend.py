"""The "triton" backend: unchecked ranks, and cases that the kernels do not run.

tests/test_contract.py tests what all backends promise, tests/test_devices.py old GPUs.
"""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Guarded
from places import ran
from problems import (
    HALF,
    NAMES,
    Case,
    assert_within_budget,
    cases,
    make_problem,
)

from smoa_kernels.backends import eager
from smoa_kernels.backends import triton as triton_backend
from smoa_kernels.definition.precision import bmm_in_float32, multiplied_in
from smoa_kernels.kernels import table
from smoa_kernels.kernels.launch import MOST_KEPT, operands_of
from smoa_kernels.operators import linear as operator

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cached_layout_follows_torchs_setting_of_tf32(dtype: torch.dtype) -> None:
    adapter = make_problem(dtype=dtype).adapter()
    for precision in ("tf32", "fp32", "tf32"):
        with multiplied_in(precision):
            layout = operands_of(adapter).layout
            assert layout.precision == ("bf16" if dtype == torch.bfloat16 else precision)
            assert operands_of(adapter).layout is layout


def test_operands_are_made_anew_when_what_is_compiled_or_the_table_changes() -> None:
    """A launch that is bound to them knows by which numbers their addresses are divisible, and how wide numbers are."""
    adapter = make_problem(dtype=torch.float32).adapter()
    kept = operands_of(adapter)
    for tensor in (adapter.weight, adapter.A, adapter.B, adapter.ranks, adapter.scaling):
        tensor.data = tensor.detach().clone()
        assert operands_of(adapter) is kept
        odd = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
        for other in (odd, odd.clone(), tensor.to(torch.float16)):
            tensor.data = other
            assert operands_of(adapter) is not kept
            kept = operands_of(adapter)
    for change in (lambda: setattr(adapter.A, "data", adapter.A[:1].detach()), table.clear_cache):
        change()
        assert operands_of(adapter) is not kept
        kept = operands_of(adapter)


def test_an_adapter_keeps_a_bounded_number_of_launches() -> None:
    operands = operands_of(make_problem(dtype=torch.float32).adapter())
    found = [operands.get(lambda layout, number: number, number) for number in range(2 * MOST_KEPT + 1)]
    assert found == list(range(2 * MOST_KEPT + 1))
    assert len(operands._made) <= MOST_KEPT


def test_the_weight_that_is_merged_is_multiplied_in_ieee() -> None:
    """Torch's setting of TF32 is for the products of a step; W_eff of `merge` stays for good."""
    found = []
    for precision in ("tf32", "fp32"):
        with multiplied_in(precision):
            found.append(triton_backend.modulated_weight(make_problem(dtype=torch.float32).adapter()))
    assert torch.equal(*found)


@pytest.mark.parametrize(("shape", "launches"), [((1, 1), 0), ((40, 1), 1), ((1, 40), 1), ((40, 2), 2)])
def test_a_sum_over_one_column_is_not_fused(
    shape: tuple[int, int], launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y sums over W0's columns, dX over its rows."""
    case = Case("triton", "fused", torch.bfloat16)
    p = case.problem(tokens=3, out_features=shape[0], in_features=shape[1], ranks=(2,))
    summed: list[int] = []
    fused = triton_backend.fused_linear
    seen = lambda x, *rest: summed.append(x.shape[1]) or fused(x, *rest)  # noqa: E731
    monkeypatch.setattr(triton_backend, "fused_linear", seen)
    assert_within_budget(p.run(**case.options), case, p)
    assert len(summed) == launches
    assert 1 not in summed


@pytest.mark.parametrize("case", [case for case in cases("triton") if case.dtype == torch.float32], ids=str)
def test_ranks_beyond_the_factors_read_no_further(
    case: Case, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checking ranks on a GPU would wait for it, so the kernels clamp them to [0, ρ]."""
    monkeypatch.setattr(operator, "check_ranks", lambda *_: None)
    p = case.problem(ranks=(3, 5, 5))
    p = replace(p, A=guarded(p.A, row_padding=3), B=guarded(p.B, row_padding=3))
    found = []
    for ranks in ([0, 5, 5], [-7, 40, 2**31 - 1]):
        found.append(replace(p, ranks=torch.tensor(ranks, dtype=torch.int32)).run(**case.options))
    for name, expected, ours in zip(NAMES, *found, strict=True):
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "the kernels take bfloat16, float16, float32, got torch.float64"),
        ({"dtype": torch.float32, "ranks": (300,)}, "the kernels take ranks up to 256, got 300"),
    ],
)
def test_cases_that_the_kernels_refuse(change: dict[str, object], words: str) -> None:
    p = make_problem(**change)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=f"backend='triton' cannot run here: {words}.*'eager' works everywhere"
    ):
        p.forward(backend="triton")


def test_algorithm_of_another_backend() -> None:
    with pytest.raises(ValueError, match="merged, split, fused on backend 'triton', got 'expanded'"):
        make_problem(dtype=torch.float32).forward(backend="triton", algorithm="expanded")


def test_eager_takes_panels_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Intel's XPU, or here on a device without data, W_eff is built at once."""
    device = torch.device("meta")
    adapter = make_problem(
        dtype=torch.float32, block_order="contiguous", out_features=64, in_features=80
    ).adapter()
    tensors = {name: getattr(adapter, name).to(device) for name in ("weight", "A", "B", "ranks", "scaling")}
    adapter = replace(
        adapter, **tensors, partition=adapter.partition.to(device), block_ranks=adapter.host_ranks()
    )
    products: list[tuple[int, ...]] = []
    mm = torch.mm

    def counted(*operands: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        products.append(tuple(out.shape))
        return mm(*operands, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    monkeypatch.setattr(eager, "MERGED_PANEL", 16)
    monkeypatch.setattr(eager, "MERGED_BYTES", 1)
    eager.merged(torch.empty(300, 80, device=device), adapter)
    assert products.count((300, 64)) == 1


@pytest.mark.parametrize("dtype", HALF)
def test_a_batched_product_is_not_rounded(dtype: torch.dtype) -> None:
    """Nor where torch has no product of half types with a float32 result, as on a CPU."""
    left, right = torch.randn(2, 8, 300, dtype=dtype), torch.randn(2, 300, 8, dtype=dtype)
    found = bmm_in_float32(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, left.float() @ right.float())


OUTSIDE = """
import torch, sys
{prelude}
from smoa_kernels import FusedSMoALinear
layer = FusedSMoALinear(8, 6, r=2, backend="triton")
try:
    layer(torch.randn(3, 8))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("prelude", "words"),
    [
        ("", "x is on the CPU, where kernels run only under Triton's interpreter (TRITON_INTERPRET=1)"),
        pytest.param(
            "sys.modules['triton'] = None",
            "triton is not installed: install 3.6 or newer",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import triton; triton.__version__ = '3.1.0'",
            "triton 3.1.0 is older than 3.6, the oldest supported: update it",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_where_the_kernels_cannot_run(prelude: str, words: str) -> None:
    result = ran("-c", OUTSIDE.format(prelude=prelude), TRITON_INTERPRET=None)
    expected = f"backend='triton' cannot run here: {words}; backend='eager' works everywhere"
    assert result.stdout.strip() == expected, result.stderr
