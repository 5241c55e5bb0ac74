"""Memory counts of launches: sectors of global memory, and passes over shared memory's banks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from .emulator import Launch

__all__ = ["accesses"]


def opcode(text: str) -> str:
    """The opcode of an instruction, without its predicate."""
    words = text.split()
    return words[1] if words[0].startswith("@") else words[0]


def accesses(launches: Iterable[Launch]) -> dict[tuple[str, str], Counter[str]]:
    """Counts by source line and opcode: `requests`, `sectors`, `used_bytes`; for shared memory `waves` and `phases`."""
    table: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for launch in launches:
        program = launch.program
        for text, line, stat in zip(program.texts, program.lines, launch.stats, strict=True):
            if stat["requests"]:
                names = ("requests", "sectors", "used_bytes", "waves", "phases")
                table[line, opcode(text)].update({name: int(stat[name]) for name in names})
    return table
