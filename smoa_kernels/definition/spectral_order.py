"""The spectral order: rows and columns of W0 sorted by where in its spectrum they have their energy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from torch import Tensor

from ..checks import check_weight
from .precision import without_autocast

__all__ = ["spectral_centroids", "spectral_orders"]


def whole(weight: Tensor) -> Tensor:
    """A sharded weight (`DTensor`) gathered on every process; any other as it is."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else cast(Tensor, gather())


def spectral_orders(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of `weight` sorted by spectral centroid: int64 (N,) and (C,).

    Args:
        weight: (N, C), as :func:`spectral_centroids` takes it; the same errors.

    Example:
        >>> rows, cols = spectral_orders(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
        >>> rows.tolist(), cols.tolist()
        ([1, 2, 0], [1, 2, 0])
    """
    row_score, col_score = spectral_centroids(weight)
    return torch.argsort(row_score, stable=True), torch.argsort(col_score, stable=True)


order_source: ContextVar[Callable[[Tensor], tuple[Tensor, Tensor]]] = ContextVar(
    "order_source", default=spectral_orders
)
"""Where `BlockPartition.from_weight` has its orders from: other processes may know them."""


def spectral_centroids(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean position in the spectrum of each row's and each column's energy (docs/definition.md).

    `Σ_j j·E_ij / Σ_j E_ij` with `E = (U∘σ)²` for rows and `(V∘σ)²` for columns, σ descending; a zero row or
    column scores 0. Computed with one intra-op thread and without autocast: the last bits of a threaded
    reduction depend on the number of threads, and labels must depend on nothing but the weight.

    Args:
        weight: (N, C) floating point; half types are computed in float32.

    Raises:
        TypeError, ValueError: it is none, or not finite, or has no elements.

    Returns:
        Scores of rows (N,) and columns (C,), in the dtype of the computation.

    Example:
        >>> [scores.tolist() for scores in spectral_centroids(torch.diag(torch.tensor([1.0, 3.0, 2.0])))]
        [[2.0, 0.0, 1.0], [2.0, 0.0, 1.0]]
    """
    check_weight(weight)
    if not weight.numel():
        raise ValueError(f"weight must have rows and columns, got shape {tuple(weight.shape)}")
    if weight.dtype.itemsize < 4:
        weight = weight.float()
    with one_thread(), without_autocast(weight):
        largest = float(torch.linalg.vector_norm(weight, torch.inf))
        if largest and not 2.0**-30 < largest < 2.0**30:
            weight = weight / largest  # energies are quadratic in W0: keep them from overflowing or vanishing
        tall = weight.shape[0] > weight.shape[1]
        short_energy, long_energy = _energies(weight.T if tall else weight)
        row_energy, col_energy = (long_energy, short_energy) if tall else (short_energy, long_energy)
        return (
            _centroid(row_energy, torch.linalg.vector_norm(weight, torch.inf, 1)),
            _centroid(col_energy, torch.linalg.vector_norm(weight, torch.inf, 0)),
        )


def _energies(wide: Tensor) -> tuple[Tensor, Tensor]:
    """(U∘σ)² of shape (n, n) and (V∘σ)² of shape (m, n) for a wide (n, m) matrix, σ ascending.

    The eigenvectors of the smaller Gram matrix give U, and Wᵀ U = V∘σ gives the other side without V.
    """
    try:
        squared, u = torch.linalg.eigh(_lower_gram(wide))
    except RuntimeError:  # LinAlgError: eigh gives up on some matrices that the SVD still takes
        u, sigma, vh = torch.linalg.svd(wide, full_matrices=False)
        return (u * sigma).square_().flip(1), (vh.T * sigma).square_().flip(1)
    return u.square() * squared.clamp_min(0), (wide.T @ u).square_()


def _lower_gram(wide: Tensor, panel: int = 128) -> Tensor:
    """Lower triangle of W Wᵀ, which is all that `eigh` reads: close to half of the product's work."""
    gram = wide.new_zeros(wide.shape[0], wide.shape[0])
    for start in range(0, wide.shape[0], panel):
        rows = wide[start : start + panel]
        torch.mm(wide[start:], rows.T, out=gram[start:, start : start + panel])
    return gram


def _centroid(energy: Tensor, largest: Tensor) -> Tensor:
    count = energy.shape[1]
    position = torch.arange(count - 1, -1, -1, dtype=energy.dtype, device=energy.device)
    total = energy.sum(1)
    # Rounding gives a zero row a little energy from every direction; its score is 0 by definition.
    empty = (largest == 0) | (total == 0)
    return torch.where(empty, 0, (energy @ position) / torch.where(empty, 1, total))


_SETTING = threading.RLock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one intra-op thread for a while; another Python thread that also wants to waits meanwhile.

    The setting is the process's as well as each thread's own. One that began under another's single thread has no
    other setting to go back to, and leaves the process's alone.
    """
    if torch.get_num_threads() == 1:
        yield
        return
    with _SETTING:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
