"""The published package: the wheel's files, its metadata, its command, and use on a machine without Triton."""

import ast
import email
import platform
import re
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from installed import CORE
from packaging.requirements import Requirement
from places import ran

import hatch_build

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "smoa_kernels"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without the network by the backend in pyproject.toml."""
    pytest.importorskip("hatchling", reason="the build backend, hatchling, is not installed")
    folder = tmp_path_factory.mktemp("dist")
    return build("wheel", ROOT, folder)


def build(kind: str, source: Path, folder: Path) -> Path:
    program = f"import sys; from hatchling.build import build_{kind}; print(build_{kind}(sys.argv[1]))"
    built = ran("-c", program, folder, cwd=source)
    assert built.returncode == 0, built.stderr
    return folder / built.stdout.strip()


def contents(wheel: Path) -> dict[str, bytes]:
    """The package's files."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def dist_info(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return email.message_from_string(dist_info(wheel, "METADATA"))


def requirements(metadata: Message, extra: str, system: str) -> set[str]:
    """The requirements of `smoa-kernels[extra]` on an operating system, by import name."""
    found = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    where = {"extra": extra, "platform_system": system}
    return {r.name.replace("-", "_") for r in found if r.marker is None or r.marker.evaluate(where)}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = set(contents(wheel))
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package == on_disk
    assert "smoa_kernels/py.typed" in package
    assert {Path(name).suffix for name in package} <= {".py", ".typed", ".c", ".h", ".so"}


def test_a_wheel_with_compiled_code_is_for_its_machine(wheel: Path) -> None:
    if hatch_build.compiler() is None:
        pytest.skip("needs a C compiler")
    assert wheel.stem.endswith(f"-py3-none-linux_{platform.machine()}")  # `make dist` turns it into manylinux
    assert "Root-Is-Purelib: false" in dist_info(wheel, "WHEEL")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    archive = build("sdist", ROOT, folder)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_sdist_builds_the_same_wheel_for_any_machine_where_nothing_compiles(
    wheel: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive suffices for the build, and holds the tests and the Makefile."""
    beside = {path.name for path in source.iterdir()}
    assert {"Makefile", "README.md", "CITATION.cff", "LICENSE", "tests", "csrc_ref"} <= beside
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    pure = build("wheel", source, tmp_path)
    assert pure.stem.endswith("-py3-none-any")
    assert contents(pure) == {n: data for n, data in contents(wheel).items() if not n.endswith(".so")}


def test_a_cross_compiler_makes_arms_wheel(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cc = tmp_path / "cc"
    cc.write_text('#!/bin/sh\nfor output; do :; done\necho "$@" > "$output"\n')
    cc.chmod(0o755)
    monkeypatch.setenv("CC", str(cc))
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")
    made = build("wheel", source, tmp_path)
    assert made.stem.endswith("-py3-none-linux_aarch64")
    (library,) = (name for name in contents(made) if name.endswith(".so"))
    assert library.endswith("/linear_neon.so")
    assert b"-DVECTOR_BYTES=16 " in contents(made)[library]


def test_metadata(wheel: Path, metadata: Message) -> None:
    assert metadata["Name"] == "smoa-kernels"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert dist_info(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert metadata["Requires-Python"] == ">=3.10"
    core = {"torch", "filelock"}
    assert requirements(metadata, "", "Darwin") == core
    assert requirements(metadata, "", "Linux") == core  # torch brings its own Triton or needs none
    assert requirements(metadata, "triton", "Linux") == core | {"triton", "numpy"}
    of_peft = {"peft", "transformers", "safetensors", "huggingface_hub", "accelerate", "tqdm", "numpy"}
    assert requirements(metadata, "peft", "Darwin") == core | of_peft
    assert requirements(metadata, "cli", "Darwin") == core | {"typer", "rich"}
    assert dist_info(wheel, "entry_points.txt").split() == [
        *("[console_scripts]", "smoa-kernels", "=", "smoa_kernels.cli:main"),
        *("[vllm.general_plugins]", "smoa_kernels", "=", "smoa_kernels.serving.vllm:register"),
    ]


def test_the_long_description_has_no_relative_link(metadata: Message) -> None:
    """PyPI has none of our files, so each link of the README leads to the version's tag or to another site."""
    (label, _, repository) = metadata["Project-URL"].partition(", ")
    assert label == "Repository"
    text, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", text)
    assert len(found) == len(re.findall(r"\]\([^)]*\)", readme)) > 20
    for picture, url in found:
        if not url.startswith(("https://arxiv.org/", "https://openreview.net/")):
            start = f"{repository}/{'raw' if picture else 'blob'}/v{metadata['Version']}/"
            assert url.startswith(start), url
            assert (ROOT / url.removeprefix(start).partition("#")[0]).is_file(), url


EXTRAS = {"adapter_folder": "peft", "peft": "peft", "serving": "peft", "cli": "cli"}
"""The extra that a folder of the package belongs to; all others are the core."""


@pytest.mark.parametrize("extra", ["peft", "cli", ""])
def test_every_import_is_declared(metadata: Message, extra: str) -> None:
    """An undeclared package may be present through another one, but is missing on some machine."""
    allowed = requirements(metadata, extra, "Linux") | set(sys.stdlib_module_names)
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        if EXTRAS.get(path.relative_to(PACKAGE).parts[0], "") == extra:
            imported |= absolute_imports(path)
    # Known by name only, or optional: PEFT's classes are passed in, torch brings Triton where it can, and one option of
    # `tune` takes transformers, and merging into a GGUF file takes gguf.
    known = {"": {"peft", "transformers", "triton"}, "cli": {"transformers"}, "peft": {"vllm", "gguf"}}[extra]
    assert imported
    assert imported - known <= allowed


def absolute_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            found.add(node.module.split(".")[0])
    return found


# Machines with torch alone and without Triton: macOS, Windows, or a Linux for which Triton has no wheel.


def test_the_core_with_torch_alone() -> None:
    """Each order and backend trains, saves, loads and merges; experts run too."""
    program = f"""
import sys

for name in ("numpy", "triton", "peft", "transformers", "typer", "rich"):
    sys.modules[name] = None
{CORE}
assert not torch.cuda.is_initialized()
layer.unmerge()
layer.backend = "triton"
try:
    layer(x)
except ValueError as error:
    print(error)
"""
    done = ran("-c", program)
    assert done.returncode == 0, done.stderr
    why = "triton is not installed: install 3.6 or newer"
    assert done.stdout == f"backend='triton' cannot run here: {why}; backend='eager' works everywhere\n"


def test_commands_without_triton() -> None:
    pytest.importorskip("typer", reason="needs the cli extra")
    program = """
from smoa_kernels.cli import main
for arguments in (["info"], ["tune"]):
    print(f"exit code of {arguments[0]}: {main(arguments)}")
"""
    done = ran("-c", f"import sys; sys.modules['triton'] = None\n{program}")
    codes = dict(re.findall(r"exit code of (\w+): (\d)", done.stdout))
    assert codes == {"info": "0", "tune": "2"}
    assert "no: triton is not installed" in done.stdout
    assert done.stderr == (
        "smoa-kernels: error: triton is not installed: there are no kernels to tune; "
        "pip install 'smoa-kernels[triton]'\n"
    )


def test_import_loads_no_optional_package() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import smoa_kernels;"
        "print([m for m in ('triton', 'peft', 'transformers', 'typer', 'rich', 'matplotlib')"
        " if m in sys.modules and m not in before])"
    )
    assert ran("-c", script).stdout == "[]\n"
