"""`Scaling`: the scales of a layer's adapters, as PEFT and its users read and write them."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch
from torch import Tensor

from ..checks import check_finite
from ..definition.packed import scaling_tensor


class Scaling(UserDict[str, float]):
    """s by adapter, a view of 0-d tensors that are changed in place: a compiled layer or a CUDA graph reads them."""

    data: Any  # tensors by adapter

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.data = tensors

    def __getitem__(self, name: str) -> float:
        return float(self.data[name])

    def __setitem__(self, name: str, value: float) -> None:
        check_finite(f"scaling[{name!r}]", value)
        s = self.data.setdefault(name, scaling_tensor(value, torch.device("cpu")))
        if float(s) != value:  # a backward refuses a tensor that was written to
            with torch.inference_mode(s.is_inference()):  # in which the adapter may have been added
                s.fill_(value)

    def __repr__(self) -> str:
        return repr(dict(self))
