"""Backend "triton": long batches in parts, ranks that nobody checked, and where the kernels do not run.

What it promises beside the other backends: tests/test_contract.py. Old GPUs: tests/test_devices.py.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from kernel_cases import Guarded
from problems import NAMES, Case, assert_within_budget, cases, make_problem, relative_error

from smoa_kernels import operator
from smoa_kernels.backends import algorithms
from smoa_kernels.backends import triton as triton_backend
from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.kernels import table
from smoa_kernels.kernels.spec import Key
from smoa_kernels.tuning.gpus import GPUS
from smoa_kernels.tuning.plan import job

pytestmark = pytest.mark.numerical


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["split", "dropout"])
def test_a_long_batch_is_gathered_in_parts(
    dtype: torch.dtype, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 4096 tokens and 128 tiles are to a GPU, 64 and one are here; dropout keeps all tokens together."""
    case = Case("triton", algorithm, dtype)
    p = case.problem(tokens=150, out_features=90, in_features=70, ranks=(3, 2), random_labels=True)
    whole = p.run(**case.options)
    monkeypatch.setattr(algorithms, "GRAD_PART_TOKENS", 64)
    monkeypatch.setattr(algorithms, "GRAD_PART_TILES", 1)
    asked_anew = triton_backend._gradient_parts.__wrapped__  # it remembers how the whole batch was gathered
    monkeypatch.setattr(triton_backend, "_gradient_parts", asked_anew)
    gathered: list[int] = []
    by_block = triton_backend._by_block
    seen = lambda x, *rest: gathered.append(x.shape[0]) or by_block(x, *rest)  # noqa: E731
    monkeypatch.setattr(triton_backend, "_by_block", seen)
    parts = p.run(**case.options)
    # x in the forward, then dY and x of each part; under dropout dY anew for dX
    assert gathered == ([150] * 4 if case.dropout else [150, 128, 128, 22, 22])
    for name, ours, theirs in zip(NAMES, parts, whole, strict=True):
        error = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
        assert relative_error(ours, theirs) <= (error if name in ("dA", "dB") else 0.0), name
    assert_within_budget(parts, case, p)


@pytest.mark.parametrize("case", [case for case in cases("triton") if case.dtype == torch.float32], ids=str)
def test_ranks_beyond_the_factors_read_no_further(
    case: Case, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's ranks are not waited for, so not checked: the kernels take what lies outside as 0 or ρ."""
    monkeypatch.setattr(operator, "check_ranks", lambda *_: None)
    p = case.problem(ranks=(3, 5, 5))
    p = replace(p, A=guarded(p.A, row_padding=3), B=guarded(p.B, row_padding=3))
    found = []
    for ranks in ([0, 5, 5], [-7, 40, 2**31 - 1]):
        found.append(replace(p, ranks=torch.tensor(ranks, dtype=torch.int32)).run(**case.options))
    for name, expected, ours in zip(NAMES, *found, strict=True):
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "the kernels take bfloat16, float16, float32, got torch.float64"),
        ({"dtype": torch.float32, "ranks": (300,)}, "the kernels take ranks up to 256, got 300"),
    ],
)
def test_what_the_kernels_do_not_take(change: dict[str, object], words: str) -> None:
    p = make_problem(**change)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=f"backend='triton' cannot run here: {words}.*'eager' works everywhere"
    ):
        p.forward(backend="triton")


def test_algorithm_of_another_backend() -> None:
    with pytest.raises(ValueError, match="merged, split, fused on backend 'triton', got 'expanded'"):
        make_problem(dtype=torch.float32).forward(backend="triton", algorithm="expanded")


@pytest.mark.parametrize(
    ("stage", "dtype", "tokens", "expected"),
    [
        ("forward", torch.bfloat16, 64, "fused"),
        ("forward", torch.bfloat16, 65, "split"),
        ("input_gradient", torch.bfloat16, 64, "fused"),
        ("input_gradient", torch.bfloat16, 65, "merged"),
        ("input_gradient", torch.float32, 32, "fused"),  # in TF32
        ("input_gradient", torch.float32, 33, "merged"),
    ],
)
def test_auto_is_fused_for_few_tokens(
    stage: str, dtype: torch.dtype, tokens: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H100: else y is split, whose W_eff must not be rounded, and dX merged."""
    monkeypatch.setattr(triton_backend, "architecture", lambda device: "sm_90")
    size, rank = 4096, 16
    labels = torch.zeros(size, dtype=torch.uint8)
    adapter = PackedAdapter(
        torch.empty(size, size, dtype=dtype),
        torch.empty(rank, size, dtype=dtype),
        torch.empty(size, rank, dtype=dtype),
        BlockPartition.from_labels(labels, labels, 1),
        torch.tensor([rank], dtype=torch.int32),
        torch.ones(()),
    )
    x = torch.empty(tokens, size, dtype=dtype)
    table.forget()
    assert triton_backend._chosen(stage, x, adapter, dtype == torch.float32) == expected
    table.forget()
    key = Key(stage, "tf32" if dtype == torch.float32 else "bf16", rank, 1, size, size, tokens)
    assert job(key, "sm_90", GPUS["h100"].multiprocessors).default == expected  # what the tuner tries first


OUTSIDE = """
import torch, sys
{prelude}
from smoa_kernels import FusedSMoALinear
layer = FusedSMoALinear(8, 6, r=2, backend="triton")
try:
    layer(torch.randn(3, 8))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("prelude", "words"),
    [
        ("", "x is on the CPU, where kernels run only under Triton's interpreter (TRITON_INTERPRET=1)"),
        pytest.param("sys.modules['triton'] = None", "triton is not installed", marks=pytest.mark.slow),
        pytest.param(
            "import triton; triton.__version__ = '3.1.0'",
            "triton 3.1.0 is older than 3.6, the oldest supported",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_where_the_kernels_cannot_run(prelude: str, words: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = OUTSIDE.format(prelude=prelude)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    expected = f"backend='triton' cannot run here: {words}; backend='eager' works everywhere"
    assert result.stdout.strip() == expected
