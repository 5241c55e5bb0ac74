"""The compiled GEMM in float32: shapes around its panels, widened half types, masks, threads, instruction sets.

The promises that it shares with other backends are tested in tests/test_contract.py.
"""

import pathlib
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiled import (
    CPU,
    FORMS,
    assert_right,
    assert_threads_agree,
    each_dtype,
    each_form,
    each_half,
    each_shape,
    needs_bf16,
    needs_library,
    on_cpu,
)
from places import ran
from problems import HALF, LAYOUTS, NAMES
from torch import Tensor

from smoa_kernels import BlockPartition
from smoa_kernels.backends import native_obstacle
from smoa_kernels.backends.native import backend, library
from smoa_kernels.backends.native.backend import Path
from smoa_kernels.backends.native.library import KINDS, Algorithm, Call, Mask
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import PackedAdapter, scaling_tensor
from smoa_kernels.definition.precision import has_gemm


@needs_library
@each_shape(
    [
        (1, 1, 1, (1,)),
        (13, 31, 29, (2, 1)),  # smaller than every tile
        (14, 32, 8, (2,)),  # exactly one tile of AVX-512
        (6, 16, 16, (3, 3)),  # exactly one tile of AVX2
        *((tokens, 23, 41, (3, 0, 2)) for tokens in range(2, 10)),  # few tokens, and one too many
        (1, 37, 41, (4, 9)),  # one block with W_eff in memory and one without
        (2, 23, 41, (1, 2)),
        (200, 97, 401, (3, 0, 2)),  # several panels of tokens, two of terms, prime sizes
        (37, 2111, 23, (1, 2)),  # two panels of rows
        (23, 19, 2111, (4, 4)),
        (900, 600, 16, (2,)),  # two slabs of G, three panels of tokens
        (5, 40, 40, (17,)),
        (64, 5, 7, (1,) * 5),  # blocks of one row
        (2100, 40, 400, (5, 2)),  # two left panels, two of terms, blocks gathered in pieces
        (30, 300, 290, (3, 0, 4)),  # three right panels
        (300, 30, 790, (2, 1)),  # two bands of tokens, two panels of terms in a block
        (12, 60, 377, (17, 0, 2)),  # few tokens, for which MKL's sums are short
    ],
)
@pytest.mark.parametrize(
    "threads", [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 3, 8))]
)
@each_form
def test_every_shape(
    sizes: dict[str, Any], threads: int, form: str, in_float32: None, guarded_memory: None
) -> None:
    assert_right(FORMS[form], on_cpu(**sizes), threads)


@needs_library
@each_shape(
    [
        (1, 1, 1, (1,)),
        (0, 8, 8, (2,)),
        (13, 31, 29, (2, 1)),  # smaller than every tile
        (3, 23, 41, (3, 0, 2)),  # few tokens
        (30, 300, 290, (3, 0, 4)),  # three right panels
        (200, 97, 401, (3, 0, 2)),  # several panels of tokens, two of terms, prime sizes
        (900, 600, 16, (2,)),  # two slabs of G, three panels of tokens
        (5, 7, 900, (4, 4)),  # pieces of AVX-512
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "column-major", "padded rows"])
@pytest.mark.parametrize("order", ["spectral", "contiguous"])
@each_half
@each_form
def test_halves_equal_float32_rounded_once(
    sizes: dict[str, Any],
    layout: str,
    order: str,
    dtype: torch.dtype,
    form: str,
    in_float32: None,
    only_compiled: None,
    guarded_memory: None,
) -> None:
    """The same bits: if torch has no GEMM of a half type, operands are widened while they are packed."""
    p = on_cpu(dtype, **sizes, block_order=order).stored(LAYOUTS[layout])
    expected = p.to(torch.float32).run(**FORMS[form].options)
    found = p.run(**replace(FORMS[form], dtype=dtype).options)
    for name, ours, theirs in zip(NAMES[:4], found, expected, strict=False):
        assert torch.equal(ours, theirs.to(dtype)), name


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


@needs_library
@each_dtype
@each_form
@pytest.mark.parametrize("tokens", [4, 50])
def test_contiguous_blocks_equal_indexed_ones(tokens: int, form: str, dtype: torch.dtype) -> None:
    """The same bits: contiguous blocks are read in place; without the flag they are read by index."""
    p = on_cpu(dtype, tokens=tokens, out_features=301, in_features=457, block_order="contiguous")
    *sizes, granularity, contiguous = p.partition.sizes()
    assert contiguous
    indexed = BlockPartition.from_tensors(p.partition.tensors(), [*sizes, granularity, 0])
    for layout in (p, replace(p, weight=p.weight.T.contiguous().T)):
        if backend.route(layout.x, layout.weight, len(layout.A), form) == Path.EAGER:
            continue
        runs = (replace(layout, partition=one).run(**FORMS[form].options) for one in (p.partition, indexed))
        assert all(map(torch.equal, *runs))


@needs_library
@pytest.mark.parametrize("granule", [8, 16, 3])
@pytest.mark.parametrize("masked", [False, True])
@each_dtype
def test_granules_equal_scattered_coordinates(granule: int, masked: bool, dtype: torch.dtype) -> None:
    """The same bits when the coordinates of each block are spread out in order, so that no two are adjacent."""
    p = on_cpu(dtype, tokens=50, out_features=202, in_features=413, block_order="random", granule=granule)
    old = p.partition
    generator = torch.Generator().manual_seed(1)
    row_block, col_block = (
        labels[torch.randperm(len(labels), generator=generator)] for labels in old.tensors()[:2]
    )
    new = BlockPartition.from_labels(row_block, col_block, old.num_blocks)
    rows, cols = (  # the old place of each row and column
        torch.empty_like(after).scatter_(0, after, before)
        for before, after in ((old.row_index, new.row_index), (old.col_index, new.col_index))
    )
    adapter, scattered = (
        PackedAdapter(W, A, B, partition, p.ranks, scaling_tensor(p.scaling, CPU))
        for W, A, B, partition in (
            (p.weight, p.A, p.B, old),
            (p.weight[rows][:, cols], p.A[:, cols], p.B[rows], new),
        )
    )
    kept = torch.rand(p.x.shape, generator=generator) < 0.7

    def results(x: Tensor, dy: Tensor, adapter: PackedAdapter, kept: Tensor) -> tuple[Tensor, ...]:
        padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 16)).unflatten(1, (-1, 16))
        words = (padded.int() << torch.arange(16)).sum(2).to(torch.int16)
        call = Call.of(adapter, Mask(words, 1.5) if masked else None).plan(Path.FLOAT, Algorithm.UPDATE)
        y, dA, dB = torch.zeros_like(dy), torch.empty_like(adapter.A), torch.empty_like(adapter.B)
        call.run("smoa_forward", x=x, y=y)
        call.run("smoa_gradient", dy=dy, x=x, dA=dA, dB=dB)
        return y, dA, dB

    y, dA, dB = results(p.x, p.dy, adapter, kept)
    found = results(p.x[:, cols], p.dy[:, rows], scattered, kept[:, cols])
    assert all(map(torch.equal, (y[:, rows], dA[:, cols], dB[rows]), found))


AMX, AVX512_BF16, AVX512, AVX2 = {"amx", "bf16", "avx512"}, {"bf16", "avx512"}, {"avx512"}, set[str]()
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, *HALF


@pytest.mark.parametrize(
    ("has", "dtype", "tokens", "algorithm", "expected"),
    [
        *((one, dtype, 12, "auto", Path.FEW) for one in (AMX, AVX512_BF16, AVX512, AVX2) for dtype in KINDS),
        *(
            (one, FLOAT32, 13, form, Path.FLOAT)
            for one in (AMX, AVX2)
            for form in ("auto", "merged", "dropout")
        ),
        *((one, BFLOAT16, 13, "auto", Path.TILES) for one in (AMX, AVX512_BF16)),
        (AMX, BFLOAT16, 4, "dropout", Path.TILES),
        (AMX, BFLOAT16, 50, "merged", Path.EAGER),
        *((one, FLOAT16, 50, "split", Path.EAGER) for one in (AMX, AVX512)),
        (AVX512, BFLOAT16, 50, "auto", Path.EAGER),
        *((AVX2, dtype, 50, form, Path.FLOAT) for dtype in HALF for form in ("auto", "merged", "dropout")),
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
    monkeypatch.setattr(backend, "has_gemm", lambda dtype: "avx512" in has)
    x, weight = torch.empty(tokens, 64, dtype=dtype), torch.empty(32, 64, dtype=dtype)
    assert backend.route(x, weight, 4, algorithm) == expected
    column_major = backend.route(x, weight.T.contiguous().T, 4, algorithm)
    assert column_major in (Path.FLOAT, Path.EAGER)
    assert column_major == (Path.EAGER if "avx512" in has and dtype.itemsize == 2 else Path.FLOAT)


@needs_library
def test_few_tokens_are_fewer_the_more_ranks_there_are() -> None:
    weight = torch.empty(8, 8)

    def most(tokens: int) -> int:
        few = (backend.route(torch.empty(tokens, 8), weight, rank, "auto") == Path.FEW for rank in range(99))
        return sum(few)

    assert [most(tokens) for tokens in range(1, 14)] == sorted(map(most, range(1, 14)), reverse=True)
    assert [most(tokens) for tokens in (1, 2, 8, 12, 13)] == [65, 33, 9, 6, 0]


def run_again(files: Sequence[str], names: str, **limit: str) -> None:
    """Run tests of these names in a process whose torch is limited to fewer instructions; none may be skipped."""
    paths = [pathlib.Path(__file__).with_name(f"test_{file}.py") for file in files]
    done = ran("-m", "pytest", "-p", "no:cacheprovider", "-rs", *paths, "-k", names, **limit)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.lower(), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or native_obstacle(CPU) is not None,
    reason="needs a processor that has both instruction sets",
)
@pytest.mark.long
def test_the_same_on_older_processors() -> None:
    names = "(native or every_shape or threads or mask or dropped)"
    names += " and not older and not without_amx and not broken"  # these skip some
    run_again(("native", "native_operands", "contract"), names, ATEN_CPU_CAPABILITY="avx2")


@pytest.mark.slow
@needs_bf16
def test_the_same_without_amx() -> None:
    """As on processors with AVX512-BF16 but without AMX: AMD's Zen 4 and 5."""
    names = "test_every_shape or one_thread or factors or outside or behind or as_large or alone"
    run_again(("native", "bf16"), names, ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")


@needs_library
@each_form
def test_one_thread_and_three_give_the_same_output(form: str) -> None:
    p = on_cpu(tokens=100, out_features=90, in_features=500, random_labels=True)
    assert_threads_agree(FORMS[form], p)


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
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite())
