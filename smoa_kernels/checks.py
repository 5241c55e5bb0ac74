"""Checks of users' arguments. Each raises a TypeError or ValueError that names the argument and what is allowed."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

# The most blocks and ranks: far more than anyone needs, far fewer than would fill the memory with bookkeeping alone.
MOST_BLOCKS = MOST_RANKS = 2**16
# The most rows or columns of a weight: int32 counts them.
MOST_COORDINATES = 2**31 - 1
# How many adjacent rows and columns stay together; or the rows, and the columns.
Granule = int | tuple[int, int]
_SIGNED = torch.int8, torch.int16, torch.int32, torch.int64
_INTEGERS = frozenset({*_SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64})

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def shown(value: object) -> str:
    """Show a value in a message, like `repr` but with long values cut short."""
    return _SHORT.repr(value)


def check_count(name: str, value: int, least: int = 1, most: int | None = None) -> None:
    """`value` must be an int from `least` to `most`. True and False are not ints here."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_blocks(num_blocks: int, shape: Sequence[int] | None = None, name: str = "a weight") -> None:
    """`num_blocks` must be a number of blocks that `name`, of this `shape`, can be cut into."""
    check_count("num_blocks", num_blocks, most=MOST_BLOCKS)
    if shape is not None and num_blocks > min(shape):
        raise ValueError(
            f"num_blocks must be at most min(out_features, in_features) = {min(shape)} for {name} of shape "
            f"{tuple(shape)}, got {num_blocks}"
        )


def check_granule(
    granule: Granule, num_blocks: int, shape: Sequence[int] | None = None, name: str = "a weight"
) -> None:
    """`granule` must be a number of coordinates that leaves a granule for every block on both sides of `shape`."""
    for side in granule if isinstance(granule, tuple) else (granule,):
        check_count("granule", side, most=MOST_COORDINATES)
    if shape is None:
        return
    rows, cols = map(granules, shape, on_sides(granule))
    if num_blocks > min(rows, cols):
        raise ValueError(
            f"granule must leave at least num_blocks={num_blocks} granules of rows and of columns of {name} of shape "
            f"{tuple(shape)}, got granule={granule}, which leaves {rows} and {cols}"
        )


def on_sides(granule: Granule, shape: Sequence[int] = (MOST_COORDINATES,) * 2) -> tuple[int, int]:
    """How many rows, and how many columns, stay together: at most all of `shape`."""
    rows, cols = granule if isinstance(granule, tuple) else (granule, granule)
    return min(rows, max(shape[0], 1)), min(cols, max(shape[1], 1))


def granules(size: int, granule: int) -> int:
    """How many granules `size` coordinates make; the last may be short."""
    return -(-size // granule)


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """`value` must be one of the allowed names."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


def check_choices(name: str, values: Collection[str], allowed: Collection[str]) -> None:
    """Each of `values` must be one of the allowed names."""
    for value in values:
        check_choice(name, value, allowed)


def check_kind(name: str, value: object, kind: type) -> None:
    """`value` must be an instance of `kind`."""
    if not isinstance(value, kind):
        wanted = f"torch.{kind.__name__}" if kind.__module__ == "torch" else kind.__name__
        article = "an" if wanted[0].lower() in "aeiou" else "a"
        raise TypeError(f"{name} must be {article} {wanted}, got {type(value).__name__}")


def check_number(name: str, value: float) -> None:
    """`value` must be a real number that torch takes as a scalar. True and False are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(
            f"{name} must be a float, or an int of at most 63 bits, got {value.bit_length()} bits"
        )


def check_probability(name: str, value: float) -> None:
    """`value` must be a number in [0, 1): a share of elements that leaves some."""
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_finite(name: str, value: float) -> None:
    """`value` must be a number, and neither NaN nor Inf."""
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_device(device: torch.device | str) -> torch.device:
    """Return `device`, which this machine must have. torch's own errors for a missing one are of several kinds."""
    try:
        return torch.empty(0, device=torch.device(device)).device
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"device must be one that this machine has, got {shown(device)}: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the hints that torch adds; or its type's name if it is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def layout_of(value: Tensor) -> str:
    """The name of a tensor's memory layout. torch calls a nested tensor strided; here it is "torch.nested"."""
    return "torch.nested" if value.is_nested else str(value.layout)


def check_dense(name: str, value: object, *, integer: bool = False) -> None:
    """`value` must be a dense tensor of floating-point numbers, or if `integer` of integers."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be {'an integer' if integer else 'a'} tensor, got {type(value).__name__}"
        )
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {layout_of(value)}")
    if not (value.dtype in _INTEGERS if integer else value.dtype.is_floating_point):
        raise TypeError(
            f"{name} must be {'an integer tensor' if integer else 'floating point'}, got {value.dtype}"
        )


def check_like(name: str, value: object, own: Tensor, *, meta: bool = False) -> None:
    """`value`, to be loaded over `own`, must have its kind and shape, and numbers unless `own` has none or `meta`."""
    check_dense(name, value, integer=not own.is_floating_point())
    assert isinstance(value, Tensor)
    if value.shape != own.shape:
        raise ValueError(
            f"size mismatch for {name}: the layer takes shape {tuple(own.shape)}, got {tuple(value.shape)}"
        )
    if value.is_meta and not (meta or own.is_meta):
        raise ValueError(f"{name} must hold numbers, got a meta tensor")


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """`weight` must be a dense, finite floating-point matrix that holds numbers. This reads all of it."""
    check_dense(name, weight)
    if weight.itemsize < 2:
        raise TypeError(f"{name} must be of 16 bits or more, got {weight.dtype}")
    if weight.is_meta:
        raise ValueError(f"{name} must hold numbers to have a spectrum, got a meta tensor")
    if weight.ndim != 2:
        raise ValueError(
            f"{name} must be a matrix (out_features, in_features), got shape {tuple(weight.shape)}"
        )
    if not is_finite(weight):
        raise ValueError(f"{name} must be finite to have a spectrum, got NaN or Inf in it")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf: by its extremes, since `isfinite` of it takes a copy's memory."""
    return not tensor.numel() or all(math.isfinite(bound) for bound in tensor.detach().aminmax())


def check_path(name: str, value: object) -> None:
    """`value` must be the path of a file or folder."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {shown(value)}")


def check_new(name: str, folder: Path) -> None:
    """`folder` must not exist, or be empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{name} must be a new or an empty folder, got {folder}")


@contextmanager
def naming(what: str | Path) -> Iterator[None]:
    """Put the name of a layer or file before the message of a TypeError or ValueError from the block.

    A wrong value in a file, given as a Path, is always a ValueError. A ValueError that begins with the name stays.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(what)):
            raise
        kind = TypeError if isinstance(error, TypeError) and not isinstance(what, Path) else ValueError
        raise kind(f"{what}: {error}") from error
