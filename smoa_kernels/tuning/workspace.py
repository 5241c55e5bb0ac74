"""Predicted memory that the backward of one layer takes, beyond its inputs and its results.

x, dY, weights and factors are there before and are not counted. Nor is what a BLAS library allocates for itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from .grad_tiling import gradient_parts, partial_bytes
from .problem import Problem

__all__ = ["backward_workspace", "backward_workspace_bytes"]


def backward_workspace(problem: Problem) -> Mapping[str, int]:
    """Bytes that each of the backward's two stages holds beyond its inputs and results.

    "factor gradients" holds dY and x of one part of the tokens, where they are gathered (`grad_tiling.gradient_parts`,
    `Problem.gathers`), and all partials. They are freed before "input gradient", which holds W_eff. Under dropout the
    first always holds a copy of x, and the second the ΔW blocks, dY gathered again, and the adapter's dX by block.
    """
    p, size = problem, problem.dtype.itemsize
    rows, cols = p.padded(p.out_features), p.padded(p.in_features)
    at_once = max(gradient_parts(p))
    dy = at_once * rows * size * p.gathers(p.out_features)
    x = at_once * cols * size * (p.gathers(p.in_features) or p.dropout > 0)
    dx = p.weight_elements * size
    if p.dropout:  # the tokens are one part, so dy is all of dY
        dx = rows * cols // p.num_blocks * size + dy + p.tokens * cols * size
    return {"factor gradients": dy + x + partial_bytes(p), "input gradient": dx}


def backward_workspace_bytes(problem: Problem) -> int:
    """Most bytes that the backward holds beyond its inputs and results: those of the larger of its two stages."""
    return max(backward_workspace(problem).values())
