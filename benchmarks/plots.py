"""Figures. Each method has one colour everywhere, from Okabe and Ito's palette for colour-blind readers."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure

from .providers import HIRA, LORA, PAPER, SMOA

matplotlib.rcParams["svg.hashsalt"] = "smoa"  # makes the file reproducible
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: small, searchable
matplotlib.rcParams |= {"font.family": "sans-serif", "axes.titlesize": 9, "axes.labelsize": 9}

COLOURS = {SMOA: "#009E73", LORA: "#0072B2", HIRA: "#E69F00", PAPER: "#CC79A7"}


def svg(figure: Figure) -> str:
    """The figure's file, the same for the same data."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
