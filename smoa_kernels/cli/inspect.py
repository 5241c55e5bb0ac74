"""`smoa-kernels inspect`: the contents of an adapter folder, and whether it fits a base model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .output import console, progress_of, write_json

if TYPE_CHECKING:
    from ..adapter_folder.inspecting import AdapterReport, LayerReport

__all__ = ["inspect"]


def inspect(
    folder: Annotated[Path, typer.Argument(help="An SMoA adapter, as PEFT's save_pretrained left it.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of a base model: does the adapter fit it? Exits 1 if not.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="A row for every layer.")] = False,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Write every layer as JSON.")] = None,
) -> None:
    """Show an adapter's layers, ranks, blocks and parameters; with --full, the fingerprints of the base weights."""
    try:
        from ..adapter_folder.inspecting import inspect_adapter
    except ImportError as error:
        raise ValueError(str(error)) from error
    with progress_of("comparing") as progress:
        report = inspect_adapter(folder, base, progress)
    if json is not None:
        write_json(json, _as_json(report))
    out = console()
    out.print(_every_layer(report) if full else _kinds(report))
    out.print(_summary(folder, report), highlight=False, soft_wrap=True)
    if report.fits is not None:
        out.print(_verdict(report.layers, base), highlight=False, soft_wrap=True)
    if report.fits is False:
        raise typer.Exit(1)


def _every_layer(report: AdapterReport) -> Table:
    table = _table("layer", "fingerprint", report)
    for layer in report.layers:
        _add_row(table, layer.name, layer, layer.parameters, layer.fingerprint, [layer])
    return table


def _kinds(report: AdapterReport) -> Table:
    """One row per group of layers whose names differ only in numbers."""
    kinds = defaultdict(list)
    for layer in report.layers:
        kinds[layer.kind, layer.shape, layer.ranks].append(layer)
    table = _table("kind of layer", "layers", report)
    for (kind, _, _), layers in kinds.items():
        parameters = sum(layer.parameters for layer in layers)
        _add_row(table, kind, layers[0], parameters, str(len(layers)), layers)
    return table


def _table(first: str, last: str, report: AdapterReport) -> Table:
    table = Table(show_edge=False)
    table.add_column(first, overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("K", justify="right")
    table.add_column("ranks", justify="right", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column(last, justify="right")
    if report.fits is not None:
        table.add_column("base", overflow="fold")
    return table


def _add_row(
    table: Table, name: str, like: LayerReport, parameters: int, last: str, layers: Sequence[LayerReport]
) -> None:
    shape, ranks = "×".join(map(str, like.shape)), " ".join(map(str, like.ranks))
    fit = [] if like.fits is None else [_fit(layers)]
    table.add_row(name, shape, str(like.num_blocks), ranks, f"{parameters:,}", last, *fit)


def _fit(layers: Iterable[LayerReport]) -> str:
    """How well the worst-fitting layer fits the base."""
    worst = max(layers, key=lambda layer: (not layer.fits, layer.base_distance))
    distance = worst.base_distance
    if distance is None or math.isinf(distance):
        return "✗ lacks it in this shape"
    expert = "" if worst.worst_expert is None else f" (expert {worst.worst_expert})"
    return f"{'✓' if worst.fits else '✗'} differs by {distance:.1%}{expert}"


def _summary(folder: Path, report: AdapterReport) -> str:
    text = (
        f"{folder}: {len(report.layers)} layers, {report.parameters:,} parameters, {report.file_size:,} bytes, "
        f"format {report.config.get('format_version')}."
    )
    others = len(report.other_tensors)
    return f"{text} Beside them: {', '.join(report.other_tensors)}." if others else text


def _verdict(layers: Sequence[LayerReport], base: Path | None) -> str:
    wrong = sum(not layer.fits for layer in layers)
    if wrong:
        return f"[red]✗[/] {wrong} of {len(layers)} layers do not fit {base}."
    return f"[green]✓[/] every layer fits {base}."


def _as_json(report: AdapterReport) -> dict[str, Any]:
    return {
        "config": report.config,
        "layers": [
            {
                **asdict(layer),
                "num_blocks": layer.num_blocks,
                # JSON has no infinity.
                "base_distance": None if layer.base_distance == math.inf else layer.base_distance,
                "fits": layer.fits,
            }
            for layer in report.layers
        ],
        "parameters": report.parameters,
        "file_size": report.file_size,
        "other_tensors": list(report.other_tensors),
        "fits": report.fits,
    }
