"""The list of kernels that passed the audit, for each version of Triton: `passed/3.9.txt`.

`make audit` writes it, and it is committed, so an audit compiles only the kernels that a change touched. A line is one
kernel on one architecture: how many forms passed, and a digest of their keys. A key is a hash of the kernel's source
and of its launch's arguments. It contains no version of a compiler, so it is the same on every machine and with every
Python and Triton. Comments, docstrings and layout do not change it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from .compile import Launch
from .rules import Record, broken_rules

FOLDER = Path(__file__).parent / "passed"
VERSION = ".".join(triton.__version__.split(".")[:2])
_SCHEMA = 8  # raised when the audit checks something new; it makes all lists invalid


def code_of(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


@cache
def sources(kernel: JITFunction) -> list[str]:
    """The code of a kernel, of all functions that it calls, and of the constants that they read."""
    found: set[str] = set()
    ahead = [kernel]
    while ahead:
        function = ahead.pop()
        code = code_of("".join(function.raw_src))
        if code in found:
            continue
        found.add(code)
        for name in {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}:
            value = function.fn.__globals__.get(name)
            if isinstance(value, JITFunction):
                ahead.append(value)
            elif isinstance(value, tl.constexpr):
                found.add(f"{name} = {value.value!r}")
    return sorted(found)


def key_of(kernel: JITFunction, launch: Launch, blank: Record) -> str:
    """Hash of a launch, and of the fields of its record that are known before compiling."""
    known = blank.kernel, blank.form, blank.role, blank.arch, blank.dtype, sorted(blank.narrow)
    return _digest([_SCHEMA, sources(kernel), asdict(launch), known])


def lines_of(records: Iterable[Record]) -> dict[str, str]:
    """The line of each kernel on each architecture. `records` have keys and hold all forms of their kernels."""
    keys = defaultdict(list)
    for record in records:
        keys[record.group].append(record.key)
    return {name: f"{len(found)} forms, {_digest(sorted(found))[:16]}" for name, found in keys.items()}


def read(folder: Path) -> dict[str, str]:
    """The lines of the kernels that passed with this version of Triton."""
    path = folder / f"{VERSION}.txt"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return dict(line.split(": ") for line in text.splitlines())


def update(folder: Path, lines: Mapping[str, str], records: Sequence[Record]) -> None:
    """List the kernels that passed in all their forms; drop those that are broken or have changed."""
    counts = Counter(record.group for record in records)
    broken = {record.group for record in records if broken_rules(record)}
    kept = {name: line for name, line in read(folder).items() if lines.get(name, line) == line}
    whole = {name: line for name, line in lines.items() if line.startswith(f"{counts[name]} forms,")}
    listed = sorted(f"{name}: {line}\n" for name, line in {**kept, **whole}.items() if name not in broken)
    folder.mkdir(exist_ok=True)
    (folder / f"{VERSION}.txt").write_text("".join(listed), encoding="utf-8")


def _digest(decides: object) -> str:
    return hashlib.sha256(json.dumps(decides, default=str, sort_keys=True).encode()).hexdigest()
