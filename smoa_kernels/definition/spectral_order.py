"""The spectral order: rows and columns of W0, sorted by where in W0's spectrum their energy lies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from torch import Tensor

from ..checks import Granule, on_sides
from .precision import without_autocast


def gather_weight(weight: Tensor) -> Tensor:
    """Gather a sharded weight (`DTensor`) on every process; return any other weight as it is."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else cast(Tensor, gather())


def spectral_orders(weight: Tensor, granule: Granule = 1) -> tuple[Tensor, Tensor]:
    """Sort the granules of rows and columns of `weight` by spectral centroid: int64 (⌈N/g⌉,) and (⌈C/g⌉,)."""
    row_score, col_score = spectral_centroids(weight, granule)
    return torch.argsort(row_score, stable=True), torch.argsort(col_score, stable=True)


order_source: ContextVar[Callable[[Tensor, Granule], tuple[Tensor, Tensor]]] = ContextVar(
    "order_source", default=spectral_orders
)
"""Gives `BlockPartition.from_weight` the orders; another process may have computed them already."""


def spectral_centroids(weight: Tensor, granule: Granule = 1) -> tuple[Tensor, Tensor]:
    """Compute where in W0's spectrum the energy of each row and column lies on average (docs/definition.md).

    The score of row i is `Σ_j j·E_ij / Σ_j E_ij` with `E = (U∘σ)²`, σ descending; columns use `(V∘σ)²`. A zero row
    or column scores 0. A granule takes both sums over all of its rows or columns. It is computed on one intra-op
    thread and without autocast, since labels must depend on nothing but the weight, and the last bits of a threaded
    reduction depend on the number of threads.

    Several weights share one spectrum, that of their mean Gram matrix (`W Wᵀ` of the shorter side); the energy of a row
    or column is summed over all of them.

    Args:
        weight: (N, C), or (E, N, C) of several; floating point, finite, not empty. Half types are computed in float32.
        granule: g, rows or columns that stay together; the last granule may be short. Or rows, and columns.
    """
    with one_thread(), without_autocast(weight):
        weights = weight if weight.ndim == 3 else weight[None]
        largest = max(float(torch.linalg.vector_norm(matrix, torch.inf)) for matrix in weights)
        scale = largest if largest and not 2.0**-30 < largest < 2.0**30 else 1.0
        tall = weight.shape[-2] > weight.shape[-1]

        def wide() -> Iterator[Tensor]:
            for matrix in weights:
                matrix = matrix.float() if matrix.dtype.itemsize < 4 else matrix
                if scale != 1.0:
                    matrix = matrix / scale  # energies are quadratic in W0 and would overflow or vanish
                yield matrix.T if tall else matrix

        short_energy, long_energy = _energies(wide)
        row_energy, col_energy = (long_energy, short_energy) if tall else (short_energy, long_energy)
        rows, cols = (
            torch.stack([torch.linalg.vector_norm(matrix, torch.inf, side) for matrix in weights]).amax(0)
            for side in (1, 0)
        )
        of_rows, of_cols = on_sides(granule)
        return _centroid(row_energy, rows, of_rows), _centroid(col_energy, cols, of_cols)


def _energies(wide: Callable[[], Iterable[Tensor]]) -> tuple[Tensor, Tensor]:
    """(U∘σ)² of shape (n, n) and (V∘σ)² of shape (m, n) for wide (n, m) matrices, summed over them, σ ascending.

    The eigenvectors of the Gram matrix of the shorter side give U, and Wᵀ U = V∘σ gives the other side without V.

    Args:
        wide: gives the matrices. They are read twice, so that no more than one is held in float32.
    """
    gram: Tensor | None = None
    for matrix in wide():
        gram = _lower_gram(matrix) if gram is None else gram.add_(_lower_gram(matrix))
    try:
        squared, u = torch.linalg.eigh(gram)
    except RuntimeError:  # LinAlgError: eigh fails on some matrices that the SVD still takes
        u, sigma, _ = torch.linalg.svd(torch.cat(list(wide()), 1), full_matrices=False)
        squared, u = sigma.square().flip(0), u.flip(1)
    long_energy: Tensor | None = None
    for matrix in wide():
        energy = (matrix.T @ u).square_()
        long_energy = energy if long_energy is None else long_energy.add_(energy)
    assert long_energy is not None
    return u.square() * squared.clamp_min(0), long_energy


def _lower_gram(wide: Tensor) -> Tensor:
    """Lower triangle of W Wᵀ, in about half the time of the product; `eigh` reads no more."""
    panel = 128
    gram = wide.new_zeros(wide.shape[0], wide.shape[0])
    for start in range(0, wide.shape[0], panel):
        rows = wide[start : start + panel]
        torch.mm(wide[start:], rows.T, out=gram[start:, start : start + panel])
    return gram


def _centroid(energy: Tensor, largest: Tensor, granule: int) -> Tensor:
    count = energy.shape[1]
    position = torch.arange(count - 1, -1, -1, dtype=energy.dtype, device=energy.device)
    total, moment = energy.sum(1), energy @ position
    # Rounding gives a zero row a little energy in every direction, but its score is 0 by definition.
    empty = (largest == 0) | (total == 0)
    if granule > 1:
        total, moment = (_granule_sums(torch.where(empty, 0, sums), granule) for sums in (total, moment))
        empty = total == 0
    return torch.where(empty, 0, moment / torch.where(empty, 1, total))


def _granule_sums(values: Tensor, granule: int) -> Tensor:
    short = -values.shape[0] % granule
    return torch.nn.functional.pad(values, (0, short)).view(-1, granule).sum(1)


_SETTING = threading.RLock()
_within = threading.local()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block with one intra-op thread; only one Python thread at a time changes the setting.

    torch keeps the setting for the process and for each thread. A Python thread that starts while another is in this
    block starts with one intra-op thread; it has no other setting to restore, and changes nothing.
    """
    if torch.get_num_threads() == 1 or hasattr(_within, "maker"):
        yield
        return
    with _SETTING:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def within_one_thread() -> None:
    """Let this thread enter `one_thread` although the thread that made it is within it.

    It mostly has one intra-op thread already, but vLLM turns `torch.set_num_threads` into a function without effect.
    """
    _within.maker = True
