"""Every public name is documented: what its arguments are, what it raises, and an example that runs here."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "smoa_kernels"

# What nobody need import: the machinery behind a command or a public name, by folder or file.
INTERNAL = {
    "_version.py": "smoa_kernels.__version__",
    "arguments.py": "checks of smoa_linear's arguments",
    "block_order.py": "behind the eager backend",
    "checks.py": "checks of single values",
    "eager.py": "a backend; backends.py says what each has",
    "native_backend.py": "a backend; backends.py says what each has",
    "layer_checks.py": "checks of FusedSMoALinear's arguments",
    "operator.py": "behind smoa_linear",
    "triton_backend.py": "a backend; backends.py says what each has",
    "cli/": "the command line; its main is public",
    "distributed/shard.py": "made by the styles of tensor parallelism",
    "kernels/": "behind the triton backend",
    "peft/combine.py": "behind several active adapters and add_weighted_adapter",
    "peft/dequantize.py": "behind layers over a quantised base",
    "peft/folders.py": "behind the commands inspect and spectrum",
    "peft/updates.py": "behind the command spectrum",
    "peft/loading.py": "hooks into PEFT",
    "peft/offload.py": "hooks into PEFT",
    "peft/quantized.py": "hooks into PEFT",
    "peft/peft_type.py": "hooks into PEFT",
    "peft/registry.py": "hooks into PEFT",
    "peft/saving.py": "hooks into PEFT",
    "peft/scratch.py": "hooks into PEFT",
    "peft/peek.py": "hooks into PEFT",
    "peft/transformers_loading.py": "hooks into PEFT",
    "peft/weighted.py": "behind add_weighted_adapter",
    "tuning/": "behind the commands audit and tune; what remains is below",
}
PUBLIC = {
    "cli/__init__.py",
    "tuning/entries.py",
    "tuning/identity.py",
    "tuning/limits.py",
    "tuning/lookup.py",
} | {
    "tuning/models.py",
    "tuning/store.py",
}


def is_public(path: str) -> bool:
    return path in PUBLIC or not any(
        path == key or (key[-1] == "/" and path.startswith(key)) for key in INTERNAL
    )


MODULES = sorted(
    path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__main__.py"
)


def load(path: str) -> Any:
    """The module in a file of the package; skips, with the reason, where what it needs is not installed."""
    needs = {
        "peft/": "peft",
        "cli/": "typer",
        "cli/spectrum_figure.py": "matplotlib",
        "kernels/": "triton",
        "tuning/": "triton",
        "triton_backend.py": "triton",
    }
    for prefix, package in needs.items():
        if path.startswith(prefix) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{path} needs {package}, which is not installed")
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return importlib.import_module("smoa_kernels" if name == "__init__" else f"smoa_kernels.{name}")


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[None]:
    """The examples of smoa_kernels.distributed are one process's of a group: here the only one."""
    if not request.getfixturevalue("path").startswith("distributed/"):
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("path", MODULES)
def test_examples(path: str, group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(path)
    if (path.startswith("kernels/") or path == "triton_backend.py") and os.environ.get(
        "TRITON_INTERPRET"
    ) != "1":
        pytest.skip("the examples run kernels on the CPU, in Triton's interpreter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.delenv("SMOA_AUTOTUNE", raising=False)
    found = {test.name.rpartition(".")[2] for test in doctest.DocTestFinder().find(module) if test.examples}
    assert {name for name, it in public_names(path) if ">>>" in (inspect.getdoc(it) or "")} <= found
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def public_names(path: str) -> list[tuple[str, Any]]:
    """(name, object) of the functions and classes that a module exports and defines."""
    module = load(path)
    found = [(name, getattr(module, name)) for name in getattr(module, "__all__", ())]
    return [
        (name, it)
        for name, it in found
        if callable(it) and getattr(it, "__module__", None) == module.__name__
    ]


@pytest.mark.parametrize("path", [path for path in MODULES if is_public(path)])
def test_public_names_are_documented(path: str) -> None:
    faults = [f"{name} {fault}" for name, it in public_names(path) for fault in lacks(it)]
    assert not faults


def lacks(it: Any) -> Iterator[str]:
    """What the documentation of a function or a class lacks."""
    doc = inspect.getdoc(it) or ""
    if ">>>" not in doc:
        yield "has no example"
    if "+SKIP" in doc:
        yield "has an example that does not run"
    if not inspect.isclass(it):
        yield from lacks_parts(it, doc)
        return
    yield from (f"does not say what {name} is" for name in fields(it) if not mentions(doc, name))
    for name, member in vars(it).items():
        function = getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function) and function.__module__ == it.__module__:
            own = f"{inspect.getdoc(function) or ''}\n{doc}"  # the class may say it for all of its methods
            yield from (f".{name} {fault}" for fault in lacks_parts(function, own))


def lacks_parts(function: Any, doc: str) -> Iterator[str]:
    """Arguments that are not named, errors that are raised and not told of."""
    inherited = re.search(r"[Aa]rguments .*are|As `?PEFT|[Aa]s `?nn\.", doc)
    for name, parameter in inspect.signature(function).parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not inherited and not variadic and name not in ("self", "cls") and not mentions(doc, name):
            yield f"does not say what {name} is"
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    if any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree)) and not re.search(
        r"Raises:|raises?\b|Error|errors", doc
    ):
        yield "does not say what it raises"


def fields(it: type) -> list[str]:
    """What a class is made of: the fields of a dataclass or named tuple, else its constructor's arguments."""
    made = getattr(it, "_fields", None)
    if dataclasses.is_dataclass(it):
        made = vars(it)["__annotations__"]  # without the fields of another package's class
    if made is None:
        made = inspect.signature(it.__init__).parameters if "__init__" in vars(it) else ()
    return [name for name in made if name not in ("self", "args", "kwargs") and not name.startswith("_")]


def mentions(doc: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", doc) is not None


# Pages that lead through the code, to what is internal too.
INSIDE = {"CONTRIBUTING.md", "add_a_kernel.md", "cpu.md", "definition.md", "gpu.md", "tour.md"}
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_what_people_are_told_of_is_public() -> None:
    """What the packages export, what any page names as one imports it, the files that a page for users names."""
    told = set()
    for package in ("__init__.py", "distributed/__init__.py", "peft/__init__.py"):
        if package.startswith("peft") and importlib.util.find_spec("peft") is None:
            continue
        exported = (getattr(load(package), name) for name in load(package).__all__)
        told |= {it.__module__.replace(".", "/") + ".py" for it in exported if callable(it)}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for dotted in re.findall(r"smoa_kernels(?:\.[a-z_]+)+", text):
            told |= {dotted.replace(".", "/") + ".py", dotted.rpartition(".")[0].replace(".", "/") + ".py"}
        if page.name not in INSIDE:
            told |= set(re.findall(r"smoa_kernels/[a-z_/]+\.py", text))
    told = {path.removeprefix("smoa_kernels/") for path in told if (ROOT / path).is_file()}
    assert {"functional.py", "reference.py", "spectrum.py"} <= told
    assert [path for path in sorted(told) if not is_public(path)] == []


def test_what_is_called_internal_exists() -> None:
    for path in [*INTERNAL, *PUBLIC]:
        assert (PACKAGE / path).exists(), path


def test_an_undocumented_name_would_show() -> None:
    def bare(x: int, y: int) -> None:
        """Of x."""
        raise ValueError

    assert list(lacks(bare)) == ["has no example", "does not say what y is", "does not say what it raises"]
