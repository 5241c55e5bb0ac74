# mypy: allow-untyped-calls
"""Where a launch goes, and the shortest way there.

Triton launches on the current device, wherever its arguments are: :func:`on_device`. And at every launch it specialises
each argument anew to find the compiled kernel, 25 µs of Python for 20 arguments: :class:`Launcher` remembers in a
:class:`Plan` what it found.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..definition.packed import PackedAdapter
from .spec import Config, granule_of

__all__ = ["Launcher", "Layout", "Plan", "on_device"]

_STAY: AbstractContextManager[None] = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one for the length of a block; nothing to do where it is, or is no CUDA device.

    Torch's own operators look after themselves. The backend calls this where a pass enters it, and the tuner around all
    that it measures.
    """
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _STAY
    return torch.cuda.device(device)


class Layout(NamedTuple):
    """What a plan depends on of an adapter: plain values, which can be remembered.

    Attributes:
        device: of all its tensors.
        dtype: W0's, and the activations'.
        features: N and C.
        rank: ρ.
        num_blocks: K.
        granule: adjacent coordinates that kernels may take as one, from `spec.granule_of`.
        weight: W0's strides.
        A: A's strides.
        B: B's strides.
    """

    device: torch.device
    dtype: torch.dtype
    features: tuple[int, int]
    rank: int
    num_blocks: int
    granule: int
    weight: tuple[int, int]
    A: tuple[int, int]
    B: tuple[int, int]

    @classmethod
    def of(cls, adapter: PackedAdapter) -> Layout:
        """The layout of an adapter."""
        w, a, b = adapter.weight, adapter.A, adapter.B
        K, granule = adapter.partition.num_blocks, granule_of(adapter.partition)
        return cls(w.device, w.dtype, w.shape, a.shape[0], K, granule, w.stride(), a.stride(), b.stride())  # type: ignore[arg-type]

    def sizes(self) -> dict[str, int]:
        """As :func:`table.select` names them."""
        N, C = self.features
        return {"rank": self.rank, "blocks": self.num_blocks, "out_features": N, "in_features": C}

    def strides(self) -> dict[str, int]:
        """As every kernel names them that reads W0, A and B, in the order of their signatures."""
        names, numbers = ("wn", "wc", "ar", "ac", "bn", "br"), (*self.weight, *self.A, *self.B)
        return {f"stride_{name}": number for name, number in zip(names, numbers, strict=True)}


class Plan:
    """All of a launch but its pointers.

    It follows from the sizes, strides, dtypes and device of a problem, so it is made once for a problem: what makes it
    is under :func:`table.remembered`, and sees nothing else.

    Args:
        grid: numbers of programs.
        config: what the compiler is told besides the arguments.
        numbers: the kernel's arguments after its pointers, in the order of its signature.
    """

    __slots__ = ("config", "grid", "launches", "numbers", "values")

    def __init__(self, grid: tuple[int, ...], config: Config, **numbers: Any) -> None:
        self.grid, self.config, self.numbers = grid, config, numbers
        self.values = tuple(numbers.values())
        self.launches: dict[tuple[object, ...], Any] = {}


class Launcher:
    """Launches one kernel, and remembers in a plan which compiled form it launched.

    A form depends on a plan, on the current device, on the dtypes of the pointers, and on whether 16 divides them.
    Remembered are forms for pointers that 16 divides; what else comes goes Triton's own way, as does every first
    launch. Of Triton this takes that a launch returns the compiled kernel, and that it can be launched with all
    arguments in order, as Triton's tutorials do; where a launch returns anything else, nothing is remembered.

    Args:
        kernel: a function under `@triton.jit`, whose pointers come first.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiles = isinstance(kernel, JITFunction)  # the interpreter compiles nothing

    def __call__(self, plan: Plan, **pointers: Tensor | None) -> None:
        """Launch on the current device.

        Args:
            plan: the rest of the launch.
            pointers: all of them, in the order of the kernel's signature.
        """
        if not self._compiles:
            self._launch(plan, pointers)
            return
        address = 0
        dtypes: list[torch.dtype | None] = []
        for tensor in pointers.values():
            if tensor is None:
                dtypes.append(None)
            else:
                address |= tensor.data_ptr()
                dtypes.append(tensor.dtype)
        if (
            plan.launches and not address & 15
        ):  # asked only then: the audit captures launches where no driver is
            active = driver.active
            device = active.get_current_device()
            launch = plan.launches.get((device, *dtypes))
            if launch is not None:
                launch(*pointers.values(), *plan.values, stream=active.get_current_stream(device))
                return
        compiled = self._launch(plan, pointers)
        if isinstance(compiled, CompiledKernel) and not address & 15:
            if [*pointers, *plan.numbers] != self._kernel.arg_names:
                raise TypeError(f"{self._kernel.__name__}: arguments must be in its signature's order")
            form = driver.active.get_current_device(), *dtypes
            plan.launches[form] = compiled[(*plan.grid, 1, 1)]

    def _launch(self, plan: Plan, pointers: dict[str, Tensor | None]) -> Any:
        return self._kernel[plan.grid](**pointers, **plan.numbers, **plan.config.options)
