"""`Scaling`: the scales of a layer's adapters, as PEFT and its users read and write them."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch

from ..checks import check_choice, check_finite


class Scaling(MutableMapping[str, float]):
    """s by adapter, a view of 0-d tensors that are changed in place: a compiled layer or a CUDA graph reads them."""

    def __init__(self, adapters: Any) -> None:
        self._adapters = adapters

    def __getitem__(self, name: str) -> float:
        return float(self._adapters[name].scaling)

    def __setitem__(self, name: str, value: float) -> None:
        check_choice("adapter_name", name, self._adapters)
        check_finite(f"scaling[{name!r}]", value)
        s = self._adapters[name].scaling
        if float(s) != value:  # a backward refuses a tensor that was written to
            with torch.inference_mode(s.is_inference()):  # in which the adapter may have been added
                s.fill_(value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("an adapter's s cannot be deleted alone")

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def copy(self) -> dict[str, float]:
        """The scales as they are now."""
        return dict(self)

    def __repr__(self) -> str:
        return repr(dict(self))
