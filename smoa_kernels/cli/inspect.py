"""`smoa-kernels inspect`: the contents of an adapter folder, and whether it fits a base model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .output import console, progress_of, write_json

if TYPE_CHECKING:
    from ..adapter_folder.inspecting import AdapterReport, LayerReport


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of an SMoA adapter.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of a base model to compare with; exit code 1 if it differs.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="A row for every layer.")] = False,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Write every layer as JSON.")] = None,
) -> None:
    """Show an adapter's layers, ranks, blocks and parameters; with --full, the fingerprints of the base weights."""
    from ..adapter_folder.inspecting import inspect_adapter

    with progress_of("comparing") as progress:
        report = inspect_adapter(folder, base, progress)
    if json is not None:
        write_json(json, _as_json(report))
    out = console()
    out.print(_table(report, full))
    out.print(_summary(folder, report), highlight=False, soft_wrap=True)
    if report.fits is None:
        return
    wrong = sum(not layer.fits for layer in report.layers)
    verdict = "[green]✓[/] every layer fits"
    if wrong:
        verdict = f"[red]✗[/] {wrong} of {len(report.layers)} layers do not fit"
    out.print(f"{verdict} {base}.", highlight=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


def _table(report: AdapterReport, full: bool) -> Table:
    """One row per layer, or per group of layers whose names differ only in numbers."""
    groups: dict[Any, list[LayerReport]] = defaultdict(list)
    for layer in report.layers:
        groups[layer.name if full else (layer.kind, layer.shape, layer.ranks)].append(layer)
    table = Table(show_edge=False)
    table.add_column("layer" if full else "kind of layer", overflow="fold")
    for title in ("shape", "K", "ranks", "parameters", "fingerprint" if full else "layers"):
        table.add_column(title, justify="right", overflow="fold" if title == "ranks" else "ellipsis")
    if report.fits is not None:
        table.add_column("base", overflow="fold")
    for layers in groups.values():
        like = layers[0]
        table.add_row(
            like.name if full else like.kind,
            "×".join(map(str, like.shape)),
            str(like.num_blocks),
            " ".join(map(str, like.ranks)),
            f"{sum(layer.parameters for layer in layers):,}",
            like.fingerprint if full else str(len(layers)),
            *([] if like.fits is None else [_fit(layers)]),
        )
    return table


def _fit(layers: Iterable[LayerReport]) -> str:
    """How well the worst-fitting layer fits the base."""
    worst = max(layers, key=lambda layer: (not layer.fits, layer.base_distance))
    distance = worst.base_distance
    if distance is None or math.isinf(distance):
        return "✗ lacks it in this shape"
    if distance < 0.005:  # rounding a sketch to float16 gives up to 0.004, a base to bf16 up to 0.002
        return "✓ same base"
    expert = "" if worst.worst_expert is None else f" (expert {worst.worst_expert})"
    return f"{'✓' if worst.fits else '✗'} differs by {distance:.1%}{expert}"


def _summary(folder: Path, report: AdapterReport) -> str:
    text = (
        f"{folder}: {len(report.layers)} layers, {report.parameters:,} parameters, {report.file_size:,} bytes, "
        f"format {report.config.get('format_version')}."
    )
    others = ", ".join(report.other_tensors)
    return f"{text} Beside them: {others}." if others else text


def _as_json(report: AdapterReport) -> dict[str, Any]:
    def layer(entry: LayerReport) -> dict[str, Any]:
        distance = None if entry.base_distance == math.inf else entry.base_distance  # JSON has no infinity
        return asdict(entry) | {"base_distance": distance, "num_blocks": entry.num_blocks, "fits": entry.fits}

    layers = [layer(entry) for entry in report.layers]
    return asdict(report) | {"layers": layers, "parameters": report.parameters, "fits": report.fits}
