"""Examples in docstrings run, and everything that the package exports is documented."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist

PACKAGE = Path(__file__).resolve().parent.parent / "smoa_kernels"
DOORS = ("smoa_kernels", "smoa_kernels.peft", "smoa_kernels.distributed")
NEEDS = {"peft": "peft", "cli": "typer", "kernels": "triton", "tuning": "triton", "audit": "triton"}
KERNELS = ("kernels", "backends.triton", "tuning")

EXAMPLES = sorted(
    path.relative_to(PACKAGE.parent)
    .as_posix()
    .removesuffix(".py")
    .removesuffix("/__init__")
    .replace("/", ".")
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def load(name: str) -> ModuleType:
    """Import a module of the package; skip, with the reason, if a requirement is not installed."""
    needed = NEEDS.get(name.partition(".")[2].partition(".")[0], "torch")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{name} needs {needed}, which is not installed")
    return importlib.import_module(name)


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[None]:
    """A group of one process, for the examples of smoa_kernels.distributed."""
    if "distributed" not in request.getfixturevalue("name"):
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str, group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(name)
    if name.partition(".")[2].startswith(KERNELS) and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the examples run kernels on the CPU, in Triton's interpreter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("door", DOORS)
def test_what_is_exported_is_documented(door: str) -> None:
    """Each function and class has an example in its or its module's docstring, and describes its arguments."""
    module = load(door)
    for it in filter(callable, (getattr(module, name) for name in module.__all__)):
        words = f"{inspect.getdoc(it)} {inspect.getdoc(inspect.getmodule(it))} {module.__doc__}"
        assert ">>>" in words, f"{it.__name__} has no example"
        missing = [name for name in arguments(it) if not re.search(rf"(?<!\w){name}(?!\w)", words)]
        assert not missing, f"{it.__name__} does not say what {missing} are"


def arguments(it: Any) -> list[str]:
    """The arguments of a function or a class, without those inherited from another package."""
    made: Any = it
    if inspect.isclass(it):
        made = vars(it).get("__init__", object)
    found: Iterable[str] = inspect.signature(made).parameters
    if dataclasses.is_dataclass(it):
        fields: dict[bool, list[str]] = {True: [], False: []}  # True: ours; False: another package's
        for base in inspect.getmro(it):
            fields[base.__module__.startswith("smoa_kernels")] += vars(base).get("__annotations__", ())
        found = [name for name in fields[True] if name not in fields[False]]
    return [name for name in found if name not in ("self", "args", "kwargs")]
