"""Backend "triton" as a whole: `smoa_linear` and `FusedSMoALinear` through the kernels, gradients included."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import Guarded
from problems import LinearProblem, flat_call, make_problem, relative_error
from torch import Tensor, nn

from smoa_kernels import (
    BlockPartition,
    FusedSMoALinear,
    backends,
    operator,
    smoa_linear,
)
from smoa_kernels.backends import triton as triton_backend
from smoa_kernels.cost import grad_tiling
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import padding_masks, scaling_tensor
from smoa_kernels.definition.reference import reference_delta_weight
from smoa_kernels.kernels.common import padded_width
from smoa_kernels.kernels.permute import gather_columns, scatter_columns
from smoa_kernels.operator import linear

pytestmark = pytest.mark.numerical

ALGORITHMS = triton_backend.ALGORITHMS
NAMES = ("y", "dx", "dA", "dB", "dbias")


def problem(dtype: torch.dtype, device: torch.device, **kwargs: object) -> LinearProblem:
    return make_problem(**kwargs).to(dtype).on(device)  # type: ignore[arg-type]


def assert_within_budget(p: LinearProblem, *, fp32_tolerance: float = 1e-5, **options: object) -> None:
    """Within twice the same-dtype reference's error; float32 within 1e-5 of the truth."""
    truth, baseline = p.to(torch.float64).run_reference(), p.run_reference()
    for name, ours, same_dtype, exact in zip(
        NAMES, p.run(backend="triton", **options), baseline, truth, strict=False
    ):
        assert ours.dtype == same_dtype.dtype, name
        budget = (
            fp32_tolerance if ours.dtype == torch.float32 else 2 * relative_error(same_dtype, exact) + 1e-6
        )
        assert relative_error(ours, exact) <= budget, name


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(dtype: torch.dtype, algorithm: str, device: torch.device) -> None:
    shape = {"tokens": 40, "out_features": 70, "in_features": 90, "ranks": (3, 2)}
    assert_within_budget(problem(dtype, device, **shape), algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "shape",
    [
        {"ranks": (3, 0, 2), "bias": False},
        {"ranks": (4,)},  # K = 1 is HiRA
        {
            "ranks": (2,) * 5,
            "random_labels": True,
            "out_features": 7,
            "in_features": 5,
        },  # some blocks are empty
        {"ranks": (40, 1), "tokens": 3},
    ],
)
def test_shapes(shape: dict[str, object], algorithm: str, device: torch.device) -> None:
    assert_within_budget(problem(torch.float32, device, **shape), algorithm=algorithm)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_long_batch_is_gathered_in_parts(
    dtype: torch.dtype, dropout: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 4096 tokens and 128 tiles are to a GPU, 64 and one are here; dropout keeps all tokens together."""
    p = problem(dtype, device, tokens=150, out_features=90, in_features=70, ranks=(3, 2), random_labels=True)
    seed = torch.tensor(3, device=device)
    whole = p.run(backend="triton", algorithm="split", dropout_p=dropout, dropout_seed=seed)
    monkeypatch.setattr(grad_tiling, "GRAD_PART_TOKENS", 64)
    monkeypatch.setattr(grad_tiling, "GRAD_PART_TILES", 1)
    gathered: list[int] = []
    by_block = triton_backend._by_block
    monkeypatch.setattr(
        triton_backend, "_by_block", lambda x, *rest: gathered.append(x.shape[0]) or by_block(x, *rest)
    )
    parts = p.run(backend="triton", algorithm="split", dropout_p=dropout, dropout_seed=seed)
    # x in the forward, then dY and x of each part; dX under dropout gathers dY anew
    assert gathered == ([150] * 4 if dropout else [150, 128, 128, 22, 22])
    for name, ours, theirs in zip(NAMES, parts, whole, strict=True):
        error = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
        assert relative_error(ours, theirs) <= (error if name in ("dA", "dB") else 0.0), name
    if not dropout:
        assert_within_budget(p, algorithm="split")


@pytest.mark.slow
@pytest.mark.parametrize("rubbish", [7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("options", [*({"algorithm": a} for a in ALGORITHMS), {"dropout_p": 0.4}], ids=str)
def test_padding_may_hold_anything(options: dict[str, object], rubbish: float, device: torch.device) -> None:
    """Memory that nobody initialised, or an optimiser that divided by zero there, must not reach a result."""
    clean, dirty = (
        problem(torch.float32, device, ranks=(3, 0, 20), random_labels=True, fill_padding=False)
        for _ in range(2)
    )
    used_A, used_B = padding_masks(dirty.partition, dirty.ranks, 20)
    dirty.A[~used_A], dirty.B[~used_B] = rubbish, rubbish
    seed = torch.tensor(3, device=device)
    for name, ours, expected in zip(
        NAMES,
        dirty.run(backend="triton", dropout_seed=seed, **options),
        clean.run(backend="triton", dropout_seed=seed, **options),
        strict=True,
    ):
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize("shape", [(0, 6), (6, 0)])
@pytest.mark.parametrize("options", [*({"algorithm": a} for a in ALGORITHMS), {"dropout_p": 0.4}], ids=str)
def test_a_weight_without_elements(
    options: dict[str, object], shape: tuple[int, int], device: torch.device
) -> None:
    labels = (torch.zeros(size, dtype=torch.int64, device=device) for size in shape)
    p = problem(torch.float32, device)
    A, B = torch.ones(2, shape[1], device=device), torch.ones(shape[0], 2, device=device)
    empty = replace(
        p,
        x=torch.ones(3, shape[1], device=device),
        dy=torch.ones(3, shape[0], device=device),
        weight=torch.ones(shape, device=device),
        bias=torch.ones(shape[0], device=device),
        A=A,
        B=B,
        partition=BlockPartition.from_labels(*labels, num_blocks=1),
        ranks=torch.full((1,), 2, dtype=torch.int32, device=device),
    )
    y, dx, dA, dB, dbias = empty.run(backend="triton", **options)
    expected = torch.ones(3, shape[0]), torch.zeros(3, shape[1]), torch.zeros_like(A), torch.zeros_like(B)
    for name, ours, value in zip(NAMES, (y, dx, dA, dB), expected, strict=False):
        assert torch.equal(ours, value.to(device)), name
    assert torch.equal(dbias, torch.full((shape[0],), 3.0, device=device))


@pytest.mark.parametrize("options", [*({"algorithm": a} for a in ALGORITHMS), {"dropout_p": 0.4}], ids=str)
def test_ranks_beyond_the_factors_read_no_further(
    options: dict[str, object], guarded: Guarded, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's ranks are not waited for, so not checked: the kernels take what lies outside as 0 or ρ."""
    monkeypatch.setattr(operator, "check_ranks", lambda *_: None)
    p = problem(torch.float32, device, ranks=(3, 5, 5))
    p = replace(p, A=guarded(p.A, row_padding=3), B=guarded(p.B, row_padding=3))
    inside = replace(p, ranks=torch.tensor([0, 5, 5], dtype=torch.int32, device=device))
    beyond = replace(p, ranks=torch.tensor([-7, 40, 2**31 - 1], dtype=torch.int32, device=device))
    seed = torch.tensor(3, device=device)
    with torch.no_grad():
        for name, ours, expected in zip(
            NAMES,
            run_in_place(beyond, dropout_seed=seed, **options),
            run_in_place(inside, dropout_seed=seed, **options),
            strict=False,
        ):
            assert torch.equal(ours, expected), name


def run_in_place(p: LinearProblem, **options: object) -> tuple[Tensor, ...]:
    """y, dX, dA, dB on the problem's own factors, where `LinearProblem.run` would copy them."""
    A, B = (t.detach().requires_grad_() for t in (p.A, p.B))
    x = p.x.clone().requires_grad_()
    with torch.enable_grad():
        y = smoa_linear(
            x, p.weight, p.bias, A, B, p.partition, p.ranks, scaling=p.scaling, backend="triton", **options
        )
        return (y.detach(), *torch.autograd.grad(y, (x, A, B), p.dy))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_tokens(algorithm: str, device: torch.device) -> None:
    p = problem(torch.float32, device, tokens=0)
    y, dx, dA, dB, dbias = p.run(backend="triton", algorithm=algorithm)
    assert y.shape == (0, 33)
    assert dx.shape == (0, 57)
    assert not dA.any()
    assert not dB.any()
    assert not dbias.any()


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_float32_factors_over_a_half_base(factor_dtype: torch.dtype, device: torch.device) -> None:
    p = problem(torch.float64, device).to(torch.bfloat16, factor_dtype)
    truth, baseline = p.to(torch.float64).run_reference(), p.run_reference()
    for name, ours, same_dtype, exact in zip(NAMES, p.run(backend="triton"), baseline, truth, strict=True):
        assert ours.dtype == same_dtype.dtype, name
        assert relative_error(ours, exact) <= 2 * relative_error(same_dtype, exact) + 1e-6, name


def test_strided_inputs(device: torch.device) -> None:
    p = problem(torch.float32, device)
    wide = torch.cat([p.x, p.x], 1)[:, : p.x.shape[1]]
    column_major = p.weight.T.contiguous().T
    strided = replace(p, x=wide, weight=column_major, dy=p.dy.T.contiguous().T)
    for algorithm in ALGORITHMS:
        assert_within_budget(strided, algorithm=algorithm)


def test_dropout_is_one_mask_in_forward_and_backward(device: torch.device) -> None:
    """The mask is read off by gathering ones; with it the definition gives the outputs and every gradient."""
    p = problem(torch.float32, device, tokens=37)
    seed = torch.tensor(12345, device=device)
    dropout = Dropout(seed, 0.4)
    blocks = p.partition
    ones = torch.ones_like(p.x)
    width = padded_width(blocks.col_sizes, 64)
    gathered = gather_columns(ones, blocks.col_index, blocks.col_offsets, width, dropout=dropout)
    mask = scatter_columns(gathered, blocks.col_index, blocks.col_offsets, torch.empty_like(ones))
    assert 0.3 < float((mask == 0).float().mean()) < 0.5
    x, A, B = (t.clone().requires_grad_() for t in (p.x, p.A, p.B))
    delta = reference_delta_weight(p.weight, A, B, p.partition, p.ranks, scaling=p.scaling)
    y = torch.nn.functional.linear(x, p.weight, p.bias) + (x * mask) @ delta.T
    y.backward(p.dy)
    options = {"dropout_p": 0.4, "dropout_seed": seed, "backend": "triton"}
    ours = p.run(**options)
    for name, value, expected in zip(NAMES, ours, (y.detach(), x.grad, A.grad, B.grad), strict=False):
        assert relative_error(value, expected) < 1e-5, name
    for first, second in zip(ours, p.run(**options), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reruns_are_bitwise_equal(algorithm: str, device: torch.device) -> None:
    p = problem(torch.bfloat16, device)
    for first, second in zip(
        p.run(backend="triton", algorithm=algorithm),
        p.run(backend="triton", algorithm=algorithm),
        strict=True,
    ):
        assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("algorithm", ["split", "fused", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_dead_zone(dtype: torch.dtype, algorithm: str, bias: bool, device: torch.device) -> None:
    """A relative update of 1e-4 arrives; the noise of so small a problem is the base's rounding over √(T·N)."""
    p = problem(torch.float64, device, tokens=256, out_features=192, in_features=64, ranks=(4,), bias=bias)
    relative = p.scaling * (p.B @ p.A).square().mean().sqrt()
    p = replace(p, B=p.B * (1e-4 / relative)).to(dtype, torch.float32)
    base = replace(p, B=torch.zeros_like(p.B))
    truth = p.to(torch.float64).run_reference()[0] - base.to(torch.float64).run_reference()[0]

    def run(q: LinearProblem, **options: object) -> Tensor:
        arguments = (q.x, q.weight, q.bias, q.A, q.B, q.partition, q.ranks)
        return smoa_linear(*arguments, scaling=q.scaling, backend="triton", **options).double()

    change = run(p, algorithm=algorithm) - run(base, algorithm=algorithm)
    share = float((change * truth).sum() / truth.square().sum())
    # y errs by 2^-9·|y|/√3 per element (bf16) against an adapter output of 1e-4·|y|.
    noise = {torch.bfloat16: 11, torch.float16: 1.5}[dtype] * 2**0.5 / (256 * 192) ** 0.5
    assert abs(share - 1) < max(0.05, 4 * noise)


def test_a_rounded_weight_would_deliver_nothing(device: torch.device) -> None:
    p = problem(torch.float64, device, tokens=64, out_features=64, in_features=64, ranks=(4,), bias=False)
    p = replace(p, B=p.B * (1e-4 / (p.scaling * (p.B @ p.A).square().mean().sqrt()))).to(torch.bfloat16)
    base = replace(p, B=torch.zeros_like(p.B))
    merged = [q.run(backend="triton", algorithm="merged")[0] for q in (p, base)]
    assert relative_error(merged[0], merged[1]) < 1e-3


def test_layer_on_both_backends(device: torch.device) -> None:
    torch.manual_seed(0)
    layer = FusedSMoALinear.from_linear(nn.Linear(57, 33), r=5, num_blocks=2).to(device)
    nn.init.normal_(layer.smoa_B, std=0.3)
    other = copy.deepcopy(layer)
    other.backend = "triton"
    x = torch.randn(2, 9, 57, device=device)
    results = []
    for one in (layer, other):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, one.smoa_A.grad, one.smoa_B.grad))
    for eager, kernels in zip(*results, strict=True):
        assert relative_error(kernels, eager) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_on_both_backends(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = FusedSMoALinear.from_linear(nn.Linear(57, 33, dtype=dtype), r=5, num_blocks=2).to(device)
    nn.init.normal_(layer.smoa_B, std=0.3)
    original, exact = layer.weight.clone(), layer.weight.double() + layer.delta_weight().double()
    layer.backend = "triton"
    layer.merge()
    assert relative_error(layer.weight, exact) < (1e-6 if dtype == torch.float32 else 4e-3)
    layer.unmerge()
    assert torch.equal(layer.weight, original)


def test_saves_x_factors_and_frozen_tensors_only(device: torch.device) -> None:
    p = problem(torch.float32, device)
    x, A, B = (t.clone().requires_grad_() for t in (p.x, p.A, p.B))
    scaling = scaling_tensor(p.scaling, device)
    known = {t.data_ptr() for t in (x, A, B, p.weight, p.ranks, scaling, *p.partition.tensors())}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        smoa_linear(x, p.weight, p.bias, A, B, p.partition, p.ranks, scaling=scaling, backend="triton")
    assert {t.data_ptr() for t in saved} <= known


def test_opcheck(device: torch.device) -> None:
    p = problem(torch.float32, device, tokens=5)
    p = replace(p, A=p.A.requires_grad_(), B=p.B.requires_grad_())
    torch.library.opcheck(linear, (p.x.requires_grad_(), p.bias, "auto", *flat_call(p, backend="triton")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "the kernels take bfloat16, float16, float32, got torch.float64"),
        ({"ranks": (300,)}, "the kernels take ranks up to 256, got 300"),
    ],
)
def test_what_the_kernels_do_not_take(change: dict[str, object], words: str, device: torch.device) -> None:
    dtype = change.pop("dtype", torch.float32)
    p = problem(dtype, device, **change)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=f"backend='triton' cannot run here: {words}.*'eager' works everywhere"
    ):
        p.run(backend="triton")


def test_algorithm_of_another_backend(device: torch.device) -> None:
    with pytest.raises(ValueError, match="merged, split, fused on backend 'triton', got 'expanded'"):
        problem(torch.float32, device).run(backend="triton", algorithm="expanded")


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
        ("sys.modules['triton'] = None", "triton is not installed"),
        (
            "import triton; triton.__version__ = '3.1.0'",
            "triton 3.1.0 is older than 3.6, the oldest supported",
        ),
    ],
)
def test_where_the_kernels_cannot_run(prelude: str, words: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = OUTSIDE.format(prelude=prelude)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    expected = f"backend='triton' cannot run here: {words}; backend='eager' works everywhere"
    assert result.stdout.strip() == expected


@pytest.mark.parametrize(
    ("capability", "words"),
    [((7, 5), "the GPU's compute capability is 7.5, the oldest supported is 8.0"), ((9, 0), None)],
)
def test_old_gpus_are_named(
    capability: tuple[int, int], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends._device_obstacle.cache_clear()
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    try:
        cuda = torch.device("cuda", 0)
        assert backends.triton_obstacle(cuda, torch.bfloat16, 8) == words
        assert backends.resolve_backend("auto", cuda, torch.bfloat16, 8) == ("eager" if words else "triton")
        assert backends.resolve_backend("auto", torch.device("xpu", 0), torch.bfloat16, 8) == "eager"
        assert backends.resolve_backend("auto", cuda, torch.float64, 8) == "eager"
    finally:
        backends._device_obstacle.cache_clear()
