"""block_matmul: y[:, rows_k] = xg_k ΔW_kᵀ of all blocks in one launch, and the transposed product."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DTYPES,
    Guarded,
    adapter_of,
    assert_within_budget,
    assert_within_its_rounding,
    delta_weight,
    from_vector,
    need_memory,
    shipped_here,
)
from problems import LinearProblem, make_problem
from torch import Tensor
from vectors import Vector, all_vectors

from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.kernels import heuristic, launch
from smoa_kernels.kernels.block_matmul import block_matmul, block_ordered
from smoa_kernels.kernels.launch import BlockMatmulConfig
from smoa_kernels.kernels.modulate import modulated_blocks
from smoa_kernels.kernels.permute import gather_columns, scatter_columns

pytestmark = pytest.mark.numerical

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Small enough that small problems have several tiles of each kind, and a last group of tokens that is not full.
TILE = 16
SMALL = BlockMatmulConfig(block_t=16, block_n=TILE, block_c=TILE, group_t=2, num_warps=4, num_stages=2)


def blocks(adapter: PackedAdapter, multiple: int = TILE) -> Tensor:
    return modulated_blocks(adapter, row_multiple=multiple, col_multiple=multiple)


def gather(x: Tensor, adapter: PackedAdapter, width: int) -> Tensor:
    return gather_columns(x, adapter.partition.col_index, adapter.partition.col_offsets, width)


def output(problem: LinearProblem) -> Tensor:
    """x ΔWᵀ, from ΔW's own kernel and the gather's."""
    adapter = adapter_of(problem)
    delta = blocks(adapter)
    out = torch.empty_like(problem.dy)
    return block_matmul(gather(problem.x, adapter, delta.shape[2]), adapter, delta, out=out, config=SMALL)


def check(problem: LinearProblem, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> None:
    rounded = problem.to(dtype, factor_dtype)
    delta, true_delta = delta_weight(rounded), delta_weight(rounded.to(torch.float64))
    same, truth = rounded.x @ delta.T, rounded.x.double() @ true_delta.T
    assert_within_budget(output(rounded), same, truth)
    if rounded.A.shape[0] <= 32:
        adapter = adapter_of(rounded)
        weight_blocks = block_ordered(adapter, row_multiple=TILE, col_multiple=TILE)
        xg = gather(rounded.x, adapter, weight_blocks.shape[2])
        out = torch.empty_like(same)
        block_matmul(xg, adapter, None, weight_blocks=weight_blocks, out=out, config=SMALL)
        assert_within_budget(out, same, truth)


@each_dtype
@pytest.mark.parametrize("vector", all_vectors(), ids=lambda vector: vector.name)
def test_vectors(vector: Vector, dtype: torch.dtype, device: torch.device) -> None:
    check(from_vector(vector).on(device), dtype)


@pytest.mark.parametrize("rank", [1, 16, 32, 256])
def test_float32_factors_over_a_half_weight(rank: int, device: torch.device) -> None:
    problem = make_problem(ranks=(rank, max(rank // 2, 1)), random_labels=True).on(device)
    check(problem, torch.bfloat16, torch.float32)


@each_dtype
@pytest.mark.parametrize("contiguous", [True, False])
def test_transposed_is_dy_delta(contiguous: bool, dtype: torch.dtype, device: torch.device) -> None:
    """dX of the adapter, dY ΔW, in block order, from ΔW's own blocks or from the transposed adapter's."""
    problem = make_problem(tokens=19, random_labels=True).on(device).to(dtype)
    adapter = adapter_of(problem)
    delta = blocks(adapter.T) if contiguous else blocks(adapter).transpose(1, 2)
    dyg = gather(problem.dy, adapter.T, delta.shape[2])
    dxg = torch.empty(19, 3, delta.shape[1], dtype=dtype, device=device)
    block_matmul(dyg, adapter.T, delta, out=dxg, config=SMALL)
    partition = adapter.partition
    for k, size in enumerate(partition.col_sizes):
        assert not dxg[:, k, size:].any()  # zero, hence finite, in padding
    dx = torch.empty_like(problem.x)
    scatter_columns(dxg, partition.col_index, partition.col_offsets, dx)
    truth = problem.dy.double() @ delta_weight(problem.to(torch.float64))
    assert_within_budget(dx, problem.dy @ delta_weight(problem), truth)
    natural = torch.empty_like(dx)
    assert torch.equal(block_matmul(dyg, adapter.T, delta, out=natural, config=SMALL), dx)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "dtype"), shipped_here("block_matmul"), ids=str)
def test_every_shipped_configuration(config: BlockMatmulConfig, dtype: str, device: torch.device) -> None:
    problem = make_problem(tokens=5, out_features=130, in_features=70, ranks=(5, 2)).on(device)
    problem = problem.to(heuristic.DTYPES[dtype])
    adapter = adapter_of(problem)
    delta = blocks(adapter, 128)
    out = torch.empty(5, 130, dtype=problem.x.dtype, device=device)
    settings = {"allow_tf32": dtype == "tf32", "config": config}
    block_matmul(gather(problem.x, adapter, 128), adapter, delta, out=out, **settings)
    truth = problem.x.double() @ delta_weight(problem.to(torch.float64)).T
    assert_within_its_rounding(dtype, out, problem.x @ delta_weight(problem).T, truth)


def test_strides_and_guards(guarded: Guarded, device: torch.device) -> None:
    """Rows of y further apart than their width, y transposed, x blocks apart: nothing outside is touched."""
    problem = make_problem(tokens=21, random_labels=True).on(device).to(torch.float32)
    adapter = adapter_of(problem, lambda tensor: guarded(tensor, row_padding=3))
    expected = output(problem)
    delta = guarded(blocks(adapter))
    xg = guarded(gather(problem.x, adapter, delta.shape[2]), row_padding=16)
    for out in (
        guarded(torch.zeros_like(expected), row_padding=5),
        guarded(torch.zeros_like(expected.T), row_padding=5).T,
    ):
        out.fill_(float("nan"))
        assert torch.equal(block_matmul(xg, adapter, delta, out=out, config=SMALL), expected)
    every_other = torch.stack([xg, torch.full_like(xg, float("nan"))], -1)[..., 0]
    assert torch.equal(block_matmul(every_other, adapter, delta, out=out, config=SMALL), expected)


def test_offsets_beyond_int32(device: torch.device) -> None:
    """Rows of y 2³¹ / 8 elements apart, in memory that is reserved and mostly never touched."""
    need_memory(device, 8)
    problem = make_problem(tokens=12, fill_padding=False).on(device).to(torch.bfloat16)
    stride = 2**31 // 8
    shape = (12, problem.weight.shape[0])
    storage = torch.zeros(1, dtype=torch.bfloat16, device=device)
    storage.untyped_storage().resize_(2 * (11 * stride + shape[1]))
    out = storage.as_strided(shape, (stride, 1))
    adapter = adapter_of(problem)
    delta = blocks(adapter)
    block_matmul(gather(problem.x, adapter, delta.shape[2]), adapter, delta, out=out, config=SMALL)
    assert torch.equal(out, output(problem))


@each_dtype
def test_reruns_are_bitwise_equal(dtype: torch.dtype, device: torch.device) -> None:
    problem = make_problem(tokens=40, random_labels=True).on(device).to(dtype)
    assert torch.equal(output(problem), output(problem))


def test_output_in_float32(device: torch.device) -> None:
    """The accumulator unrounded, for a base GEMM that adds onto it in float32."""
    problem = make_problem().on(device).to(torch.bfloat16)
    adapter = adapter_of(problem)
    delta = blocks(adapter)
    out = torch.empty(*problem.dy.shape, device=device)
    block_matmul(gather(problem.x, adapter, delta.shape[2]), adapter, delta, out=out, config=SMALL)
    assert torch.equal(out.bfloat16(), output(problem))


def test_no_tokens(device: torch.device) -> None:
    problem = make_problem(tokens=0).on(device).to(torch.float32)
    assert output(problem).shape == (0, 33)


def test_a_choice_for_every_layout(device: torch.device) -> None:
    """Without a configuration: whatever shipped tile divides the padded widths."""
    problem = make_problem(tokens=3).on(device).to(torch.float32)
    adapter = adapter_of(problem)
    xg = gather(problem.x, adapter, 64)
    out = torch.empty(3, 33, device=device)
    block_matmul(xg, adapter, None, out=out)
    loaded = torch.empty(3, 33, device=device)
    block_matmul(xg, adapter, blocks(adapter, 64), out=loaded)
    truth = problem.x.double() @ delta_weight(problem.to(torch.float64)).T
    for y in (out, loaded):
        assert_within_budget(y, problem.x @ delta_weight(problem).T, truth)


def test_bad_input(device: torch.device) -> None:
    problem = make_problem().on(device).to(torch.float32)
    adapter = adapter_of(problem)
    delta = blocks(adapter)
    xg = gather(problem.x, adapter, delta.shape[2])
    out = torch.empty(11, 33, device=device)
    with pytest.raises(ValueError, match="must be multiples of the tile"):
        block_matmul(xg, adapter, delta, out=out, config=replace(SMALL, block_c=64))
    with pytest.raises(ValueError, match="do not fit"):
        block_matmul(xg, adapter, delta, out=out[:, :32], config=SMALL)
    wide = replace(adapter, A=torch.zeros(33, 57, device=device), B=torch.zeros(33, 33, device=device))
    with pytest.raises(ValueError, match="up to rank 32, got 33: pass delta"):
        block_matmul(xg, wide, None, weight_blocks=delta, out=out, config=SMALL)


@pytest.mark.parametrize(
    ("version", "arch", "dtype", "largest"),
    [
        ((3, 6), "sm_90", torch.bfloat16, 128),
        ((3, 6), "sm_90", torch.float32, 64),
        ((3, 6), "sm_100", torch.bfloat16, 64),
        ((3, 6), "sm_80", torch.bfloat16, 64),
        ((3, 9), "sm_90", torch.float32, 256),
        ((3, 9), "sm_80", torch.bfloat16, 128),
        ((4, 0), "sm_100", torch.bfloat16, 256),
    ],
)
def test_large_tiles_ship_only_where_they_do_not_spill(
    version: tuple[int, int], arch: str, dtype: torch.dtype, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_TRITON", version)
    shipped = launch.block_matmul_configs(arch, dtype, "tf32")
    assert shipped[0].block_t == largest
    assert len(shipped) >= 3
