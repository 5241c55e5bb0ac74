"""Show how an update spreads over the singular directions of a model's weights: SMoA's beside LoRA's or HiRA's.

    python examples/spectrum.py MODEL --figure overview.svg                     # random factors
    python examples/spectrum.py MODEL --adapter runs/finetune-smoa/adapter --compare runs/finetune-lora/adapter

Random factors show what an adapter's form allows, trained factors the result of training. With the thin SVD
W0 = U diag(σ) Vᵀ, q = min(N, C), and `e^H(p)` the exponential of the entropy of shares p:

    left_j = ‖u_jᵀ ΔW‖² / ‖ΔW‖²          right_j = ‖ΔW v_j‖² / ‖ΔW‖²
    coverage       = √(e^H(left) · e^H(right)) / q,  left and right each over their sum
    effective rank = e^H(τ² / Σ τ²),  τ the singular values of ΔW

docs/spectrum.md says how to read the figure.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from adapters import NAME
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from options import run_command
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from smoa_kernels import BlockPartition
from smoa_kernels.peft import SMoAConfig

STYLE: Any = {
    "svg.hashsalt": "smoa",  # the same numbers give the same file
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
COLOURS = ("#009E73", "#0072B2")  # of the adapter, and of the one beside it
SHARES = np.linspace(0, 1, 101)
FLOOR = 1e-4  # singular values below this share of the largest are not drawn


@dataclass(frozen=True)
class Update:
    """An update ΔW of one layer, in float64.

    Attributes:
        singular_values: (q,) of ΔW, descending.
        left, right: (q,) share of ΔW's energy along each left and right singular direction of W0.
        rank: numerical rank.
    """

    singular_values: Tensor
    left: Tensor
    right: Tensor
    rank: int

    @property
    def effective_rank(self) -> float:
        """`e^H` of the energies of the singular values; 0 for a zero update."""
        return effective_number(self.singular_values.square())

    @property
    def coverage(self) -> float:
        """Share of W0's directions that the update touches, from 0 (a zero update) to 1."""
        return math.sqrt(effective_number(self.left) * effective_number(self.right)) / len(self.left)


@dataclass(frozen=True)
class Layer:
    """One layer, in float64.

    Attributes:
        singular_values: (q,) of W0, descending.
        diagonal: (K,) share of W0's energy in `rows_k × cols_k`, the part of W0 that block k of SMoA changes.
        blocks: (K, q) share of each singular direction in the rows and columns of block k, the mean of both sides.
        updates: by the adapter's name.
    """

    singular_values: Tensor
    diagonal: Tensor
    blocks: Tensor
    updates: dict[str, Update]


def effective_number(energies: Tensor) -> float:
    """The effective number of energies: `exp(-Σ p log p)` with `p = energies / Σ energies`; 0 if all are zero."""
    total = energies.sum()
    return float(torch.special.entr(energies / total).sum().exp()) if total > 0 else 0.0


def measure(weight: Tensor, partition: BlockPartition, updates: dict[str, Tensor]) -> Layer:
    """Measure the updates of a layer against its W0 (N, C), in float64."""
    W0 = weight.detach().double()
    U, sigma, Vh = torch.linalg.svd(W0, full_matrices=False)
    one_hot = torch.eye(partition.num_blocks, dtype=torch.float64)
    rows, cols = one_hot[partition.row_block.long()], one_hot[partition.col_block.long()]
    found = {}
    for name, update in updates.items():
        delta = update.detach().double()
        values, energy = torch.linalg.svdvals(delta), float(delta.square().sum()) or 1.0
        noise = values[0] * max(delta.shape) * torch.finfo(values.dtype).eps
        left, right = (U.T @ delta).square().sum(1) / energy, (delta @ Vh.T).square().sum(0) / energy
        found[name] = Update(values, left, right, int((values > noise).sum()))
    shares = rows.T @ W0.square() @ cols / (float(W0.square().sum()) or 1.0)
    blocks = (rows.T @ U.square() + (Vh.square() @ cols).T) / 2
    return Layer(sigma, shares.diagonal(), blocks, found)


def model_spectrum(
    model: Path,
    adapter: Path | None = None,
    compare: Path | None = None,
    rank: int = 8,
    blocks: int = 2,
    targets: tuple[str, ...] = (),
) -> dict[str, Layer]:
    """Measure the layers of a model that both adapters adapt, or those whose names end with `targets`.

    Without a folder, an adapter's factors are random: SMoA's have rank budget `rank` and `blocks` blocks, LoRA's the
    rank that gives it as many parameters.
    """
    torch.manual_seed(0)
    shared: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    sources = (
        (adapter, SMoAConfig(r=rank, num_blocks=blocks, init_weights=False, **shared)),
        (compare, LoraConfig(r=max(1, rank // blocks), init_lora_weights=False, **shared)),
    )
    adapted: dict[str, dict[str, Any]] = {}
    for folder, random in sources:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        peft_model = (
            get_peft_model(base, random) if folder is None else PeftModel.from_pretrained(base, folder)
        )
        config = peft_model.peft_config["default"]
        label = f"{NAME[config.peft_type.value.lower()]} r={config.r}"
        label += f", K={config.num_blocks}" if isinstance(config, SMoAConfig) else ""
        label += ", random" if folder is None else f" ({folder})" if label in adapted else ""
        modules = peft_model.get_base_model().named_modules()
        adapted[label] = {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}
    ours, others = adapted.values()
    found = {}
    for name, layer in ours.items():
        if name in others and name.endswith(targets or ""):
            (weight, first), (_, second) = tensors_of(layer), tensors_of(others[name])
            updates = dict(zip(adapted, (first, second), strict=True))
            found[name] = measure(weight, layer.partition("default"), updates)
    if not found:
        raise ValueError(f"no layer of both adapters has a name that ends with {targets}")
    return found


def tensors_of(layer: Any) -> tuple[Tensor, Tensor]:
    """W0 and ΔW (N, C) in float64, because rounding in float32 would raise the rank of ΔW.

    Some layers store them transposed. PEFT's HiRA gives the factor that multiplies W0.
    """
    layer.double()
    weight, delta = layer.get_base_layer().weight, layer.get_delta_weight("default")
    delta = delta * weight if hasattr(layer, "hira_A") else delta
    return (weight.T, delta.T) if getattr(layer, "fan_in_fan_out", False) else (weight, delta)


@matplotlib.rc_context(STYLE)
def overview(layers: dict[str, Layer], title: str) -> Figure:
    """Draw W0's spectrum and blocks, the updates' spectra, and their energy along W0's singular directions.

    Lines are medians over the layers; bands reach from 10 to 90 % of them.
    """
    figure = Figure(figsize=(9.2, 7.0), layout="constrained")
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    (weights, blocks), (updates, energies) = figure.subplots(2, 2)
    draw_weights(weights, layers)
    draw_blocks(blocks, list(layers.values()))
    draw_updates(updates, list(layers.values()))
    draw_energies(energies, list(layers.values()))
    return figure


def by_kind(layers: dict[str, Layer]) -> dict[str, list[Layer]]:
    """Layers by the part of their name that is the same in every decoder block."""
    kinds = defaultdict(list)
    for name, layer in layers.items():
        kinds[".".join(name.split(".")[-2:])].append(layer)
    return kinds


def draw_weights(axis: Axes, layers: dict[str, Layer]) -> None:
    """Singular values of W0, a line for each kind of layer."""
    for kind, members in by_kind(layers).items():
        axis.plot(SHARES, np.median([along(m.singular_values, SHARES) for m in members], 0), label=kind)
    axis.set(yscale="log", ylim=(FLOOR, 1.5), xlim=(0, 1), xlabel="position in W0's spectrum, j / q")
    axis.set_title("Singular values of W0, over the largest")
    axis.legend(fontsize=7, ncols=2, loc="lower left")


def draw_blocks(axis: Axes, layers: list[Layer]) -> None:
    """Shares of the blocks in W0's singular directions, along its spectrum: means over the layers."""
    count, places = max(len(layer.diagonal) for layer in layers), np.linspace(0, 1, 33)
    shares, diagonal = np.zeros((count, 32)), np.zeros(count)
    for layer in layers:
        for k, curve in enumerate(layer.blocks):
            shares[k] += np.diff(cumulated(curve, places)) * 32 / len(curve) / len(layers)
            diagonal[k] += float(layer.diagonal[k]) / len(layers)
    labels = [f"block {k + 1}: {share:.0%} of W0's energy" for k, share in enumerate(diagonal)]
    axis.stackplot((places[1:] + places[:-1]) / 2, shares, labels=labels, alpha=0.7)
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="position in W0's spectrum", ylabel="share of a direction")
    axis.set_title(f"{count} blocks, which hold {diagonal.sum():.0%} of W0's energy")
    axis.legend(loc="lower left")


def draw_updates(axis: Axes, layers: list[Layer]) -> None:
    """Singular values of ΔW. A line falls where half of the layers have no more of them."""
    places = np.geomspace(1 / max(len(layer.singular_values) for layer in layers), 1, 101)
    for key, colour in zip(layers[0].updates, COLOURS, strict=True):
        updates = [layer.updates[key] for layer in layers]
        inside = places <= np.median([u.rank / len(u.singular_values) for u in updates]) * (1 + 1e-9)
        curves = np.clip([along(u.singular_values, places)[inside] for u in updates], FLOOR, None)
        draw_band(axis, places[inside], curves, colour, label=key)
        if inside.any():
            end = [np.median(curves, 0)[-1], FLOOR]
            axis.plot([places[inside][-1]] * 2, end, color=colour, linewidth=1.8)
    axis.set(xscale="log", yscale="log", ylim=(FLOOR, 1.5), xlabel="position in ΔW's spectrum, j / q")
    axis.set_title("Singular values of ΔW, over the largest")
    axis.legend(loc="lower center")


def draw_energies(axis: Axes, layers: list[Layer]) -> None:
    """Share of ΔW's energy along W0's first directions, in its energy along all of them."""
    for key, colour in zip(layers[0].updates, COLOURS, strict=True):
        for side, style in (("left", "-"), ("right", "--")):
            energies = [getattr(layer.updates[key], side) for layer in layers]
            curves = [cumulated(each / (float(each.sum()) or 1.0), SHARES) for each in energies]
            draw_band(axis, SHARES, np.array(curves), colour, label=f"{key}: {side}", linestyle=style)
    energies = [layer.singular_values.square() for layer in layers]
    own = np.median([cumulated(each / float(each.sum()), SHARES) for each in energies], 0)
    axis.plot(SHARES, own, color="#555555", linestyle=":", label="W0 itself")
    axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="W0's first directions, j / q", ylabel="share of the energy")
    axis.set_title("Energy of ΔW along W0's singular directions")
    axis.legend(loc="lower right", fontsize=7)


def draw_band(axis: Axes, x: Any, curves: Any, colour: str, **line: Any) -> None:
    """The median of some curves, and their 10 and 90 % quantiles."""
    axis.plot(x, np.median(curves, 0), color=colour, linewidth=1.8, **line)
    if len(curves) > 1:
        axis.fill_between(x, *np.quantile(curves, [0.1, 0.9], axis=0), color=colour, alpha=0.15, linewidth=0)


def along(values: Tensor, places: Any) -> Any:
    """Singular values over the largest, interpolated at shares j / q of the spectrum."""
    return np.interp(places, np.arange(1, len(values) + 1) / len(values), values / (values[0] or 1.0))


def cumulated(shares: Tensor, places: Any) -> Any:
    """Sums of the first shares, interpolated at j / q."""
    sums = np.concatenate([[0.0], shares.cumsum(0)])
    return np.interp(places, np.linspace(0, 1, len(sums)), sums)


def print_table(layers: dict[str, Layer]) -> None:
    """Print a row for each kind of layer: medians over its layers."""
    for kind, members in by_kind(layers).items():
        shares = " ".join(f"{share:.2f}" for share in np.median([layer.diagonal for layer in members], 0))
        print(f"\n{kind}, {len(members)} layers; shares of W0's energy in the blocks: {shares}")
        for key in members[0].updates:
            updates = [layer.updates[key] for layer in members]
            names = ("rank", "effective_rank", "coverage")
            rank, effective, coverage = (np.median([getattr(u, name) for u in updates]) for name in names)
            print(f"  {key:24} rank {rank:.0f}, effective rank {effective:.1f}, coverage {coverage:.3f}")


def main(
    model: Annotated[Path, typer.Argument(exists=True, help="Folder of a causal language model.")],
    adapter: Annotated[Path | None, typer.Option(help="Folder of an SMoA adapter; random if absent.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Of a LoRA, HiRA or other SMoA adapter.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="r of random SMoA.")] = 8,
    blocks: Annotated[int, typer.Option(min=1, help="K of random SMoA.")] = 2,
    target: Annotated[list[str] | None, typer.Option(help="Last part of the names to measure.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw a figure: a file .svg or .png.")] = None,
) -> None:
    """Measure how an SMoA update spreads over the spectra of a model's weights, beside LoRA's or HiRA's."""
    torch.set_num_threads(1)  # a second one speeds up LAPACK's SVD little
    layers = model_spectrum(model, adapter, compare, rank, blocks, tuple(target or ()))
    print_table(layers)
    if figure is not None:
        drawn = overview(layers, f"{model.name}: medians over {len(layers)} layers")
        with matplotlib.rc_context(STYLE):
            drawn.savefig(figure, metadata={"Date": None} if figure.suffix == ".svg" else None)


if __name__ == "__main__":
    sys.exit(run_command(main))
