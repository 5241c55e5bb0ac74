"""Which pointer arguments of a kernel an access in its machine code goes through.

Machine code carries source lines, not pointer names. Kernels name their pointers `*_ptr`, so the names follow from the
text: a `tl.load` or `tl.store` touches the `*_ptr` names that its address mentions, directly or through local variables
assigned from them.

Where LLVM merges two accesses of AMDGCN, their common instruction has no source line. The layout of the kernel's
argument segment is known, so the address itself tells: each register is followed from the scalar loads that fetch
arguments, through moves and arithmetic, to the access.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

__all__ = ["argument_offsets", "argument_pointers", "pointers_at", "pointers_by_line"]

Lines = dict[tuple[int, str], frozenset[str]]


@lru_cache(maxsize=64)
def _file(path: str) -> Lines:
    try:
        return pointers_by_line(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return {}


def pointers_at(path: str, line: int, kind: str) -> frozenset[str]:
    """Pointer parameters that a line of a file loads from or stores to (`kind`); empty where there are none."""
    lines = _file(path)
    # A compiler may name the line that made the address rather than the access.
    return lines.get((line, kind)) or lines.get((line, "address"), frozenset())


def pointers_by_line(text: str) -> Lines:
    """(line, "load" | "store" | "address") to the pointer parameters that a statement spanning it touches."""
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
    """Local name to the `*_ptr` parameters that its value is an address in.

    Loads end the trail: an offset that was itself loaded from `index_ptr` is no address in `index_ptr`.
    """
    origin: dict[str, frozenset[str]] = {
        a.arg: frozenset([a.arg]) for a in function.args.args if a.arg.endswith("_ptr")
    }
    for _ in range(2):  # a second round reaches names that a loop assigns after their first use
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
    """Pointers in an address expression: sums, conditionals and `.to(...)` pass them on, calls do not."""
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


_KERNEL_ARGUMENTS = -1  # stands for the segment's own address, in s[0:1] when a kernel starts


def argument_pointers(types: Sequence[tuple[str, str]]) -> dict[int, str]:
    """Byte offset in the argument segment to the name of the pointer there.

    Args:
        types: (name, Triton type) of the runtime parameters in order, for example ("x_ptr", "*bf16").
    """
    offset, pointers = 0, {}
    for name, kind in types:
        size = 8 if kind.startswith("*") or kind.endswith("64") else 4
        offset += -offset % size
        if kind.startswith("*"):
            pointers[offset] = name
        offset += size
    return pointers


def argument_offsets(code: Sequence[tuple[str, str]]) -> list[frozenset[int]]:
    """Per instruction, the argument offsets that its address operands derive from; empty where it has none.

    Args:
        code: (opcode, operands) in address order. Branches are ignored: registers are followed in that order.
    """
    held: dict[str, frozenset[int]] = {
        "s0": frozenset([_KERNEL_ARGUMENTS]),
        "s1": frozenset([_KERNEL_ARGUMENTS]),
    }
    found = []
    for opcode, text in code:
        operands = [_registers(operand) for operand in text.split(",")]
        target, *sources = operands
        if access := re.match(r"(global|buffer|flat)_(load|store)", opcode):
            data = 1 if access[2] == "store" and access[1] != "buffer" else 0
            to_shared = "_lds_" in opcode or text.endswith(" lds")
            address = [r for i, group in enumerate(operands) if i != data or to_shared for r in group]
            found.append(_held(held, address) - {_KERNEL_ARGUMENTS})
            if access[2] == "load" and not to_shared:
                held.update((register, frozenset()) for register in target)
            continue
        found.append(frozenset())
        if opcode.startswith("s_load"):
            of_arguments = _KERNEL_ARGUMENTS in _held(held, sources[0])
            immediate = re.search(r"0x[0-9a-f]+", text)
            start = int(immediate[0], 16) if immediate else 0
            for i, register in enumerate(target):
                # both halves of a pointer carry the offset of its first
                held[register] = frozenset([start + 4 * i & ~7]) if of_arguments else frozenset()
        elif not opcode.startswith(("ds_", "s_waitcnt", "s_cbranch", "s_barrier", "scratch_")):
            moved = _held(held, [r for group in sources for r in group])
            held.update((register, moved) for register in target)
        elif opcode.startswith("ds_read"):
            held.update((register, frozenset()) for register in target)
    return found


def _registers(operand: str) -> list[str]:
    names: list[str] = []
    for kind, first, last in re.findall(r"\b([sva])(?:\[(\d+):(\d+)\]|\d+\b)", operand):
        if first:
            names += [f"{kind}{i}" for i in range(int(first), int(last) + 1)]
    names += re.findall(r"\b[sva]\d+\b", operand)
    return names


def _held(held: dict[str, frozenset[int]], registers: Sequence[str]) -> frozenset[int]:
    return frozenset().union(*(held.get(register, frozenset()) for register in registers))
