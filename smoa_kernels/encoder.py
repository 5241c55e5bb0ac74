"""Adapters inside torch's own transformer layers, which may read the weight of a linear layer instead of calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def call_always(layer: nn.Module) -> None:
    """Keep an `nn.TransformerEncoderLayer` around `layer` off its fast path, which reads the weights in it.

    It takes that path in evaluation, unless a module in it has a hook. Pickle finds this hook by its name.
    """
    layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: Any) -> None:
    pass


def over_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of (T, C) to a nested tensor, which `nn.TransformerEncoder` makes of a padded batch."""
    parts = x.unbind()
    y = function(torch.cat(parts)).split([len(part) for part in parts])
    return torch.nested.as_nested_tensor(list(y), layout=x.layout)
