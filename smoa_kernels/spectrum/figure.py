"""Draws the figures of `smoa-kernels spectrum`. Imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from .layer import LayerSpectrum, cumulated
from .model import ModelSpectrum, Source, layer_kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["layer_figure", "overview", "rendered"]

_SETTINGS: Any = {
    "svg.hashsalt": "smoa",  # the same numbers give the same file
    "svg.fonttype": "none",  # text stays text: small, searchable
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
# Okabe and Ito's colours, safe for colour-blind readers; markers differ too.
_STYLES = {"ours": ("#009E73", "o"), "theirs": ("#0072B2", "s")}
_KINDS = ("#000000", "#E69F00", "#56B4E9", "#CC79A7", "#D55E00", "#999999", "#7B5E00", "#4B0092")
_POINTS = 101
_SHARES = [i / (_POINTS - 1) for i in range(_POINTS)]
_PLACE = "position in W0's spectrum, j / q"
_FLOOR = 1e-4  # singular values below this share of the largest are not drawn


def overview(found: ModelSpectrum) -> Figure:
    """Draw all layers: W0's spectra and blocks, the updates' spectra and their energy along W0's, coverage and rank."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(12.5, 7.4), layout="constrained")
        axes = figure.subplots(2, 3)
        layers = list(found.layers.values())
        compared = " beside ".join(_words(source) for source in found.sources.values())
        about = f"{len(layers)} layers; lines are medians over them, bands reach from 10 to 90 % of them"
        _title(figure, [f"{found.model}: {compared}", about])
        _weights(axes[0, 0], found)
        _blocks(axes[0, 1], layers)
        _updates(axes[0, 2], found, layers)
        _cumulated(axes[1, 0], found, layers)
        _by_kind(axes[1, 1], found, "coverage")
        axes[1, 1].set(xlim=(0, 1.02), xlabel="exp(entropy) of the shares along W0's directions, over q")
        axes[1, 1].set_title("Coverage of W0's directions")
        axes[1, 1].legend(loc="lower left")
        _by_kind(axes[1, 2], found, "effective_rank")
        axes[1, 2].set(xscale="log", xlabel="exp(entropy) of ΔW's energies; a bar is the rank")
        axes[1, 2].set_title("Effective rank of ΔW")
        axes[1, 2].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes[1, 2].xaxis.set_minor_formatter(NullFormatter())
        return figure


def layer_figure(found: ModelSpectrum, name: str) -> Figure:
    """Draw one layer: W0's spectrum and blocks, the updates' spectra and their energy along W0's."""
    layer = found.layers[name]
    one = ModelSpectrum(found.model, found.sources, {name: layer}, 0)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(9.2, 7.0), layout="constrained")
        axes = figure.subplots(2, 2)
        lines = [f"{found.model}: {name}, {'×'.join(map(str, layer.shape))}, rank {layer.rank}"]
        for key, source in found.sources.items():
            update = layer.updates[key]
            numbers = f"effective rank {update.effective_rank:.1f}, coverage {update.coverage:.3f}"
            lines.append(f"{source.label}: rank {update.rank}, {numbers}")
        _title(figure, lines)
        _weights(axes[0, 0], one)
        _blocks(axes[0, 1], [layer])
        _updates(axes[1, 0], one, [layer])
        _cumulated(axes[1, 1], one, [layer])
        return figure


def rendered(figure: Figure, suffix: str) -> bytes:
    """The bytes of a figure's file, ".svg" or ".png". The same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        if suffix == ".png":
            figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
            return buffer.getvalue()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    lines = buffer.getvalue().decode().splitlines()
    return ("\n".join(line.rstrip() for line in lines) + "\n").encode()


def _title(figure: Figure, lines: Sequence[str]) -> None:
    figure.suptitle("\n".join(lines), fontsize=9, x=0.01, ha="left")


def _words(source: Source) -> str:
    return f"{source.label} ({source.parameters:,} parameters, {'nothing trained' if source.random else 'trained'})"


def _kinds(found: ModelSpectrum) -> dict[str, list[LayerSpectrum]]:
    kinds: dict[str, list[LayerSpectrum]] = {}
    for name, layer in found.layers.items():
        kinds.setdefault(layer_kind(name), []).append(layer)
    return kinds


def _weights(axis: Axes, found: ModelSpectrum) -> None:
    """Singular values of W0, one line for each kind of layer."""
    kinds = _kinds(found)
    for i, (kind, layers) in enumerate(kinds.items()):
        curves = [_along(layer.singular_values.numpy(), _SHARES) for layer in layers]
        colour = _KINDS[i % len(_KINDS)]
        axis.plot(_SHARES, np.median(curves, 0), color=colour, linewidth=1.3, label=kind)
    _spectrum_axis(axis)
    axis.set_title("Singular values of W0")
    if len(kinds) > 1:
        axis.legend(fontsize=7, ncols=2, loc="lower left")


def _blocks(axis: Axes, layers: Sequence[LayerSpectrum]) -> None:
    """Shares of the blocks in W0's singular directions, along its spectrum: means over the layers."""
    count = max(len(layer.blocks.diagonal_shares) for layer in layers)
    places = np.linspace(0, 1, 32)
    shares, diagonal = np.zeros((count, len(places))), np.zeros(count)
    for layer in layers:
        blocks = layer.blocks
        both = (blocks.left + blocks.right) / (2 * len(layers))
        for k, curve in enumerate(both):
            shares[k] += np.diff(cumulated(curve, len(places) + 1)) * len(places) / len(curve)
            diagonal[k] += float(blocks.diagonal_shares[k]) / len(layers)
    axis.stackplot(places, shares, colors=matplotlib.colormaps["viridis"](np.linspace(0.25, 0.9, count)))
    edges = np.concatenate([[0], shares[:, len(places) // 2].cumsum()])
    for k in range(count if count <= 8 else 0):
        axis.text(
            0.5,
            (edges[k] + edges[k + 1]) / 2,
            f"block {k + 1}: {diagonal[k]:.0%} of W0's energy",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if k < count / 2 else "black",
        )
    axis.set(xlabel=_PLACE, ylabel="share of the direction in each block", xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"{count} blocks, which hold {diagonal.sum():.0%} of W0's energy")


def _updates(axis: Axes, found: ModelSpectrum, layers: Sequence[LayerSpectrum]) -> None:
    """Singular values of ΔW. A line falls where half of the layers have no more of them."""
    places = np.geomspace(1 / max(len(layer.singular_values) for layer in layers), 1, _POINTS)
    for key, source in found.sources.items():
        colour, _ = _STYLES[key]
        updates = [layer.updates[key] for layer in layers]
        curves = np.array([_along(u.singular_values.numpy(), places) for u in updates])
        ends = np.array([u.rank / max(len(u.singular_values), 1) for u in updates])
        end = float(np.median(ends))
        inside = places <= end * (1 + 1e-9)
        if not inside.any():
            continue
        _band(axis, places[inside], np.clip(curves[:, inside], _FLOOR, None), colour)
        line = np.clip(np.median(curves[:, inside], 0), _FLOOR, None)
        axis.plot(
            [*places[inside], end, end],
            [*line, line[-1], _FLOOR],
            color=colour,
            linewidth=1.8,
            label=source.label,
        )
    _spectrum_axis(axis)
    axis.set(xscale="log", xlim=(places[0], 1.15), xlabel="position in ΔW's spectrum, j / q")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_title("Singular values of ΔW")
    axis.legend(loc="lower center", bbox_to_anchor=(0.6, 0.0))


def _cumulated(axis: Axes, found: ModelSpectrum, layers: Sequence[LayerSpectrum]) -> None:
    """Share of ΔW's energy along W0's first directions, in its energy along all of them."""
    for key, source in found.sources.items():
        colour, _ = _STYLES[key]
        for side, style in (("left", "-"), ("right", (0, (4, 2)))):
            curves = np.array([_cumulated_share(getattr(layer.updates[key], side)) for layer in layers])
            _band(axis, _SHARES, curves, colour)
            label = f"{source.label}: {side}"
            axis.plot(
                _SHARES, np.median(curves, 0), color=colour, linewidth=1.6, linestyle=style, label=label
            )
    energy = [_cumulated_share(layer.singular_values.square()) for layer in layers]
    axis.plot(
        _SHARES,
        np.median(energy, 0),
        color="#555555",
        linewidth=1.2,
        linestyle=(0, (1, 1)),
        label="W0 itself",
    )
    axis.plot([0, 1], [0, 1], color="#000000", linewidth=0.7, label="all directions alike")
    axis.set(
        xlabel="W0's first directions, j / q", ylabel="their share of the energy", xlim=(0, 1), ylim=(0, 1.02)
    )
    axis.set_title("Energy of ΔW along W0's singular directions")
    axis.legend(loc="lower right", fontsize=7)
    axis.grid(alpha=0.25, linewidth=0.6)


def _by_kind(axis: Axes, found: ModelSpectrum, quantity: str) -> None:
    """A dot for each layer, the first on top, and a row for each kind of layer and source."""
    kinds = _kinds(found)
    for (key, source), offset in zip(found.sources.items(), (-0.2, 0.2), strict=True):
        colour, marker = _STYLES[key]
        for row, layers in enumerate(kinds.values()):
            updates = [layer.updates[key] for layer in layers]
            heights = (
                row + offset + (np.linspace(-0.14, 0.14, len(layers)) if len(layers) > 1 else np.zeros(1))
            )
            values = [getattr(update, quantity) for update in updates]
            label = source.label if row == 0 else None
            axis.scatter(
                values, heights, s=10, color=colour, marker=marker, alpha=0.6, linewidths=0, label=label
            )
            if quantity == "effective_rank":
                rank = np.median([update.rank for update in updates])
                axis.plot([rank] * 2, [row + offset - 0.16, row + offset + 0.16], color=colour, linewidth=2)
    axis.set_yticks(range(len(kinds)), list(kinds))
    axis.set_ylim(len(kinds) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(alpha=0.25, linewidth=0.6, axis="x")


def _spectrum_axis(axis: Axes) -> None:
    axis.set(yscale="log", xlabel=_PLACE, ylabel="over the largest", xlim=(0, 1))
    axis.set_ylim(_FLOOR, 1.5)
    axis.grid(alpha=0.25, linewidth=0.6)


def _band(axis: Axes, x: Any, curves: NDArray[np.float64], colour: str) -> None:
    if len(curves) > 1:
        low, high = np.quantile(curves, [0.1, 0.9], axis=0)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _along(values: NDArray[np.float64], places: Any) -> NDArray[np.float64]:
    """Singular values over the largest, interpolated at shares j / q of the spectrum."""
    index = np.arange(1, len(values) + 1) / len(values)
    found: NDArray[np.float64] = np.interp(places, index, values / (values[0] or 1.0))
    return found


def _cumulated_share(energies: Tensor) -> list[float]:
    return cumulated(energies / (float(energies.sum()) or 1.0), _POINTS)
