"""A sketch of a weight: 33 numbers that tell whether an adapter was trained on this base.

A hash of the bits is too strict: the same base in bf16, or dequantised from NF4, must be recognised. The sketch is 32
random projections `uᵀ W0 v`, with vectors of signs u and v, divided by W0's Frobenius norm, and the logarithm of that
norm. A relative error ε in W0 moves the projections by about ε; another weight moves them by about √2.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from .precision import without_autocast
from .spectral_order import gather_weight, one_thread

PROJECTIONS = 32
SKETCH_SIZE = PROJECTIONS + 1
# NF4 and int4 move the sketch by about 0.1, an unrelated weight by 1.4.
TOLERANCE = 0.35

# Smaller weights are sketched on one thread. Loading a model makes hundreds of such products; while other processes
# were busy they took ten times as long on two threads as on one.
_SMALL = 2**22


def sketch_weight(weight: Tensor) -> Tensor:
    """Compute the sketch of a weight: float32 (33,) on its device, 32 projections and log2 of the norm."""
    weight = gather_weight(weight).detach()
    with one_thread() if weight.numel() < _SMALL else nullcontext(), without_autocast(weight):
        weight = weight.to(torch.float32)
        norm = torch.linalg.vector_norm(weight).clamp_min(torch.finfo(torch.float32).tiny)
        u, v = (_signs(size, side, weight.device) for side, size in enumerate(weight.shape))
        projections = ((u.T @ weight) * v.T).sum(1)
        return torch.cat([projections / norm, norm.log2()[None]])


def sign_rows(in_features: int, like: Tensor) -> Tensor:
    """The vectors v of a sketch as rows (32, C), in the dtype and on the device of `like`."""
    return _signs(in_features, 1, like.device).T.contiguous().to(like.dtype)


def sketch_distance(first: Tensor, second: Tensor) -> float:
    """Estimate the relative difference of two weights from their sketches; up to `TOLERANCE` they are one base."""
    difference = first.detach().float().cpu() - second.detach().float().cpu()
    projections = difference[:-1].square().mean().sqrt()
    return float(torch.maximum(projections, difference[-1].abs()))


def distance_by_products(products: Tensor, sketch: Tensor) -> float:
    """As `sketch_distance`, from the sketch to a W0 that can only multiply; the norms are not compared.

    Args:
        products: :func:`sign_rows` times W0ᵀ, (32, N).
        sketch: of the weight that was trained on.
    """
    u = _signs(products.shape[1], 0, products.device)
    projections = (products.float() * u.T).sum(1).cpu()
    return sketch_distance(sketch, torch.cat([projections / sketch[-1].exp2(), sketch[-1:]]))


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)


def check_base(distances: Mapping[str, float], *, strict: bool, warn: Callable[[str], None] = _warn) -> None:
    """Warn, or raise a ValueError where `strict`, if an adapter was trained on other weights than these layers'.

    Args:
        distances: by layer, that of its base weight from the one that was trained on. NaN is another weight.
        strict: whether to refuse.
        warn: shows a warning.
    """
    others = {name: distance for name, distance in distances.items() if not distance <= TOLERANCE}
    if not others:
        return
    name = max(others, key=others.__getitem__)
    where = name if len(distances) == 1 else f"{len(others)} layers, for one {name}"
    message = (
        f"the adapter was trained on another base weight in {where} (it differs by about {others[name]:.0%}, the "
        f"same base in another precision by at most {TOLERANCE:.0%}); load the base that it was trained on"
    )
    if strict:
        raise ValueError(f"{message}; strict_base=True refuses it")
    warn(message)


def _signs(size: int, side: int, device: torch.device) -> Tensor:
    # `torch.tensor` lifts its result too: in a trace this is a constant.
    signs: Tensor = torch.ops.aten.lift_fresh(torch.frombuffer(_host_signs(size, side), dtype=torch.float32))
    return signs.view(size, PROJECTIONS).to(device)


# The signs of a byte of random bits, the lowest bit first; a set bit is -1.
_SIGNS = [struct.pack("8f", *(1.0 - 2.0 * (byte >> bit & 1) for bit in range(8))) for byte in range(256)]


# Cached, because a model has few sizes and each layer asks for two. As bytes, because a tensor made in one of torch's
# fake or functional modes must not outlive the mode.
@functools.lru_cache(maxsize=64)
def _host_signs(size: int, side: int) -> bytearray:
    """The signs of W0's rows (`side` 0) or columns (1): SHAKE128 of the word, 32 bits for each of them."""
    bits = hashlib.shake_128((b"rows", b"columns")[side]).digest(size * PROJECTIONS // 8)
    return bytearray().join(map(_SIGNS.__getitem__, bits))
