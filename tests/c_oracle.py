"""The C oracle (`csrc_ref/`), built with `cc` once per session. It computes in float64; its operands are widened.

A test that calls it on a machine without a C compiler is skipped. Shapes: N = out_features, C = in_features, K =
blocks, T = tokens, ρ = max rank.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from problems import LinearProblem
from torch import Tensor

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SOURCE_DIR = Path(__file__).parent.parent / "csrc_ref"
COMPILE = ("cc", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2")


class CLayer(ctypes.Structure):
    """`smoa_layer` of `smoa_ref.h`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("out_features", "in_features", "num_blocks", "max_rank")),
        *((name, ctypes.c_void_p) for name in ("weight", "a", "b", "row_block", "col_block", "ranks")),
        ("scaling", ctypes.c_double),
    )


class SpectralOrders(NamedTuple):
    """Centroids and stable ascending orders of the granules of rows (⌈N/g⌉) and of columns (⌈C/g⌉)."""

    row_score: FloatArray
    col_score: FloatArray
    row_order: IntArray
    col_order: IntArray


def require_compiler() -> None:
    """Skip the running test if there is no `cc`."""
    if shutil.which(COMPILE[0]) is None:
        pytest.skip(f"the C oracle needs a C compiler named {COMPILE[0]!r}")


@functools.cache
def library() -> ctypes.CDLL:
    """Build and load the library, once."""
    require_compiler()
    # The file can be deleted once it is loaded: the mapping stays.
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "libsmoa_ref.so"
        subprocess.run([*COMPILE, "-shared", "-fPIC", SOURCE_DIR / "smoa_ref.c", "-o", target], check=True)
        loaded = ctypes.CDLL(str(target))
    size, pointer, layer = ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(CLayer)
    loaded.smoa_spectral_order.argtypes = [size, size, size, pointer, pointer, pointer, pointer]
    loaded.smoa_block_labels.argtypes = [size, size, size, pointer, pointer]
    loaded.smoa_delta_weight.argtypes = [layer, pointer]
    loaded.smoa_forward.argtypes = [layer, size, pointer, pointer, pointer, pointer]
    loaded.smoa_backward.argtypes = [layer, size, pointer, pointer, pointer, pointer, pointer, pointer]
    return loaded


def spectral_orders(U: ArrayLike, sigma: ArrayLike, V: ArrayLike, granule: int = 1) -> SpectralOrders:
    """Spectral centroids and orders from a thin SVD: U (N, q), sigma (q) and V (C, q), not Vᵀ."""
    sigma = _input(sigma, np.float64)
    row_score, row_order = _spectral_order(U, sigma, granule)
    col_score, col_order = _spectral_order(V, sigma, granule)
    return SpectralOrders(row_score, col_score, row_order, col_order)


def block_labels(order: ArrayLike, num_blocks: int, size: int, granule: int = 1) -> IntArray:
    """The block of each of `size` coordinates: `order` (⌈size/g⌉ granules), cut as `torch.tensor_split` cuts."""
    order = _input(order, np.int64)
    labels = np.full(size, -1, dtype=np.int64)
    _call(library().smoa_block_labels, size, granule, num_blocks, order, labels)
    return labels


def delta_weight(p: LinearProblem) -> FloatArray:
    """ΔW (N, C)."""
    delta = _output(*p.weight.shape)
    _call(library().smoa_delta_weight, _Layer(p), delta)
    return delta


def run(p: LinearProblem, multiplier: Tensor | None = None) -> tuple[FloatArray, ...]:
    """y (T, N) and the gradients dX (T, C), dA (ρ, C) and dB (N, ρ); the padding of uneven ranks is exactly 0.

    The adapter reads x∘multiplier, where `multiplier` (T, C) is the scaled dropout mask.
    """
    layer, x, dy = _Layer(p), _input(p.x, np.float64), _input(p.dy, np.float64)
    bias, mask = (None if t is None else _input(t, np.float64) for t in (p.bias, multiplier))
    y, *gradients = (_output(*t.shape) for t in (dy, x, p.A, p.B))
    _call(library().smoa_forward, layer, len(x), x, bias, mask, y)
    _call(library().smoa_backward, layer, len(x), x, mask, dy, *gradients)
    return y, *gradients


class _Layer(CLayer):
    """A `CLayer` made from a problem. It keeps the arrays alive, because the C structure holds bare addresses."""

    def __init__(self, p: LinearProblem) -> None:
        factors = (p.weight, p.A, p.B)
        labels = (p.partition.row_block, p.partition.col_block, p.ranks)
        self._arrays = [_input(t, np.float64) for t in factors] + [_input(t, np.int64) for t in labels]
        addresses = (array.ctypes.data for array in self._arrays)
        super().__init__(*p.weight.shape, len(p.ranks), len(p.A), *addresses, p.scaling)


def _spectral_order(basis: ArrayLike, sigma: FloatArray, granule: int) -> tuple[FloatArray, IntArray]:
    basis = _input(basis, np.float64)
    size, count = len(basis), -(-len(basis) // granule)
    score, order = _output(count), np.full(count, -1, dtype=np.int64)
    _call(library().smoa_spectral_order, size, granule, sigma.size, basis, sigma, score, order)
    return score, order


def _input(value: ArrayLike | Tensor, dtype: type[np.generic]) -> NDArray[Any]:
    """`value` as an array for C."""
    if isinstance(value, Tensor):
        wide = value.detach().cpu()
        value = wide.double() if wide.is_floating_point() else wide
    return np.ascontiguousarray(value, dtype=dtype)


def _output(*shape: int) -> FloatArray:
    """An array of NaN: an entry that the library does not write stays NaN."""
    return np.full(shape, np.nan)


def _call(function: Callable[..., int], *arguments: Any) -> None:
    raw = [item.ctypes.data if isinstance(item, np.ndarray) else item for item in arguments]
    if status := function(*raw):
        raise ValueError(f"{function.__name__} returned {status}, a smoa_status of csrc_ref/smoa_ref.h")
