"""The compiled code: GEMMs and passes beside torch's, threads, instruction sets, what it refuses to follow; why it may
be absent.

What they promise beside the other backends: tests/test_contract.py.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiled import CPU, adapter_of, assert_right, assert_threads_agree, each_shape, needs_bf16, on_cpu
from problems import HALF, LAYOUTS, NAMES, Case, LinearProblem, assert_within_budget
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import hatch_build
from smoa_kernels import BlockPartition
from smoa_kernels.backends import load_backend, native_obstacle, resolve_backend
from smoa_kernels.backends.native import backend, bf16, library, operands, torch_gemms
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import PackedAdapter, scaling_tensor
from smoa_kernels.definition.precision import has_gemm

needs_library = pytest.mark.skipif(native_obstacle(CPU) is not None, reason=str(native_obstacle(CPU)))


# W_eff's GEMMs, by packing it and by not; those of W0 and ΔW: of all of x, and of what is not dropped.
FORMS = {form: Case("native", form, torch.float32) for form in ("merged", "expanded", "split", "dropout")}
each_form = pytest.mark.parametrize("form", FORMS)
# Half types take other code; the two of them the same, but for the numbers' format.
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=lambda dtype: str(dtype)[6:])
each_half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
# Strides of a W0 whose elements share memory.
SHARING = ((0, 1), (1, 0), (0, 0), (1, 1))


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
@pytest.mark.parametrize(
    ("dtype", "strides", "form"),
    [
        (dtype, strides, form)  # of every two some, and no two alike
        for turn, dtype in enumerate((torch.float32, *HALF))
        for strides, form in zip(SHARING, [*FORMS, *FORMS][turn : turn + 4], strict=True)
    ],
)
@pytest.mark.parametrize("multiplies", ["torch", "compiled"])
def test_weights_whose_elements_share_memory(
    dtype: torch.dtype, strides: tuple[int, int], form: str, multiplies: str, request: pytest.FixtureRequest
) -> None:
    """What torch makes like a broadcast matrix, or windows of a line, has an order of its own."""
    request.getfixturevalue(f"{multiplies}_multiplies")
    p, case = on_cpu(dtype, tokens=40, ranks=(2, 3)), replace(FORMS[form], dtype=dtype)
    p = replace(p, weight=p.weight.as_strided(p.weight.shape, strides))
    assert_within_budget(p.run(**case.options), case, p)


@needs_library
@each_form
def test_factors_of_a_dtype_that_it_does_not_read(form: str) -> None:
    """Under autocast they may be of any: torch's operators take over."""
    p, case = on_cpu(tokens=40), FORMS[form]
    found = replace(p.to(torch.float32, torch.float64), dy=p.dy.bfloat16()).run(
        autocast=torch.bfloat16, **case.options
    )
    cast = p.to(torch.bfloat16)
    assert [one.dtype for one in found[2:4]] == [torch.float64] * 2
    rounded = tuple(one.to(torch.bfloat16) for one in found)
    assert_within_budget(rounded, replace(case, dtype=torch.bfloat16), cast)


def in_backend(name: str, p: LinearProblem, form: str) -> list[tuple[Tensor, ...] | type]:
    """What `forward` and `backward` of a backend return, or the kind of error that they raise."""
    dropout = FORMS[form].dropout
    adapter = adapter_of(p)
    module = load_backend(name)
    calls = (
        lambda: (module.forward(p.x, None, adapter, "split" if dropout else form, dropout),),
        lambda: module.backward(p.dy, p.x, adapter, dropout, needs_x=True),
    )
    found: list[tuple[Tensor, ...] | type] = []
    for call in calls:
        try:
            found.append(call())
        except (RuntimeError, IndexError) as error:
            found.append(type(error))
    return found


def another(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.bfloat16 else torch.bfloat16


CHANGES: dict[str, Callable[[LinearProblem], LinearProblem]] = {
    "float64": lambda p: p.to(torch.float64),
    "x": lambda p: replace(p, x=p.x[:, :-9]),
    "A": lambda p: replace(p, A=p.A[:, :-9]),
    "B": lambda p: replace(p, B=p.B[:-9]),
    "dy": lambda p: replace(p, dy=p.dy[:, :-9]),
    "fewer dy": lambda p: replace(p, dy=p.dy[:-9]),
    "dtype of x": lambda p: replace(p, x=p.x.to(another(p.x.dtype))),
    "dtype of B": lambda p: replace(p, B=p.B.to(another(p.B.dtype))),
}


@needs_library
@each_dtype
@each_form
@pytest.mark.parametrize("change", CHANGES)
def test_what_it_does_not_take_is_eagers(change: str, form: str, dtype: torch.dtype) -> None:
    """An exported program names its backend whatever it meets; and compiled code would read beyond the end."""
    p = CHANGES[change](on_cpu(dtype, tokens=50))
    found, expected = in_backend("native", p, form), in_backend("eager", p, form)
    first = 1 if change.endswith("dy") else 0  # which the forward does not take
    for ours, theirs in zip(found[first:], expected[first:], strict=True):
        assert ours is theirs if isinstance(theirs, type) else all(map(torch.equal, ours, theirs))
    assert any(isinstance(one, type) for one in found) or change.startswith(("float64", "dtype"))


@needs_library
@each_dtype
@each_form
def test_indices_of_any_kind(form: str, dtype: torch.dtype) -> None:
    """The kernels take contiguous ones alone, which a partition makes; the compiled code makes its own."""
    p = on_cpu(dtype, tokens=50, random_labels=True)
    labels, indices = p.partition.tensors()[:2], p.partition.tensors()[2:]
    strided = [torch.stack([index, index], 1)[:, 0] for index in indices]
    other = BlockPartition.from_tensors([*(one.long() for one in labels), *strided], p.partition.sizes())
    options = FORMS[form].options
    assert all(map(torch.equal, replace(p, partition=other).run(**options), p.run(**options)))


@needs_library
@each_dtype
@each_form
def test_sizes_that_the_blocks_do_not_have(
    form: str, dtype: torch.dtype, guarded_memory: None, torch_multiplies: None
) -> None:
    """`from_tensors` believes the sizes that it is given; compiled code goes by offsets, and so must its callers."""
    p = on_cpu(dtype, tokens=40, out_features=300, in_features=600, ranks=(2, 3))
    sizes, options = [100, 200, 350, 250, *p.partition.sizes()[4:]], FORMS[form].options
    other = BlockPartition.from_tensors(p.partition.tensors(), sizes)
    assert all(map(torch.equal, replace(p, partition=other).run(**options), p.run(**options)))


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
    here = Path(__file__)
    names = "(native or every_shape or threads or mask or dropped)"
    names += " and not older and not without_amx and not broken"  # which skip some
    files = [str(here), str(here.with_name("test_contract.py"))]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *files, "-k", names]
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_form
@pytest.mark.parametrize("value", [-1, 90, 2**31])
@pytest.mark.parametrize(
    "which", range(6), ids=["row_block", "col_block", "row_index", "col_index", "row_offsets", "col_offsets"]
)
def test_a_partition_that_is_broken(
    which: int, value: int, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`from_tensors` takes almost all that it is given, and compiled code would follow it anywhere."""
    if which < 2:
        monkeypatch.setattr(bf16, "multiplies", lambda *_: False)  # which reads no labels
    if form == "dropout" and which < 2:
        pytest.skip("only W_eff asks for labels")
    asked = {"merged": (0, 1), "expanded": (1, 2, 4)}.get(form, (2, 3, 4, 5))
    p = on_cpu(dtype, tokens=50)
    ways = [lambda t: t.long().index_fill(0, torch.tensor([2]), value), lambda t: t[:-1]]
    if which in (2, 3):  # one twice, another never
        ways.append(lambda t: t.index_copy(0, torch.tensor([5]), t[6:7]))
    for broken in ways:
        tensors = p.partition.tensors()
        tensors[which] = broken(tensors[which])
        if len(tensors[-1]) == len(p.ranks):
            with pytest.raises(ValueError, match="a partition is 6 tensors and 2K"):
                BlockPartition.from_tensors(tensors, p.partition.sizes())
            continue
        other = BlockPartition.from_tensors(tensors, p.partition.sizes())
        broken_one = replace(p, partition=other)
        with pytest.raises(ValueError, match="partition must"):
            broken_one.run(**FORMS[form].options)
        if which in asked:  # by the forward alone
            with pytest.raises(ValueError, match="partition must"):
                broken_one.forward(**FORMS[form].options)


@needs_library
def test_saved_tensors_that_hooks_give_back_otherwise() -> None:
    """What compiled code cannot read, the dispatcher sees: a subclass that has no memory of its own."""
    p = on_cpu(torch.bfloat16, tokens=50)
    leaves, expected = p.leaves("x", "A", "B"), p.run(backend="native")

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return TwoTensor(tensor, tensor) if tensor.shape == p.x.shape else tensor

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, unpack):
        y = leaves.forward(backend="native")
    y.backward(p.dy)
    for name, gradient in zip(("x", "A", "B"), expected[1:], strict=False):
        found = getattr(leaves, name).grad
        torch.testing.assert_close(found.a if isinstance(found, TwoTensor) else found, gradient)


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


def test_auto_takes_what_is_there() -> None:
    there = native_obstacle(CPU) is None
    assert resolve_backend("auto", CPU, torch.float32, 4) == ("native" if there else "eager")
    assert resolve_backend("auto", CPU, torch.float64, 4) == "eager"
    assert resolve_backend("auto", CPU, torch.bfloat16, 4) == ("native" if there else "eager")
    assert (
        native_obstacle(CPU, torch.float64)
        == "the compiled code takes bfloat16, float16, float32, got torch.float64"
    )


def test_a_variable_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_NATIVE", "0")
    assert resolve_backend("auto", CPU, torch.float32, 4) == "eager"
    with pytest.raises(
        ValueError, match="backend='native' cannot run here: SMOA_NATIVE=0 forbids it; backend='eager'"
    ):
        on_cpu().forward(backend="native")


def test_less_than_float32_is_eagers() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert (
            native_obstacle(CPU) == "torch's float32 GEMMs on CPUs are set to multiply in less than float32"
        )
        assert native_obstacle(CPU, torch.bfloat16) == library.obstacle()
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@needs_library
def test_a_setting_that_a_program_meets_later_rounds_nothing() -> None:
    """A compiled or exported program names this backend when it is made."""
    p = on_cpu(tokens=1100, out_features=40, in_features=64, ranks=(2, 3), bias=False)
    adapter = adapter_of(p)
    case, before = Case("native", "auto", torch.float32), torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        y = backend.forward(p.x, None, adapter, "auto", None)
        gradients = backend.backward(p.dy, p.x, adapter, None, needs_x=True)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert_within_budget((y, *gradients), case, p)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the compiled code and its sources, to spoil; it is there that :func:`said` looks."""
    shutil.copytree(hatch_build.FOLDER, tmp_path / "native")
    monkeypatch.setattr(library, "_FOLDER", tmp_path / "native")
    return tmp_path / "native"


def said() -> str:
    return str(library._load.__wrapped__())


def test_a_library_that_is_not_there(folder: Path) -> None:
    for path in folder.glob("*.so"):
        path.unlink()
    assert said().startswith("it was not compiled: the wheel is for another machine, or was built without")


@needs_library
def test_a_library_of_another_source(folder: Path) -> None:
    for path in sorted(folder.glob("*.[ch]")):
        text = path.read_text()
        path.write_text(text + "\n")
        assert said().endswith("was compiled from other sources: install the package again")
        path.unlink()
        assert said().endswith("was compiled from other sources: install the package again")
        path.write_text(text)


@needs_library
def test_a_library_that_is_broken_or_of_something_else(folder: Path) -> None:
    source = folder.parent / "other.c"
    source.write_text("int other(void) { return 0; }\n")
    for path in folder.glob("*.so"):
        path.unlink()
        path.write_bytes(b"no library")
    assert "cannot be loaded" in said()
    for path in folder.glob("*.so"):
        path.unlink()
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    assert "cannot be loaded" in said()


@pytest.mark.slow
@pytest.mark.skipif(hatch_build.compiler() is None, reason="needs a C compiler, on an x86 processor")
def test_it_compiles_without_warnings(tmp_path: Path) -> None:
    assert [path.name for path in hatch_build.compile_library(tmp_path)] == [
        "linear_avx2.so",
        "linear_avx512.so",
    ]
    for flags in hatch_build.VARIANTS.values():
        command = [
            *(hatch_build.compiler() or []),
            "-fsyntax-only",
            "-Wall",
            "-Wextra",
            "-Werror",
            '-DSOURCE=""',
            *flags,
        ]
        done = subprocess.run(
            [*command, str(hatch_build.SOURCE)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_without_a_compiler_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no such compiler")
    assert hatch_build.compiler() is None
    assert hatch_build.compile_library(tmp_path) == []
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(hatch_build.compiler() is None, reason="needs a C compiler, on an x86 processor")
def test_a_compiler_that_takes_options_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cc,) = hatch_build.compiler() or []
    monkeypatch.setenv("CC", f"{cc} -DOTHER")
    assert hatch_build.compiler() == [cc, "-DOTHER"]
    (tmp_path / "broken").write_bytes(b"\0")
    (tmp_path / "broken").chmod(0o755)
    for broken in (str(tmp_path / "broken"), f"{cc} --no-such-option"):
        monkeypatch.setenv("CC", broken)
        assert hatch_build.compile_library(tmp_path) == []


def test_another_machines_wheel_has_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")
    assert hatch_build.compiler() is None
