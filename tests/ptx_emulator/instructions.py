"""Translates PTX statements to the machine's instructions: a table of forms, and functions for longer translations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from .assembler import SIZES, Assembler, Statement, UnsupportedError, literal, vector

WGMMA_KINDS = ("f16", "bf16", "tf32")


class Form(NamedTuple):
    """Statements that become one instruction of the machine.

    Attributes:
        pattern: of the whole operation.
        name: of the machine's operation; it may have the pattern's groups.
        operands: the kind of each operand. "4" is a source of 4 bytes, "t" one of the operation's last type, "p" a
            predicate; a ">" before it makes it a destination. "#" is a number, "0" and "-1" are that number and no
            other. Registers of 4 bytes may come as vectors, and a ">4|p" may have a predicate.
    """

    pattern: str
    name: str
    operands: str = ""


FORMS = (
    Form(r"ret|exit", "ret"),
    Form(r"(bar|barrier)\.sync(\.aligned)?", "bar.sync", "0"),  # no named barriers, no subsets of warps
    Form(r"bar\.warp\.sync", "bar.warp.sync", "-1"),
    Form(r"fence\.proxy\.async(\.shared::(cta|cluster))?", "fence.proxy.async"),
    Form(r"cp\.async\.(commit_group|wait_all)", r"cp.async.\1"),
    Form(r"cp\.async\.wait_group", "cp.async.wait_group", "#"),
    Form(r"mma\.sync\.aligned\.(m16n8k\d+)\.row\.col\.f32\.(\w+)\.\2\.f32", r"mma.\1.\2", ">4 4 4 4"),
    Form(r"wgmma\.(fence|commit_group)\.sync\.aligned", r"wgmma.\1"),
    Form(r"wgmma\.wait_group\.sync\.aligned", "wgmma.wait_group", "#"),
    Form(r"shfl\.sync\.(\w+)\.b32", r"shfl.\1", ">4|p 4 4 4 4"),
    Form(r"redux\.sync\.add\.[su]32", "redux.add", ">4 4 4"),
    Form(r"setp\.(\w+)(\.ftz)?\.(\w+)", r"setp.\1.\3", ">p t t"),
    Form(r"selp\.[a-z]+(\d+)", r"selp.b\1", ">t t t p"),
    Form(r"(not|mov)\.pred", r"\1.pred", ">p p"),
    Form(r"(and|or|xor)\.pred", r"\1.pred", ">p p p"),
)
UNSUPPORTED = frozenset(["mbarrier", "elect", "tcgen05", "atom", "red"])


def translate(a: Assembler, s: Statement) -> None:
    """Append the instructions of a statement."""
    for form in FORMS:
        if match := re.fullmatch(form.pattern, s.operation):
            _translate(a, s, match.expand(form.name), form.operands.split())
            return
    if s.parts[0] in UNSUPPORTED:
        raise UnsupportedError(s.text)
    FAMILIES.get(s.parts[0], _arithmetic)(a, s)


def _translate(a: Assembler, s: Statement, name: str, operands: list[str]) -> None:
    to: list[int] = []
    sources: list[int] = []
    immediate = 0
    for kind, text in zip(operands, s.arguments, strict=True):
        width = SIZES[s.parts[-1]] if kind[-1] == "t" else 4
        if kind in ("#", "0", "-1"):
            immediate = literal(text) or 0
            if kind != "#" and immediate not in (int(kind), int(kind) % (1 << 32)):
                raise UnsupportedError(s.text)
        elif kind == ">4|p":
            value, *inside = text.split("|")
            to += [a.destination(s, value, 4), *map(a.predicate, inside)]
        elif kind[-1] == "p":
            (to if kind[0] == ">" else sources).append(a.predicate(text))
        elif kind[0] == ">":
            to += a.destinations(s, text, width)
        else:
            sources += a.sources(s, [text], width)
    a.emit(s, name, to, sources, immediate=immediate)


def _branch(a: Assembler, s: Statement) -> None:
    a.jump(s, s.arguments[0])


# Memory


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text.strip())
    if not match:
        raise UnsupportedError(f"address {text}")
    return match[1], (literal(match[2]) or 0) if match[2] else 0


def _space(s: Statement) -> tuple[str, str, int]:
    """The state space, the type and the elements per lane of a load or store."""
    ignored = {"volatile", "relaxed", "acquire", "release", "weak", "gpu", "cta", "sys", "nc"}
    parts = [p for p in s.parts[1:] if p not in ignored and not p.startswith(("L1::", "L2::"))]
    space, *rest = [p.removesuffix("::cta") for p in parts]
    count = {"v2": 2, "v4": 4}.get(rest[0], 1)
    if space not in ("global", "shared") or len(rest) != (1 if count == 1 else 2):
        raise UnsupportedError(s.text)
    if SIZES[rest[-1]] * count > 16:
        raise UnsupportedError(s.text)
    return space, rest[-1], count


def _load(a: Assembler, s: Statement) -> None:
    if s.parts[1] == "param":
        name, offset = _address(s.arguments[1])
        row, width = a.row(s.arguments[0])
        size = SIZES[s.parts[-1]]
        aux = (size, 1, int(s.parts[-1][0] == "s"))
        at = a.parameters[name] + offset
        a.emit(s, "ld.param", [row], destination_widths=[width], immediate=at, aux=aux)
        return
    space, kind, count = _space(s)
    base, offset = _address(s.arguments[1])
    rows = [(-1, 4) if name == "_" else a.row(name) for name in vector(s.arguments[0])]
    if len(rows) != count:
        raise UnsupportedError(s.text)
    a.emit(
        s,
        f"ld.{space}",
        [row for row, _ in rows],
        [a.source(s, base, 8 if space == "global" else 4)],
        destination_widths=[width for _, width in rows],
        immediate=offset,
        aux=(SIZES[kind], count, int(kind[0] == "s")),
    )


def _store(a: Assembler, s: Statement) -> None:
    space, kind, count = _space(s)
    base, offset = _address(s.arguments[0])
    rows = []
    for name in vector(s.arguments[1]):
        value, width = literal(name), max(SIZES[kind], 2)
        rows.append(a.row(name) if value is None else (a.constant(value, width), width))
    if len(rows) != count:
        raise UnsupportedError(s.text)
    a.emit(
        s,
        f"st.{space}",
        (),
        [a.source(s, base, 8 if space == "global" else 4), *(row for row, _ in rows)],
        source_widths=[4, *(width for _, width in rows)],
        immediate=offset,
        aux=(SIZES[kind], count, 0),
    )


def _copy(a: Assembler, s: Statement) -> None:
    """cp.async. TMA's bulk copies are not supported."""
    if not re.fullmatch(r"cp\.async\.c[ag]\.shared\.global(\.L2::\w+)*", s.operation):
        raise UnsupportedError(s.text)
    (to, to_offset), (source, offset) = _address(s.arguments[0]), _address(s.arguments[1])
    size, *rest = s.arguments[2:]
    if "cache_hint" in s.operation:
        rest = rest[:-1]
    sources = [a.source(s, to, 4), a.source(s, source, 8), *(a.source(s, n, 4) for n in rest[:1])]
    a.emit(s, "cp.async", (), sources, immediate=to_offset, aux=(literal(size) or 0, offset))


def _matrix(a: Assembler, s: Statement) -> None:
    pattern = r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16"
    match = re.fullmatch(pattern, s.operation)
    if not match:
        raise UnsupportedError(s.text)
    aux = (int(match[2]), int(bool(match[3])))
    loads = match[1] == "ld"
    base, offset = _address(s.arguments[1 if loads else 0])
    at = a.source(s, base, 4)
    if loads:
        a.emit(s, "ldmatrix", a.destinations(s, s.arguments[0], 4), [at], immediate=offset, aux=aux)
    else:
        values = a.sources(s, [s.arguments[1]], 4)
        a.emit(s, "stmatrix", (), [at, *values], immediate=offset, aux=aux)


# Products


def _wgmma(a: Assembler, s: Statement) -> None:
    match = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)", s.operation)
    if not match or match[3] != match[4] or match[3] not in WGMMA_KINDS:
        raise UnsupportedError(s.text)
    columns, depth, kind = int(match[1]), int(match[2]), WGMMA_KINDS.index(match[3])
    in_registers = s.arguments[1].startswith("{")
    accumulators = a.destinations(s, s.arguments[0], 4)
    left = a.sources(s, [s.arguments[1]], 4 if in_registers else 8)
    signs, transposed = _flags(s, s.arguments[4:6]), _flags(s, s.arguments[6:])
    operands = 1 if in_registers else 2  # operands with a descriptor, which may be transposed
    allowed = (
        depth == (8 if kind == 2 else 16)
        and columns in range(8, 257, 8)
        and len(accumulators) == len(set(accumulators)) == columns // 2
        and len(left) == (4 if in_registers else 1)
        and set(signs) <= {1, -1}
        and len(transposed) == (0 if kind == 2 else operands)
        and set(transposed) <= {0, 1}
    )
    if not allowed:
        raise UnsupportedError(s.text)
    # TF32 operands cannot be transposed, nor operands in registers.
    left_transposed, right_transposed = (0, 0) if kind == 2 else [0, *transposed][-2:]
    bits = [int(in_registers), int(signs[0] < 0), int(signs[1] < 0), left_transposed, right_transposed]
    first = len(a.extra)
    a.extra += accumulators
    sources = [*left, a.source(s, s.arguments[2], 8), a.predicate(s.arguments[3])]
    aux = (first, columns, kind, sum(bit << i for i, bit in enumerate(bits)))
    a.emit(s, "wgmma.mma", (), sources, aux=aux)


def _flags(s: Statement, texts: list[str]) -> list[int]:
    values = [literal(text) for text in texts]
    if None in values:
        raise UnsupportedError(s.text)
    return [value for value in values if value is not None]


# Moves, conversions


def _move(a: Assembler, s: Statement) -> None:
    to, source = s.arguments
    width = SIZES[s.parts[1]]
    if to.startswith("{"):
        rows = [(-1, 4) if name == "_" else a.row(name) for name in vector(to)]
        name, widths = f"unpack.b{8 * width}.{len(rows)}", [w for _, w in rows]
        a.emit(s, name, [row for row, _ in rows], [a.source(s, source, width)], destination_widths=widths)
    elif source.startswith("{"):
        names = vector(source)
        part, rows = width // len(names), []
        for name in names:
            value = literal(name)
            rows.append(a.row(name) if value is None else (a.constant(value, part), part))
        name, widths = f"pack.b{8 * width}.{len(rows)}", [w for _, w in rows]
        a.emit(s, name, [a.destination(s, to, width)], [row for row, _ in rows], source_widths=widths)
    else:
        a.emit(s, f"mov.b{8 * width}", [a.destination(s, to, width)], [a.source(s, source, width)])


def _convert(a: Assembler, s: Statement) -> None:
    kinds = [part for part in s.parts[1:] if part in SIZES or part in ("f16x2", "bf16x2", "tf32")]
    to, source = kinds[0], kinds[-1]
    if to in ("f16x2", "bf16x2"):
        a.emit(s, s.operation, [a.destination(s, s.arguments[0], 4)], a.sources(s, s.arguments[1:], 4))
        return
    operand = a.source(s, s.arguments[1], SIZES[source])
    row, actual = a.row(s.arguments[0])
    width = 4 if to == "tf32" else max(SIZES[to], 2)
    integers = all(part in SIZES for part in s.parts[1:]) and "f" not in to + source
    name = f"cvt.{to}.{source}" if integers else s.operation
    if actual == width:
        a.emit(s, name, [row], [operand])
        return
    narrow = a.allocate(width)  # a destination may be wider than its type
    a.emit(s, name, [narrow], [operand])
    a.emit(s, f"cvt.{to[0]}{8 * actual}.{to}", [row], [narrow])


# Arithmetic

FLOAT_OPERATIONS = frozenset(["add", "sub", "mul", "fma", "min", "max", "neg", "abs", "div"])


def _arithmetic(a: Assembler, s: Statement) -> None:
    kind = s.parts[-1]
    to, operands = s.arguments[0], s.arguments[1:]
    if kind == "f32x2" and set(s.parts[1:]) <= {"rn", "f32x2"}:
        a.emit(s, f"{s.parts[0]}.f32x2", [a.destination(s, to, 8)], a.sources(s, operands, 8))
        return
    if kind not in SIZES:
        raise UnsupportedError(s.text)
    width = SIZES[kind]
    name = _float_name(s) if kind.startswith("f") else s.operation
    result, widths = width, [width] * len(operands)
    if s.parts[1:2] == ["wide"]:
        result, widths = 2 * width, [width, width, 2 * width][: len(operands)]
    elif s.parts[0] in ("shl", "shr"):
        widths = [width, 4]
    elif s.parts[0] == "bfe":
        widths = [width, 4, 4]
    sources = [a.source(s, text, w) for text, w in zip(operands, widths, strict=True)]
    a.emit(s, name, [a.destination(s, to, result)], sources)


def _float_name(s: Statement) -> str:
    operation = s.parts[0]
    if operation not in FLOAT_OPERATIONS or not {"rz", "rm", "rp"}.isdisjoint(s.parts):
        raise UnsupportedError(s.text)
    dropped = {"rn", "full"}
    if operation == "div":  # always exact to the last bit, even if PTX allows approximation
        dropped |= {"approx", "ftz"}
    return ".".join(part for part in s.parts if part not in dropped)


FAMILIES: Mapping[str, Callable[[Assembler, Statement], None]] = {
    "bra": _branch,
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "ldmatrix": _matrix,
    "stmatrix": _matrix,
    "wgmma": _wgmma,
    "mov": _move,
    "cvt": _convert,
}
