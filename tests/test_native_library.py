"""The compiled code as a library: when it is used, why it may be absent, and how it is compiled."""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from compiled import CPU, needs_library, on_cpu
from cpu_emulator.arm import CC
from cpu_emulator.build import FOR_ARM
from problems import Case, assert_within_budget
from torch_calls import on_threads

import hatch_build
from smoa_kernels.backends import native_unsupported_reason, resolve_backend
from smoa_kernels.backends.native import backend, library


def test_auto_takes_compiled_code_if_present() -> None:
    there = native_unsupported_reason(CPU) is None
    assert resolve_backend("auto", CPU, torch.float32, 4) == ("native" if there else "eager")
    assert resolve_backend("auto", CPU, torch.float64, 4) == "eager"
    assert resolve_backend("auto", CPU, torch.bfloat16, 4) == ("native" if there else "eager")
    reason = "the compiled code takes bfloat16, float16, float32, got torch.float64"
    assert native_unsupported_reason(CPU, torch.float64) == reason


def test_a_variable_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_NATIVE", "0")
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    assert resolve_backend("auto", CPU, torch.float32, 4) == "eager"
    with pytest.raises(
        ValueError, match="backend='native' cannot run here: SMOA_NATIVE=0 forbids it; backend='eager'"
    ):
        on_cpu().forward(backend="native")


def test_eager_takes_reduced_float32_precision() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        reason = "torch's float32 GEMMs on CPUs are set to multiply in less than float32"
        assert native_unsupported_reason(CPU) == reason
        assert native_unsupported_reason(CPU, torch.bfloat16) == library.unsupported_reason()
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@needs_library
def test_a_setting_that_a_program_meets_later_rounds_nothing() -> None:
    """A compiled or exported program fixes its backend when it is made; later settings must not change its rounding."""
    p = on_cpu(tokens=1100, out_features=40, in_features=64, ranks=(2, 3), bias=False)
    adapter = p.adapter()
    case, before = Case("native", "auto", torch.float32), torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        y = backend.forward(p.x, None, adapter, "auto", None)
        gradients = backend.backward(p.dy, p.x, adapter, None, needs_x=True)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert_within_budget((y, *gradients), case, p)


def calls_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each new call."""
    made: list[int] = []
    monkeypatch.setattr(library.Call, "of", lambda adapter, of=library.Call.of: made.append(1) or of(adapter))
    return made


@needs_library
def test_a_kept_adapter_follows_its_tensors_and_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers keep an adapter, and its call, over many steps; factors, x, bias and threads may change between."""
    p = on_cpu(tokens=130, out_features=200, in_features=96, ranks=(4, 8))
    adapter, made = p.adapter(), calls_made(monkeypatch)
    for count, tokens, bias in ((1, 130, p.bias), (2, 7, None), (3, 130, None), (1, 1, p.bias)):
        with on_threads(count):
            for scale in (1, 3):
                adapter.B.mul_(-2)
                x, b = p.x[:tokens] * scale, None if bias is None else bias * scale
                before = len(made)
                y = backend.forward(x, b, adapter, "auto", None)
                assert len(made) - before == (before == 0)
                torch.testing.assert_close(y, backend.forward(x, b, replace(adapter), "auto", None))
            assert adapter.layout.threads == count
    with pytest.raises(RuntimeError, match=r"size|shape|dimension"):
        backend.forward(p.x[:1, :-1], p.bias, adapter, "auto", None)


@needs_library
@pytest.mark.parametrize("change", ["weight", "transposed", "A", "fewer ranks", "scaling", "threads"])
def test_a_kept_call_follows_its_tensors(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data = …` leaves the tensor object as it is; the memory that the call knows is free then."""
    p = on_cpu(tokens=5, out_features=64, in_features=64, ranks=(4, 8), bias=False)
    p = replace(p, weight=p.weight.clone(), A=p.A.clone(), scaling=torch.tensor(p.scaling))
    adapter, made = p.adapter(), calls_made(monkeypatch)
    with on_threads(1):
        backend.forward(p.x, None, adapter, "auto", None)
    if change == "transposed":
        adapter.weight.data = adapter.weight.data.T
    elif change == "fewer ranks":  # the same memory
        adapter.A.data, adapter.B.data = adapter.A.data[:4], adapter.B.data[:, :4]
        adapter.block_ranks = 4, 4
        adapter.ranks.fill_(4)
    elif change == "scaling":
        adapter.scaling.mul_(3)
    elif change != "threads":
        getattr(adapter, change).data = -2 * getattr(adapter, change).data
    with on_threads(2 if change == "threads" else 1):
        y = backend.forward(p.x, None, adapter, "auto", None)
        assert torch.equal(y, backend.forward(p.x, None, replace(adapter), "auto", None))
    assert len(made) == (2 if change in ("scaling", "threads") else 3)


@needs_library
def test_two_threads_share_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second thread comes while the first one's call has its operands, and waits for its workspace."""
    p = on_cpu(tokens=5, ranks=(4, 8))
    adapter, seconds = p.adapter(), [2 * p.x]

    def workspace(like: torch.Tensor, floats: int) -> torch.Tensor:
        if len(seconds) == 1:
            seconds.append(seconds[0])
            seconds.append(backend.forward(seconds[0], p.bias, adapter, "auto", None))
        return like.new_empty(floats, dtype=torch.float32)

    expected = [backend.forward(x, p.bias, adapter, "auto", None) for x in (p.x, seconds[0])]
    monkeypatch.setattr(library, "workspace", workspace)
    assert torch.equal(backend.forward(p.x, p.bias, adapter, "auto", None), expected[0])
    assert torch.equal(seconds[2], expected[1])


@needs_library
def test_one_thread_needs_no_runtime_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.library()
    monkeypatch.setattr(library, "_load", lambda: (found, SimpleNamespace(has_threads=0, bf16=1)))
    with on_threads(2):
        assert not library.has("bf16")
    with on_threads(1):
        assert library.has("bf16")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the compiled code and its sources to damage; :func:`said` reads it."""
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


class Longer(library.Call):
    _fields_: ClassVar = [("another", ctypes.c_int64)]


@needs_library
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("Call", Longer),
        ("KINDS", dict(zip(library.KINDS, (0, 2, 1), strict=True))),
        ("Path", (library.Path.FLOAT, library.Path.FEW, library.Path.TILES)),
        ("Algorithm", (1, 0)),
    ],
)
def test_a_library_of_other_numbers(name: str, other: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, name, other)
    assert said().endswith("has other numbers or structs than library.py")


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
@pytest.mark.skipif(hatch_build.compiler() is None, reason="needs Linux and a C compiler")
def test_it_compiles_without_warnings(tmp_path: Path) -> None:
    variants = hatch_build.VARIANTS[sysconfig.get_platform()]
    names = [path.name for path in hatch_build.compile_library(tmp_path)]
    assert names == [f"linear_{name.lower()}.so" for name in variants]
    strictly = [*(hatch_build.compiler() or []), "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    for flags in variants.values():
        command = [*strictly, '-DSOURCE=""', *flags, str(hatch_build.SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_without_a_compiler_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no such compiler")
    assert hatch_build.compiler() is None
    assert hatch_build.compile_library(tmp_path) == []
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(hatch_build.compiler() is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_compiler_leaves_nothing(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them, in containers where their numbers are equal, write to different files meanwhile."""
    outputs = set()

    def interrupted(command: list[str], **_: object) -> None:
        outputs.add(command[-1])
        Path(command[-1]).write_bytes(b"unfinished")
        raise error

    monkeypatch.setattr(subprocess, "run", interrupted)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            assert hatch_build.compile_library(tmp_path) == []
    variants = hatch_build.VARIANTS[sysconfig.get_platform()]
    assert len(outputs) == 2 * (1 if error is KeyboardInterrupt else len(variants))
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(hatch_build.compiler() is None, reason="needs Linux and a C compiler")
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
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "macosx-14.0-arm64")
    assert hatch_build.compiler() is None


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(CC), reason=f"needs {CC}: make arm-tools")
def test_arms_library_has_each_function_that_python_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in FOR_ARM.items():
        monkeypatch.setenv(name, value)
    (made,) = hatch_build.compile_library(tmp_path, "-O0", "-Wall", "-Wextra", "-Werror")
    assert made.name == "linear_neon.so"
    command = [CC.replace("gcc", "nm"), "-D", "--defined-only", made]
    listed = subprocess.run(command, capture_output=True, text=True)
    sources = "".join(path.read_text() for path in hatch_build.FOLDER.glob("*.py"))
    called = set(re.findall(r"\bsmoa_(?!kernels)\w+", sources))
    assert called > set(library.FUNCTIONS)
    assert called == {line.split()[-1] for line in listed.stdout.splitlines()}


@pytest.mark.parametrize(
    ("machine", "torchs", "found"),
    [
        ("aarch64", "SVE256", "NEON"),  # Linux
        ("arm64", "DEFAULT", "DEFAULT"),  # macOS: there is no library of that name
        ("x86_64", "AVX2", "AVX2"),
    ],
)
def test_which_library_is_for_a_processor(
    machine: str, torchs: str, found: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.glob("*.so"):
        path.unlink()
    (folder / "linear_other.so").touch()
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torchs)
    assert said() == f"it was compiled for OTHER, this processor is {found}"
    (folder / f"linear_{found.lower()}.so").touch()
    assert "cannot be loaded" in said()
    assert not library.has("avx512")


@pytest.mark.parametrize(
    ("flags", "limit", "answer", "found"),
    [
        ("avx512f", "", 0, (False, False)),
        ("avx512f avx512_bf16", "", 0, (True, False)),
        ("avx512_bf16 amx_bf16 amx_tile", "", 0, (True, True)),
        ("avx512_bf16 amx_bf16 amx_tile", "ALL", -1, (True, False)),  # the system refuses
        ("avx512_bf16 amx_bf16 amx_tile", "avx512_core_bf16", 0, (True, False)),
        ("avx512_bf16 amx_bf16 amx_tile", "AVX512_CORE", 0, (False, False)),
        ("avx512_bf16 GenuineIntel", "", 0, (False, False)),  # slower than FMA
        ("avx512_bf16 amx_bf16 GenuineIntel", "", 0, (True, True)),
        ("avx512_bf16 amx_bf16 GenuineIntel", "AVX512_CORE_FP16", 0, (False, False)),
        ("avx512_bf16 amx_bf16 GenuineIntel", "AVX512_CORE_BF16", 0, (True, False)),
        (None, "", 0, (False, False)),
    ],
)
def test_which_instructions_for_bfloat16_are_used(
    flags: str | None, limit: str, answer: int, found: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def read(path: Path) -> str:
        assert str(path) == "/proc/cpuinfo"
        if flags is None:
            raise PermissionError(path)
        return f"flags : {flags}"

    def syscall(*given: int) -> int:
        asked.append(given)
        return answer

    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(library.ctypes, "CDLL", lambda name: SimpleNamespace(syscall=syscall))
    assert library.allowed() == found
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) of Linux on x86-64
    assert asked == [(158, 0x1023, 18)] * (found[1] or answer < 0)
