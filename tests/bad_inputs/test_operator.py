"""Bad arguments of `smoa_linear`."""

from typing import Any

import numpy as np
import torch
from problems import make_problem

from smoa_kernels import smoa_linear

from .harness import FLOAT8, HUGE, NESTED, Change, World, check, rows

INT32 = torch.int32
_meta = torch.randn(4, 57, device="meta")

ARGUMENTS: list[Change] = [
    ({"x": torch.randn(4, 56)}, ValueError, r"x must have 57 features .* got shape \(4, 56\)"),
    ({"x": torch.ones(4, 57, dtype=torch.int64)}, TypeError, "x must be floating point, got torch.int64"),
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.randn(4, 57).to_sparse()}, TypeError, "x must be a dense tensor, got .*sparse_coo"),
    ({"x": torch.randn(4, 57).bfloat16()}, TypeError, "weight must have x's dtype torch.bfloat16"),
    ({"x": _meta}, ValueError, "weight must be on x's device meta, got cpu"),
    ({"weight": torch.randn(33, 57, requires_grad=True)}, ValueError, "weight must be frozen"),
    ({"weight": torch.randn(57)}, ValueError, "weight must have shape"),
    ({"weight": torch.randn(33, 57).to(torch.float8_e4m3fn)}, TypeError, "weight must have x's dtype"),
    ({"bias": torch.randn(32)}, ValueError, r"bias must have shape \(33,\), got \(32,\)"),
    ({"A": torch.randn(3, 56)}, ValueError, r"A must have shape \(ρ, 57\), got \(3, 56\)"),
    ({"B": torch.randn(33, 2)}, ValueError, r"B must have shape \(33, 3\) to fit A, got \(33, 2\)"),
    ({"B": torch.randn(33, 3).double()}, TypeError, "A and B must have one dtype"),
    (
        {"A": torch.randn(3, 57).bfloat16(), "B": torch.randn(33, 3).bfloat16()},
        TypeError,
        "A and B must have weight's dtype torch.float32 or float32, got torch.bfloat16",
    ),
    ({"partition": None}, TypeError, "partition must be a BlockPartition, got NoneType"),
    (
        {"partition": make_problem(in_features=56).partition},
        ValueError,
        r"partition must be made for a weight of shape \(33, 57\), got one for \(33, 56\)",
    ),
    ({"ranks": [3, 0, 2]}, TypeError, "ranks must be an integer tensor, got list"),
    ({"ranks": torch.tensor([3, 0], dtype=INT32)}, ValueError, r"ranks must be int32 of shape \(3,\)"),
    ({"ranks": torch.tensor([4, 0, 2], dtype=INT32)}, ValueError, r"ranks must lie in \[0, 3\]"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must lie in"),
    ({"dropout_seed": 3}, TypeError, "dropout_seed must be an integer tensor, got int"),
    ({"dropout_seed": torch.ones(2, dtype=torch.int64)}, TypeError, "dropout_seed must be an int64 tensor"),
    ({"column_offset": 1}, ValueError, "column_offset and global_in_features must hold x's 57 columns"),
    ({"column_offset": -1}, ValueError, "got columns -1 to 56 of 57"),
    ({"global_in_features": 50}, ValueError, "got columns 0 to 57 of 50"),
    ({"global_in_features": 57.0}, TypeError, "global_in_features must be an int, got 57.0"),
    ({"scaling": torch.ones(2)}, ValueError, r"scaling must be a number or a 0-d tensor, got shape \(2,\)"),
    ({"scaling": torch.tensor(1j)}, TypeError, "scaling must be real, got torch.complex64"),
    ({"scaling": torch.tensor(1.0, requires_grad=True)}, ValueError, "scaling must not require grad"),
]

CHOICES: list[Change] = [
    ({"algorithm": "fast"}, ValueError, "algorithm must be one of auto, merged, split, expanded, fused"),
    ({"algorithm": np.ones(3)}, ValueError, "algorithm must be one of auto, merged"),
    ({"algorithm": "merged", "dropout_p": 0.1}, ValueError, "'split' or 'auto' while dropout is active"),
    ({"algorithm": "fused"}, ValueError, "merged, split, expanded on backend '(eager|native)', got 'fused'"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, eager, .*, got 'cuda'"),
    ({"block_ranks": 3}, ValueError, r"block_ranks must be the 3 numbers in ranks, in \[0, 3\], got 3"),
    ({"block_ranks": [3, 0]}, ValueError, r"block_ranks must be the 3 numbers in ranks.* got \[3, 0\]"),
    ({"block_ranks": [4, 0, 2]}, ValueError, r"in \[0, 3\], got \[4, 0, 2\]"),
    ({"block_ranks": [2, 0, 2]}, ValueError, r"numbers in ranks, \[3, 0, 2\], got \[2, 0, 2\]"),
]

TENSORS: list[Change] = [
    *(
        ({name: NESTED}, TypeError, f"{name} must be a dense tensor, got layout torch.nested")
        for name in ("x", "weight", "bias", "A", "B")
    ),
    (
        {"x": FLOAT8, "weight": FLOAT8[:1].expand(33, 57), "bias": None},
        TypeError,
        "x must be of 16 bits or more, got torch.float8_e4m3fn",
    ),
    ({"scaling": NESTED}, TypeError, "scaling must be a dense tensor .* got layout torch.nested"),
    ({"scaling": torch.ones((), device="meta")}, TypeError, "scaling must be .* holds a number, got a meta"),
    ({"scaling": HUGE}, ValueError, "scaling must be a float, or an int of at most 63 bits, got 1329 bits"),
    ({"dropout_p": HUGE}, ValueError, "dropout_p must be a float, or an int of at most 63 bits"),
    ({"global_in_features": 2**70}, ValueError, "global_in_features must be at most 2147483647, got 1180591"),
    ({"dropout_seed": NESTED}, TypeError, "dropout_seed must be a dense tensor, got layout torch.nested"),
    ({"column_offset": None}, TypeError, "column_offset must be an int, got None"),
]


@rows("changed", [*ARGUMENTS, *CHOICES, *TENSORS])
def test_arguments(changed: dict[str, Any], error: type[Exception], words: str, world: World) -> None:
    check(world, lambda w: smoa_linear(**w.arguments(changed)), error, words)
