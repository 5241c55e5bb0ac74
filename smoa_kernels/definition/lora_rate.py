"""The scale with which a layer trains at LoRA's learning rate (docs/internals/learning_rate.md)."""

from __future__ import annotations

import math

from torch import Tensor

# Fitted; theory gives the powers of K and of W0's size.
_KAPPA = 3.0


def alpha_for_lora_rate(alpha: float, num_blocks: int, sketch: Tensor, elements: int) -> float:
    """Return the alpha of a layer at LoRA's learning rate: `alpha · 3 K / rms(W0)`.

    Args:
        alpha: LoRA's alpha.
        num_blocks: K.
        sketch: that of W0, float32 (33,), or of each matrix of a stack (E, 33): it holds the norm.
        elements: how many elements each matrix has.
    """
    if sketch.is_meta:
        raise ValueError("use_lora_rate reads the base weight, which is on the meta device: load it first")
    rms = float(sketch[..., -1].double().mul(2).exp2().mean().div(elements).sqrt())
    # The sketch of zero holds the smallest normal float32 for a norm.
    if not 1e-30 < rms < math.inf:
        raise ValueError("use_lora_rate needs a base weight that is finite and not zero")
    return alpha * _KAPPA * num_blocks / rms
