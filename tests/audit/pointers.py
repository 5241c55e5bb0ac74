"""Finds the pointer arguments that an access in a kernel's machine code goes through.

Machine code carries source lines, not pointer names. Kernels name their pointers `*_ptr`, so the source gives the
names: a `tl.load` or `tl.store` touches the `*_ptr` names in its address, used directly or through local variables
assigned from them.

If LLVM merges two accesses of AMDGCN, the merged instruction has no source line and its pointer stays unknown.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

Lines = dict[tuple[int, str], frozenset[str]]


@lru_cache(maxsize=64)
def _file(path: str) -> Lines:
    try:
        return pointers_by_line(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return {}


def pointers_at(path: str, line: int, kind: str) -> frozenset[str]:
    """Pointer parameters that a line of a file loads from or stores to (`kind`); empty if there are none."""
    lines = _file(path)
    # A compiler may name the line that computed the address instead of the access.
    return lines.get((line, kind)) or lines.get((line, "address"), frozenset())


def pointers_by_line(text: str) -> Lines:
    """Maps (line, "load" | "store" | "address") to the pointer parameters of the statements on that line."""
    lines: Lines = {}

    def note(node: ast.stmt | ast.expr, kind: str, names: frozenset[str]) -> None:
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            lines[line, kind] = lines.get((line, kind), frozenset()) | names

    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef):
            origin = _origins(function)
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and _is_access(node) and node.args:
                    assert isinstance(node.func, ast.Attribute)
                    note(node, node.func.attr, _mentioned(node.args[0], origin))
                elif isinstance(node, ast.Assign | ast.AugAssign):
                    note(node, "address", _mentioned(node.value, origin))
    return lines


def _is_access(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr in ("load", "store")


def _origins(function: ast.FunctionDef) -> dict[str, frozenset[str]]:
    """Maps a local name to the `*_ptr` parameters that its value points into.

    A load ends the chain: an offset loaded from `index_ptr` is not an address in `index_ptr`.
    """
    origin: dict[str, frozenset[str]] = {
        a.arg: frozenset([a.arg]) for a in function.args.args if a.arg.endswith("_ptr")
    }
    for _ in range(2):  # the second round finds names that a loop assigns after their first use
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                targets, value = node.targets, node.value
            elif isinstance(node, ast.AugAssign):
                targets, value = [node.target], node.value
            else:
                continue
            found = _mentioned(value, origin)
            for target in targets:
                if isinstance(target, ast.Name) and found:
                    origin[target.id] = origin.get(target.id, frozenset()) | found
    return origin


def _mentioned(node: ast.AST, origin: dict[str, frozenset[str]]) -> frozenset[str]:
    """Pointers in an address expression. Sums, conditionals and `.to(...)` pass them on, other calls do not."""
    if isinstance(node, ast.Name):
        return origin.get(node.id, frozenset())
    if isinstance(node, ast.BinOp):
        return _mentioned(node.left, origin) | _mentioned(node.right, origin)
    if isinstance(node, ast.Subscript):
        return _mentioned(node.value, origin)
    if isinstance(node, ast.IfExp):
        return _mentioned(node.body, origin) | _mentioned(node.orelse, origin)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr != "load":
        inner = [_mentioned(a, origin) for a in (node.func.value, *node.args)]
        return frozenset().union(*inner)
    return frozenset()
