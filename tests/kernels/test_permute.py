"""permute: blocked[t, k, p] = m[t, j] · x[t, j] and its adjoint, with the dropout mask m."""

import functools
from typing import Any

import pytest
import torch
from audit.workloads import configured
from kernel_cases import each_dtype, shipped_here
from problems import DEVICE
from torch import Tensor

from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.kernels.permute import gather_columns, scatter_columns
from smoa_kernels.kernels.spec import block_width

pytestmark = pytest.mark.numerical

CONFIGS = [config for config, _ in shipped_here("permute")]


def random_partition(columns: int, num_blocks: int, seed: int = 0) -> BlockPartition:
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randint, num_blocks, generator=generator, device="cpu")
    rows, cols = (draw((n,)) for n in (3, columns))
    return BlockPartition.from_labels(rows, cols, num_blocks).to(DEVICE)


def gather(x: Tensor, partition: BlockPartition, **kwargs: object) -> Tensor:
    return gather_columns(x, partition, block_width(partition.col_sizes), **kwargs)  # type: ignore[arg-type]


def gathered_by_hand(x: Tensor, partition: BlockPartition) -> Tensor:
    blocked = x.new_zeros(len(x), partition.num_blocks, block_width(partition.col_sizes))
    for k, cols in enumerate(partition.col_index.split(partition.col_sizes)):
        blocked[:, k, : len(cols)] = x[:, cols]
    return blocked


def mask(
    dropout: Dropout, tokens: int, partition: BlockPartition, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The multiplier m itself: the mask applied to ones."""
    ones = torch.ones(tokens, partition.shape[1], dtype=dtype, device=partition.device)
    return scatter_columns(gather(ones, partition, dropout=dropout), partition, torch.empty_like(ones))


@pytest.mark.parametrize(
    ("size", "width"), [(1, 64), (64, 64), (65, 128), (144, 192), (288, 320), (1024, 1024)]
)
def test_blocks_are_padded_to_the_narrowest_tile(size: int, width: int) -> None:
    """64 numbers of half types are the 128 bytes that a line of cache and a row of cuBLAS's operands take."""
    assert block_width((1, size)) == width


@each_dtype
def test_dropout_zeroes_or_scales(dtype: torch.dtype) -> None:
    partition = random_partition(70, 3)
    dropout = Dropout(torch.tensor(7), p=0.25)
    x = torch.randn(50, 70).to(dtype)
    kept = mask(dropout, 50, partition) != 0
    dropped = scatter_columns(gather(x, partition, dropout=dropout), partition, torch.empty_like(x))
    # Gather and its adjoint draw the same mask.
    expected = torch.where(kept, (x.float() * (4 / 3)), 0).to(dtype)
    assert torch.equal((dropped != 0), kept & (x != 0))
    gathered = gather(x, partition, dropout=dropout)
    undropped = scatter_columns(gathered, partition, torch.empty_like(x))
    assert torch.equal(undropped, expected)
    moved = scatter_columns(gather(x, partition), partition, torch.empty_like(x), dropout=dropout)
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("seed", [-3, 2**62 + 2**33 + 5])
@pytest.mark.parametrize("config", CONFIGS)
def test_dropout_mask_is_the_definitions(config: Any, seed: int) -> None:
    """Whatever the tiles, also for a shard of the columns."""
    whole, ones = Dropout(torch.tensor(seed), p=0.3), torch.ones(70, 150)
    partition = random_partition(150, 4)
    shard = partition.shard(col_slice=slice(40, 110))
    with configured("permute", config):
        assert torch.equal(mask(whole, 70, partition), whole.multiplier(ones))
        part = mask(Dropout(whole.seed, 0.3, column_offset=40), 70, shard)
    assert torch.equal(part, whole.multiplier(ones)[:, 40:110])


def test_dropout_of_almost_nothing_and_almost_all() -> None:
    partition = random_partition(40, 2)
    assert bool((mask(Dropout(torch.tensor(1), 0.0), 30, partition) == 1).all())
    nearly_all = mask(Dropout(torch.tensor(1), 1 - 2**-16), 30, partition)
    assert set(nearly_all.unique().tolist()) <= {0.0, 65536.0}
