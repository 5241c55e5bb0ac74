"""`smoa-kernels inspect`: what an adapter folder holds, and whether it fits a base model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .output import console, progress_of, write_json

if TYPE_CHECKING:
    from ..peft.inspection import AdapterReport, LayerReport

__all__ = ["inspect"]


def inspect(
    folder: Annotated[Path, typer.Argument(help="An SMoA adapter, as PEFT's save_pretrained left it.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of a base model: does the adapter fit it? Exits 1 if not.")
    ] = None,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the same as JSON.")] = None,
) -> None:
    """Show an adapter's layers, ranks, blocks, parameters, and the fingerprints of the base weights."""
    try:
        from ..peft.inspection import inspect_adapter
    except ImportError as error:
        raise ValueError(str(error)) from error
    with progress_of("comparing") as progress:
        report = inspect_adapter(folder, base, progress)
    if json is not None:
        write_json(json, _as_json(report))
    out = console()
    out.print(_table(report))
    out.print(_summary(folder, report), highlight=False, soft_wrap=True)
    if report.fits is not None:
        out.print(_verdict(report.layers, base), highlight=False, soft_wrap=True)
    if report.fits is False:
        raise typer.Exit(1)


def _table(report: AdapterReport) -> Table:
    table = Table(show_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("K", justify="right")
    table.add_column("ranks", justify="right", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("fingerprint")
    if report.fits is not None:
        table.add_column("base", overflow="fold")
    for layer in report.layers:
        table.add_row(
            layer.name,
            "×".join(map(str, layer.shape)),
            str(layer.num_blocks),
            " ".join(map(str, layer.ranks)),
            f"{layer.parameters:,}",
            layer.fingerprint,
            *([] if layer.fits is None else [_fit(layer)]),
        )
    return table


def _fit(layer: LayerReport) -> str:
    distance = layer.base_distance
    if distance is None or math.isinf(distance):
        return "✗ lacks it in this shape"
    expert = "" if layer.worst_expert is None else f" (expert {layer.worst_expert})"
    return f"{'✓' if layer.fits else '✗'} differs by {distance:.1%}{expert}"


def _summary(folder: Path, report: AdapterReport) -> str:
    text = (
        f"{folder}: {len(report.layers)} layers, {report.parameters:,} parameters, {report.file_size:,} bytes, "
        f"format {report.config.format_version}."
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
        "config": {key: sorted(v) if isinstance(v, set) else v for key, v in report.config.to_dict().items()},
        "layers": [
            {
                **asdict(layer),
                "num_blocks": layer.num_blocks,
                # JSON knows no infinity.
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
