"""`smoa_linear` in TF32, and some of the contract in half types for `make emulate-smoke`.

`make emulate` runs all of tests/test_contract.py and tests/test_experts.py on the triton backend.
"""

from typing import Any

import pytest
import torch
from problems import NAMES, Case, assert_within_budget, make_problem, relative_error

from smoa_kernels.definition.precision import multiplied_in

from .findings import OVERWRITES_OPERANDS

ALGORITHMS = ("split", "merged", "fused", "dropout")
ODD = {"tokens": 37, "out_features": 131, "in_features": 197}
PROBLEMS: dict[str, dict[str, Any]] = {
    "odd": ODD | {"ranks": (20, 3, 0)},
    "small ranks": ODD | {"ranks": (5, 3, 0)},
    "one block": {"tokens": 70, "out_features": 67, "in_features": 101, "ranks": (40,)},
    "aligned": {"tokens": 128, "out_features": 256, "in_features": 192, "ranks": (16, 16)},
    "granules": ODD | {"ranks": (16, 3, 0), "block_order": "random", "granule": 8},
}
SMOKE = [
    *(("odd", algorithm) for algorithm in ALGORITHMS),
    *(("aligned", "fused"), ("small ranks", "fused"), ("granules", "split"), ("granules", "dropout")),
]
TF32 = 2**-9  # TF32 keeps 10 bits of each operand


@pytest.mark.skipif(OVERWRITES_OPERANDS, reason="torch's operators compute TF32 by this Triton")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.smoke] if name == "odd" else []) for name in PROBLEMS]
)
def test_tf32(name: str, algorithm: str) -> None:
    p = make_problem(**PROBLEMS[name], dtype=torch.float32)
    case = Case("triton", algorithm, torch.float32)
    with multiplied_in("tf32"):
        found = p.run(**case.options)
    truth = case.definition(p.to(torch.float64))
    shares = {n: relative_error(ours, t) / TF32 for n, ours, t in zip(NAMES, found, truth, strict=True)}
    assert all(share <= 1 for share in shares.values()), shares


@pytest.mark.smoke
@pytest.mark.parametrize("factors", [None, torch.float32], ids=["", "float32 factors"])
@pytest.mark.parametrize(("name", "algorithm"), SMOKE)
def test_half(name: str, algorithm: str, factors: torch.dtype | None) -> None:
    """bfloat16 alone, and float16 under float32 factors."""
    dtype = torch.float16 if factors else torch.bfloat16
    p, case = make_problem(**PROBLEMS[name]).to(dtype, factors), Case("triton", algorithm, dtype)
    assert_within_budget(p.run(**case.options), case, p)
