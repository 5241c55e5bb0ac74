"""Which launch parameters a launcher uses: what was tuned for its problem, else the heuristic; once per problem.

Launchers ask at every launch, so an answer is kept for the life of the process. Where tuned choices come from is no
business of the kernels: whoever has them says so with :func:`prefer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..definition.precision import precision_of
from .heuristic import Key, bucket, heuristic
from .launch import Config, architecture, multiprocessors

__all__ = ["capturing", "forget", "name_of", "prefer", "select"]

Source = Callable[[Key, torch.device], Config | None]

_source: Source | None = None
_selected: dict[tuple[torch.device, Key], Config] = {}


def prefer(source: Source | None) -> None:
    """Ask `source` before the heuristic; None asks nobody."""
    global _source
    _source = source
    forget()


def forget() -> None:
    """Choose anew at the next launch, for what was tuned has changed."""
    _selected.clear()


def capturing() -> bool:
    """Whether a CUDA graph is captured: nothing can be measured, and what is answered meanwhile is not kept."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def name_of(dtype: torch.dtype, precision: str) -> str:
    """`Key.dtype` of operands whose float32 products have a precision, "tf32" or "ieee"."""
    return precision_of(dtype, ieee=precision == "ieee").name


def select(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    precision: str = "ieee",
    *,
    rank: int = 0,
    blocks: int = 0,
    out_features: int = 0,
    in_features: int = 0,
    tokens: int | None = None,
    padded_out: int = 0,
    padded_in: int = 0,
    transposed: bool = False,
) -> Any:
    """Launch parameters of `kernel`, of its own configuration class; arguments as the fields of `Key`.

    Args:
        kernel: one of `heuristic.CONFIGS`.
        device: of the operands.
        dtype: of the operands that the kernel multiplies or copies.
        precision: how float32 products round, "tf32" or "ieee".
        tokens: not yet bucketed; None where the kernel sees none.
    """
    key = Key(
        kernel,
        name_of(dtype, precision),
        rank,
        blocks,
        out_features,
        in_features,
        0 if tokens is None else bucket(tokens),
        padded_out,
        padded_in,
        transposed,
    )
    found = _selected.get((device, key))
    if found is None:
        found = None if _source is None else _source(key, device)
        if found is None:
            found = heuristic(key, architecture(device), multiprocessors(device))
        if not capturing():
            _selected[device, key] = found
    return found
