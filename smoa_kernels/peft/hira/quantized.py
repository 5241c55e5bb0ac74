"""PEFT's HiRA layers over bitsandbytes' quantised layers: W0 is dequantised for each product and dropped after it.

This imports bitsandbytes, so it is imported where there is such a layer.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from peft.tuners.hira import bnb as theirs
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from ...definition.packed import PackedAdapter
from ..dequantize import dequantized, keep_packing
from ..quantized import dequantized_linear
from .layer import Accelerated, OneBlock

__all__ = ["ACCELERATED"]


class _Quantized(Accelerated):
    @staticmethod
    def obstacle(base: nn.Module) -> str | None:
        """None: PEFT makes these layers over bitsandbytes' alone."""
        return None

    def _weight_fits(self, x: Tensor) -> bool:
        return True  # what it is dequantised to is chosen by x

    def _product(self, x: Tensor, A: Tensor, B: Tensor, block: OneBlock, dropout_p: float) -> Tensor:
        base = cast(Any, self.base_layer)
        weight = x.new_empty(()).expand(block.partition.shape)  # the shape alone is used
        return dequantized_linear(
            x,
            functools.partial(dequantized, resolve_quantization_backend(base), base),
            base.bias,
            PackedAdapter(weight, A, B, block.partition, block.ranks_of(A), block.scaling, [A.shape[0]]),
            compute_dtype=cast("torch.dtype | None", getattr(base, "compute_dtype", None)),
            dropout_p=dropout_p,
            algorithm="auto",
            backend="auto",
        )


ACCELERATED: dict[type, type[Accelerated]] = {}

if hasattr(theirs, "Linear8bitLt"):

    class AcceleratedLinear8bitLt(_Quantized, theirs.Linear8bitLt):  # type: ignore[misc]  # PEFT's types are not followed
        """PEFT's HiRA layer over an int8 layer."""

        pefts_class = theirs.Linear8bitLt

    ACCELERATED[theirs.Linear8bitLt] = AcceleratedLinear8bitLt

if hasattr(theirs, "Linear4bit"):

    class AcceleratedLinear4bit(_Quantized, theirs.Linear4bit):  # type: ignore[misc]  # PEFT's types are not followed
        """PEFT's HiRA layer over an NF4 or FP4 layer, which is kept from repacking its weight for the CPU."""

        pefts_class = theirs.Linear4bit

        def make_ready(self) -> None:
            """Also note whether bitsandbytes was to repack the weight."""
            super().make_ready()
            packs = getattr(self.base_layer, "support_avx512bf16_for_cpu", False)
            self._repacked: bool = vars(self).get("_repacked", packs)
            keep_packing(self.base_layer)

        def give_back(self) -> None:
            """Also let bitsandbytes repack the weight."""
            super().give_back()
            if self._repacked:
                self.base_layer.support_avx512bf16_for_cpu = True
            del self._repacked

    ACCELERATED[theirs.Linear4bit] = AcceleratedLinear4bit
