"""Experts by the kernels of `kernels/grouped_linear.py` and `kernels/grouped_grad.py`: all of them in one launch.

Nothing of W0's size is built. The host does not wait for `ends`, which only the device knows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..definition.experts import ExpertsAdapter
from ..kernels.grouped_grad import grouped_grad
from ..kernels.grouped_linear import grouped_linear
from ..kernels.launch import on_device
from . import Gradients


def experts_product(ends: Tensor, adapter: ExpertsAdapter) -> Callable[[Tensor], Tensor]:
    """Return a function `y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) in x's dtype."""

    def product(x: Tensor) -> Tensor:
        with on_device(x.device):
            return grouped_linear(x, ends, adapter)

    return product


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_product`: dX where `needs_x`, dA and dB where x is given."""
    dx = dA = dB = None
    with on_device(dy.device):
        if x is not None:
            dA, dB = grouped_grad(dy, x, ends, adapter)
        if needs_x:
            dx = grouped_linear(dy, ends, adapter.T)
    return dx, dA, dB
