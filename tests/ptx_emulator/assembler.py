"""Allocates a warp's registers and builds its instructions."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

SIZES = {
    **dict.fromkeys(("u8", "s8", "b8"), 1),
    **dict.fromkeys(("u16", "s16", "b16", "f16", "bf16"), 2),
    **dict.fromkeys(("u32", "s32", "b32", "f32"), 4),
    **dict.fromkeys(("u64", "s64", "b64", "f64"), 8),
}
SPECIAL = re.compile(r"%(tid|ctaid)\.[xyz]$|%(laneid|warpid)$")


class UnsupportedError(Exception):
    """PTX that the machine does not support."""


class Predicate(int):
    """A predicate's number, among operands that are rows."""


@dataclass(frozen=True)
class Statement:
    """A PTX statement, split into operation and operands."""

    operation: str
    arguments: list[str]
    text: str
    line: str
    predicate: int
    negated: bool

    @cached_property
    def parts(self) -> list[str]:
        """The parts of the operation between dots."""
        return self.operation.split(".")


_s32, _u32, _s64 = ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64


class Instruction(ctypes.Structure):
    """An instruction of the machine (`struct Instruction` in core/machine.h), with its text and source line."""

    _fields_ = (
        *(("operation", _u32), ("predicate", _s32), ("negated", _u32)),
        *(("destination_count", _s32), ("source_count", _s32)),
        *(("destinations", _s32 * 4), ("sources", _s32 * 14)),
        *(("destination_widths", _u32 * 4), ("source_widths", _u32 * 14)),
        *(("immediate", _s64), ("aux", _s64 * 4), ("watch", _s32)),
    )
    text: str
    line: str
    rows: tuple[list[int], list[int]]
    """The registers that it reads, and those that it writes; without predicates."""


@dataclass
class Assembler:
    """The state of a kernel's translation while its statements are read.

    Attributes:
        operations: the number of each machine operation by name.
        shared_base: the address of `global_smem`.
        parameters: the offset of each parameter.
        declared: the width of each class of registers; 0 for predicates.
        rows: offset and width of each register used so far.
        constants: offset of each constant, by value and width.
        predicates: the number of each predicate.
        code: the instructions so far.
        labels: the number of the instruction after each label.
        extra: as in `ptx.Program`.
        register_bytes: the size of the register file so far.
    """

    operations: Mapping[str, int]
    shared_base: int
    parameters: Mapping[str, int]
    declared: dict[str, int] = field(default_factory=dict)
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    constants: dict[tuple[int, int], int] = field(default_factory=dict)
    predicates: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    extra: list[int] = field(default_factory=list)
    register_bytes: int = 0
    _jumps: list[tuple[int, str]] = field(default_factory=list)

    def emit(
        self,
        statement: Statement,
        name: str,
        destinations: Sequence[int] = (),
        sources: Sequence[int] = (),
        *,
        destination_widths: Sequence[int] = (),
        source_widths: Sequence[int] = (),
        immediate: int = 0,
        aux: Sequence[int] = (),
    ) -> None:
        """Append a machine instruction for a statement."""
        if name not in self.operations:
            raise UnsupportedError(f"{name}: {statement.text}")
        one = Instruction(
            operation=self.operations[name],
            predicate=statement.predicate,
            negated=statement.negated,
            destination_count=len(destinations),
            source_count=len(sources),
            immediate=immediate,
            watch=-1,
        )
        one.destinations[: len(destinations)] = destinations
        one.sources[: len(sources)] = sources
        one.destination_widths[: len(destination_widths)] = destination_widths
        one.source_widths[: len(source_widths)] = source_widths
        one.aux[: len(aux)] = aux
        one.text, one.line = statement.text, statement.line
        reads, writes = (
            [r for r in side if not isinstance(r, Predicate)] for side in (sources, destinations)
        )
        one.rows = reads, writes
        self.code.append(one)

    def jump(self, statement: Statement, label: str) -> None:
        """Append a branch to a label, which may be defined later."""
        self._jumps.append((len(self.code), label))
        self.emit(statement, "bra")

    def finish(self) -> None:
        """Append the end of the program, and resolve the branches."""
        self.emit(Statement("ret", [], "(end)", "?", -1, False), "ret")
        for at, label in self._jumps:
            self.code[at].immediate = self.labels[label]

    def allocate(self, width: int) -> int:
        """Allocate a row of the register file; returns its offset."""
        offset = self.register_bytes
        self.register_bytes += 32 * max(width, 2)
        return offset

    def row(self, register: str) -> tuple[int, int]:
        """Offset and width of a register."""
        if register not in self.rows:
            width = self._width(register)
            if width == 0:
                raise UnsupportedError(f"predicate {register} where a register is expected")
            self.rows[register] = self.allocate(width), width
        return self.rows[register]

    def constant(self, value: int, width: int) -> int:
        """Offset of a row that holds a constant."""
        width = max(width, 2)
        key = value % (1 << 8 * width), width
        if key not in self.constants:
            self.constants[key] = self.allocate(width)
        return self.constants[key]

    def predicate(self, name: str) -> Predicate:
        """Number of a predicate; "-1" and "1" are always true, "0" is always false."""
        if name in ("-1", "1", "0"):
            name = "false" if name == "0" else "true"
        elif self._width(name) != 0:
            raise UnsupportedError(f"{name} is no predicate")
        return Predicate(self.predicates.setdefault(name, len(self.predicates)))

    def source(self, statement: Statement, text: str, width: int) -> int:
        """Offset of an operand that is read: a constant, or a register, truncated to `width` if wider."""
        if text == "global_smem":
            return self.constant(self.shared_base, width)
        if (value := literal(text)) is not None:
            return self.constant(value, width)
        offset, actual = self.row(text)
        width = max(width, 2)
        if actual == width:
            return offset
        if actual < width:
            raise UnsupportedError(f"{text} is narrower than {width} bytes in {statement.text}")
        narrowed = self.allocate(width)
        self.emit(statement, f"cvt.u{width * 8}.u{actual * 8}", [narrowed], [offset])
        return narrowed

    def sources(self, statement: Statement, texts: Sequence[str], width: int) -> list[int]:
        """Offsets of operands of one width: registers, constants or vectors of them."""
        return [self.source(statement, text, width) for group in texts for text in vector(group)]

    def destination(self, statement: Statement, text: str, width: int) -> int:
        """Offset of a register that is written; `_` gets a scratch row."""
        if text == "_":
            return self.allocate(width)
        offset, actual = self.row(text)
        if actual != max(width, 2):
            raise UnsupportedError(f"{text} has another width than {width} bytes in {statement.text}")
        return offset

    def destinations(self, statement: Statement, text: str, width: int) -> list[int]:
        """Offsets of the registers of a vector."""
        return [self.destination(statement, register, width) for register in vector(text)]

    def _width(self, register: str) -> int:
        if SPECIAL.match(register):
            return 4
        numbered = re.match(r"(%[a-zA-Z_]+)\d+$", register)
        for name in (register, numbered[1] if numbered else register):
            if name in self.declared:
                return self.declared[name]
        raise UnsupportedError(f"register {register}")


def literal(text: str) -> int | None:
    """The bits of a constant; None if the text is not a constant."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return int(match[1] or match[2], 16)
    if match := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(match[2], 0) * (-1 if match[1] else 1)
    return None


def split_list(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def vector(text: str) -> list[str]:
    """The registers of `{a, b}`, or the single register `a`."""
    return [name.strip() for name in text.strip().removeprefix("{").removesuffix("}").split(",")]
