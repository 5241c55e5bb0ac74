"""Translates PTX to the machine's bytecode: fixed-size instructions over rows of 32 lanes.

Every PTX register is a row of the warp's register file (2, 4 or 8 bytes a lane). Every constant is a row that is
filled before the warp starts. Unknown statements raise `UnsupportedError`.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .assembler import SIZES, Assembler, Instruction, Statement, UnsupportedError, split_list
from .instructions import translate

SPECIAL_ROWS = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%laneid", "%warpid")


class Parameter(NamedTuple):
    """The offset and size of a kernel parameter among all of them."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, eq=False)
class Program:
    """A kernel, translated for the machine.

    Attributes:
        threads: per program (CTA).
        code: the instructions, an array.
        texts: the PTX of each instruction.
        lines: the source line of each instruction, "permute.py:79".
        register_bytes: per warp.
        initial: a warp's registers at the start: the constants.
        predicates: number per warp.
        initial_predicates: one bit per lane.
        special: offsets of the rows of `SPECIAL_ROWS`; -1 if unused.
        parameters: of the kernel.
        parameter_bytes: their total size.
        extra: lists of rows. A wgmma lists its accumulators; another instruction lists the wgmma registers that it
            touches.
        has_wgmma: whether the kernel has a wgmma.
    """

    threads: int
    code: ctypes.Array[Instruction]
    texts: tuple[str, ...]
    lines: tuple[str, ...]
    register_bytes: int
    initial: np.ndarray
    predicates: int
    initial_predicates: np.ndarray
    special: np.ndarray
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    extra: np.ndarray
    has_wgmma: bool


def parse(text: str, operations: Mapping[str, int], shared_base: int) -> Program:
    """Translate a module with one kernel.

    Args:
        text: the PTX.
        operations: the machine's, by name.
        shared_base: the address of `global_smem`.

    Raises:
        UnsupportedError: naming the statement.
    """
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)\s*(.*?)\{", text, re.S)
    if not entry or len(re.findall(r"\.entry\s", text)) != 1:
        raise UnsupportedError("not one entry")
    if re.search(r"^\s*(\.visible\s+)?\.(func|global|const)\b", text, re.M):
        raise UnsupportedError("functions or variables of the module")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[2])
    if threads is None:
        raise UnsupportedError("no number of threads")
    parameters = _parameters(entry[1])
    assembler = Assembler(operations, shared_base, {p.name: p.offset for p in parameters})
    body = text[entry.end() : text.index("\n}", entry.end())]
    for kind, content, line in _statements(body):
        if kind == "label":
            assembler.labels[content] = len(assembler.code)
        elif content.startswith(".reg"):
            _declare(assembler, content)
        elif content.startswith("."):
            raise UnsupportedError(content)
        else:
            _translate(assembler, content, line)
    assembler.finish()
    _watch_wgmma_registers(assembler)
    return _program(assembler, int(threads[1]), parameters)


def _parameters(text: str) -> tuple[Parameter, ...]:
    found, offset = [], 0
    pattern = r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+\.\w+\s+(?:\.align\s+\d+\s+)?)?(\w+)$"
    for declaration in split_list(text):
        match = re.match(pattern, declaration)
        if not match:
            raise UnsupportedError(f"parameter {declaration}")
        size = SIZES[match[1]]
        offset = -(-offset // size) * size
        found.append(Parameter(match[2], offset, size))
        offset += size
    return tuple(found)


def _statements(body: str) -> Iterator[tuple[str, str, str]]:
    """Yields ("label" or "instruction", its text, the source line) in order."""
    line, inline, locations, pending = "?", False, 0, ""
    for raw in body.splitlines():
        stripped = raw.strip()
        if stripped.startswith("// begin inline asm"):
            inline, locations = True, 0
        elif stripped.startswith("// end inline asm"):
            inline = False
        if stripped.startswith(".loc"):
            locations += 1
            # LLVM's line numbers inside inline assembly mean nothing, except the first.
            if not inline or locations == 1:
                match = re.search(r"//\s*([\w.]+:\d+)", stripped)
                line = match[1] if match else line
            continue
        code = stripped.split("//")[0].strip()
        if not code or code.startswith((".file", ".pragma")):
            continue
        pending = f"{pending} {code}".strip()
        while pending:
            if match := re.match(r"([$\w]+):(?!:)\s*", pending):
                yield "label", match[1], line
                pending = pending[match.end() :]
            elif pending[0] in "{}" and not re.match(r"\{[^;]*\}\s*,", pending):
                pending = pending[1:].strip()  # a brace of a scope
            elif ";" in pending:
                statement, pending = (part.strip() for part in pending.split(";", 1))
                yield "instruction", statement, line
            else:
                break
    if pending:
        raise UnsupportedError(f"unfinished statement {pending!r}")


def _declare(assembler: Assembler, statement: str) -> None:
    match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement, re.S)
    if match is None:
        raise UnsupportedError(statement)
    width = 0 if match[1] == "pred" else SIZES[match[1]]
    for name in match[2].split(","):
        numbered = re.match(r"(%[\w$]+)<\d+>$", name.strip())
        assembler.declared[numbered[1] if numbered else name.strip()] = width


def _translate(assembler: Assembler, text: str, line: str) -> None:
    match = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)$", text, re.S)
    if match is None:
        raise UnsupportedError(text)
    negated, predicate, operation, arguments = match.groups()
    statement = Statement(
        operation=operation,
        arguments=split_list(arguments),
        text=text,
        line=line,
        predicate=-1 if predicate is None else assembler.predicate(predicate),
        negated=bool(negated),
    )
    try:
        translate(assembler, statement)
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(f"{text}: {error!r}") from error


def _watch_wgmma_registers(assembler: Assembler) -> None:
    """For every other instruction, list the wgmma registers that it reads, then those that it writes."""
    number = assembler.operations["wgmma.mma"]
    watched: set[int] = set()
    for instruction in assembler.code:
        if instruction.operation == number:
            first, columns, _, flags = instruction.aux
            watched.update(assembler.extra[first : first + columns // 2])
            if flags & 1:  # the left operand is in registers
                watched.update(instruction.sources[:4])
    for instruction in assembler.code:
        reads, writes = ([row for row in rows if row in watched] for rows in instruction.rows)
        if instruction.operation != number and (reads or writes):
            instruction.watch = len(assembler.extra)
            assembler.extra += [len(reads), len(writes), *reads, *writes]


def _program(assembler: Assembler, threads: int, parameters: tuple[Parameter, ...]) -> Program:
    initial = np.zeros(assembler.register_bytes, np.uint8)
    for (value, width), offset in assembler.constants.items():
        initial[offset : offset + 32 * width].view(f"u{width}")[:] = value
    predicates = max(len(assembler.predicates), 1)
    initial_predicates = np.zeros(predicates, np.uint32)
    if (always := assembler.predicates.get("true")) is not None:
        initial_predicates[always] = 0xFFFFFFFF
    special = [assembler.rows[name][0] if name in assembler.rows else -1 for name in SPECIAL_ROWS]
    return Program(
        threads=threads,
        code=(Instruction * len(assembler.code))(*assembler.code),
        texts=tuple(i.text for i in assembler.code),
        lines=tuple(i.line for i in assembler.code),
        register_bytes=assembler.register_bytes,
        initial=initial,
        predicates=predicates,
        initial_predicates=initial_predicates,
        special=np.array(special, np.int32),
        parameters=parameters,
        parameter_bytes=max((p.offset + p.size for p in parameters), default=1),
        extra=np.array(assembler.extra or [0], np.int32),
        has_wgmma=any(i.operation == assembler.operations["wgmma.mma"] for i in assembler.code),
    )
