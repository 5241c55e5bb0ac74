"""Experts: their blocks, and the operator on the CPU's backends."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from expert_problems import RULES, make_blocks, make_problem
from problems import DTYPES, HALF, if_it_runs, unsupported_reason
from torch import Tensor
from torch_calls import Largest, on_threads, saved_tensors

from smoa_kernels.backends.native import backend as native
from smoa_kernels.definition.experts import ExpertBlocks, index_dtype, reference_experts_linear
from smoa_kernels.definition.precision import KERNEL_DTYPES
from smoa_kernels.operators.experts import experts_linear

BACKENDS = [
    *map(if_it_runs, ("eager", "native")),
    if_it_runs("triton", pytest.mark.slow, pytest.mark.long),
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
numerical = pytest.mark.numerical
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled code runs on CPUs")


CASES = [
    pytest.param(*each.values, dtype, marks=each.marks)
    for each in BACKENDS
    for dtype in (DTYPES if each.values == ("eager",) else KERNEL_DTYPES)
]


GRANULES: dict[str, Any] = {"pairs": (5, 0, 18), "rows": 48, "cols": 88}


@numerical
@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("blocks", ["contiguous", "shared", "own", "empty", *RULES])
@pytest.mark.parametrize("transposed", [False, True])
def test_results_are_within_their_budget(
    backend: str, dtype: torch.dtype, blocks: str, transposed: bool
) -> None:
    sizes = GRANULES if "granules" in blocks else {}
    p = make_problem(blocks=blocks, transposed=transposed, dtype=dtype, **sizes)
    p.assert_within_budget(p.operator(backend))


@numerical
@each_backend
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("blocks", ["contiguous granules", "own"])
def test_float32_factors_over_a_half_weight(backend: str, dtype: torch.dtype, blocks: str) -> None:
    p = make_problem(blocks=blocks, **GRANULES).to(dtype, torch.float32)
    p.assert_within_budget(p.operator(backend))


@on_the_cpu
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_pairs_that_no_expert_counts_are_refused(backend: str) -> None:
    """No expert would compute their rows, which would keep stale memory."""
    p = make_problem(dtype=torch.float32)
    below = torch.cat([p.ends.new_full((1,), -1), p.ends[1:]])
    for x, ends in ((torch.cat([p.x, p.x[:1]]), p.ends), (p.x, below)):
        with pytest.raises(ValueError, match="ends must count x's"):
            experts_linear(x, ends, p.adapter, backend)


SHAPES: list[dict[str, Any]] = [
    {"pairs": (1,), "ranks": (2,), "rows": 1, "cols": 1},
    {"pairs": (0, 0, 1), "ranks": (2, 2), "rows": 16, "cols": 24},  # one token, routed to one expert
    {"pairs": (40, 0, 130), "ranks": (1, 3), "rows": 300, "cols": 290},  # several panels
    {"pairs": (5, 9), "ranks": (4,), "rows": 64, "cols": 31},  # K = 1
    {"pairs": (20, 20), "ranks": (2, 2, 2, 2), "rows": 40, "cols": 40},
    # One pair more than full tiles.
    {**GRANULES, "pairs": (33, 0, 65, 1), "ranks": (20, 12), "blocks": "contiguous granules"},
    *(  # no rank, and more ranks than a kernel handles at once
        {**GRANULES, "ranks": ranks, "blocks": blocks}
        for ranks in [(0, 0), (0, 5), (1, 40), (65, 33)]
        for blocks in ["contiguous granules", "own"]
    ),
]
FEW: list[dict[str, Any]] = [
    {"pairs": pairs, "blocks": blocks, "ranks": ranks, "rows": 70, "cols": 90}
    for pairs in [(1, 2, 0, 3), (5, 8, 9, 0)]
    for blocks in ["contiguous", "own", "empty"]
    for ranks in [(2, 2, 2), (3, 0, 2), (5, 1, 9)]
]


@numerical
@each_backend
@pytest.mark.parametrize("sizes", SHAPES + FEW, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_results_of_every_shape(
    backend: str, sizes: dict[str, Any], threads: int, poisoned_memory: None
) -> None:
    """The gradient of an expert without pairs is exactly zero."""
    p = make_problem(dtype=torch.float32, **sizes)
    with on_threads(threads):
        found = p.operator(backend)
    p.assert_within_budget(found)
    idle = p.ends.diff(prepend=p.ends.new_zeros(1)) == 0
    assert not any(gradient[idle].any() for gradient in found[2:])


@numerical
@each_backend
def test_no_token_at_all(backend: str) -> None:
    p = make_problem(pairs=(0, 0), dtype=torch.float32)
    y, dx, dA, dB = p.operator(backend)
    assert (y.shape, dx.shape) == (p.dy.shape, p.x.shape)
    assert not dA.any()
    assert not dB.any()
    one_side_shared = torch.tensor([[0, 0, 1], [1, 0, 0]]), torch.tensor([[0, 1], [0, 1]])
    assert ExpertBlocks.from_labels(*one_side_shared, 2).partitions([]) == []


@numerical
@on_the_cpu
@pytest.mark.parametrize("backend", BACKENDS[1:2])  # eager's sums are torch's; their length depends on layout
@pytest.mark.parametrize(
    ("pairs", "ranks", "rows", "cols"),
    [
        ((5, 9, 15), (5, 1, 9), 374, 60),  # dX: MKL's sums are short in this layout for fewer than 16 pairs
        ((10,), (8,), 7, 1536),  # dB: the last rows of the block are fewer than one contraction panel
        ((19,), (2,), 11830, 96),  # dA: one block with very many rows
    ],
)
def test_sums_are_as_short_as_torchs(
    backend: str, pairs: tuple[int, ...], ranks: tuple[int, ...], rows: int, cols: int
) -> None:
    p = make_problem(pairs=pairs, ranks=ranks, rows=rows, cols=cols, transposed=True, dtype=torch.float32)
    p.assert_within_budget(p.operator(backend))


@numerical
@on_the_cpu
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("pairs", [(1, 1, 1), (4, 3, 5), (40, 30, 50)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_an_expert_whose_update_is_zero_gives_the_bits_of_its_weight(
    backend: str, pairs: tuple[int, ...], dtype: torch.dtype
) -> None:
    """True for any B of other experts."""
    p = make_problem(pairs=pairs, dtype=dtype)
    p.adapter.B[1] = 0
    y, plain = experts_linear(p.x, p.ends, p.adapter, backend), torch.empty_like(p.dy)
    for e, rows in enumerate(p.x.split(pairs)):
        torch.mm(rows, p.adapter.weight[e].T, out=plain.split(pairs)[e])
    same = [torch.equal(*both) for both in zip(y.split(pairs), plain.split(pairs), strict=True)]
    assert same == [False, True, False]
    off = replace(p.adapter, scaling=torch.zeros(()).double())
    assert torch.equal(experts_linear(p.x, p.ends, off, backend), plain)


WITHOUT_NATIVE = unsupported_reason("native")
needs_native = pytest.mark.skipif(WITHOUT_NATIVE is not None, reason=str(WITHOUT_NATIVE))


@on_the_cpu
@needs_native
@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: replace(p, x=p.x[:, 1:]),
        lambda p: replace(p, x=p.x.half()),
        lambda p: replace(p, adapter=replace(p.adapter, B=p.adapter.B.bfloat16())),
    ],
    ids=["fewer columns", "x of another dtype", "B of another dtype than A"],
)
def test_compiled_layers_get_no_operands_that_they_would_read_beyond(
    spoil: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, torch's operators compute with them or raise."""
    p = spoil(make_problem().to(torch.bfloat16, torch.float32))
    monkeypatch.setattr(native.Call, "run", lambda *_, **__: pytest.fail("compiled code got them"))
    with suppress(RuntimeError):
        p.operator("native")


@on_the_cpu
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", ["contiguous", "own"])
def test_nothing_as_large_as_the_weight_is_made_or_saved(
    backend: str, dtype: torch.dtype, blocks: str
) -> None:
    pairs = (2, 0, 9, 1, 3, 1, 0, 12)
    p = make_problem(pairs=pairs, rows=64, cols=48, blocks=blocks, dtype=dtype)
    adapter = p.adapter
    x, A, B = (t.clone().requires_grad_() for t in (p.x, adapter.A, adapter.B))
    with Largest(adapter.weight.untyped_storage().data_ptr()) as largest, saved_tensors() as saved:
        y = experts_linear(x, p.ends, replace(adapter, A=A, B=B), backend)
        torch.autograd.grad(y, (x, A, B), p.dy)
    # At most as much as W_eff of three of the eight experts.
    assert p.x.numel() <= largest.elements < adapter.weight.numel() * 3 // len(pairs)
    given = (x, p.ends, A, B, *vars(adapter).values(), *vars(adapter.blocks).values())
    places = {each.untyped_storage().data_ptr() for each in given if isinstance(each, Tensor)}
    assert {t.untyped_storage().data_ptr() for t in saved} <= places
    assert len(saved) > 5


@numerical
@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_never_read(backend: str, dtype: torch.dtype) -> None:
    p = make_problem(dtype=dtype)
    rotten = replace(p.adapter, A=p.adapter.A.clone(), B=p.adapter.B.clone())
    for e, layer in enumerate(p.adapter.experts(range(len(p.adapter.weight)))):
        for k, rank in enumerate(p.adapter.ranks.tolist()):
            rotten.A[e, rank:, layer.partition.cols(k)] = torch.nan
            rotten.B[e, layer.partition.rows(k), rank:] = torch.nan
    for clean, found in zip(p.operator(backend), replace(p, adapter=rotten).operator(backend), strict=True):
        assert torch.equal(clean, found)


@numerical
@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_survive_half_precision(backend: str, dtype: torch.dtype) -> None:
    """It is added before the only rounding, or W_eff is rounded by thresholds: on average all of it survives."""
    exact = make_problem(pairs=(200, 0, 300), rows=96, cols=512, ranks=(2, 2), blocks="shared")
    p = replace(exact, adapter=replace(exact.adapter, B=exact.adapter.B * 1e-3)).to(dtype, torch.float32)

    def change(function: object, problem: object) -> Tensor:
        base = replace(problem.adapter, B=problem.adapter.B * 0)
        y, without = (function(problem.x, problem.ends, each) for each in (problem.adapter, base))
        return y.double() - without.double()

    truth = change(reference_experts_linear, p.to(torch.float64))
    found = change(partial(experts_linear, backend=backend), p)
    share = float((found * truth).sum() / truth.square().sum())
    # Of long rows thresholds deliver more exactly.
    assert abs(share - 1) < (0.05 if backend == "triton" else 0.1)


@numerical
@each_backend
def test_only_requested_gradients(backend: str) -> None:
    p = make_problem(dtype=torch.float32)
    _, dx, dA, _dB = p.operator(backend)
    x, A = p.x.clone().requires_grad_(), p.adapter.A.clone().requires_grad_()
    experts_linear(x, p.ends, p.adapter, backend).backward(p.dy)
    assert torch.equal(x.grad, dx)
    experts_linear(p.x, p.ends, replace(p.adapter, A=A), backend).backward(p.dy)
    assert torch.equal(A.grad, dA)


@pytest.mark.slow
def test_operator_passes_torchs_own_checks() -> None:
    from smoa_kernels.operators.experts import flatten

    p = make_problem(dtype=torch.float32)
    leaves = {"A": p.adapter.A.requires_grad_(), "B": p.adapter.B.requires_grad_()}
    flat = flatten(p.ends, replace(p.adapter, **leaves), "eager")
    torch.library.opcheck(torch.ops.smoa.experts_linear.default, (p.x.requires_grad_(), *flat))


@pytest.mark.slow
def test_compiled_graphs_hold_it_whole() -> None:
    p = make_problem(dtype=torch.float32)
    compiled = torch.compile(lambda x, ends: experts_linear(x, ends, p.adapter, "eager") * 2, fullgraph=True)
    expected = experts_linear(p.x, p.ends, p.adapter, "eager") * 2
    assert torch.equal(compiled(p.x, p.ends), expected)
    other = make_problem(pairs=(1, 2, 3, 4, 1), dtype=torch.float32)  # as many pairs, distributed otherwise
    expected = experts_linear(other.x, other.ends, p.adapter, "eager") * 2
    assert torch.equal(compiled(other.x, other.ends), expected)


def test_no_second_derivative() -> None:
    p = make_problem(dtype=torch.float32)
    x = p.x.requires_grad_()
    loss = experts_linear(x, p.ends, p.adapter, "eager").square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@on_the_cpu
@needs_native
@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: replace(p, ends=p.ends + 1),
        lambda p: replace(p, ends=p.ends.flip(0)),
        lambda p: _with(p, row_offsets=p.adapter.blocks.row_offsets + 1),
        lambda p: _with(p, row_offsets=p.adapter.blocks.row_offsets * 10**6),
        lambda p: _with(p, col_index=p.adapter.blocks.col_index * 0),
        lambda p: _with(p, row_index=p.adapter.blocks.row_index + 1),
    ],
    ids=["ends beyond x", "ends that fall", "offsets", "huge offsets", "a column twice", "a row beyond"],
)
def test_compiled_code_reads_nothing_beyond_its_operands(spoil: object) -> None:
    p = spoil(make_problem(dtype=torch.float32))
    with pytest.raises(ValueError, match="blocks must have each row"):
        p.operator("native")


@on_the_cpu
@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_a_workspace_is_large_enough(threads: int, guarded_memory: None) -> None:
    draw = random.Random(threads)
    for seed in range(25):
        p = make_problem(
            pairs=(draw.choice((1, 3, 9)), *draw.choices((0, 1, 8, 9, 30, 270), k=2)),
            rows=draw.randint(1, 600),
            cols=draw.randint(1, 600),
            ranks=(draw.randint(1, 12), draw.randint(0, 3), draw.randint(0, 3)),
            blocks=draw.choice(("contiguous", "shared", "own", "empty")),
            transposed=draw.random() < 0.5,
            dtype=torch.float32,
            seed=seed,
        )
        with on_threads(threads):
            assert all(result.isfinite().all() for result in p.operator("native"))


def _with(p: object, **changed: Tensor) -> object:
    return replace(p, adapter=replace(p.adapter, blocks=replace(p.adapter.blocks, **changed)))


@pytest.mark.parametrize("kind", ["contiguous", "shared", "own", "empty"])
def test_blocks_are_those_of_each_experts_partition(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = make_blocks(kind, 4, (12, 9), 3, generator)
    sides = [torch.randint(3, (4, size), generator=generator) for size in (12, 9)]
    sides[0][0], sides[1][0] = 0, 0  # the granule must be that of all experts
    blocks = ExpertBlocks.from_labels(*sides, 3) if kind == "own" else blocks
    for e, partition in enumerate(blocks.partitions(range(4))):
        again = type(partition).from_labels(partition.row_block, partition.col_block, 3)
        for name in ("row_index", "col_index", "row_offsets", "col_offsets", "row_block", "col_block"):
            assert torch.equal(getattr(partition, name), getattr(again, name)), name
        assert (partition.row_sizes, partition.col_sizes) == (again.row_sizes, again.col_sizes)
        assert again.granularity % partition.granularity == 0
        if kind == "own":
            assert torch.equal(partition.row_block.long(), sides[0][e])


def test_shared_indices_are_kept_once() -> None:
    generator = torch.Generator().manual_seed(0)
    assert len(make_blocks("shared", 7, (40, 30), 2, generator).row_index) == 1
    contiguous = make_blocks("contiguous", 7, (40, 30), 2, generator)
    assert contiguous.row_index is None
    assert len(contiguous.row_offsets) == 1
    own = make_blocks("own", 7, (40, 30), 2, generator)
    assert own.row_index.shape == (7, 40)
    assert own.row_index.itemsize == 2
    assert index_dtype(32_768) == torch.int16  # the last index is 32,767
    assert index_dtype(32_769) == torch.int32
    order = torch.arange(32_768) % 2
    wide = ExpertBlocks.from_labels(order[None], torch.arange(4)[None] % 2, 2)
    assert torch.equal(wide.partitions([0])[0].row_index, order.argsort(stable=True))
