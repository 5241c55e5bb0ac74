"""The compiled GEMMs: every shape, stride and number of threads against the definition; and why they may be absent."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import TINY, LinearProblem, flat_call, make_problem, relative_error
from torch import Tensor

import hatch_build
from smoa_kernels import BlockPartition, smoa_linear
from smoa_kernels.backends import native_obstacle, resolve_backend
from smoa_kernels.backends.native import library as native
from smoa_kernels.backends.native.backend import (
    GRADIENT,
    LINEAR,
    UPDATE,
    _drawn,
)
from smoa_kernels.definition.dropout import Dropout

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(native_obstacle(CPU) is not None, reason=str(native_obstacle(CPU)))


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def on_cpu(**options: object) -> LinearProblem:
    return make_problem(**options).on(CPU)  # type: ignore[arg-type]


# W_eff's GEMMs, by packing it and by not; those of W0 and ΔW: of all of x, and of what is not dropped.
FORMS: dict[str, dict[str, object]] = {
    "merged": {"algorithm": "merged"},
    "expanded": {"algorithm": "expanded"},
    "split": {"algorithm": "split"},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor(9)},
}
each_form = pytest.mark.parametrize("form", FORMS)


def check(p: LinearProblem, form: str) -> None:
    """Every result within twice the error of torch operators in float32, both against float64."""
    single, options = p.to(torch.float32), FORMS[form]
    found = single.run(backend="native", **options)
    beside = single.run(backend="eager", **options)
    truths = p.run_reference(**(options if form == "dropout" else {}))
    for name, ours, theirs, truth in zip(("y", "dX", "dA", "dB"), found, beside, truths, strict=False):
        allowed = 2 * relative_error(theirs, truth) + TINY[torch.float32]
        assert relative_error(ours, truth) <= allowed, name


@needs_library
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features", "ranks"),
    [
        (1, 1, 1, (1,)),
        (13, 31, 29, (2, 1)),  # below every tile
        (14, 32, 8, (2,)),  # just one tile of AVX-512
        (6, 16, 16, (3, 3)),  # of AVX2
        *((tokens, 23, 41, (3, 0, 2)) for tokens in range(2, 10)),  # few, and one more
        (200, 97, 401, (3, 0, 2)),  # several panels of tokens, two of terms, prime sizes
        (37, 2111, 23, (1, 2)),  # two panels of rows
        (23, 19, 2111, (4, 4)),
        (900, 600, 16, (2,)),  # two slabs of G, three panels of tokens
        (5, 40, 40, (17,)),
        (64, 5, 7, (1,) * 5),  # blocks of one row
        (2100, 40, 400, (5, 2)),  # two left panels, two of terms, blocks that are gathered as pieces
        (30, 300, 290, (3, 0, 4)),  # three right panels
        (300, 30, 790, (2, 1)),  # two bands of tokens, two panels of terms in a block
    ],
)
@each_form
def test_every_shape(
    tokens: int, out_features: int, in_features: int, ranks: tuple[int, ...], threads: int, form: str
) -> None:
    p = on_cpu(tokens=tokens, out_features=out_features, in_features=in_features, ranks=ranks)
    check(p, form)


@needs_library
@pytest.mark.parametrize("name", ["x", "weight", "dy", "A", "B"])
@each_form
def test_every_memory_order(name: str, form: str) -> None:
    p = on_cpu(tokens=50, out_features=33, in_features=57, random_labels=True)
    whole = getattr(p, name)
    for other in (
        whole.T.contiguous().T,
        whole.repeat_interleave(3, 1)[:, ::3],
        torch.cat([whole, whole], 1),
        torch.randn(whole.numel(), dtype=whole.dtype).unfold(0, whole.shape[1], 1),  # windows: both strides 1
    ):
        check(replace(p, **{name: other[: whole.shape[0], : whole.shape[1]]}), form)


@needs_library
@each_form
def test_indices_of_any_kind(form: str) -> None:
    p = on_cpu(tokens=50, out_features=33, in_features=57, random_labels=True).to(torch.float32)
    labels, indices = p.partition.tensors()[:2], p.partition.tensors()[2:]
    strided = [torch.stack([index, index], 1)[:, 0] for index in indices]
    other = BlockPartition.from_tensors([*(one.long() for one in labels), *strided], p.partition.sizes())
    first = p.run(backend="native", **FORMS[form])
    again = replace(p, partition=other).run(backend="native", **FORMS[form])
    assert all(map(torch.equal, first, again))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_in_another_dtype_is_eagers(dtype: torch.dtype) -> None:
    """An exported program names the backend that was chosen where it was exported."""
    p = on_cpu(tokens=50).to(dtype)
    for operator, args in (
        (torch.ops.smoa.linear, (p.x, None, "merged")),
        (torch.ops.smoa.linear_backward, (p.dy, p.x, True)),
    ):
        found, expected = (operator(*args, *flat_call(p, backend=backend)) for backend in ("native", "eager"))
        assert all(map(torch.equal, found, expected))


@needs_library
@each_form
@pytest.mark.parametrize("what", ["x", "A", "B", "dy", "fewer dy", "dtype"])
def test_the_operator_asks_torch_to_refuse_other_shapes(what: str, form: str) -> None:
    """`smoa_linear` checks what it is given, its operators do not, and compiled code would read beyond the end."""
    p = on_cpu(tokens=50, out_features=33, in_features=57).to(torch.float32)
    x, A, B, dy = p.x, p.A, p.B, p.dy
    x, dy = x[:, :-9] if what == "x" else x, {"dy": dy[:, :-9], "fewer dy": dy[:-9]}.get(what, dy)
    A, B = A[:, :-9] if what == "A" else A, B[:-9] if what == "B" else B
    x = x.bfloat16() if what == "dtype" else x
    dropped = form == "dropout"
    dropout = Dropout(torch.tensor(9), 0.4, 0, 57) if dropped else None
    operators = {
        torch.ops.smoa.linear: (x, None, "auto" if dropped else form),
        torch.ops.smoa.linear_backward: (dy, x, True),
    }
    if what.endswith("dy"):
        operators.pop(torch.ops.smoa.linear)
    raised = []
    for operator, arguments in operators.items():
        found = []
        for backend in ("native", "eager"):
            try:
                found.append(operator(*arguments, *flat_call(replace(p, A=A, B=B), dropout, backend)))
            except (RuntimeError, IndexError) as error:
                found.append(type(error))
        raised.append(isinstance(found[0], type))
        assert found[0] is found[1] if raised[-1] else all(map(torch.equal, *found))
    assert any(raised) or what == "dtype"  # under dropout torch's operators promote one


@needs_library
def test_few_tokens_are_fewer_the_more_ranks_there_are() -> None:
    few = native.library().smoa_few_fit
    ranks = [max((rank for rank in range(1, 40) if few(tokens, rank)), default=0) for tokens in range(1, 10)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 16
    assert ranks[-1] == 0


@needs_library
@pytest.mark.parametrize("num_blocks", [2, 3, 9])
@each_form
def test_a_block_in_another_order(num_blocks: int, form: str) -> None:
    """Nothing says that what a block lists ascends, which its pieces make use of."""
    p = on_cpu(tokens=50, out_features=90, in_features=170, ranks=(3,) * num_blocks, random_labels=True)
    tensors, sizes = p.partition.tensors(), p.partition.sizes()
    for axis, parts in ((2, sizes[:num_blocks]), (3, sizes[num_blocks:])):
        tensors[axis] = torch.cat([block.flip(0) for block in tensors[axis].split(parts)])
    check(replace(p, partition=BlockPartition.from_tensors(tensors, sizes)), form)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or native_obstacle(CPU) is not None,
    reason="needs a processor that has both instruction sets",
)
def test_the_same_on_older_processors() -> None:
    names = "every or another_order or without_rows or threads or mask or dropped"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-rs",
        __file__,
        "-k",
        names,
    ]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@needs_library
@each_form
@pytest.mark.parametrize("value", [-1, 90, 2**31])
@pytest.mark.parametrize(
    "which", range(6), ids=["row_block", "col_block", "row_index", "col_index", "row_offsets", "col_offsets"]
)
def test_a_partition_that_is_broken(which: int, value: int, form: str) -> None:
    """`from_tensors` takes what it is given, and compiled code would follow it anywhere."""
    if form == "dropout" and which < 2:
        pytest.skip("only W_eff asks for labels")
    asked = {"merged": (0, 1), "expanded": (1, 2, 4)}.get(form, (2, 3, 4, 5))
    p = on_cpu(tokens=50, out_features=33, in_features=57).to(torch.float32)
    ways = [lambda t: t.long().index_fill(0, torch.tensor([2]), value), lambda t: t[:-1]]
    if which in (2, 3):  # one twice, another never
        ways.append(lambda t: t.index_copy(0, torch.tensor([5]), t[6:7]))
    for broken in ways:
        tensors = p.partition.tensors()
        tensors[which] = broken(tensors[which])
        other = BlockPartition.from_tensors(tensors, p.partition.sizes())
        broken_one = replace(p, partition=other)
        with pytest.raises(ValueError, match="partition must"):
            broken_one.run(backend="native", **FORMS[form])
        if which in asked:  # by the forward alone
            with pytest.raises(ValueError, match="partition must"):
                smoa_linear(*_arguments(broken_one), scaling=1.0, backend="native", **FORMS[form])


@needs_library
@each_form
def test_blocks_without_rows_or_columns(form: str) -> None:
    p = on_cpu(tokens=20, out_features=3, in_features=4, ranks=(1, 2, 1, 2, 1, 1), random_labels=True)
    assert 0 in p.partition.row_sizes + p.partition.col_sizes
    check(p, form)


@needs_library
@each_form
@pytest.mark.parametrize(("tokens", "out_features", "in_features"), [(0, 5, 6), (4, 0, 6), (4, 5, 0)])
def test_nothing_to_multiply(tokens: int, out_features: int, in_features: int, form: str) -> None:
    whole = on_cpu(tokens=4, out_features=5, in_features=6, ranks=(1,)).to(torch.float32)
    cut = replace(
        whole,
        x=whole.x[:tokens, :in_features],
        weight=whole.weight[:out_features, :in_features],
        bias=None,
        A=whole.A[:, :in_features],
        B=whole.B[:out_features],
        partition=whole.partition.shard(slice(0, out_features), slice(0, in_features)),
        dy=whole.dy[:tokens, :out_features],
    )
    found, expected = (cut.run(backend=backend, **FORMS[form]) for backend in ("native", "eager"))
    assert all(map(torch.equal, found, expected))


@needs_library
@each_form
def test_one_thread_and_three_give_the_same_output(form: str) -> None:
    p = on_cpu(tokens=100, out_features=90, in_features=500, random_labels=True).to(torch.float32)
    before = torch.get_num_threads()
    found: list[tuple[Tensor, ...]] = []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            found.append(p.run(backend="native", **FORMS[form]))
    finally:
        torch.set_num_threads(before)
    for name, one, three, again in zip(("y", "dX", "dA", "dB"), *found, strict=False):
        assert torch.equal(three, again), name
        if name != "dA":  # summed over rows, which the threads share
            assert torch.equal(one, three), name


@needs_library
@pytest.mark.parametrize(
    ("form", "expected"),
    [("merged", (2, 0, 1)), ("expanded", (2, 0, 1)), ("split", (2, 1, 1)), ("dropout", (2, 2, 1))],
)
def test_a_profile_names_what_was_called(form: str, expected: tuple[int, ...]) -> None:
    p = on_cpu(tokens=50).to(torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        p.run(backend="native", **FORMS[form])
    counts = {event.key: event.count for event in profile.key_averages()}
    assert tuple(counts.get(name, 0) for name in (LINEAR, UPDATE, GRADIENT)) == expected


@needs_library
@pytest.mark.parametrize("shard", [None, (5, 100)])
def test_the_mask_is_eagers(shard: tuple[int, int] | None) -> None:
    """The very bits, of a part of the columns too."""
    offset, width = shard or (0, None)
    mask = Dropout(torch.tensor(7), 0.3, offset, width)
    x = torch.randn(600, 37)
    bits = _drawn(mask, x, 37).kept[:, torch.arange(37) // 16] >> (torch.arange(37) % 16) & 1
    assert torch.equal(bits.float() * mask.scale, mask.multiplier(x))


@needs_library
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_dropped_is_still_seen_where_it_is_not_finite(value: float) -> None:
    """0 · NaN is NaN, by the definition and in torch's operators."""
    p = on_cpu(tokens=40, out_features=33, in_features=57, random_labels=True).to(torch.float32)
    dropped = Dropout(torch.tensor(9), 0.4).multiplier(p.x) == 0
    for place in dropped.nonzero()[:3].tolist():
        x = p.x.clone()
        x[tuple(place)] = value
        found, expected = (
            replace(p, x=x).run(backend=backend, **FORMS["dropout"]) for backend in ("native", "eager")
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_auto_takes_what_is_there() -> None:
    there = native_obstacle(CPU) is None
    assert resolve_backend("auto", CPU, torch.float32, 4) == ("native" if there else "eager")
    assert resolve_backend("auto", CPU, torch.float64, 4) == "eager"
    assert resolve_backend("auto", CPU, torch.bfloat16, 4) == "eager"


def test_a_variable_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_NATIVE", "0")
    assert resolve_backend("auto", CPU, torch.float32, 4) == "eager"
    with pytest.raises(
        ValueError, match="backend='native' cannot run here: SMOA_NATIVE=0 forbids it; backend='eager'"
    ):
        smoa_linear(*_arguments(on_cpu().to(torch.float32)), scaling=1.0, backend="native")


def test_less_than_float32_is_eagers() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert (
            native_obstacle(CPU) == "torch's float32 GEMMs on CPUs are set to multiply in less than float32"
        )
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def _arguments(p: LinearProblem) -> tuple[object, ...]:
    return p.x, p.weight, p.bias, p.A, p.B, p.partition, p.ranks


# What a process says of a package whose folder it is given.
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from smoa_kernels import native; print(native.obstacle())"
)


def said(package: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(package)], capture_output=True, text=True, check=True, cwd=package
    )
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of smoa_kernels, to spoil."""
    shutil.copytree(Path(native.__file__).parent.parent, tmp_path / "smoa_kernels")
    return tmp_path


def test_a_library_that_is_not_there(package: Path) -> None:
    for path in (package / "smoa_kernels" / "native").glob("*.so"):
        path.unlink()
    assert said(package).startswith(
        "it was not compiled: the wheel is for another machine, or was built without"
    )


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("name", sorted(path.name for path in hatch_build.FOLDER.glob("*.[ch]")))
@pytest.mark.parametrize(
    "edit", [lambda path: path.write_text(path.read_text() + "\n"), Path.unlink], ids=["edited", "lost"]
)
def test_a_library_of_another_source(package: Path, name: str, edit: Callable[[Path], object]) -> None:
    edit(package / "smoa_kernels" / "native" / name)
    assert said(package).endswith("was compiled from other sources: install the package again")


@needs_library
def test_a_library_that_is_broken(package: Path) -> None:
    for path in (package / "smoa_kernels" / "native").glob("*.so"):
        path.unlink()
        path.write_bytes(b"no library")
    assert "cannot be loaded" in said(package)


@needs_library
def test_a_library_of_something_else(package: Path, tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text("int other(void) { return 0; }\n")
    for path in (package / "smoa_kernels" / "native").glob("*.so"):
        path.unlink()
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    assert "cannot be loaded" in said(package)


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
