"""`smoa-kernels spectrum`: how updates spread over the singular directions of a model's weights."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..spectrum.layer import LayerSpectrum, UpdateSpectrum, cumulated
from .needs import needs_matplotlib
from .output import check_place, console, progress_of, write_bytes, write_json

if TYPE_CHECKING:
    from ..spectrum.model import ModelSpectrum, Source

__all__ = ["spectrum"]

_FORMATS = (".svg", ".png")
_DEFINITIONS = (
    "Medians over the layers of a kind. In blocks: share of W0's energy in each diagonal block. Effective rank: "
    "exp(entropy) of the shares of energy of ΔW's singular values. Coverage: exp(entropy) of the shares of ΔW's energy "
    "along W0's singular directions, over min(N, C), the geometric mean of left and right."
)


def spectrum(
    model: Annotated[Path, typer.Argument(help="Folder of a base model in safetensors files.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an SMoA adapter over it; random factors if absent.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a LoRA, HiRA or further SMoA adapter; if absent, a random LoRA of as many parameters."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Without --adapter: rank budget of the random SMoA, r; 8 if absent."),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Without --adapter: its spectral blocks, K; 2 if absent.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Last part of the names of layers to measure, repeatable; every adapted layer if absent."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of random factors.")] = 0,
    figure: Annotated[Path | None, typer.Option(help="Draw the overview: a file .svg or .png.")] = None,
    layer_figures: Annotated[
        Path | None, typer.Option(help="Draw every layer: a folder, for files of the overview's format.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every layer's numbers as JSON.")] = None,
    full: Annotated[bool, typer.Option("--full", help="A row per layer, not per kind of layer.")] = False,
) -> None:
    """Measure how an SMoA update spreads over the spectra of a model's weights, and compare it with LoRA's."""
    if adapter is not None and not rank is blocks is None:
        raise ValueError("--rank and --blocks are for a random SMoA adapter; they do not go with --adapter")
    _check_places(figure, layer_figures, json)
    try:
        from ..spectrum.model import model_spectrum
    except ImportError as error:
        raise ValueError(str(error)) from error
    with progress_of("measuring") as progress:
        found = model_spectrum(
            model,
            adapter,
            compare,
            rank=rank or 8,
            num_blocks=blocks or 2,
            targets=target or (),
            seed=seed,
            progress=progress,
        )
    out = console()
    out.print(_table(found, full))
    for source in found.sources.values():
        out.print(_source(source), highlight=False, soft_wrap=True)
    if found.left_out:
        out.print(
            f"{found.left_out} layers are left out: only one of the adapters adapts them.", highlight=False
        )
    out.print(_DEFINITIONS, highlight=False, style="dim")
    if json is not None:
        write_json(json, _as_json(found))
    if figure is not None or layer_figures is not None:
        _draw(found, figure, layer_figures)


def _check_places(figure: Path | None, layer_figures: Path | None, json: Path | None) -> None:
    """Check where results go before minutes of computing."""
    if figure is not None:
        if figure.suffix not in _FORMATS:
            raise ValueError(f"--figure must be a file {' or '.join(_FORMATS)}, got {figure}")
        needs_matplotlib("--figure")
        check_place(figure)
    if layer_figures is not None:
        if not layer_figures.is_dir():
            raise ValueError(f"--layer-figures must be a folder, got {layer_figures}")
        needs_matplotlib("--layer-figures")
    if json is not None:
        check_place(json)


def _draw(found: ModelSpectrum, figure: Path | None, layer_figures: Path | None) -> None:
    from ..spectrum.figure import layer_figure, overview, rendered

    suffix = _FORMATS[0] if figure is None else figure.suffix
    if figure is not None:
        write_bytes(figure, rendered(overview(found), suffix))
    if layer_figures is not None:
        for name in found.layers:
            write_bytes(layer_figures / f"{name}{suffix}", rendered(layer_figure(found, name), suffix))


def _table(found: ModelSpectrum, full: bool) -> Table:
    from ..spectrum.model import layer_kind

    table = Table(title=found.model, box=SIMPLE_HEAD, padding=0)
    table.add_column("layer", overflow="fold", min_width=18)
    headings = ["shape", "W0\neffective\nrank", "energy\nin blocks"]
    for source in found.sources.values():
        name = f"random\n{source.method}" if source.random else source.method
        headings += [f"{name}\nrank", "effective\nrank", "\ncoverage"]
    if not full:
        headings.insert(0, "layers")
    for heading in headings:
        table.add_column(heading, justify="right")
    groups: dict[tuple[str, tuple[int, int]], list[LayerSpectrum]] = defaultdict(list)
    for name, layer in found.layers.items():
        groups[name if full else layer_kind(name), layer.shape].append(layer)
    for (name, shape), layers in groups.items():
        count = [] if full else [str(len(layers))]
        table.add_row(name, *count, "×".join(map(str, shape)), *_numbers(layers, list(found.sources)))
    return table


def _numbers(layers: Sequence[LayerSpectrum], sources: Sequence[str]) -> list[str]:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    diagonal = zip(*(layer.blocks.diagonal_shares.tolist() for layer in layers), strict=False)
    row = [f"{median([layer.effective_rank for layer in layers]):.0f}"]
    row.append(" ".join(f"{median(shares):.2f}" for shares in diagonal))
    for source in sources:
        updates = [layer.updates[source] for layer in layers]
        row.append(f"{median([update.rank for update in updates]):.0f}")
        row.append(f"{median([update.effective_rank for update in updates]):.1f}")
        row.append(f"{median([update.coverage for update in updates]):.3f}")
    return row


def _source(source: Source) -> str:
    where = "factors are random, nothing is trained" if source.random else f"saved in {source.folder}"
    return f"{source.label}: {where}; {source.parameters:,} parameters."


def _as_json(found: ModelSpectrum) -> dict[str, Any]:
    return {
        "model": found.model,
        "definitions": _DEFINITIONS,
        "sources": {
            key: {
                "label": source.label,
                "method": source.method,
                "random": source.random,
                "ranks": list(source.ranks),
                "num_blocks": list(source.num_blocks),
                "parameters": source.parameters,
            }
            for key, source in found.sources.items()
        },
        "left_out": found.left_out,
        "layers": [{"name": name, **_layer_json(layer)} for name, layer in found.layers.items()],
    }


def _layer_json(layer: LayerSpectrum) -> dict[str, Any]:
    blocks = layer.blocks
    return {
        "shape": list(layer.shape),
        "rank": layer.rank,
        "effective_rank": _short(layer.effective_rank),
        "singular_values": _shortened(layer.singular_values.tolist()),
        "blocks": {
            name: _shortened(getattr(blocks, name).tolist())
            for name in ("row_shares", "col_shares", "diagonal_shares")
        }
        | {
            f"{name}_cumulated": [_shortened(cumulated(shares)) for shares in getattr(blocks, name)]
            for name in ("left", "right")
        },
        "updates": {name: _update_json(update) for name, update in layer.updates.items()},
    }


def _update_json(update: UpdateSpectrum) -> dict[str, Any]:
    return {
        "rank": update.rank,
        "effective_rank": _short(update.effective_rank),
        "coverage": _short(update.coverage),
        # JSON knows no infinity.
        "relative_norm": _short(update.relative_norm) if math.isfinite(update.relative_norm) else None,
        "singular_values": _shortened(update.singular_values[: update.rank].tolist()),
        "left_cumulated": _shortened(cumulated(update.left)),
        "right_cumulated": _shortened(cumulated(update.right)),
    }


def _shortened(values: Sequence[float]) -> list[float]:
    return [_short(value) for value in values]


def _short(value: float) -> float:
    """Rounded to six digits."""
    return float(f"{value:.6g}")
