# mypy: allow-untyped-calls
"""Where a launch goes, and the shortest way there.

Triton launches on the current device, wherever its arguments are: :func:`on_device`. And at every launch it specialises
each argument anew to find the compiled kernel, 25 µs of Python for 20 arguments: :class:`Launcher` remembers in a
:class:`Plan` what it found.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..definition.packed import PackedAdapter
from .spec import Config, granule_of

__all__ = ["Launcher", "Layout", "Plan", "on_device"]

_STAY: AbstractContextManager[None] = nullcontext()
_runtime: Any = knobs.runtime  # which holds the hooks on launches


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
        """The layout of an adapter, which keeps it for the pass's other launches."""
        if adapter.layout is None:
            w, a, b, partition = adapter.weight, adapter.A, adapter.B, adapter.partition
            sizes = w.shape, a.shape[0], len(partition.row_sizes), granule_of(partition)
            adapter.layout = cls(w.device, w.dtype, *sizes, w.stride(), a.stride(), b.stride())  # type: ignore[arg-type]
        found: Layout = adapter.layout
        return found

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
    is under :func:`table.remembered`, and sees nothing else. Its launches are on that device, the current one.

    Args:
        grid: numbers of programs.
        config: what the compiler is told besides the arguments.
        numbers: the kernel's arguments after its pointers, in the order of its signature.
    """

    __slots__ = ("config", "forms", "grid", "numbers", "values")

    def __init__(self, grid: tuple[int, ...], config: Config, **numbers: Any) -> None:
        self.grid, self.config, self.numbers = (*grid, 1, 1)[:3], config, numbers
        self.values = tuple(numbers.values())
        self.forms: dict[tuple[object, ...], Form] = {}


class Form(NamedTuple):
    """A plan's compiled kernel, loaded, and what a launch of it asks.

    Attributes:
        kernel: Triton's, which unloads it once nobody holds it; `run`, `function` and `metadata` are its parts.
        device: number of the one that it is loaded on, the plan's.
        stream: the current stream of a device.
    """

    kernel: CompiledKernel
    run: Callable[..., None]
    function: Any
    metadata: Any
    device: int
    stream: Callable[[int], int]

    @classmethod
    def of(cls, kernel: CompiledKernel) -> Form:
        """A kernel that was just launched."""
        active = driver.active
        parts = kernel.run, kernel.function, kernel.packed_metadata
        return cls(kernel, *parts, active.get_current_device(), active.get_current_stream)


class Launcher:
    """Launches one kernel, and remembers in a plan which compiled form it launched.

    A form depends on a plan, on the dtypes of the pointers, and on whether 16 divides them. Remembered are forms for
    pointers that 16 divides; what else comes goes Triton's own way, as does every launch while a profiler has hooks on
    launches, and every first one. Of Triton this takes that a launch returns the compiled kernel, and that `run`
    launches it, which Triton and PyTorch's compiler call alike; where a launch returns anything else, nothing is
    remembered.

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
        address = 0
        dtypes: list[torch.dtype | None] = []
        for tensor in pointers.values():
            if tensor is None:
                dtypes.append(None)
            else:
                address |= tensor.data_ptr()
                dtypes.append(tensor.dtype)
        aligned = self._compiles and not address & 15
        form = plan.forms.get(tuple(dtypes)) if aligned else None
        # Does someone listen to launches? A chain with calls does, or what was put in the place of Triton's chain.
        enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
        if form is not None and not getattr(enter, "calls", enter) and not getattr(leave, "calls", leave):
            form.run(
                *plan.grid,
                form.stream(form.device),
                form.function,
                form.metadata,
                None,  # of hooks, as the next two
                None,
                None,
                *pointers.values(),
                *plan.values,
            )
            return
        compiled = self._kernel[plan.grid](**pointers, **plan.numbers, **plan.config.options)
        if aligned and isinstance(compiled, CompiledKernel):
            if [*pointers, *plan.numbers] != self._kernel.arg_names:
                raise TypeError(f"{self._kernel.__name__}: arguments must be in its signature's order")
            plan.forms[tuple(dtypes)] = Form.of(compiled)
