"""`group_size`: columns of W0 that share a column of A."""

from __future__ import annotations

import pytest
import torch
from problems import relative_error
from torch import nn

from smoa_kernels import BlockPartition, FusedSMoALinear
from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.functional import dense_update

pytestmark = pytest.mark.numerical

ORDERS = ["contiguous", "random", "spectral"]
SIZES = [(1, 4), (2, 8), (3, 8), (2, 10_000)]  # K and g; the last group may be short


def grouped(order: str, num_blocks: int, group_size: int, **settings: object) -> FusedSMoALinear:
    torch.manual_seed(0)
    settings = {"r": 5, "num_blocks": num_blocks, "block_order": order, "group_size": group_size, **settings}
    layer = FusedSMoALinear.from_linear(nn.Linear(52, 33), **settings)  # type: ignore[arg-type]
    nn.init.normal_(layer.smoa.B, std=0.3)
    return layer


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("num_blocks", "group_size"), SIZES[:3])
def test_the_update_scales_each_group_of_a_row_by_one_number(
    order: str, num_blocks: int, group_size: int
) -> None:
    layer = grouped(order, num_blocks, group_size)
    labels = layer.partition.col_block
    for start in range(0, 52, group_size):
        assert len(labels[start : start + group_size].unique()) == 1
        ratio = (
            layer.delta_weight()[:, start : start + group_size] / layer.weight[:, start : start + group_size]
        )
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)
    assert layer.smoa.A.shape == (-(-5 // num_blocks), -(-52 // group_size))
    groups = [len(labels[::group_size][labels[::group_size] == k]) for k in range(num_blocks)]
    sizes = zip(layer.block_ranks, layer.partition.row_sizes, groups, strict=True)
    assert layer.smoa.num_parameters == sum(r * (rows + cols) for r, rows, cols in sizes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_a_layer_whose_columns_of_A_are_repeated(order: str, dropout: float) -> None:
    """The gradient of A is the sum of its columns' gradients over a group."""
    ours = grouped(order, 2, 8, dropout=dropout)
    other = FusedSMoALinear.from_linear(
        nn.Linear(52, 33), r=5, num_blocks=2, dropout=dropout, partition=ours.partition
    )
    other.load_state_dict(
        {
            **{name: value for name, value in ours.state_dict().items() if name != "smoa.A"},
            "smoa.A": ours.smoa.A.detach().repeat_interleave(8, 1)[:, :52],
        }
    )
    x, found = torch.randn(7, 52), []
    for layer in (ours, other):
        torch.manual_seed(1)
        layer(x).sin().sum().backward()
        found.append([layer.smoa.A.grad, layer.smoa.B.grad])
    (dA, dB), (dA_each, dB_each) = found
    assert dA_each is not None
    assert relative_error(dB, dB_each) < 1e-5
    summed = torch.stack([part.sum(1) for part in dA_each.split(8, 1)], 1)
    assert relative_error(dA, summed) < 1e-5


def test_a_group_of_all_columns_is_a_number_for_each_row() -> None:
    layer = grouped("spectral", 1, 2**31 - 1)
    assert layer.smoa.A.shape == (5, 1)
    ratio = layer.delta_weight() / layer.weight
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="group_size must leave at least num_blocks=2 groups"):
        grouped("spectral", 2, 52)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("num_blocks", "group_size"), SIZES[:3])
def test_groups_of_columns_anywhere(order: str, num_blocks: int, group_size: int) -> None:
    """Against the formula with a dense A, in float64: the update, its gradients, whole groups in a block."""
    layer = grouped(order, num_blocks, group_size).double()
    groups = (torch.arange(52) // group_size)[torch.randperm(52)]
    layer.smoa.set_groups(groups)
    layer.smoa.set_blocks(layer._rule.build(layer.weight, groups))
    layer.smoa.reset(zero=False)
    rows, cols, A, B = (getattr(layer.smoa, name) for name in ("row_block", "col_block", "A", "B"))
    assert all(len(cols[groups == group].unique()) == 1 for group in groups)
    by_group = groups.argsort(stable=True)
    in_order = layer._rule.build(layer.weight[:, by_group])
    assert torch.equal(in_order.col_block, cols[by_group])
    assert torch.equal(in_order.row_block, rows)
    sizes = [int(cols[groups == group][0]) for group in range(int(groups.max()) + 1)]
    counts = zip(layer.block_ranks, layer.partition.row_sizes, range(num_blocks), strict=True)
    assert layer.smoa.num_parameters == sum(r * (n + sizes.count(block)) for r, n, block in counts)
    ranks = torch.tensor(layer.block_ranks)
    kept = torch.arange(A.shape[0])[:, None] < ranks[cols.long()]
    dense = torch.where(kept, A.detach()[:, groups], 0).requires_grad_()
    wanted = layer.weight * layer.scaling * (rows[:, None] == cols) * (B.detach() @ dense)
    found = dense_update(layer.smoa.packed(layer.weight))
    torch.testing.assert_close(found, wanted)
    x, dy = torch.randn(2, 7, 52, dtype=torch.float64), torch.randn(7, 33, dtype=torch.float64)
    (dense_gradient,) = torch.autograd.grad((x[0] @ wanted.T * dy).sum(), dense)
    (layer(x[0]) * dy).sum().backward()
    summed = torch.zeros_like(A).index_add_(1, groups, dense_gradient.where(kept, 0))
    torch.testing.assert_close(A.grad, summed)


def test_a_batch_of_layers() -> None:
    """As `torch.func` computes an ensemble, whose labels are batched too."""
    layers, x = [grouped(order, 2, 4) for order in ORDERS], torch.randn(7, 52)
    states = torch.func.stack_module_state(layers)  # type: ignore[arg-type]

    def call(*state: dict[str, torch.Tensor]) -> object:
        return torch.func.functional_call(layers[0], state, (x,))

    torch.testing.assert_close(torch.func.vmap(call)(*states), torch.stack([layer(x) for layer in layers]))


def test_rows_are_sorted_one_by_one_and_columns_by_groups() -> None:
    weight = torch.randn(33, 52)
    partition = BlockRule(3, "spectral", 2, group_size=8).build(weight)
    assert partition == BlockPartition.from_weight(weight, 3, granule=(2, 8))
    rows = BlockPartition.from_weight(weight, 3, granule=2)
    assert torch.equal(partition.row_block, rows.row_block)
