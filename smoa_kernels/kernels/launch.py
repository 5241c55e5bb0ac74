# mypy: allow-untyped-calls
"""Where a launch goes, and the shortest way there.

Triton launches on the current device, wherever its arguments are: :func:`on_device`. And at every launch it specialises
each argument anew to find the compiled kernel, 25 µs of Python for 20 arguments: :class:`Launcher` remembers what it
found.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .spec import Config

__all__ = ["Launcher", "on_device"]

_STAY: AbstractContextManager[None] = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one for the length of a block; nothing to do where it is, or is no CUDA device.

    Torch's own operators look after themselves. The backend calls this where a pass enters it, and the tuner around all
    that it measures.
    """
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _STAY
    return torch.cuda.device(device)


class Launcher:
    """Launches one kernel, a compiled form of which it finds by less than Triton looks at.

    A form depends on the dtypes of the pointers and whether 16 divides them, on the numbers that the kernel specialises
    on, and on the constants. Forms are kept by all of these, the numbers in full, for pointers that 16 divides; what
    else comes goes Triton's own way, as does every first launch. Of Triton this takes that a launch returns the
    compiled kernel, and that it can be launched with all arguments in order, as Triton's tutorials do; where a launch
    returns anything else, nothing is kept.

    Args:
        kernel: a function under `@triton.jit`, whose pointers come first and are named `…_ptr`.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[object, ...], Any] = {}
        self._compiles = isinstance(kernel, JITFunction)  # the interpreter compiles nothing
        if self._compiles:
            names = kernel.arg_names
            self._pointers = sum(name.endswith("_ptr") for name in names)
            numbers = range(self._pointers, len(names))
            free = [i for i in numbers if kernel.params[i].do_not_specialize]
            self._free = tuple(free)
            self._keyed = itemgetter(*(i for i in numbers if i not in free))

    def __call__(self, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
        """Launch on the current device.

        Args:
            grid: numbers of programs.
            config: what the compiler is told besides the arguments.
            arguments: the kernel's own, all of them, in the order of its signature.
        """
        if not self._compiles:
            self._kernel[grid](**arguments, **config.options)
            return
        values = tuple(arguments.values())
        usual = self._compiled if self._is_usual(values) else None
        if usual:
            active = driver.active
            device = active.get_current_device()
            compiled = usual.get(self._key(device, config, values))
            if compiled is not None:
                compiled[(*grid, 1, 1)](*values, stream=active.get_current_stream(device))
                return
        compiled = self._kernel[grid](**arguments, **config.options)
        if usual is not None and isinstance(compiled, CompiledKernel):
            if list(arguments) != self._kernel.arg_names:
                raise TypeError(f"{self._kernel.__name__}: arguments must be in its signature's order")
            usual[self._key(driver.active.get_current_device(), config, values)] = compiled

    def _is_usual(self, values: tuple[Any, ...]) -> bool:
        """Whether 16 divides every pointer, and the numbers that are not specialised on have 32 bits."""
        wide = 0
        for pointer in values[: self._pointers]:
            if pointer is not None:
                wide |= pointer.data_ptr() & 15
        for i in self._free:
            wide |= values[i] >> 31
        return not wide

    def _key(self, device: int, config: Any, values: tuple[Any, ...]) -> tuple[object, ...]:
        dtypes = [None if pointer is None else pointer.dtype for pointer in values[: self._pointers]]
        return (device, config.num_warps, config.num_stages, self._keyed(values), *dtypes)
