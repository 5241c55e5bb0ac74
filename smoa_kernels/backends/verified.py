"""Backend "triton" as the package uses it: torch's operators replace a kernel that is wrong or does not run.

Triton has compiled correct kernels wrongly before, so a compiled kernel runs only after it was compared. It is known by
Triton's hash: of its source, constants and options, of the compiler, and of what Triton specialises by itself (sizes
and strides that are 1 or that 16 divides, aligned pointers). Before a call launches a new kernel, it computes a probe
by the kernels and by torch's operators: two of the largest tiles of tokens and a tail, in the call's layout. Launch
parameters are chosen as for the call (`table.override`), and no kernel's control flow depends on the random numbers,
so the probe launches what the call launches. If not, a probe of all tokens follows.

A finished comparison is kept in the tuning table's file, by the first process of a job. Another failure, such as a
missing C compiler, holds for the process; a lack of memory for the call. While a CUDA graph is captured nothing can be
compared or loaded: torch's operators compute what did not run before. `SMOA_VERIFY=0` turns verification off.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..checks import first_line
from ..definition.dropout import Dropout
from ..definition.experts import ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..kernels.architectures import gpu_name, identity
from ..kernels.launch import Launch, launch_hook, on_device, operands_of
from ..kernels.spec import bucket
from ..kernels.table import keep, override, read, user_table
from . import Gradients, eager, experts, experts_masked, triton
from .probes import ALLOWED, distance, probe

FEW = 2 * 256 + 37
"""Tokens of a probe: two of the largest tiles of any kernel, and a tail."""

P = ParamSpec("P")
R = TypeVar("R")
_one_at_a_time = threading.RLock()  # backward runs in a thread for each device


class _WithheldError(RuntimeError):
    """A kernel must not run."""


class Verdicts:
    """Verdicts on the kernels that were compared on a GPU, kept in its tuning table's file."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.identity = device, identity(device)
        stored = read(user_table(gpu_name(device))).part(self.identity, "verdicts")
        # By a kernel's name and Triton's hash, why it is refused; empty if it is verified.
        self.kernels = {name: reason for name, reason in stored.items() if isinstance(reason, str)}
        self.ran: set[str] = set()  # those that this process launched
        self.withheld: dict[object, str] = {}  # why calls do not try the kernels in this process

    def name_of(self, launch: Launch, *arguments: Any) -> str:
        """Compile a kernel and name it. Raises a _WithheldError if it is refused."""
        name = f"{launch.kernel.__name__} {launch.compiled(*arguments).hash}"
        if reason := self.kernels.get(name):
            raise _WithheldError(reason)
        return name

    def check(self, compare: Callable[[int], None], sizes: Iterable[int], *launch: Any) -> None:
        """Raise a _WithheldError if a kernel must not run; `compare` a probe of each size until there is a verdict."""
        try:
            kernel = self.name_of(*launch)
            if _is_captured() and kernel not in self.ran:
                raise _WithheldError(f"{kernel} did not run before the capture of this CUDA graph")
            with _one_at_a_time:
                for rows in sizes:
                    if kernel not in self.kernels:
                        compare(rows)
            if self.name_of(*launch) not in self.kernels:
                raise LookupError(f"no probe launches {kernel}")
        except _WithheldError:
            raise
        except Exception as error:  # for example there is no C compiler, or no room on the disk
            raise _WithheldError(f"{type(error).__name__}: {first_line(error)}") from error
        self.ran.add(kernel)

    def compare(self, run: Callable[[], Any], by_torch: Callable[[], Any], allowed: float) -> None:
        """Compare a probe's results. Keeps a verdict on its new kernels, in a job's first process on disk too."""
        names: list[str] = []
        with launch_hook(lambda *launch: names.append(self.name_of(*launch)), new=True):
            for _ in range(2):  # the second time as later calls do: each `Launch` has its compiled kernel
                result = run()
        error = distance(result, by_torch(), allowed)
        new = [name for name in dict.fromkeys(names) if name not in self.kernels]
        wrong = f"{', '.join(new)}: results differ by {error:.3g} times what rounding explains"
        verdicts = dict.fromkeys(new, "" if error <= 1 else wrong)
        self.kernels |= verdicts
        job = torch.distributed
        if new and not (job.is_available() and job.is_initialized() and job.get_rank()):
            with suppress(OSError, NotImplementedError):  # filelock's, where the system has no locks
                keep(self.device, "verdicts", verdicts)


verdicts = cache(Verdicts)  # reads the file once


@cache
def _is_verified(device: torch.device) -> bool:
    return device.type == "cuda" and os.environ.get("SMOA_VERIFY") != "0"


def _is_captured() -> bool:
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _verified(
    run: Callable[P, R], by_torch: Callable[P, R], in_graph: Callable[P, R] | None = None
) -> Callable[P, R]:
    """The operation `run` of the kernels, replaced by torch's operators where a kernel must not run.

    While a CUDA graph is captured `in_graph` replaces `by_torch`, if that waits for the device.
    """

    @wraps(run)
    def operation(*args: P.args, **options: P.kwargs) -> R:
        first: Any = args[0]  # activations, or the adapter
        device = (first if isinstance(first, Tensor) else first.weight).device
        if not _is_verified(device):
            return run(*args, **options)
        known, lasts = verdicts(device), True
        why = known.withheld.get(_call_of(run, args, options)) if known.withheld else None
        if why is None:
            try:
                with launch_hook(partial(_check, run, by_torch, args, options), new=True):
                    return run(*args, **options)
            except _WithheldError as error:
                why, lasts = str(error), not isinstance(error.__cause__, torch.OutOfMemoryError)
            warning = f"torch's operators compute instead of a GPU kernel: {why} ({known.identity})"
            report = "Please report wrong kernels and what `smoa-kernels info` says"
            warnings.warn(f"{warning}. {report}", stacklevel=2)
        with on_device(device):
            is_captured = _is_captured()
        if lasts and not is_captured:
            known.withheld[_call_of(run, args, options)] = why
        if in_graph is None or not is_captured:
            return by_torch(*args, **options)
        warnings.warn(f"in a CUDA graph every expert multiplies all pairs: {why}", stacklevel=2)
        return in_graph(*args, **options)

    return operation


def _withhold(*launch: Any) -> None:
    raise _WithheldError


def _call_of(run: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> object:
    """Calls that are equal in this launch the same kernels."""
    given = *args, *options.values()
    kinds = [value if isinstance(value, (str, bool)) else type(value) for value in given]
    tokens = _tokens(args)
    return (run, operands_of(_adapter(args)).layout, tokens and bucket(tokens), *kinds)


def _check(
    run: Callable[..., Any],
    by_torch: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    *launch: Any,
) -> None:
    """Raise a _WithheldError if a kernel that a call of `run` launches for the first time must not run."""
    layout, tokens = operands_of(_adapter(args)).layout, _tokens(args)
    known = verdicts(layout.device)

    def compare(rows: int) -> None:
        result, reference = (partial(probe, of, args, options, rows) for of in (run, by_torch))
        experts = max(layout.experts, 1)  # parameters are chosen for the average expert
        with override(tokens={-(-rows // experts): -(-tokens // experts)}):
            known.compare(result, reference, ALLOWED[layout.precision])

    known.check(compare, (FEW + layout.experts // 2, tokens or FEW), *launch)


def _adapter(given: tuple[Any, ...]) -> Any:
    return next(value for value in given if isinstance(value, (PackedAdapter, ExpertsAdapter)))


def _tokens(args: tuple[Any, ...]) -> int:
    return len(args[0]) if isinstance(args[0], Tensor) else 0


ALGORITHMS = triton.ALGORITHMS
forward = _verified(triton.forward, eager.forward)
modulated_weight = _verified(triton.modulated_weight, eager.modulated_weight)
experts_forward = _verified(triton.experts_forward, experts.experts_forward, experts_masked.experts_forward)
_gradients = _verified(triton.backward, eager.backward)
experts_backward = _verified(
    triton.experts_backward, experts.experts_backward, experts_masked.experts_backward
)


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> Gradients:
    """Gradients of :func:`forward`, as in `triton.py`. A wrong kernel of dX refuses none of dA and dB."""
    if x is not None and needs_x and _is_verified(dy.device) and not verdicts(dy.device).withheld:
        with suppress(_WithheldError), launch_hook(_withhold, new=True):
            return triton.backward(dy, x, adapter, dropout, needs_x=True)
    nothing = None, None, None
    _, dA, dB = nothing if x is None else _gradients(dy, x, adapter, dropout, needs_x=False)
    dx, _, _ = _gradients(dy, None, adapter, dropout, needs_x=True) if needs_x else nothing
    return dx, dA, dB
