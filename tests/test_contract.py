"""The promises of every backend for every algorithm and dtype, each tested once.

The cases are `problems.cases`: an axis added there reaches every test. Other files test the operator, the layer and
whatever one backend alone does. Single kernels are tested in tests/kernels/.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from problems import (
    DEVICE,
    HALF,
    LAYOUTS,
    LEAVES,
    NAMES,
    ORDERS,
    SLOW,
    Case,
    LinearProblem,
    assert_within_budget,
    cases,
    each,
    error_over_budget,
    in_orders,
    interpreted,
    reference_linear,
    relative_error,
    small_update,
    some,
    survival,
    widest,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch_calls import Calls, on_threads, saved_tensors

from smoa_kernels import BlockPartition
from smoa_kernels.definition.packed import padding_masks

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("poisoned_memory")]

each_way = each(widest)
each_slowly = each(widest, slow=interpreted)
# The compiler sees the same operator for every block order.
each_compiled = each(widest, slow=lambda case: interpreted(case) or case.order != "spectral")
each_spectral = each(lambda backend: in_orders(widest(backend), "spectral"), slow=interpreted)

SHAPES: dict[str, dict[str, Any]] = {
    "uneven, one of rank 0": {"random_labels": True},
    "one block": {"ranks": (4,), "bias": False},  # K = 1 is HiRA
    "primes": {"tokens": 13, "out_features": 31, "in_features": 29, "ranks": (2, 1)},
    "one input": {"tokens": 40, "in_features": 1, "ranks": (2,)},
    "one token": {"tokens": 1, "ranks": (0, 0, 1)},
    "one of everything": {"tokens": 1, "out_features": 1, "in_features": 1, "ranks": (1,)},
    "no rank": {"ranks": (0, 0)},
    "high rank": {"tokens": 3, "ranks": (40, 1)},
}


def equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, ours, wanted in zip(NAMES, found, expected, strict=True):
        assert torch.equal(ours, wanted), name


# Numbers


def test_one_wrong_element_exceeds_the_budget() -> None:
    """One of thirty thousand hardly changes the norm."""
    truth = torch.randn(160, 192, dtype=torch.float64)
    rounded = truth.bfloat16()
    assert error_over_budget(rounded.clone(), rounded, truth) <= 1
    for wrong in (rounded[3, 4] + 0.1, NAN):
        ours = rounded.clone()
        ours[3, 4] = wrong
        assert not error_over_budget(ours, rounded, truth) <= 1


@pytest.mark.parametrize("shape", SHAPES)
@each_slowly
def test_results_of_every_shape(case: Case, shape: str) -> None:
    p = case.problem(**SHAPES[shape])
    assert_within_budget(p.run(**case.options), case, p)


@pytest.mark.parametrize(("shape", "ranks"), [((7, 5), (2,) * 9), ((1, 5), (0, 1)), ((5, 1), (17, 1))])
@each_spectral
def test_more_blocks_than_rows_or_columns(case: Case, shape: tuple[int, int], ranks: tuple[int, ...]) -> None:
    """Only labels allow this."""
    p = case.problem(ranks=ranks, random_labels=True, out_features=shape[0], in_features=shape[1])
    assert_within_budget(p.run(**case.options), case, p)


def of_every_order(backend: str) -> list[Case]:
    """The kernels distinguish only blocks of whole granules of 8 from all others, so a few orders are enough."""
    if backend == "triton":
        return in_orders(some(backend, torch.bfloat16), "contiguous", "granules of 8, primes", "random")
    found = some(backend, torch.float32, torch.bfloat16) if backend != "reference" else []
    return in_orders(found, *list(ORDERS)[1:])


@each(of_every_order, slow=interpreted)
def test_results_of_every_order(case: Case) -> None:
    p = case.problem()
    assert_within_budget(p.run(**case.options), case, p)


@each(
    lambda backend: (
        in_orders(cases(backend), "spectral", "contiguous", "granules of 8")
        if backend in ("eager", "native")
        else []
    )
)
def test_results_of_several_panels(case: Case) -> None:
    """More tokens and rows than one panel of a CPU backend; tests/kernels covers the tiles of every kernel."""
    p = case.problem(tokens=530, out_features=1104, in_features=48, ranks=(2, 1))
    assert_within_budget(p.run(**case.options), case, p)


@each(
    lambda backend: list(cases(backend)),
    slow=lambda case: interpreted(case) and case.dtype == torch.float16,
)
def test_results_in_every_dtype(case: Case) -> None:
    """Factors in W0's dtype, and in float32 over a half-precision base."""
    p = case.problem(tokens=40, out_features=70, in_features=90, ranks=(3, 2))
    wide = case.dtype if case.backend == "reference" else torch.promote_types(case.dtype, torch.float32)
    for factor_dtype in {case.dtype, wide}:  # in mixed dtypes the reference backend rounds once more
        mixed = p.to(case.dtype, factor_dtype)
        assert_within_budget(mixed.run(**case.options), case, mixed)


@each(lambda backend: list(cases(backend)), slow=interpreted)
def test_two_runs_are_bitwise_equal(case: Case) -> None:
    p = case.problem(random_labels=True)
    equal(p.run(**case.options), p.run(**case.options))


@pytest.mark.parametrize("threads", [1, 2, 3])
@each(lambda backend: some(backend, torch.float32, torch.bfloat16) if backend in ("eager", "native") else [])
def test_any_number_of_threads(case: Case, threads: int) -> None:
    p = case.problem(tokens=40, out_features=70, in_features=60)
    with on_threads(threads):
        assert_within_budget(p.run(**case.options), case, p)


@pytest.mark.parametrize("cut", [1, 17])
@each(lambda backend: [case for case in widest(backend) if not case.dropout], slow=interpreted)
def test_a_batch_in_two_parts(case: Case, cut: int) -> None:
    """A GEMM of fewer rows may sum in another order, so bits may differ."""
    p = case.problem(tokens=40)
    halves = [replace(p, x=p.x[rows], dy=p.dy[rows]) for rows in (slice(cut), slice(cut, None))]
    parts = [half.run(**case.options) for half in halves]
    for part, half in zip(parts, halves, strict=True):
        assert_within_budget(part, case, half)
    whole, truth = p.run_reference(), p.to(torch.float64).run_reference()
    for i, name in enumerate(("y", "dX")):
        assert error_over_budget(torch.cat([part[i] for part in parts]), whole[i], truth[i]) <= 1, name


each_layout = pytest.mark.parametrize("layout", [*list(LAYOUTS)[1:], "expanded", "windows"])


def stored(p: LinearProblem, layout: str) -> LinearProblem:
    if layout == "expanded":  # one row for all, as sum() passes to backward
        p = replace(p, x=p.x[:1].expand_as(p.x), dy=p.dy[:1].expand_as(p.dy))
    elif layout == "windows":  # both strides 1
        line = torch.randn(sum(p.x.shape), dtype=p.x.dtype)
        p = replace(p, x=line.unfold(0, p.x.shape[1], 1)[: p.x.shape[0]])
    else:
        p = p.stored(LAYOUTS[layout])
    return p


def of_any_strides(backend: str) -> list[Case]:
    """Half types too, whose columns eager copies as integers."""
    found = in_orders(some(backend, torch.bfloat16), *list(ORDERS)[1:6]) if backend == "eager" else []
    return [*widest(backend), *found]


@each_layout
@each(of_any_strides, slow=interpreted)
def test_any_strides(case: Case, layout: str) -> None:
    p = stored(case.problem(random_labels=True), layout)
    assert_within_budget(p.run(**case.options), case, p)


@each_way
def test_a_bias_and_ranks_of_any_stride(case: Case) -> None:
    p = case.problem()
    bias, ranks = (torch.stack([vector, vector + 1], 1)[:, 0] for vector in (p.bias, p.ranks))
    equal(replace(p, bias=bias, ranks=ranks).run(**case.options), p.run(**case.options))
    bias = p.bias[:1].expand_as(p.bias)
    found = (replace(p, bias=one).forward(**case.options) for one in (bias, bias.contiguous()))
    assert torch.equal(*found)


@each_spectral
def test_blocks_listed_in_any_order(case: Case) -> None:
    """A block may list its rows and columns in any order."""
    p = case.problem(random_labels=True)
    tensors, sizes = p.partition.tensors(), p.partition.sizes()
    for axis, parts in ((2, p.partition.row_sizes), (3, p.partition.col_sizes)):
        tensors[axis] = torch.cat([block.flip(0) for block in tensors[axis].split(parts)])
    turned = replace(p, partition=BlockPartition.from_tensors(tensors, sizes))
    assert_within_budget(turned.run(**case.options), case, turned)


@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (3, 0)])
@each_slowly
def test_any_leading_dimensions(case: Case, leading: tuple[int, ...]) -> None:
    flat = case.problem(tokens=torch.Size(leading).numel())
    folded = replace(flat, x=flat.x.view(*leading, 57), dy=flat.dy.view(*leading, 33))
    y, dx, *others = folded.run(**case.options)
    assert (y.shape, dx.shape) == ((*leading, 33), (*leading, 57))
    equal((y.reshape(-1, 33), dx.reshape(-1, 57), *others), flat.run(**case.options))
    assert flat.x.numel() or not any(map(Tensor.any, others))


@pytest.mark.parametrize(("rows", "cols"), [(0, 6), (6, 0)])
@each_way
def test_a_weight_without_elements(case: Case, rows: int, cols: int) -> None:
    p = case.problem(tokens=3, out_features=6, in_features=6, ranks=(2,))
    cut = replace(
        p, x=p.x[:, :cols], weight=p.weight[:rows, :cols], bias=p.bias[:rows], A=p.A[:, :cols], B=p.B[:rows],
        dy=p.dy[:, :rows], partition=p.partition.shard(slice(0, rows), slice(0, cols)),
    )  # fmt: skip
    y, dx, dA, dB, dbias = cut.run(**case.options)
    assert torch.equal(y, p.bias[:rows].expand(3, -1))
    assert torch.equal(dbias, p.dy[:, :rows].sum(0))
    assert not any(map(Tensor.any, (dx, dA, dB)))


@pytest.mark.parametrize(
    "rubbish", [float("nan"), *(pytest.param(x, marks=SLOW) for x in (7.0, float("inf")))]
)
@each_slowly
def test_padding_is_ignored_and_its_gradient_is_zero(case: Case, rubbish: float) -> None:
    """Padding may be uninitialised, or hold an optimiser's division by zero. It must not reach a result."""
    clean, dirty = (case.problem(ranks=(3, 0, 20), fill_padding=False) for _ in range(2))
    used_A, used_B = padding_masks(dirty.partition, dirty.ranks, 20)
    dirty.A[~used_A], dirty.B[~used_B] = rubbish, rubbish
    found = dirty.run(**case.options)
    equal(found, clean.run(**case.options))
    assert not found[2][~used_A].any()
    assert not found[3][~used_B].any()


NAN, INF = float("nan"), float("inf")
POISONS = [("x", NAN), ("x", INF), ("weight", NAN), ("weight", INF), ("A", NAN), ("B", INF), ("dy", NAN)]


def poisoned(case: Case, name: str, value: float, block: int) -> LinearProblem:
    """One poisoned number in one block's part of a tensor; block 1 has rank zero."""
    p = case.problem(tokens=6, out_features=21, in_features=26)
    row, col = int(p.partition.rows(block)[1]), int(p.partition.cols(block)[1])
    place = {"x": (2, col), "dy": (2, row), "weight": (row, col), "A": (0, col), "B": (row, 0)}[name]
    getattr(p, name)[place] = value
    return p


def assert_nothing_hidden(ours: Tensor, wanted: Tensor, poison: str) -> None:
    """Our result is finite exactly where the definition's result is, and agrees with it there."""
    finite = ours.isfinite()
    assert not (finite & ~wanted.isfinite()).any()
    # merged and expanded multiply a broken factor with the zeros of other blocks; 0 · NaN is NaN, so it may spread.
    assert poison in "AB" or torch.equal(finite, wanted.isfinite())
    rtol, atol = (4e-2, 4e-2) if ours.dtype in HALF else (2e-4, 2e-5)
    torch.testing.assert_close(ours[finite], wanted[finite], rtol=rtol, atol=atol)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("poison", POISONS, ids=str)
@each(lambda backend: some(backend, torch.float32, torch.bfloat16), slow=interpreted)
def test_nan_and_infinity_are_not_hidden(case: Case, poison: tuple[str, float], block: int) -> None:
    p = poisoned(case, *poison, block)
    for ours, wanted in zip(p.run(**case.options), case.definition(p), strict=True):
        assert_nothing_hidden(ours, wanted, poison[0])


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=SLOW)])
@each(lambda backend: some(backend, *HALF) if backend != "reference" else [], slow=interpreted)
def test_a_small_update_survives(case: Case, bias: bool) -> None:
    """An update far below the last bit of half precision survives.

    Split, expanded and fused add base and bias to it. A merged weight is rounded by thresholds: the longer a row, the
    smaller the updates that it delivers. The definition is left out: it rounds the base's output first.
    """
    tokens = 256 if case.backend == "triton" else 4096  # few in the interpreter

    def autocast(p: LinearProblem) -> Tensor:
        with torch.autocast(DEVICE.type, case.dtype):
            return p.to(torch.float32).forward(backend=case.backend)

    named = partial(LinearProblem.forward, **case.options)
    auto = partial(LinearProblem.forward, **case.options | {"algorithm": "auto"})
    if case.algorithm not in ("auto", "merged"):
        share, noise = survival(case, small_update(case, tokens, bias), named)
        assert abs(share - 1) < max(0.05, 4 * noise)
    for delta, allowed in ((3e-4, 0.1), (1e-3, 0.05)):
        p = small_update(case, 256, bias, 1024, delta)
        for run in (named, auto, *([] if case.dropout else [autocast])):
            assert abs(survival(case, p, run)[0] - 1) < allowed


# Autograd


@each_slowly
def test_only_the_gradients_that_are_asked_for(case: Case) -> None:
    p = case.problem(tokens=5)
    whole = dict(zip(LEAVES, p.run(**case.options)[1:], strict=True))
    for wanted in ((), *((name,) for name in LEAVES), ("x", "B")):
        leaves = p.leaves(*wanted)
        y = leaves.forward(**case.options)
        assert y.requires_grad == bool(wanted)
        if wanted:
            y.backward(p.dy)
        for name in LEAVES:
            gradient = getattr(leaves, name).grad
            assert (gradient is not None) == (name in wanted), wanted
            assert gradient is None or torch.equal(gradient, whole[name]), (wanted, name)


@each_way
def test_saves_x_the_factors_and_frozen_tensors_only(case: Case) -> None:
    p, options = case.problem(), case.options
    p = replace(p, scaling=torch.tensor(0.7, dtype=torch.float64))
    known = [p.x, p.A, p.B, p.weight, p.ranks, p.scaling, *p.partition.tensors()]
    known += [value for value in options.values() if isinstance(value, Tensor)]
    for wanted in (LEAVES, ("x",)):
        with saved_tensors() as saved:
            p.leaves(*wanted).forward(**options)
        found = {t.data_ptr() for t in saved}
        assert found <= {t.data_ptr() for t in known}
        assert (p.x.data_ptr() in found) == ("A" in wanted)  # with frozen factors x is not kept


@each(lambda backend: some(backend, torch.bfloat16))
def test_autocast_is_a_cast_of_x_and_the_frozen_tensors(case: Case) -> None:
    stored = case.problem().to(torch.float32)
    cast = stored.to(torch.bfloat16, torch.float32)
    expected = cast.run(**case.options)
    found = replace(stored, dy=cast.dy).run(autocast=torch.bfloat16, **case.options)
    assert [t.dtype for t in found] == [torch.bfloat16, *(torch.float32,) * 4]
    equal(found, tuple(map(Tensor.to, expected, (t.dtype for t in found))))
    with torch.autocast(DEVICE.type, torch.bfloat16):  # of the backward too
        equal(cast.run(**case.options), expected)


@each(lambda backend: some(backend, torch.float64))
def test_autocast_leaves_float64_alone(case: Case) -> None:
    p = case.problem()
    equal(p.run(autocast=torch.bfloat16, **case.options), p.run(**case.options))


# Dropout


each_dropout = each(lambda backend: [case for case in widest(backend) if case.dropout])


@each_dropout
def test_a_mask_is_drawn_by_seed_and_recomputed(case: Case) -> None:
    p = case.problem()
    drawn = {"backend": case.backend, "dropout_p": 0.4}

    def run(how: bool | None) -> tuple[Tensor, ...]:
        torch.manual_seed(11)
        leaves = p.leaves(*LEAVES)

        def call(x: Tensor) -> Tensor:
            return replace(leaves, x=x).forward(**drawn)

        y = call(leaves.x) if how is None else checkpoint(call, leaves.x, use_reentrant=how)
        y.backward(p.dy)
        return (y.detach(), *(getattr(leaves, name).grad for name in LEAVES))

    expected = run(None)
    for how in (True, False):  # both kinds of checkpointing
        equal(run(how), expected)
    assert not torch.equal(expected[0], p.forward(**drawn))


@each_dropout
def test_a_shard_draws_its_columns_of_the_whole_mask(case: Case) -> None:
    p = case.problem(random_labels=True)
    whole, parts = p.run(**case.options), []
    for first, last in ((0, 23), (23, 57)):
        cols = slice(first, last)
        shard = replace(
            p, x=p.x[:, cols], weight=p.weight[:, cols], A=p.A[:, cols], bias=p.bias if first == 0 else None,
            partition=p.partition.shard(col_slice=cols),
        )  # fmt: skip
        parts.append(shard.run(column_offset=first, global_in_features=57, **case.options))
    (y, dx, dA, dB, dbias), others = parts
    dx, dA = (torch.cat([left, right], 1) for left, right in ((dx, others[1]), (dA, others[2])))
    joined = y + others[0], dx, dA, dB + others[3], dbias
    for name, ours, wanted in zip(NAMES, joined, whole, strict=True):
        assert relative_error(ours, wanted) < 1e-6, name


# Compilers


@pytest.mark.parametrize(
    "wanted", [LEAVES, pytest.param(("x",), marks=SLOW), pytest.param(("A",), marks=SLOW)]
)
@each_compiled
def test_opcheck(case: Case, wanted: tuple[str, ...]) -> None:
    """Checks forward, and backward with all gradients, with dX alone and with dA and dB alone."""
    p = case.problem(tokens=5)
    with Calls() as calls:
        p.leaves(*wanted).forward(**case.options).backward(p.dy)
    (linear, arguments), (backward, others) = (call for call in calls.made if call[0].namespace == "smoa")
    assert (linear, backward) == (torch.ops.smoa.linear.default, torch.ops.smoa.linear_backward.default)
    torch.library.opcheck(linear, arguments)
    # The backward has no backward: tests/test_derivatives.py.
    torch.library.opcheck(backward, tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, others))


@each_compiled
def test_compiles_whole(case: Case) -> None:
    """The compiler traces the choice of backend and algorithm, although it cannot follow their imports."""
    torch._dynamo.reset()
    p = case.problem(ranks=(3, 1, 2))
    dropout = case.dropout
    settings = {"dropout": dropout.p} if dropout else {"algorithm": case.algorithm}
    layer = p.layer(partition=p.partition, backend=case.backend, **settings)

    def run(module: nn.Module) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        x = p.x.clone().requires_grad_()
        y = module(x)
        return (y.detach(), *torch.autograd.grad(y, (x, layer.smoa.A, layer.smoa.B), p.dy))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(layer))


# The merged weight


@each(
    lambda backend: in_orders(
        (case for case in cases(backend) if case.algorithm == "merged"), "spectral", "contiguous"
    )
)
def test_merge_is_delta_weight_and_unmerge_restores_every_bit(case: Case) -> None:
    p = case.problem(random_labels=True)
    exact, same = p.to(torch.float64), p.weight + p.delta_weight()
    layer = replace(p, weight=p.weight.clone()).layer(partition=p.partition, backend=case.backend)
    assert error_over_budget(layer.delta_weight(), p.delta_weight(), exact.delta_weight()) <= 1
    layer.merge()
    assert error_over_budget(layer.weight, same, exact.weight + exact.delta_weight()) <= 1
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[case.dtype.itemsize]
    for poison in (("x", 1.0), *POISONS[2:-1]):
        p = poisoned(case, *poison, 0)
        layer = replace(p, weight=p.weight.clone()).layer(partition=p.partition, backend=case.backend)
        layer.merge()
        assert_nothing_hidden(layer(p.x), p.forward(reference_linear), poison[0])
        layer.unmerge()
        assert torch.equal(layer.weight.view(bits), p.weight.view(bits))
