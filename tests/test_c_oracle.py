"""The C oracle against the vectors, closed forms and finite differences. Other tests rely on it."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import c_oracle
import numpy as np
import pytest
import torch
from c_oracle import FloatArray, IntArray
from vectors import Vector, all_vectors

pytestmark = pytest.mark.slow

TOLERANCE = 1e-10

each_vector = pytest.mark.parametrize("vector", all_vectors(), ids=lambda vector: vector.name)


def assert_close(actual: FloatArray, expected: FloatArray | list[float]) -> None:
    """Errors are relative to the largest entry: small entries are sums of large terms that cancel."""
    scale = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=TOLERANCE * scale)


@dataclass(frozen=True)
class Case:
    """Arguments of one call, N × C = 6 × 9."""

    x: FloatArray
    dy: FloatArray
    weight: FloatArray
    bias: FloatArray
    A: FloatArray
    B: FloatArray
    row_block: IntArray
    col_block: IntArray
    ranks: IntArray
    multiplier: FloatArray
    scaling: float = 0.7

    @property
    def adapter(self) -> tuple[FloatArray, FloatArray, IntArray, IntArray, IntArray]:
        return self.A, self.B, self.row_block, self.col_block, self.ranks

    def padding(self) -> tuple[np.ndarray, np.ndarray]:
        """Where A (ρ, C) and B (N, ρ) have padding."""
        t = np.arange(self.A.shape[0])
        return t[:, None] >= self.ranks[self.col_block], t >= self.ranks[self.row_block][:, None]


def make_case(ranks: list[int], row_block: list[int], col_block: list[int]) -> Case:
    random = np.random.default_rng(0)
    tokens, out_features, in_features, max_rank = 4, len(row_block), len(col_block), max(ranks)
    keep = random.random((tokens, in_features)) < 0.75
    return Case(
        x=random.normal(size=(tokens, in_features)),
        dy=random.normal(size=(tokens, out_features)),
        weight=random.normal(size=(out_features, in_features)),
        bias=random.normal(size=out_features),
        A=random.normal(size=(max_rank, in_features)),
        B=random.normal(size=(out_features, max_rank)),
        row_block=np.array(row_block),
        col_block=np.array(col_block),
        ranks=np.array(ranks),
        multiplier=keep / 0.75,
    )


CASES = {
    "one_block": make_case([3], [0] * 6, [0] * 9),
    "even": make_case([2, 2], [0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 1, 0, 1, 0, 0]),
    "uneven_with_zero_rank": make_case([3, 0, 1], [0, 1, 2, 0, 2, 1], [2, 1, 0, 0, 1, 2, 2, 0, 1]),
    "no_rank": make_case([0, 0], [0, 1], [0, 1, 1]),
    "blocks_without_rows_or_columns": make_case(
        [1, 2, 3, 2], [0, 0, 2, 0, 2, 0], [3, 0, 3, 0, 0, 3, 3, 0, 0]
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# ---- the vectors


@each_vector
def test_orders_and_blocks_match_the_vectors(vector: Vector) -> None:
    U, sigma, Vh = np.linalg.svd(vector.weight, full_matrices=False)
    single = c_oracle.spectral_orders(U, sigma, Vh.T)
    assert_close(single.row_score, vector.row_score)
    assert_close(single.col_score, vector.col_score)
    orders = c_oracle.spectral_orders(U, sigma, Vh.T, vector.granule)
    for spectral, order, labels in (
        (orders.row_order, vector.row_order, vector.row_block),
        (orders.col_order, vector.col_order, vector.col_block),
    ):
        granules = order[order % vector.granule == 0] // vector.granule
        ascending = np.arange(granules.size)
        # A random order cannot be recomputed: it comes from the file.
        expected = {"spectral": spectral, "contiguous": ascending}.get(vector.block_order, granules)
        np.testing.assert_array_equal(granules, expected)
        found = c_oracle.block_labels(expected, vector.num_blocks, labels.size, vector.granule)
        np.testing.assert_array_equal(found, labels)


@each_vector
def test_delta_and_outputs_match_the_vectors(vector: Vector) -> None:
    adapter = (vector.A, vector.B, vector.row_block, vector.col_block, vector.ranks)
    delta = c_oracle.delta_weight(vector.weight, *adapter, scaling=vector.scaling)
    assert_close(delta, vector.delta_weight)
    y = c_oracle.forward(vector.x, vector.weight, vector.bias, *adapter, scaling=vector.scaling)
    assert_close(y, vector.y)


@each_vector
def test_gradients_match_the_vectors(vector: Vector) -> None:
    adapter = (vector.A, vector.B, vector.row_block, vector.col_block, vector.ranks)
    dx, dA, dB = c_oracle.backward(vector.dy, vector.x, vector.weight, *adapter, scaling=vector.scaling)
    assert_close(dx, vector.dx)
    # Packed factors also compare the zeros of the padding.
    assert_close(dA, vector.pack_A(vector.block_dA))
    assert_close(dB, vector.pack_B(vector.block_dB))


# ---- order and blocks


def test_centroid_by_hand() -> None:
    # Row energies over σ = (2, 1) are (4, 1), (0, 1), (4, 0): centroids 1/5, 1, 0.
    orders = c_oracle.spectral_orders([[1, 1], [0, 1], [1, 0]], [2, 1], [[0, 1], [1, 0]])
    assert_close(orders.row_score, [0.2, 1.0, 0.0])
    np.testing.assert_array_equal(orders.row_order, [2, 0, 1])
    np.testing.assert_array_equal(orders.col_order, [1, 0])


def test_order_is_stable_and_zero_rows_come_first() -> None:
    U = [[0, 1], [1, 0], [0, 1], [0, 0], [1, 0], [0, 0], [0, 1]]
    orders = c_oracle.spectral_orders(U, [3, 2], [[0, 0]] * 4)
    np.testing.assert_array_equal(orders.row_score, [1, 0, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(orders.row_order, [1, 3, 4, 5, 0, 2, 6])
    np.testing.assert_array_equal(orders.col_order, [0, 1, 2, 3])


def test_a_granule_takes_both_sums_over_its_coordinates() -> None:
    # Energies over σ = (2, 1): (4, 1) and (0, 1) sum to (4, 2), centroid 2/6; the short granule has (4, 0), centroid 0.
    orders = c_oracle.spectral_orders([[1, 1], [0, 1], [1, 0]], [2, 1], [[0, 0], [0, 0], [0, 0]], granule=2)
    assert_close(orders.row_score, [1 / 3, 0.0])
    np.testing.assert_array_equal(orders.row_order, [1, 0])
    np.testing.assert_array_equal(orders.col_order, [0, 1])
    np.testing.assert_array_equal(c_oracle.block_labels(orders.row_order, 2, size=3, granule=2), [1, 1, 0])


@pytest.mark.parametrize("granule", [1, 4])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 11, 13])
def test_labels_cut_as_tensor_split(num_blocks: int, granule: int) -> None:
    order = np.random.default_rng(1).permutation(11)
    size = 11 * granule - granule // 2  # the last granule is short
    labels = c_oracle.block_labels(order, num_blocks, size, granule)
    for k, chunk in enumerate(torch.tensor_split(torch.from_numpy(order), num_blocks)):
        assert (labels[np.isin(np.arange(size) // granule, chunk.numpy())] == k).all()


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3], [0, 1, -1]])
def test_what_is_no_permutation_of_granules_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="smoa_block_labels returned 5"):
        c_oracle.block_labels(order, 2, size=10, granule=4)


# ---- forward and backward; tests/test_reference.py repeats this with matrices


@pytest.mark.parametrize("dropout", [False, True])
@each_case
def test_gradients_match_finite_differences(case: Case, dropout: bool) -> None:
    multiplier = case.multiplier if dropout else None
    labels = (case.row_block, case.col_block, case.ranks)

    def loss(x: FloatArray, A: FloatArray, B: FloatArray) -> float:
        y = c_oracle.forward(
            x, case.weight, case.bias, A, B, *labels, scaling=case.scaling, multiplier=multiplier
        )
        return float((case.dy * y).sum())

    gradients = c_oracle.backward(
        case.dy, case.x, case.weight, *case.adapter, scaling=case.scaling, multiplier=multiplier
    )
    point = (case.x, case.A, case.B)
    for position, gradient in enumerate(gradients):
        numeric = np.empty_like(gradient)
        for index in np.ndindex(gradient.shape):
            # The loss is linear in each entry, so a step of 1 has no truncation error.
            above, below = ([array.copy() for array in point] for _ in range(2))
            above[position][index] += 0.5
            below[position][index] -= 0.5
            numeric[index] = loss(*above) - loss(*below)
        assert_close(gradient, numeric)


@each_case
def test_padding_is_never_read_and_has_zero_gradients(case: Case) -> None:
    pad_A, pad_B = case.padding()
    poisoned = (np.where(pad_A, np.nan, case.A), np.where(pad_B, np.nan, case.B), *case.adapter[2:])
    y = c_oracle.forward(case.x, case.weight, case.bias, *poisoned, scaling=case.scaling)
    assert np.isfinite(y).all()
    gradients = c_oracle.backward(case.dy, case.x, case.weight, *poisoned, scaling=case.scaling)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert (gradients.dA[pad_A] == 0.0).all()
    assert (gradients.dB[pad_B] == 0.0).all()


def test_clean_under_the_sanitizers(tmp_path: Path) -> None:
    c_oracle.require_compiler()
    compile_sanitized = [*c_oracle.COMPILE, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    program = tmp_path / "program"
    # Leaks could only be the check program's: the oracle never allocates. The leak checker fails under ptrace.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    built = subprocess.run([*compile_sanitized, probe, "-o", program], capture_output=True)
    if built.returncode or subprocess.run([program], env=environment, capture_output=True).returncode:
        pytest.skip("this compiler has no working address and undefined-behaviour sanitizers")

    sources = [c_oracle.SOURCE_DIR / name for name in ("smoa_ref.c", "smoa_ref_check.c")]
    subprocess.run([*compile_sanitized, *sources, "-o", program], check=True)
    ran = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
