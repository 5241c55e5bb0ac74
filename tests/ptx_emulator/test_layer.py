"""`smoa_linear`, forward and backward, with all algorithms and dtypes: odd sizes and strides, and sizes of one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from expert_problems import make_problem as make_experts
from problems import LAYOUTS, NAMES, Case, LinearProblem, budget_shares, make_problem, relative_error

from smoa_kernels.definition.experts import reference_experts_linear

from .plugin import SHARE

ALGORITHMS = ("split", "merged", "fused", "dropout")
PROBLEMS = {
    "odd": {"tokens": 37, "out_features": 131, "in_features": 197, "ranks": (20, 3, 0)},
    "strided": {"tokens": 37, "out_features": 131, "in_features": 197, "ranks": (20, 3, 0)},
    "small ranks": {"tokens": 37, "out_features": 131, "in_features": 197, "ranks": (5, 3, 0)},
    "one block": {"tokens": 70, "out_features": 67, "in_features": 101, "ranks": (40,)},
    "five blocks": {
        "tokens": 1,
        "out_features": 90,
        "in_features": 61,
        "ranks": (7, 0, 33, 1, 17),
        "random_labels": True,
    },
    "aligned": {
        "tokens": 128,
        "out_features": 256,
        "in_features": 192,
        "ranks": (16, 16),
        "random_labels": True,
    },
    "granules": {
        "tokens": 70,
        "out_features": 240,
        "in_features": 200,
        "ranks": (16, 3, 0),
        "block_order": "random",
        "granule": 8,
    },
}
PRECISIONS = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16, float32 factors": (torch.bfloat16, torch.float32),
    "fp16, float32 factors": (torch.float16, torch.float32),
    "tf32": (torch.float32, None),
    "fp32": (torch.float32, None),
}
SMOKE = [
    *(("bf16", "odd", algorithm, False) for algorithm in ALGORITHMS),
    ("bf16", "aligned", "fused", False),
    ("bf16", "small ranks", "fused", False),
    *(("bf16", "granules", algorithm, False) for algorithm in ("split", "dropout")),
    ("fp16, float32 factors", "odd", "merged", True),
    ("tf32", "odd", "split", False),
    ("tf32", "aligned", "fused", False),
]
TF32 = 2**-9  # TF32 keeps 10 bits of each operand
MOST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-4}
"""Limits for sizes of one, for which the definition's own error is small or large by luck."""


def problem(name: str, precision: str, *, positive: bool = False) -> LinearProblem:
    """A problem. With `positive` values, roundings towards zero add up."""
    dtype, factor_dtype = PRECISIONS[precision]
    p = make_problem(**PROBLEMS[name])  # type: ignore[arg-type]
    if positive:
        p = replace(p, **{n: getattr(p, n).abs() for n in ("x", "weight", "bias", "A", "B", "dy")})
    p = p.to(dtype, factor_dtype)
    return p.stored(LAYOUTS["column-major"]) if name == "strided" else p


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Sets PyTorch's TF32 option, which the kernels obey."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def cases() -> Iterator[object]:
    for precision in PRECISIONS:
        for name in PROBLEMS:
            for algorithm in ALGORITHMS:
                for positive in (False, True) if "factors" in precision else (False,):
                    case = precision, name, algorithm, positive
                    label = f"{precision}-{name}-{algorithm}{'-positive' if positive else ''}"
                    marks = [pytest.mark.smoke] if case in SMOKE else []
                    yield pytest.param(*case, id=label.replace(", ", "-").replace(" ", "_"), marks=marks)


@pytest.mark.parametrize(("precision", "name", "algorithm", "positive"), list(cases()))
def test_layer(
    precision: str,
    name: str,
    algorithm: str,
    positive: bool,
    record_property: Callable[[str, object], None],
) -> None:
    p = problem(name, precision, positive=positive)
    case = Case("triton", algorithm, p.x.dtype)
    with tf32_allowed(precision == "tf32"):
        found = p.run(**case.options)
    if precision == "tf32":
        truth = case.definition(p.to(torch.float64))
        shares = {n: relative_error(ours, t) / TF32 for n, ours, t in zip(NAMES, found, truth, strict=True)}
    else:
        shares = budget_shares(found, case, p)
    record_property(SHARE, (f"layer, {algorithm}, {precision}", max(shares.values())))
    assert all(share <= 1 for share in shares.values()), shares


def ones() -> Iterator[object]:
    for tokens in (1, 3):
        for out_features in (1, 5):
            for in_features in (1, 5):
                for ranks in ((1,), (0, 1), (17, 1)):
                    for algorithm in ALGORITHMS:
                        smoke = tokens * out_features * in_features == 1 and ranks == (1,)
                        for dtype in MOST_ERROR if smoke else (torch.float32,):
                            sizes = f"T{tokens}-N{out_features}-C{in_features}-r{'+'.join(map(str, ranks))}"
                            marks = [pytest.mark.smoke] if smoke else []
                            case = tokens, out_features, in_features, ranks, algorithm, dtype
                            yield pytest.param(*case, id=f"{sizes}-{algorithm}-{dtype}", marks=marks)


@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features", "ranks", "algorithm", "dtype"), list(ones())
)
def test_ones(
    tokens: int,
    out_features: int,
    in_features: int,
    ranks: tuple[int, ...],
    algorithm: str,
    dtype: torch.dtype,
) -> None:
    """Sizes of 1, which Triton compiles to constants."""
    p = make_problem(
        tokens=tokens,
        out_features=out_features,
        in_features=in_features,
        ranks=ranks,
        random_labels=True,
        dtype=dtype,
    )
    case = Case("triton", algorithm, dtype)
    found = p.run(**case.options)
    for name, ours, truth in zip(NAMES, found, case.definition(p.to(torch.float64)), strict=True):
        assert relative_error(ours, truth) < MOST_ERROR[dtype], name


@pytest.mark.parametrize("blocks", ["contiguous", "own"])
@pytest.mark.parametrize("pairs", [(1,), (1, 0)])
@pytest.mark.parametrize(
    ("rows", "cols", "ranks", "dtype"),
    [
        *(pytest.param(1, 1, (1,), dtype, marks=pytest.mark.smoke) for dtype in MOST_ERROR),
        *((*sizes, ranks, torch.float32) for sizes in ((1, 5), (5, 1)) for ranks in ((1,), (0, 1))),
        (1, 1, (0, 1), torch.float32),
    ],
)
def test_ones_of_experts(
    rows: int, cols: int, ranks: tuple[int, ...], pairs: tuple[int, ...], blocks: str, dtype: torch.dtype
) -> None:
    p = make_experts(pairs=pairs, rows=rows, cols=cols, ranks=ranks, blocks=blocks, dtype=dtype)
    truth = p.to(torch.float64).run(reference_experts_linear)
    for name, ours, exact in zip(NAMES[:4], p.operator("triton"), truth, strict=True):
        assert relative_error(ours, exact) < MOST_ERROR[dtype], name
