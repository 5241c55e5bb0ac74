"""The spectral order and its blocks (docs/definition.md)."""

import copy
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import DEVICE
from torch_calls import on_threads
from vectors import Vector, all_vectors

from smoa_kernels import BlockPartition
from smoa_kernels.definition.block_rule import BLOCK_ORDERS, BlockRule
from smoa_kernels.definition.sketch import sketch_weight
from smoa_kernels.definition.spectral_order import one_thread, spectral_centroids, spectral_orders


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Drawn on the CPU, so that every device gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator, device="cpu").to(DEVICE)


def svd_centroids(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition step by step: a thin SVD, energies, mean position."""
    U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
    position = torch.arange(sigma.shape[0], dtype=weight.dtype)
    scores = []
    for basis in (U, Vh.T):
        energy = (basis * sigma).square()
        total = energy.sum(1)
        scores.append(torch.where(total > 0, (energy @ position) / total.clamp_min(1e-300), 0))
    return scores[0], scores[1]


@pytest.mark.numerical
@pytest.mark.parametrize("vector", all_vectors(), ids=lambda v: v.name)
def test_equals_vectors(vector: Vector) -> None:
    partition, stored = vector.partition(DEVICE), vector.problem.partition
    row_score, col_score = spectral_centroids(vector.problem.weight.to(DEVICE))
    for score, true in ((row_score, vector.row_score), (col_score, vector.col_score)):
        torch.testing.assert_close(score.cpu(), torch.from_numpy(true), rtol=1e-9, atol=1e-9)
    if vector.rule.needs_weight:
        g = vector.rule.granule
        for order, true in zip(
            spectral_orders(vector.problem.weight, g), (vector.row_order, vector.col_order), strict=True
        ):
            assert order.tolist() == (true[true % g == 0] // g).tolist()
    assert partition.row_block.tolist() == stored.row_block.tolist()
    assert partition.col_block.tolist() == stored.col_block.tolist()


@pytest.mark.numerical
@pytest.mark.parametrize("shape", [(37, 19), (19, 37), (23, 23), (1, 5), (5, 1)])
def test_gram_route_equals_svd(shape: tuple[int, int]) -> None:
    weight = drawn(*shape, seed=0)
    for ours, expected in zip(spectral_centroids(weight), svd_centroids(weight), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.numerical
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_magnitudes_keep_the_order(scale: float) -> None:
    """Squares of these entries overflow or vanish in float32."""
    weight = drawn(24, 40, seed=1, dtype=torch.float32)
    expected = BlockPartition.from_weight(weight, 3)
    assert BlockPartition.from_weight(weight * scale, 3) == expected


@pytest.mark.numerical
def test_svd_takes_over_where_eigh_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(3, 12, 30, dtype=torch.float64)
    expected = BlockPartition.from_weight(weights[0], 4), BlockPartition.from_experts(weights, 4)

    def fails(*_: object) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert (BlockPartition.from_weight(weights[0], 4), BlockPartition.from_experts(weights, 4)) == expected


@pytest.mark.numerical
def test_zero_rows_score_zero_and_rank_deficiency_works() -> None:
    shapes = (10, 6), (6, 3), (3, 14)
    weight = torch.linalg.multi_dot([torch.randn(shape, dtype=torch.float64) for shape in shapes])
    weight[4] = 0
    weight[:, 9] = 0
    row_score, col_score = spectral_centroids(weight)
    assert row_score[4] == 0
    assert col_score[9] == 0
    assert (row_score[[0, 1, 2]] > 0).all()
    expected_rows, _ = svd_centroids(weight)
    others = [i for i in range(10) if i != 4]
    torch.testing.assert_close(row_score[others], expected_rows[others], rtol=1e-6, atol=1e-6)


@pytest.fixture
def two_threads() -> Iterator[None]:
    with on_threads(2):
        yield


def in_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.usefixtures("two_threads")
def test_a_thread_that_began_under_anothers_setting_leaves_it_alone() -> None:
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with one_thread():
            entered.set()
            assert left.wait(timeout=60)

    with ThreadPoolExecutor(1) as pool:
        with one_thread():
            done = pool.submit(second)
            assert entered.wait(timeout=60)
        left.set()
        done.result()
    assert torch.get_num_threads() == in_a_new_thread() == 2


@pytest.mark.usefixtures("two_threads")
def test_another_thread_waits_for_its_turn() -> None:
    """Without waiting, the first thread to finish would restore the thread count while the second computes."""
    entered = threading.Event()

    def second() -> int:
        with one_thread():
            entered.set()
            assert torch.get_num_threads() == 1
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2  # from now on its own setting
        with one_thread():
            done = pool.submit(second)
            assert not entered.wait(timeout=0.2)
        assert done.result() == 2
    assert in_a_new_thread() == 2


@pytest.mark.numerical
def test_autocast_rounds_neither_labels_nor_sketch() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator(torch.get_default_device()).manual_seed(3))
    partition, sketch = BlockPartition.from_weight(weight, 5), sketch_weight(weight)
    with torch.autocast(weight.device.type, torch.bfloat16):
        assert (weight @ weight.T).dtype == torch.bfloat16
        assert BlockPartition.from_weight(weight, 5) == partition
        assert torch.equal(sketch_weight(weight), sketch)


@pytest.mark.numerical
def test_label_dtypes() -> None:
    for num_blocks, dtype in ((256, torch.uint8), (257, torch.int32)):
        labels = torch.arange(num_blocks)
        partition = BlockPartition.from_labels(labels, labels, num_blocks)
        assert (partition.row_block.dtype, partition.num_blocks) == (dtype, num_blocks)


@pytest.mark.numerical
def test_shards_keep_labels_and_may_miss_blocks() -> None:
    partition = BlockPartition.from_labels(torch.tensor([0, 0, 1, 2]), torch.tensor([2, 1, 0]), 3)
    shard = partition.shard(slice(0, 2), slice(1, 3))
    assert shard.shape == (2, 2)
    assert shard.num_blocks == 3
    assert shard.row_sizes == (2, 0, 0)
    assert shard.col_block.tolist() == [1, 0]
    assert shard == BlockPartition.from_labels(partition.row_block[:2], partition.col_block[1:], 3)


@pytest.mark.numerical
def test_equality_is_by_labels() -> None:
    rows, cols = torch.tensor([0, 1]), torch.tensor([1, 0])
    partition = BlockPartition.from_labels(rows, cols, 2)
    assert partition == BlockPartition.from_labels(rows.int(), cols.to(torch.uint8), 2)
    assert partition != BlockPartition.from_labels(rows, cols, 3)
    assert partition != BlockPartition.from_labels(cols, cols, 2)
    assert partition != BlockPartition.from_labels(rows, rows, 2)
    assert partition != "partition"
    assert partition == partition.T.T
    assert partition.T.shape == (2, 2)


# Granules and other orders


def made(order: str, weight: torch.Tensor, num_blocks: int, granule: int) -> BlockPartition:
    return BlockRule(num_blocks, order, granule, block_seed=3).build(weight)


@pytest.mark.numerical
def test_a_granule_scores_the_energy_weighted_mean_of_its_coordinates() -> None:
    """The last granule of 23 rows is short, and a granule of zeros scores 0."""
    weight = drawn(23, 30, seed=4)
    weight[8:12] = 0
    single, (rows, cols) = spectral_centroids(weight), spectral_centroids(weight, 4)
    for score, found, energy in (
        (single[0], rows, weight.square().sum(1)),
        (single[1], cols, weight.square().sum(0)),
    ):
        moments = zip((energy * score).split(4), energy.split(4), strict=True)
        expected = torch.stack([moment.sum() / part.sum() for moment, part in moments]).nan_to_num(nan=0.0)
        torch.testing.assert_close(found, expected)
    partition = BlockPartition.from_weight(weight, 3, granule=4)
    for k, chunk in enumerate(torch.argsort(rows, stable=True).tensor_split(3)):
        expected_rows = [i for g in chunk.tolist() for i in range(4 * g, min(4 * g + 4, 23))]
        assert partition.rows(k).tolist() == sorted(expected_rows)


@pytest.mark.numerical
@pytest.mark.parametrize("order", BLOCK_ORDERS)
@pytest.mark.parametrize(("shape", "granule"), [((31, 29), 8), ((31, 29), 1), ((16, 40), 4), ((5, 64), 2)])
def test_granules_stay_together(order: str, shape: tuple[int, int], granule: int) -> None:
    weight = drawn(*shape, seed=5)
    partition = made(order, weight, 3, granule)
    assert partition.granularity % granule == 0
    assert partition.device.type == DEVICE.type
    for labels, sizes, index in (
        (partition.row_block, partition.row_sizes, partition.row_index),
        (partition.col_block, partition.col_sizes, partition.col_index),
    ):
        per_granule = labels[::granule]
        assert torch.equal(per_granule.repeat_interleave(granule)[: labels.shape[0]], labels)
        counts = torch.bincount(per_granule, minlength=3).tolist()
        assert counts == [len(part) for part in torch.arange(len(per_granule)).tensor_split(3)]
        for block in index.split(sizes):  # ascending, so a short granule comes last in its block
            assert torch.equal(block, block.sort().values)


@pytest.mark.numerical
def test_contiguous_blocks_are_cut_as_tensor_split_cuts() -> None:
    partition = BlockPartition.contiguous((11, 8), 3)
    assert partition.row_block.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert partition.col_sizes == (3, 3, 2)
    assert partition.is_contiguous
    assert BlockPartition.contiguous((20, 16), 2, granule=8).row_sizes == (16, 4)


@pytest.mark.numerical
def test_shortcuts_are_found_from_the_labels() -> None:
    def labels(*runs: tuple[int, int]) -> torch.Tensor:
        return torch.cat([torch.full((count,), block) for block, count in runs])

    fours, eights = labels((1, 4), (0, 12), (1, 5)), labels((0, 16), (1, 24))
    partition = BlockPartition.from_labels(fours, eights, 2)
    assert (partition.granularity, partition.is_contiguous) == (4, False)
    assert BlockPartition.from_labels(eights, eights, 2).granularity == 16
    assert BlockPartition.from_labels(eights, fours.sort().values, 2).is_contiguous
    assert BlockPartition.from_labels(fours * 0, eights * 0, 1).granularity == 40
    assert BlockPartition.from_labels(fours[:0], eights[:0], 1).granularity == 1
    crossed = partition.from_tensors(partition.tensors(), partition.sizes())
    # A cut at a multiple of the granularity keeps it; another cut may not.
    for one, expected in ((partition.T, 4), (partition.to("meta"), 4), (crossed, 4)):
        assert (one.granularity, one.is_contiguous) == (expected, False)
    assert partition.shard(slice(8, 21), slice(8, 40)).granularity == 8
    assert partition.shard(slice(3, 21)).granularity == 1
    assert partition.shard(slice(4, 16)).is_contiguous


@pytest.mark.parametrize("num_blocks", [1, 3, 256, 300])
def test_a_plan_is_the_partition(num_blocks: int) -> None:
    """It is found again by its plan, also after copying, and is read from one that comes from elsewhere."""
    partition = BlockPartition.random((641, 317), num_blocks, seed=1)
    crossed = BlockPartition.from_tensors(partition.tensors(), partition.sizes())
    copies = copy.deepcopy(partition), pickle.loads(pickle.dumps(partition))
    for one in (partition, partition.T.T, crossed, *copies):
        assert one == partition
        assert one.sizes() == partition.sizes()
        assert torch.equal(one.plan, partition.plan)
        assert BlockPartition.from_plan(one.plan) is one
    foreign = partition.plan.clone()
    found = BlockPartition.from_plan(foreign)
    assert found is BlockPartition.from_plan(foreign)
    for ours, reference in zip(found.tensors(), partition.tensors(), strict=True):
        assert torch.equal(ours, reference)
        assert ours.data_ptr() % 16 == 0
