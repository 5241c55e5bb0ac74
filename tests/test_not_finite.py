"""NaN and Inf in the numbers: what comes out is not finite wherever the definition's is not, and nowhere else."""

import pytest
import torch
from problems import DEVICE, LinearProblem, make_problem, obstacle
from torch import Tensor, nn

from smoa_kernels import FusedSMoALinear
from smoa_kernels.backends import triton_obstacle

pytestmark = pytest.mark.numerical

OBSTACLE = triton_obstacle(DEVICE)
needs_triton = pytest.mark.skipif(OBSTACLE is not None, reason=f"on {DEVICE}, {OBSTACLE}")

# Backend, algorithm and dropout.
WAYS = [
    *(("eager", algorithm, 0.0) for algorithm in ("merged", "split", "expanded")),
    ("eager", "split", 0.3),
    ("native", "merged", 0.0),
    ("native", "split", 0.3),
    *(
        pytest.param("triton", algorithm, 0.0, marks=needs_triton)
        for algorithm in ("merged", "split", "fused")
    ),
    pytest.param("triton", "split", 0.3, marks=needs_triton),
    ("reference", "auto", 0.0),
    ("reference", "auto", 0.3),
]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: (2e-4, 2e-5), torch.bfloat16: (4e-2, 4e-2)}
NAN, INF = float("nan"), float("inf")
FORWARD = [("x", NAN), ("x", INF), ("weight", NAN), ("weight", INF), ("A", NAN), ("B", INF)]


def poisoned(name: str, value: float, block: int, dtype: torch.dtype) -> LinearProblem:
    """One poisoned number in the part of a tensor that belongs to a block; block 1 has rank zero."""
    p = make_problem(tokens=6, out_features=21, in_features=26, ranks=(3, 0, 2), dtype=dtype)
    row, col = int(p.partition.rows(block)[1]), int(p.partition.cols(block)[1])
    place = {"x": (2, col), "dy": (2, row), "weight": (row, col), "A": (0, col), "B": (row, 0)}[name]
    getattr(p, name)[place] = value
    return p


def check_hides_nothing(ours: Tensor, theirs: Tensor, poison: str, what: str) -> Tensor:
    """Where our result is finite; ours and the definition's."""
    finite = ours.isfinite()
    assert not (finite & ~theirs.isfinite()).any(), what
    # A broken factor meets the zeros of other blocks in merged and expanded, and 0 · NaN is NaN: it may spread.
    assert poison in "AB" or torch.equal(finite, theirs.isfinite()), what
    return finite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(("name", "value"), [*FORWARD, ("dy", NAN)])
@pytest.mark.parametrize(("backend", "algorithm", "dropout"), WAYS)
def test_what_is_not_finite_is_not_hidden(
    backend: str, algorithm: str, dropout: float, name: str, value: float, block: int, dtype: torch.dtype
) -> None:
    if (reason := obstacle(backend, dtype)) is not None:
        pytest.skip(reason)
    p = poisoned(name, value, block, dtype)
    mask = {"dropout_p": dropout, "dropout_seed": torch.tensor(3)} if dropout else {}
    found = p.run(backend=backend, algorithm=algorithm, **mask)
    expected = p.run_reference(**mask)
    for what, ours, theirs in zip(("y", "dX", "dA", "dB", "dbias"), found, expected, strict=True):
        finite = check_hides_nothing(ours, theirs, name, what)
        if backend == "triton" and dropout:
            continue  # whose mask is another; what is dropped stays NaN all the same, for 0 · NaN is
        rtol, atol = TOLERANCE[dtype]
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(("name", "value"), FORWARD)
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_triton)])
def test_a_merged_layer_hides_nothing(
    backend: str, name: str, value: float, block: int, dtype: torch.dtype
) -> None:
    p = poisoned(name, value, block, dtype)
    sound = nn.Linear(26, 21, dtype=dtype)
    settings = {"r": 5, "num_blocks": 3, "block_ranks": (3, 0, 2), "backend": backend}
    layer = FusedSMoALinear.from_linear(sound, partition=p.partition, **settings)
    values = {"weight": p.weight, "bias": p.bias, "smoa_A": p.A, "smoa_B": p.B}
    with torch.no_grad():
        for parameter, tensor in values.items():
            getattr(layer, parameter).copy_(tensor)
    layer.scaling = p.scaling
    layer.merge()
    y, expected = layer(p.x), p.run_reference()[0]
    finite = check_hides_nothing(y, expected, name, "y")
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(y[finite], expected[finite], rtol=rtol, atol=atol)
    layer.unmerge()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(layer.weight.view(bits), p.weight.view(bits))
