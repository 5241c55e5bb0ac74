"""Draw the blocks that SMoA adapts: a weight in its own and in spectral order, and the singular values of updates.

    python -m benchmarks.blocks_figure      # docs/blocks.svg

The figure shows real numbers: a weight of random directions and a falling spectrum, the blocks that `BlockPartition`
finds in it, and the updates of a random SMoA and a random LoRA adapter.
"""

from __future__ import annotations

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from smoa_kernels import BlockPartition
from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.definition.reference import delta_weight

from .plots import COLOURS, svg
from .providers import LORA, SMOA
from .results import ROOT, write

ROWS, COLS, BLOCKS, RANK = 48, 64, 4, 8
# Okabe and Ito's colours, as in the other figures: first for the background, then one for each block.
COLOUR_MAP = ListedColormap(["#E6E6E6", "#0072B2", "#E69F00", "#009E73", "#CC79A7"])


def example() -> tuple[BlockPartition, Tensor, Tensor]:
    """The blocks of a weight, the update of a random SMoA adapter and that of a LoRA of the same rank budget."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(ROWS, ROWS) * torch.logspace(0, -1, ROWS))
    v, _ = torch.linalg.qr(torch.randn(COLS, ROWS))
    weight = (u * torch.logspace(0, -1.5, ROWS)) @ v.T
    partition = BlockPartition.from_weight(weight, BLOCKS)
    ranks = torch.full((BLOCKS,), RANK // BLOCKS, dtype=torch.int32)
    A, B = torch.randn(RANK // BLOCKS, COLS), torch.randn(ROWS, RANK // BLOCKS)
    delta = delta_weight(PackedAdapter(weight, A, B, partition, ranks, torch.ones(())))
    lora = torch.randn(ROWS, RANK, dtype=torch.float64) @ torch.randn(RANK, COLS, dtype=torch.float64)
    return partition, delta, lora


def figure() -> Figure:
    """Three panels: labels in W0's order, the same sorted, and the singular values of the updates."""
    partition, delta, lora = example()
    rows, cols = partition.row_block[:, None], partition.col_block
    label = torch.where(rows == cols, rows.int() + 1, 0)
    drawn = Figure(figsize=(9.0, 2.9), layout="constrained")
    own, ordered, singular = drawn.subplots(1, 3, width_ratios=[1, 1, 1.15])
    for axis, labels, title in (
        (own, label, "W0 in its own order:\nrow i and column j share a block"),
        (
            *(ordered, label[partition.row_index][:, partition.col_index]),
            f"sorted along the spectrum:\nK = {BLOCKS} aligned blocks",
        ),
    ):
        axis.imshow(labels.numpy(), cmap=COLOUR_MAP, vmin=0, vmax=BLOCKS, interpolation="none")
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(f"{COLS} input features", fontsize=8)
        axis.set_ylabel(f"{ROWS} output features", fontsize=8)
    # The centre of each block, between the first and the last of its rows and columns.
    row_ends, col_ends = partition.row_offsets.double(), partition.col_offsets.double()
    for k in range(BLOCKS):
        y, x = (float(ends[k : k + 2].sum() - 1) / 2 for ends in (row_ends, col_ends))
        ordered.text(x, y, f"$B_{k}A_{k}$", ha="center", va="center", fontsize=9, color="white")
    for name, update, of, marker in (("SMoA", delta, SMOA, "o"), ("LoRA", lora, LORA, "s")):
        values = torch.linalg.svdvals(update.double())
        values = values[values > 1e-9 * values[0]]
        places = range(1, len(values) + 1)
        singular.plot(places, values / values[0], marker, color=COLOURS[of], ms=3, label=name)
    smoa = RANK // BLOCKS * (ROWS + COLS)
    singular.set_title(
        f"singular values of the update, r = {RANK}:\nSMoA trains {smoa} numbers, LoRA {RANK * (ROWS + COLS)}",
        fontsize=9,
    )
    singular.set(xlim=(0, ROWS + 1), yscale="log")
    singular.set_xlabel(f"of {ROWS}", fontsize=8)
    singular.legend(frameon=False, fontsize=8)
    singular.tick_params(labelsize=7)
    return drawn


if __name__ == "__main__":
    write(ROOT / "docs" / "blocks.svg", svg(figure()))
