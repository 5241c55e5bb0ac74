"""The C oracle (`csrc_ref/`) as numpy functions, built with `cc` once per session.

Inputs are anything numpy can turn into an array, CPU tensors included (other floating and integer types are
widened); outputs are new float64 or int64 arrays. A test that calls these on a machine without a C
compiler is skipped. Shapes: N = out_features, C = in_features, K = blocks, T = tokens, ρ = max rank.
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
import torch
from numpy.typing import ArrayLike, NDArray

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


class Gradients(NamedTuple):
    """dX (T, C), dA (ρ, C), dB (N, ρ); the padding of uneven ranks is exactly 0."""

    dx: FloatArray
    dA: FloatArray
    dB: FloatArray


def require_compiler() -> None:
    """Skip the running test where there is no `cc`."""
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
    sigma = _input("sigma", sigma, np.float64, (len(sigma),))
    row_score, row_order = _spectral_order("U", U, sigma, granule)
    col_score, col_order = _spectral_order("V", V, sigma, granule)
    return SpectralOrders(row_score, col_score, row_order, col_order)


def block_labels(order: ArrayLike, num_blocks: int, size: int, granule: int = 1) -> IntArray:
    """The block of each of `size` coordinates: `order` (⌈size/g⌉ granules), cut as `torch.tensor_split` cuts."""
    order = _input("order", order, np.int64, (-(-size // granule),))
    labels = np.full(size, -1, dtype=np.int64)
    _call(library().smoa_block_labels, size, granule, num_blocks, order, labels)
    return labels


# `*adapter` stands for packed A (ρ, C), B (N, ρ), labels (N) and (C), ranks (K).


def delta_weight(weight: ArrayLike, *adapter: ArrayLike, scaling: float) -> FloatArray:
    """ΔW (N, C)."""
    layer = _Layer(weight, *adapter, scaling=scaling)
    delta = _output(layer.out_features, layer.in_features)
    _call(library().smoa_delta_weight, layer, delta)
    return delta


def forward(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    *adapter: ArrayLike,
    scaling: float,
    multiplier: ArrayLike | None = None,
) -> FloatArray:
    """y (T, N) from x (T, C); the adapter reads x∘multiplier, where `multiplier` (T, C) is the scaled dropout mask."""
    layer = _Layer(weight, *adapter, scaling=scaling)
    x, multiplier = layer.tokens(x, multiplier)
    bias = None if bias is None else _input("bias", bias, np.float64, (layer.out_features,))
    y = _output(len(x), layer.out_features)
    _call(library().smoa_forward, layer, len(x), x, bias, multiplier, y)
    return y


def backward(
    dy: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike,
    *adapter: ArrayLike,
    scaling: float,
    multiplier: ArrayLike | None = None,
) -> Gradients:
    """Gradients of `sum(dy * forward(...))` with dy (T, N)."""
    layer = _Layer(weight, *adapter, scaling=scaling)
    x, multiplier = layer.tokens(x, multiplier)
    dy = _input("dy", dy, np.float64, (len(x), layer.out_features))
    gradients = Gradients(
        dx=_output(*x.shape),
        dA=_output(layer.max_rank, layer.in_features),
        dB=_output(layer.out_features, layer.max_rank),
    )
    _call(library().smoa_backward, layer, len(x), x, multiplier, dy, *gradients)
    return gradients


class _Layer(CLayer):
    """A `CLayer` made from arrays. It keeps them alive, because the C structure holds bare addresses."""

    def __init__(
        self,
        weight: ArrayLike,
        A: ArrayLike,
        B: ArrayLike,
        row_block: ArrayLike,
        col_block: ArrayLike,
        ranks: ArrayLike,
        *,
        scaling: float,
    ) -> None:
        out_features, in_features = np.shape(weight)
        max_rank, num_blocks = len(A), len(ranks)
        self._arrays = (
            _input("weight", weight, np.float64, (out_features, in_features)),
            _input("A", A, np.float64, (max_rank, in_features)),
            _input("B", B, np.float64, (out_features, max_rank)),
            _input("row_block", row_block, np.int64, (out_features,)),
            _input("col_block", col_block, np.int64, (in_features,)),
            _input("ranks", ranks, np.int64, (num_blocks,)),
        )
        addresses = (array.ctypes.data for array in self._arrays)
        super().__init__(out_features, in_features, num_blocks, max_rank, *addresses, scaling)

    def tokens(self, x: ArrayLike, multiplier: ArrayLike | None) -> tuple[FloatArray, FloatArray | None]:
        """x and its mask as arrays for C."""
        x = _input("x", x, np.float64, (len(x), self.in_features))
        return x, None if multiplier is None else _input("multiplier", multiplier, np.float64, x.shape)


def _spectral_order(
    name: str, basis: ArrayLike, sigma: FloatArray, granule: int
) -> tuple[FloatArray, IntArray]:
    size = len(basis)
    basis = _input(name, basis, np.float64, (size, sigma.size))
    count = -(-size // granule)
    score, order = _output(count), np.full(count, -1, dtype=np.int64)
    _call(library().smoa_spectral_order, size, granule, sigma.size, basis, sigma, score, order)
    return score, order


def _input(name: str, value: ArrayLike, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """`value` as an array for C. The shape is checked here because C sees only an address."""
    if isinstance(value, torch.Tensor):
        value = value.cpu()
    array = np.ascontiguousarray(value, dtype=dtype)
    if np.shape(value) != shape:
        raise ValueError(f"{name} has shape {np.shape(value)}, expected {shape}")
    return array


def _output(*shape: int) -> FloatArray:
    """An array of NaN: an entry that the library does not write stays NaN."""
    return np.full(shape, np.nan)


def _call(function: Callable[..., int], *arguments: Any) -> None:
    raw = [item.ctypes.data if isinstance(item, np.ndarray) else item for item in arguments]
    if status := function(*raw):
        raise ValueError(f"{function.__name__} returned {status}, a smoa_status of csrc_ref/smoa_ref.h")
