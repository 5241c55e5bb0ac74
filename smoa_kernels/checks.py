"""Checks of single values, whoever takes them: what each must be, and what was given."""

from __future__ import annotations

import functools
import math
import os
import reprlib
from collections.abc import Callable, Collection, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "MOST_BLOCKS",
    "MOST_RANKS",
    "MOST_SIZE",
    "cached",
    "check_blocks",
    "check_choice",
    "check_count",
    "check_device",
    "check_finite",
    "check_kind",
    "check_names",
    "check_number",
    "check_path",
    "check_weight",
    "first_line",
    "layout_of",
    "shown",
]

P = ParamSpec("P")
T = TypeVar("T")

# Of blocks, and of ranks: far above any that serves, far below those whose bookkeeping alone fills the memory.
MOST_BLOCKS = MOST_RANKS = 2**16
# Of tokens, features and GPUs that something is predicted for: products of a few still fit into a float.
MOST_SIZE = 10**12


def cached(function: Callable[P, T]) -> Callable[P, T]:
    """Keep the answers of a function that checks its arguments, which `functools.cache` may keep from it.

    An argument that cannot be hashed gets the function's own error, and 1 is not answered with what True was.
    """
    kept = functools.lru_cache(maxsize=4096, typed=True)(function)

    @functools.wraps(function)
    def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return kept(*args, **kwargs)  # type: ignore[arg-type]  # typeshed asks for what can be hashed
        except TypeError:  # of the hash or of the function, which then says it again
            pass
        return function(*args, **kwargs)

    return answer


# As Python shows values, but the middle of long ones left out: a message is read by people.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def shown(value: object) -> str:
    """What was given, in a message: like `repr`, and no page of it, however large the value is.

    Example:
        >>> shown([1, 2]), shown(list(range(1000)))
        ('[1, 2]', '[0, 1, 2, 3, 4, 5, ...]')
    """
    return _SHORT.repr(value)


def check_count(name: str, value: int, least: int = 1, most: int | None = None) -> None:
    """Whether `value` is an int from `least` to `most`; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_blocks(num_blocks: int, shape: Sequence[int] | None = None, name: str = "a weight") -> None:
    """Whether anything can have so many blocks and, where `shape` is given, whether `name`, of that shape, can."""
    check_count("num_blocks", num_blocks, most=MOST_BLOCKS)
    if shape is not None and num_blocks > min(shape):
        raise ValueError(
            f"num_blocks must be at most min(out_features, in_features) = {min(shape)} for {name} of shape "
            f"{tuple(shape)}, got {num_blocks}"
        )


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Whether `value` is one of the names that are allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


def check_kind(name: str, value: object, kind: type) -> None:
    """Whether `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        wanted = f"torch.{kind.__name__}" if kind.__module__ == "torch" else kind.__name__
        article = "an" if wanted[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {wanted}, got {type(value).__name__}")


def check_names(name: str, value: object) -> None:
    """Whether `value` is a list of strings, and no string, which would be a list of its letters."""
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list of names, got {shown(value)}")


def check_number(name: str, value: float) -> None:
    """Whether `value` is a real number that torch takes as a scalar; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(
            f"{name} must be a float, or an int of at most 63 bits, got {value.bit_length()} bits"
        )


def check_finite(name: str, value: float) -> None:
    """Whether `value` is a number, and neither NaN nor Inf."""
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_device(device: torch.device | str) -> torch.device:
    """`device` where this machine has it; torch says it in a RuntimeError, a TypeError or an AssertionError."""
    try:
        return torch.empty(0, device=torch.device(device)).device
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"device must be one that this machine has, got {shown(device)}: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """Of an error's message, below which torch puts hints; the name of its type where it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def layout_of(value: Tensor) -> str:
    """How a tensor lies in memory; a nested one calls itself strided."""
    return "torch.nested" if value.is_nested else str(value.layout)


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Whether `weight`, called `name`, has a spectrum; a whole tensor is read."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {weight.dtype}")
    if layout_of(weight) != "torch.strided" or weight.itemsize < 2:
        raise TypeError(
            f"{name} must be dense, of 16 bits or more, got {layout_of(weight)} of {weight.dtype}"
        )
    if weight.is_meta:
        raise ValueError(f"{name} must hold numbers to have a spectrum, got a meta tensor")
    if weight.ndim != 2:
        raise ValueError(
            f"{name} must be a matrix (out_features, in_features), got shape {tuple(weight.shape)}"
        )
    if weight.numel() and not all(math.isfinite(bound) for bound in weight.detach().aminmax()):
        raise ValueError(f"{name} must be finite to have a spectrum, got NaN or Inf in it")


def check_path(name: str, value: object) -> None:
    """Whether `value` can be the path of a file or folder."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {shown(value)}")
