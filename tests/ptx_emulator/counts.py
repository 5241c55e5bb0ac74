"""What a launch executed: instructions of each class, sectors of global memory, passes over shared memory's banks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from .emulator import Launch

__all__ = ["accesses", "describe", "instructions"]

# The first prefix that an opcode has decides.
CLASSES = (
    ("product", ("mma", "wgmma.mma")),
    ("fence, commit, wait", ("wgmma", "fence", "cp.async.commit", "cp.async.wait", "bar")),
    ("matrix load", ("ldmatrix", "stmatrix")),
    ("global load", ("ld.global", "cp.async")),
    ("global store", ("st.global",)),
    ("shared load", ("ld.shared",)),
    ("shared store", ("st.shared",)),
    (
        "float32",
        ("fma", "add.f32", "mul.f32", "sub.f32", "add.rn", "mul.rn", "ex2", "max.f32", "min.f32", "div"),
    ),
    ("branch", ("bra", "ret")),
    ("move", ("mov", "ld.param")),
    ("conversion", ("cvt", "prmt")),
    ("predicate", ("setp", "and.pred", "or.pred", "not.pred", "selp")),
)


def opcode(text: str) -> str:
    """Of an instruction, behind its predicate."""
    words = text.split()
    return words[1] if words[0].startswith("@") else words[0]


def classify(text: str) -> str:
    name = opcode(text)
    return next((of for of, prefixes in CLASSES if name.startswith(prefixes)), "integer")


def instructions(launch: Launch) -> dict[str, float]:
    """Executed by a warp on average, by class; the most frequent first."""
    total: Counter[str] = Counter()
    for text, count in zip(launch.program.texts, launch.stats["exec"], strict=True):
        total[classify(text)] += int(count)
    return {name: count / launch.warps for name, count in total.most_common() if count}


def accesses(launches: Iterable[Launch]) -> dict[tuple[str, str], Counter[str]]:
    """By source line and opcode: `requests`, `sectors`, `used_bytes`, and of shared memory `waves` and `phases`."""
    table: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for launch in launches:
        program = launch.program
        for text, line, stat in zip(program.texts, program.lines, launch.stats, strict=True):
            if stat["requests"]:
                names = ("requests", "sectors", "used_bytes", "waves", "phases")
                table[line, opcode(text)].update({name: int(stat[name]) for name in names})
    return table


def describe(launches: list[Launch]) -> str:
    """Launches of one kernel, in words."""
    first = launches[0]
    kernel = first.kernel
    classes = ", ".join(f"{name} {count:.0f}" for name, count in instructions(first).items())
    text = [
        f"  {len(launches)} launches, grid {first.grid}, {kernel.num_warps} warps, {kernel.num_stages} stages, "
        f"{kernel.shared} bytes of shared memory",
        f"  instructions a warp: {sum(instructions(first).values()):.0f}, of which {classes}",
    ]
    table = accesses(launches)
    for space, prefixes in (("global loads", ("ld.global", "cp.async")), ("global stores", ("st.global",))):
        total: Counter[str] = Counter()
        for (_, name), row in table.items():
            if name.startswith(prefixes):
                total.update(row)
        if total["sectors"]:
            text.append(f"  {space}: {_sectors(total)}")
    waves, phases = (sum(row[name] for row in table.values()) for name in ("waves", "phases"))
    if phases:
        text.append(
            f"  shared memory: {waves} wavefronts, {waves / phases:.2f} times those without conflicts"
        )
    scattered = sorted(table.items(), key=lambda item: -item[1]["sectors"])[:6]
    text += [f"    {line} {name}: {_sectors(row)}" for (line, name), row in scattered if row["sectors"]]
    conflicts = sorted(table.items(), key=lambda item: item[1]["phases"] - item[1]["waves"])[:4]
    text += [
        f"    {line} {name}: {row['waves']} wavefronts, {row['waves'] / row['phases']:.2f} times"
        for (line, name), row in conflicts
        if row["waves"] > row["phases"]
    ]
    return "\n".join(text)


def _sectors(row: Counter[str]) -> str:
    sectors, requests = row["sectors"], row["requests"]
    used = row["used_bytes"] / (32 * sectors)
    return f"{sectors} sectors in {requests} requests, {sectors / requests:.1f} each, {used:.0%} of their bytes used"
