"""Three oracles for one definition, on which other tests rely: the vectors, the C code and the PyTorch reference."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import c_oracle
import numpy as np
import pytest
import torch
from problems import DEVICE, LinearProblem, make_problem
from torch import Tensor
from vectors import Vector, all_vectors

from smoa_kernels import BlockPartition
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import padding_masks

pytestmark = pytest.mark.numerical

TOLERANCE = 1e-10
each_vector = pytest.mark.parametrize("vector", all_vectors(), ids=lambda vector: vector.name)


def assert_close(value: object, expected: object) -> None:
    """Errors are also judged by the largest entry: small entries are sums of large terms that cancel."""
    ours, exact = (np.asarray(v.cpu() if isinstance(v, Tensor) else v) for v in (value, expected))
    least = TOLERANCE * min(1.0, np.abs(exact).max(initial=0.0))
    np.testing.assert_allclose(ours, exact, rtol=TOLERANCE, atol=least)


def by_reference(p: LinearProblem, dropout: Dropout | None = None) -> tuple[Any, ...]:
    """ΔW, y, dX, dA and dB, the gradients by autograd."""
    return p.delta_weight(), *p.run_reference(dropout=dropout)[:4]


def by_c(p: LinearProblem, dropout: Dropout | None = None) -> tuple[Any, ...]:
    """The same by the C code."""
    multiplier = None if dropout is None else dropout.multiplier(p.x)
    return c_oracle.delta_weight(p), *c_oracle.run(p, multiplier)


# Forward and backward


@pytest.mark.parametrize("oracle", [by_reference, by_c])
@each_vector
def test_the_vectors_come_out(vector: Vector, oracle: Any) -> None:
    """Packed factors also compare the zeros of the padding."""
    p = replace(vector.problem.on(DEVICE), partition=vector.partition(DEVICE))
    for found, exact in zip(oracle(p), vector.expected, strict=True):
        assert_close(found, exact)


PROBLEMS: dict[str, dict[str, Any]] = {
    "spectral": {"ranks": (3, 0, 2)},
    "one block": {"ranks": (1,), "bias": False},
    "labels": {"ranks": (2, 2, 2, 2, 5), "random_labels": True, "bias": False},
    "no rank": {"ranks": (0, 0)},
    "blocks without rows or columns": {"ranks": (1, 2, 3, 2)},
}


def problem(name: str) -> LinearProblem:
    p = make_problem(**PROBLEMS[name])
    if name == "blocks without rows or columns":
        rows, cols = (torch.arange(size) % 2 * 2 for size in p.weight.shape)  # 0 and 2
        partition = BlockPartition.from_labels(rows, torch.where(cols == 2, 3, cols), 4)
        p = replace(p, partition=partition.to(DEVICE))
    return p


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_reference_equals_the_c_code(name: str, dropout_p: float) -> None:
    """The C code has gradients of its own, the reference autograd's."""
    p, dropout = problem(name), Dropout(torch.tensor(1234), dropout_p) if dropout_p else None
    for ours, exact in zip(by_reference(p, dropout), by_c(p, dropout), strict=True):
        assert_close(ours, exact)


@pytest.mark.parametrize("oracle", [by_reference, by_c])
@pytest.mark.parametrize("name", PROBLEMS)
def test_padding_is_never_read_and_has_zero_gradients(name: str, oracle: Any) -> None:
    p = problem(name)
    used_A, used_B = padding_masks(p.partition, p.ranks, p.A.shape[0])
    p.A[~used_A], p.B[~used_B] = torch.nan, torch.nan
    found = [torch.as_tensor(value) for value in oracle(p)]
    assert all(value.isfinite().all() for value in found)
    assert not found[3].cpu()[~used_A.cpu()].any()
    assert not found[4].cpu()[~used_B.cpu()].any()


# Order and blocks


@each_vector
def test_orders_and_blocks_of_the_vectors(vector: Vector) -> None:
    blocks, rule = vector.problem.partition, vector.rule
    U, sigma, Vh = np.linalg.svd(vector.problem.weight.numpy(), full_matrices=False)
    single = c_oracle.spectral_orders(U, sigma, Vh.T)
    assert_close(single.row_score, vector.row_score)
    assert_close(single.col_score, vector.col_score)
    orders = c_oracle.spectral_orders(U, sigma, Vh.T, rule.granule)
    for spectral, order, labels in (
        (orders.row_order, vector.row_order, blocks.row_block),
        (orders.col_order, vector.col_order, blocks.col_block),
    ):
        granules = order[order % rule.granule == 0] // rule.granule
        ascending = np.arange(granules.size)
        # A random order cannot be recomputed: it comes from the file.
        expected = {"spectral": spectral, "contiguous": ascending}.get(rule.block_order, granules)
        np.testing.assert_array_equal(granules, expected)
        found = c_oracle.block_labels(expected, rule.num_blocks, len(labels), rule.granule)
        np.testing.assert_array_equal(found, labels)


# Row energies over σ = (2, 1) are (4, 1), (0, 1), (4, 0): centroids 1/5, 1, 0. Granules of 2 have (4, 2) and (4, 0).
ROWS = [[1, 1], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("U", "V", "granule", "scores", "row_order", "col_order"),
    [
        (ROWS, [[0, 1], [1, 0]], 1, [0.2, 1.0, 0.0], [2, 0, 1], [1, 0]),
        (ROWS, [[0, 0]] * 3, 2, [1 / 3, 0.0], [1, 0], [0, 1]),
        # The order is stable, and rows of zeros come first.
        (
            [[0, 1], [1, 0], [0, 1], [0, 0], [1, 0], [0, 0], [0, 1]],
            [[0, 0]] * 4,
            1,
            [1, 0, 1, 0, 0, 0, 1],
            [1, 3, 4, 5, 0, 2, 6],
            [0, 1, 2, 3],
        ),
    ],
)
def test_centroids_by_hand(
    U: Any, V: Any, granule: int, scores: list[float], row_order: list[int], col_order: list[int]
) -> None:
    orders = c_oracle.spectral_orders(U, [2, 1], V, granule)
    assert_close(orders.row_score, scores)
    np.testing.assert_array_equal(orders.row_order, row_order)
    np.testing.assert_array_equal(orders.col_order, col_order)


@pytest.mark.parametrize("granule", [1, 4])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 11, 13])
def test_labels_cut_as_tensor_split(num_blocks: int, granule: int) -> None:
    order = np.random.default_rng(1).permutation(11)
    size = 11 * granule - granule // 2  # the last granule is short
    labels = c_oracle.block_labels(order, num_blocks, size, granule)
    for k, chunk in enumerate(torch.tensor_split(torch.from_numpy(order).cpu(), num_blocks)):
        assert (labels[np.isin(np.arange(size) // granule, chunk.numpy())] == k).all()


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3], [0, 1, -1]])
def test_an_order_that_is_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="smoa_block_labels returned 5"):
        c_oracle.block_labels(order, 2, size=10, granule=4)


@pytest.mark.slow
def test_clean_under_the_sanitizers(tmp_path: Path) -> None:
    c_oracle.require_compiler()
    compile_sanitized = [*c_oracle.COMPILE, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    program = tmp_path / "program"
    # The oracle never allocates, so only the check program could leak. The leak checker fails under ptrace.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    built = subprocess.run([*compile_sanitized, probe, "-o", program], capture_output=True)
    if built.returncode or subprocess.run([program], env=environment, capture_output=True).returncode:
        pytest.skip("this compiler has no working address and undefined-behaviour sanitizers")

    sources = [c_oracle.SOURCE_DIR / name for name in ("smoa_ref.c", "smoa_ref_check.c")]
    subprocess.run([*compile_sanitized, *sources, "-o", program], check=True)
    ran = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
