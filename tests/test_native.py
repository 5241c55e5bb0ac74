"""The compiled code: GEMMs and passes beside torch's, threads, instruction sets.

What they promise beside the other backends: tests/test_contract.py.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiled import (
    CPU,
    FORMS,
    adapter_of,
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
from problems import LAYOUTS, NAMES, assert_within_budget

from smoa_kernels import BlockPartition
from smoa_kernels.backends import native_obstacle
from smoa_kernels.backends.native import backend, library, operands, torch_gemms
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import PackedAdapter, scaling_tensor
from smoa_kernels.definition.precision import has_gemm


@needs_library
@each_shape(
    [
        (1, 1, 1, (1,)),
        (13, 31, 29, (2, 1)),  # below every tile
        (14, 32, 8, (2,)),  # just one tile of AVX-512
        (6, 16, 16, (3, 3)),  # of AVX2
        *((tokens, 23, 41, (3, 0, 2)) for tokens in range(2, 10)),  # few, and one more
        (1, 37, 41, (4, 9)),  # a block whose W_eff is not made, and one whose is
        (2, 23, 41, (1, 2)),
        (200, 97, 401, (3, 0, 2)),  # several panels of tokens, two of terms, prime sizes
        (37, 2111, 23, (1, 2)),  # two panels of rows
        (23, 19, 2111, (4, 4)),
        (900, 600, 16, (2,)),  # two slabs of G, three panels of tokens
        (5, 40, 40, (17,)),
        (64, 5, 7, (1,) * 5),  # blocks of one row
        (2100, 40, 400, (5, 2)),  # two left panels, two of terms, blocks that are gathered as pieces
        (30, 300, 290, (3, 0, 4)),  # three right panels
        (300, 30, 790, (2, 1)),  # two bands of tokens, two panels of terms in a block
        (12, 60, 377, (17, 0, 2)),  # few tokens, of which MKL's sums are short
    ],
)
@pytest.mark.parametrize(
    "threads", [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 3, 8))]
)
@each_form
def test_every_shape(
    sizes: dict[str, Any], threads: int, form: str, compiled_multiplies: None, guarded_memory: None
) -> None:
    assert_right(FORMS[form], on_cpu(**sizes), threads)


@needs_library
@each_shape(
    [
        (1, 1, 1, (1,)),
        (0, 8, 8, (2,)),
        (13, 31, 29, (2, 1)),  # below every tile
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
def test_halves_give_what_float32_gives_rounded_once(
    sizes: dict[str, Any],
    layout: str,
    order: str,
    dtype: torch.dtype,
    form: str,
    compiled_multiplies: None,
    only_compiled: None,
    guarded_memory: None,
) -> None:
    """Bit for bit: where torch has no GEMM of a half type, operands are widened as they are packed."""
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
    """A build without oneDNN has no such question, and no such GEMM."""
    name = f"_is_mkldnn_{ {torch.bfloat16: 'bf16', torch.float16: 'fp16'}[dtype] }_supported"
    assert has_gemm.__wrapped__(dtype) == getattr(torch.ops.mkldnn, name, lambda: False)()
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**{name: lambda: supported}))
    assert has_gemm.__wrapped__(dtype) == supported
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not has_gemm.__wrapped__(dtype)


@needs_library
@each_shape(
    [
        (13, 31, 29, (2, 1)),
        (3, 33, 16, (1,)),  # one vector, and a column more
        (1, 37, 41, (4, 9)),
        (0, 64, 96, (2, 2)),  # no tokens
        (0, 64, 96, (40,)),
        (8, 64, 96, (2, 2)),  # blocks of one shape
        (40, 97, 401, (3, 0, 2)),
        (70, 32, 320, (17,) * 8),  # blocks whose columns lie far apart
        (600, 40, 48, (2, 2)),  # two panels of tokens
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("column_major", [False, True])
@each_dtype
@each_form
def test_every_shape_where_torch_multiplies(
    sizes: dict[str, Any],
    threads: int,
    column_major: bool,
    dtype: torch.dtype,
    form: str,
    poisoned_memory: None,
    torch_multiplies: None,
) -> None:
    """In half precision, and in float32 of many tokens on some processors; here of few, on every one."""
    p = on_cpu(dtype, **sizes)
    if column_major:
        p = replace(p, weight=p.weight.T.contiguous().T)
    assert_right(replace(FORMS[form], dtype=dtype), p, threads)


@needs_library
@each_dtype
@each_form
@pytest.mark.parametrize("tokens", [4, 50])
def test_contiguous_blocks_give_what_their_indices_give(tokens: int, form: str, dtype: torch.dtype) -> None:
    """Bit for bit: what lies in order is read where it lies, by its label; without it by index."""
    p = on_cpu(dtype, tokens=tokens, out_features=301, in_features=457, block_order="contiguous")
    *sizes, granularity, contiguous = p.partition.sizes()
    assert contiguous
    indexed = BlockPartition.from_tensors(p.partition.tensors(), [*sizes, granularity, 0])
    for layout in (p, replace(p, weight=p.weight.T.contiguous().T)):
        runs = (replace(layout, partition=one).run(**FORMS[form].options) for one in (p.partition, indexed))
        assert all(map(torch.equal, *runs))


@needs_library
@each_dtype
@each_form
@pytest.mark.parametrize("tokens", [0, 70, 600])
@pytest.mark.parametrize("column_major", [False, True])
def test_contiguous_blocks_of_one_shape_where_torch_multiplies(
    tokens: int,
    column_major: bool,
    dtype: torch.dtype,
    form: str,
    poisoned_memory: None,
    torch_multiplies: None,
) -> None:
    """Of few tokens they are one batch, of copies; of many they are slices; W0 and x may be parts of others."""
    p = on_cpu(
        dtype, tokens=tokens, out_features=64, in_features=96, ranks=(2,) * 4, block_order="contiguous"
    )
    if column_major:
        p = replace(p, weight=p.weight.T.contiguous().T)
    p = replace(p, x=torch.nn.functional.pad(p.x, (3, 2))[:, 3:-2])
    assert_within_budget(p.run(**FORMS[form].options), replace(FORMS[form], dtype=dtype), p)


@needs_library
@pytest.mark.parametrize("features", [(5, 7), (6, 8), (31, 29)])
def test_a_workspace_behind_halves_is_where_floats_are(features: tuple[int, int]) -> None:
    p = on_cpu(torch.bfloat16, tokens=3, out_features=features[0], in_features=features[1], ranks=(2,))
    adapter = adapter_of(p)
    memory, address = torch_gemms.Blocks(adapter, None, batch=False).memory(20)
    assert address % 4 == 0
    assert address + 20 * 4 <= memory.data_ptr() + memory.nbytes


@needs_library
@pytest.mark.parametrize("granule", [8, 16, 3])
@pytest.mark.parametrize("masked", [False, True])
@each_dtype
def test_granules_give_what_scattered_coordinates_give(
    granule: int, masked: bool, dtype: torch.dtype
) -> None:
    """Bit for bit: coordinates of a block moved apart, in their order, so that no two are read together."""
    p = on_cpu(dtype, tokens=50, out_features=202, in_features=413, block_order="random", granule=granule)
    old = p.partition
    generator = torch.Generator().manual_seed(1)
    row_block, col_block = (
        labels[torch.randperm(len(labels), generator=generator)] for labels in old.tensors()[:2]
    )
    new = BlockPartition.from_labels(row_block, col_block, old.num_blocks)
    rows, cols = (  # where each row and column comes from
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

    def mask(columns: torch.Tensor) -> operands.Mask | None:
        padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % 16)).unflatten(1, (-1, 16))
        words = (padded.int() << torch.arange(16)).sum(2)
        return operands.Mask(words.to(torch.int16), 1.5) if masked else None

    y = backend._update(p.x, adapter, x_mask=mask(kept))
    assert torch.equal(y[:, rows], backend._update(p.x[:, cols], scattered, x_mask=mask(kept[:, cols])))
    dA, dB = backend.factor_gradients(p.dy, p.x, adapter, mask(kept))
    found = backend.factor_gradients(p.dy[:, rows], p.x[:, cols], scattered, mask(kept[:, cols]))
    assert torch.equal(dA[:, cols], found[0])
    assert torch.equal(dB[rows], found[1])


@needs_library
def test_few_tokens_are_fewer_the_more_ranks_there_are() -> None:
    few = library.library().smoa_few_fit
    ranks = [max((rank for rank in range(1, 40) if few(tokens, rank)), default=0) for tokens in range(1, 10)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 16
    assert ranks[-1] == 0


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or native_obstacle(CPU) is not None,
    reason="needs a processor that has both instruction sets",
)
@pytest.mark.long
def test_the_same_on_older_processors() -> None:
    names = "(native or every_shape or threads or mask or dropped)"
    names += " and not older and not without_amx and not broken"  # which skip some
    files = [
        Path(__file__).with_name(f"test_{name}.py") for name in ("native", "native_operands", "contract")
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *map(str, files), "-k", names]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
@needs_bf16
def test_the_same_without_amx() -> None:
    """As on processors that have AVX512-BF16 alone, AMD's Zen 4 and 5."""
    files = [__file__, str(Path(__file__).with_name("test_bf16.py"))]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *files, "-k"]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    names = "(test_every_shape and not multiplies) or one_thread or factors or outside or behind or as_large or alone"
    done = subprocess.run([*command, names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "SKIPPED" not in done.stdout, done.stdout


@needs_library
@each_form
def test_one_thread_and_three_give_the_same_output(form: str) -> None:
    p = on_cpu(tokens=100, out_features=90, in_features=500, random_labels=True)
    assert_threads_agree(FORMS[form], p)


@needs_library
@pytest.mark.parametrize(
    ("form", "expected"),
    [("merged", (2, 0, 1)), ("expanded", (2, 0, 1)), ("split", (2, 1, 1)), ("dropout", (2, 2, 1))],
)
def test_a_profile_names_what_was_called(form: str, expected: tuple[int, ...]) -> None:
    p = on_cpu(tokens=50)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        p.run(**FORMS[form].options)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert (
        tuple(counts.get(name, 0) for name in (backend.LINEAR, backend.UPDATE, backend.GRADIENT)) == expected
    )


@needs_library
@pytest.mark.parametrize("shard", [None, (5, 100)])
@pytest.mark.parametrize("seed", [7, -3, 2**62 + 5])
@pytest.mark.parametrize("p", [0.3, 1e-6, 0.999])
def test_the_mask_is_eagers(seed: int, p: float, shard: tuple[int, int] | None) -> None:
    """The very bits that torch's generator draws, of a part of the columns too."""
    offset, width = shard or (0, None)
    mask = Dropout(torch.tensor(seed), p, offset, width)
    x = torch.randn(600, 37)
    bits = operands.drawn(mask, x, 37).kept[:, torch.arange(37) // 16] >> (torch.arange(37) % 16) & 1
    assert torch.equal(bits.float() * mask.scale, mask.multiplier(x))


@needs_library
@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_dropped_is_still_seen_where_it_is_not_finite(value: float, dtype: torch.dtype) -> None:
    """0 · NaN is NaN, by the definition and in torch's operators."""
    p, options = on_cpu(dtype, tokens=40, random_labels=True), FORMS["dropout"].options
    dropped = FORMS["dropout"].dropout.multiplier(p.x) == 0
    for place in dropped.nonzero()[:3].tolist():
        x = p.x.clone()
        x[tuple(place)] = value
        found, expected = (replace(p, x=x).run(**options | {"backend": name}) for name in ("native", "eager"))
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite())
