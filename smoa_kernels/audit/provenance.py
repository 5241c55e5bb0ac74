"""Which kernel argument an AMDGCN address is made from.

Where LLVM merges two accesses their common instruction has no source line. The pointers come from the kernel's
argument segment, whose layout is known, so the address itself tells: follow each register from the scalar loads
that fetch arguments, through moves and arithmetic, to the access.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["argument_offsets", "argument_pointers"]

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
