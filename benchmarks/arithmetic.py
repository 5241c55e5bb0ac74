"""What a training pass of ours multiplies on the eager backend, over the two GEMMs of a frozen layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def over_frozen(layer: Mapping[str, Any]) -> float:
    """Multiplications of forward, dX, dA and dB over those of a frozen layer's forward and dX.

    Counted are frozen's two, the blocks' GEMMs (G; the forward's where it is split; dX's under dropout), and the thin
    products: W_eff is built from factors that are padded to N and C, ΔW_k and dA, dB from those of the block.

    Args:
        layer: a case as it is recorded, whose blocks are equally large and share the rank equally.
    """
    tokens, blocks, rank = (int(layer[name]) for name in ("tokens", "num_blocks", "rank"))
    split_backward = bool(layer["dropout"])
    split_forward = split_backward or layer["dtype"] != "float32"
    splits = split_forward + split_backward
    # In units of N·C multiplications: a block has N·C/K² entries, all K of them N·C/K.
    base = 2 * tokens
    blockwise = (1 + splits) * tokens / blocks
    built = (2 - splits) * rank + splits * rank / blocks / blocks
    contracted = 2 * rank / blocks / blocks
    return (base + blockwise + built + contracted) / base
