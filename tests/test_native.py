"""The compiled GEMM in float32: shapes around its panels, widened half types, masks, threads, instruction sets.

The promises that it shares with other backends are tested in tests/test_contract.py.
"""

import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from compiled import (
    CPU,
    FORMS,
    assert_threads_agree,
    each_dtype,
    each_form,
    each_half,
    needs_amx,
    needs_avx512_bf16,
    needs_bf16,
    needs_library,
    on_cpu,
)
from places import ran
from problems import HALF, LAYOUTS, assert_within_budget

from smoa_kernels import FusedSMoALinear
from smoa_kernels.backends import native_unsupported_reason
from smoa_kernels.backends.native import backend, library
from smoa_kernels.backends.native.backend import Path
from smoa_kernels.backends.native.library import KINDS
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.precision import has_gemm

SHAPES: dict[str, tuple[tuple[int, int, int, tuple[int, ...]], ...]] = {
    "any code": (
        (1, 1, 1, (1,)),
        (0, 8, 8, (2,)),
        (13, 31, 29, (2, 1)),  # smaller than every tile
        *((tokens, 23, 41, (3, 0, 2)) for tokens in range(2, 10)),  # few tokens, and one too many
        (1, 37, 41, (4, 9)),
        (1, 37, 70, (12,)),  # a bf16 token is multiplied by 13 vectors, five at a time
        (70, 61, 147, (3, 0, 18)),
        (40, 8, 8, (300,)),  # a workspace mostly for the factors
        (64, 5, 7, (1,) * 5),  # blocks of one row
    ),
    "float": (
        (14, 32, 8, (2,)),  # exactly one tile of AVX-512
        (6, 16, 16, (3, 3)),  # exactly one tile of AVX2
        (200, 97, 541, (3, 0, 2)),  # several panels of tokens, two of terms, prime sizes
        (37, 2111, 23, (1, 2)),  # two panels of rows
        (23, 19, 2111, (4, 4)),
        (5, 7, 900, (4, 4)),  # few and long rows
        (1100, 600, 16, (2,)),  # two slabs of G, three panels of tokens
        (5, 40, 40, (17,)),
        (2100, 40, 530, (5, 2)),  # more tokens than are multiplied at once, two panels of terms
        (30, 300, 290, (3, 0, 4)),  # two right panels
        (520, 5, 4300, (2,)),  # more tokens than half types multiply at once if rows are long
        (300, 30, 1050, (2, 1)),  # two panels of terms in a block
        (12, 60, 377, (17, 0, 2)),  # few tokens, for which MKL's sums are short
    ),
    "amx_parts": (
        (96, 128, 128, (2,)),  # exactly one tile
        (97, 131, 127, (3, 0, 2)),  # prime sizes, blocks below a tile
        (130, 7, 33, (1,)),
        (300, 300, 1050, (17, 2)),  # several right panels, three of terms; G needs only one of terms
        (1600, 530, 40, (2,)),  # four panels of terms of G; two slabs are summed
        (2100, 40, 70, (4, 1)),  # more tokens than are multiplied at once
    ),
    "bf16_tiles": (
        (16, 32, 32, (2,)),  # exactly one tile
        (33, 31, 29, (2, 1)),  # one token more; smaller than every other tile
        (40, 97, 401, (3, 0, 2)),  # a block without a rank, prime sizes
        (70, 32, 320, (17,) * 8),  # two tiles of ranks, widely spaced columns
        (20, 600, 330, (16, 8)),  # several groups of rows and of columns
        (300, 40, 2100, (5, 2)),
        (2051, 48, 80, (3, 2)),  # more tokens than one copy holds
        (80, 640, 320, (16, 8)),  # several groups of rows, of whole panels
        (1040, 512, 320, (2, 2)),  # whole panels, several together, and half a panel of tokens
    ),
}
"""Tokens, rows, columns and ranks: around the tiles and panels of float32's code, AMX's for it, and bfloat16's."""
CODES = {
    "float": (needs_library, FORMS),
    "amx_parts": (needs_amx, ("merged", "split", "dropout")),
    "bf16_tiles": (needs_bf16, ("merged", "split", "dropout")),
}


def of_every_code() -> Iterator[object]:
    for code, (needed, forms) in CODES.items():
        for form, shape in product(forms, SHAPES["any code"] + SHAPES[code]):
            name = f"{code}-{form}-{'x'.join(map(str, shape[:3]))}"
            yield pytest.param(code, form, shape, id=name, marks=needed)


@pytest.mark.parametrize(("code", "form", "shape"), list(of_every_code()))
@pytest.mark.parametrize(
    ("order", "layout"),
    [("spectral", "contiguous"), ("contiguous", "column-major"), ("contiguous", "padded rows")],
)
def test_every_shape(
    code: str,
    form: str,
    shape: tuple[int, int, int, tuple[int, ...]],
    order: str,
    layout: str,
    only_compiled: None,
    guarded_memory: None,
    request: pytest.FixtureRequest,
) -> None:
    """Without tiles half types are widened while they are packed: float32's bits, rounded once; "split" is "merged"."""
    sizes = dict(zip(("tokens", "out_features", "in_features", "ranks"), shape, strict=True))
    p, case = on_cpu(**sizes, block_order=order).stored(LAYOUTS[layout]), FORMS[form]
    if code == "bf16_tiles":
        p, case = p.to(torch.bfloat16), replace(case, dtype=torch.bfloat16)
    if code == "float":
        request.getfixturevalue("in_float32")
    assert_threads_agree(case, p)
    for dtype in HALF if code == "float" else ():
        rounded = p.to(dtype)
        dots = len(shape[3]) == 1 and form != "dropout" and library.has("bf16")
        if dtype == torch.bfloat16 and len(p.x) == 1 and dots:
            # One token of one block is multiplied by W0 and by A_t ∘ x, which is rounded (column-major: dY by B_t).
            assert_within_budget(rounded.run(**case.options), replace(case, dtype=dtype), rounded)
            continue
        exact = rounded.to(torch.float32).run(**FORMS["merged" if form == "split" else form].options)
        for ours, reference in zip(rounded.run(**case.options)[:4], exact, strict=False):
            assert torch.equal(ours, reference.to(dtype))


@pytest.mark.parametrize("supported", [True, False])
@each_half
def test_torch_is_asked_whether_it_has_a_gemm(
    supported: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build without oneDNN has neither this query nor the GEMM."""
    name = f"_is_mkldnn_{ {torch.bfloat16: 'bf16', torch.float16: 'fp16'}[dtype] }_supported"
    assert has_gemm.__wrapped__(dtype) == getattr(torch.ops.mkldnn, name, lambda: False)()
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**{name: lambda: supported}))
    assert has_gemm.__wrapped__(dtype) == supported
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not has_gemm.__wrapped__(dtype)


AMX, AVX512_BF16, AVX512, AVX2 = {"amx", "bf16", "avx512"}, {"bf16", "avx512"}, {"avx512"}, set[str]()
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, *HALF


def route(tokens: torch.Tensor, rank: int, algorithm: str) -> Path:
    few, path = backend.routes(tokens.dtype, rank, algorithm)
    return Path.FEW if len(tokens) <= few else path


@pytest.mark.parametrize(
    ("has", "dtype", "tokens", "algorithm", "expected"),
    [
        *(
            (one, dtype, 12, form, Path.FEW)
            for one in (AMX, AVX512_BF16, AVX512, AVX2)
            for dtype in KINDS
            for form in ("auto", "merged", "split")
        ),
        *(
            (one, FLOAT32, 17, form, Path.FLOAT)
            for one in (AMX, AVX2)
            for form in ("auto", "merged", "dropout")
        ),
        *((one, BFLOAT16, 13, "auto", Path.TILES) for one in (AMX, AVX512_BF16)),
        (AMX, BFLOAT16, 4, "dropout", Path.TILES),
        *((AMX, BFLOAT16, 50, form, Path.TILES) for form in ("merged", "split")),
        *((one, dtype, 16, "auto", Path.FEW) for one, dtype in ((AVX512, BFLOAT16), (AMX, FLOAT16))),
        (AMX, FLOAT16, 50, "split", Path.FLOAT),
        *((AVX2, dtype, 13, "auto", Path.FLOAT) for dtype in KINDS),
        *((AVX512, dtype, 50, form, Path.FLOAT) for dtype in HALF for form in ("auto", "merged", "dropout")),
        (AMX, FLOAT32, 50, "expanded", Path.FEW),
    ],
)
def test_which_code_computes_a_call(
    has: set[str],
    dtype: torch.dtype,
    tokens: int,
    algorithm: str,
    expected: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "has", has.__contains__)
    assert route(torch.empty(tokens, 64, dtype=dtype), 4, algorithm) == expected


@needs_library
def test_few_tokens_are_fewer_the_more_ranks_there_are() -> None:
    def most(tokens: int) -> int:
        return sum(route(torch.empty(tokens, 8), rank, "auto") == Path.FEW for rank in range(99))

    assert [most(tokens) for tokens in range(1, 18)] == sorted(map(most, range(1, 18)), reverse=True)
    assert [most(tokens) for tokens in (1, 2, 8, 12, 16, 17)] == [65, 33, 9, 6, 5 * library.has("avx512"), 0]


@needs_library
def test_dx_of_few_tokens_is_as_exact_as_torchs() -> None:
    """Rows of W_eff are added up, in short sums: one sum of all rows has over three times torch's error."""
    torch.manual_seed(0)
    layer = FusedSMoALinear(32, 11008, bias=False, r=2, num_blocks=1, block_order="contiguous")
    x, dy = torch.randn(4, 32, requires_grad=True), torch.randn(4, 11008)
    assert route(dy, 2, "auto") == Path.FEW
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    exact = dy.double() @ layer.weight.double()
    assert (dx - exact).norm() < 1.5 * (dy @ layer.weight - exact).norm()


def run_again(files: Sequence[str], names: str, **limit: str) -> None:
    """Run tests of these names in a process whose torch is limited to fewer instructions; none may be skipped."""
    paths = [pathlib.Path(__file__).with_name(f"test_{file}.py") for file in files]
    done = ran("-m", "pytest", "-p", "no:cacheprovider", "-rs", *paths, "-k", names, **limit)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.lower(), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or native_unsupported_reason(CPU) is not None,
    reason="needs a processor that has both instruction sets",
)
@pytest.mark.long
def test_the_same_on_older_processors() -> None:
    names = "(native or every_shape or threads or mask or dropped or bf16)"
    others = ("older", "without_amx", "broken", "bf16_tiles", "its_thresholds", "amx_parts", "limit")
    names += "".join(f" and not {name}" for name in others)
    run_again(("native", "native_operands", "bf16", "contract"), names, ATEN_CPU_CAPABILITY="avx2")


@pytest.mark.slow
@needs_avx512_bf16
@needs_library
def test_the_same_without_amx() -> None:
    """By AVX512-BF16 without AMX, as on AMD's Zen 4 and 5; on Intel's processors the limit asks for it."""
    names = "(test_every_shape and not amx_parts) or factors or behind or as_large or alone"
    run_again(("native", "bf16"), names, ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")


@needs_library
@each_form
def test_a_profile_names_the_called_functions(form: str) -> None:
    p = on_cpu(tokens=50)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        p.run(**FORMS[form].options)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert [counts.get(name) for name in library.FUNCTIONS] == [1, 1, 1]


@needs_library
@pytest.mark.parametrize("offset", [0, 5, 2**31 - 38])
@pytest.mark.parametrize("seed", [7, -3, 2**62 + 5])
@pytest.mark.parametrize("p", [0.3, 1e-6, 0.999])
def test_the_mask_is_eagers(seed: int, p: float, offset: int) -> None:
    mask = Dropout(torch.tensor(seed), p, offset)
    x = torch.randn(600, 37)
    bits = library.drawn(mask, x, 37).kept[:, torch.arange(37) // 16] >> (torch.arange(37) % 16) & 1
    assert torch.equal(bits.float() * mask.scale, mask.multiplier(x))


@needs_library
@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_dropped_nan_and_infinity_are_still_seen(value: float, dtype: torch.dtype) -> None:
    """0 · NaN is NaN, in the definition and in torch's operators."""
    p, options = on_cpu(dtype, tokens=40, random_labels=True), FORMS["dropout"].options
    dropped = FORMS["dropout"].dropout.multiplier(p.x) == 0
    for place in dropped.nonzero()[:3].tolist():
        x = p.x.clone()
        x[tuple(place)] = value
        found, expected = (replace(p, x=x).run(**options | {"backend": name}) for name in ("native", "eager"))
        for ours, reference in zip(found, expected, strict=True):
            assert torch.equal(ours.isfinite(), reference.isfinite())
