"""`smoa-kernels audit`: what every shipped configuration compiles to, and whether it may ship."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..audit.rules import Record, broken_rules
from ..audit.run import DEFAULT_REGISTRY, run_audit
from ..definition.precision import KERNEL_PRECISIONS
from ..kernels.architectures import ARCHITECTURES
from .needs import needs_triton
from .output import check_place, console, progress_bar, write_json

__all__ = ["audit"]


def audit(
    arch: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(ARCHITECTURES)}.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Repeatable; every kernel if absent.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {', '.join(KERNEL_PRECISIONS)}.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one per core if absent.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="A row per configuration, not only the summary.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write every record as JSON.")] = None,
    registry: Annotated[str, typer.Option(hidden=True)] = DEFAULT_REGISTRY,
) -> None:
    """Compile every shipped configuration, without a GPU, and check it. Exits 1 if one breaks a rule."""
    needs_triton("to compile")
    if json is not None:
        check_place(json)  # before minutes of compiling
    out = console()
    records: list[Record] = []
    with progress_bar("compiling") as progress:
        bar = progress.add_task("", total=None)
        for count, record in run_audit(
            archs=arch or tuple(ARCHITECTURES),
            kernels=kernel or None,
            dtypes=dtype or KERNEL_PRECISIONS,
            jobs=jobs,
            registry=registry,
        ):
            if record is None:
                progress.update(bar, total=count)
            else:
                records.append(record)
                progress.advance(bar)
    records.sort(key=_order)
    verdicts = [(record, broken_rules(record)) for record in records]

    if full:
        out.print(_full_table(verdicts))
    out.print(_summary_table(records))
    _print_narrow(out, records)
    for record, broken in verdicts:
        for rule in broken:
            out.print(f"[red]✗[/] {_title(record)}: {rule}", soft_wrap=True, highlight=False)
    failed = sum(bool(broken) for _, broken in verdicts)
    out.print(f"{len(records)} compilations, {failed} break a rule.", highlight=False)
    if json is not None:
        write_json(json, [{**r.to_json(), "broken_rules": list(broken)} for r, broken in verdicts])
    if failed:
        raise typer.Exit(1)


def _order(record: Record) -> tuple[object, ...]:
    return (
        record.kernel,
        list(ARCHITECTURES).index(record.arch),
        KERNEL_PRECISIONS.index(record.dtype),
        record.variant,
        str(record.config),
    )


def _title(record: Record) -> str:
    return f"{record.kernel} {_config(record)} {record.variant} {record.arch} {record.dtype}"


def _config(record: Record) -> str:
    short = {"num_warps": "w", "num_stages": "s"}
    return " ".join(f"{short.get(k, k.removeprefix('block_'))}{v}" for k, v in record.config.items())


def _loads(record: Record) -> str:
    if record.role == "matmul":
        widths = sorted(record.main_loop_loads, reverse=True)
    else:
        widths = sorted({(t.bits, t.asynchronous) for t in record.traffic if t.pointer not in record.narrow})
    return " ".join(f"{bits or 'bulk'}{' async' if asynchronous else ''}" for bits, asynchronous in widths)


def _full_table(verdicts: Sequence[tuple[Record, tuple[str, ...]]]) -> Table:
    headings = ("regs", "spill", "stack", "shared", "blocks/SM", "tensor", "loads", "size", "")
    table = Table(title="Configurations")
    for heading in ("kernel", "config", "variant", "arch", "dtype"):
        table.add_column(heading)
    for heading in headings:
        table.add_column(heading, justify="right")
    for r, broken in verdicts:
        table.add_row(
            r.kernel,
            _config(r),
            r.variant,
            r.arch,
            r.dtype,
            *map(str, (r.registers, r.spilled, r.stack, r.shared, r.blocks_per_multiprocessor)),
            " ".join(r.tensor_cores) or "-",
            _loads(r),
            f"{r.binary_bytes / 1024:.0f}K",
            "✗" if broken else "✓",
            style="red" if broken else None,
        )
    return table


def _summary_table(records: Sequence[Record]) -> Table:
    """One row per kernel and architecture: ranges over configurations and variants, per dtype."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.kernel, record.arch, record.dtype].append(record)
    table = Table(title="Audit")
    for heading in ("kernel", "arch", "dtype"):
        table.add_column(heading)
    for heading in ("passed", "regs", "shared KiB", "blocks/SM", "tensor", "loads", "spills"):
        table.add_column(heading, justify="right")
    for (kernel, arch, dtype), group in groups.items():
        built = [r for r in group if r.error is None]
        passed = sum(not broken_rules(r) for r in group)
        table.add_row(
            kernel,
            arch,
            dtype,
            f"{passed}/{len(group)}",
            _range([r.registers for r in built]),
            _range([r.shared // 1024 for r in built]),
            _range([r.blocks_per_multiprocessor for r in built]),
            " ".join(sorted({core for r in built for core in r.tensor_cores})) or "-",
            ", ".join(sorted({_loads(r) for r in built})),
            str(sum(bool(r.spilled or r.stack) for r in built)),
            style="red" if passed < len(group) else None,
        )
    return table


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}-{max(values)}" if values else "-"


def _print_narrow(out: Console, records: Sequence[Record]) -> None:
    reasons = {(r.kernel, pointer): why for r in records for pointer, why in r.narrow.items()}
    seen = {(r.kernel, t.pointer) for r in records for t in r.traffic if 0 < t.bits < 128}
    for (kernel, pointer), why in sorted(reasons.items()):
        if (kernel, pointer) in seen:
            out.print(f"narrow by nature: {kernel} {pointer} ({why})", highlight=False, style="dim")
