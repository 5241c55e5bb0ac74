"""Backend "triton" as the package uses it: torch's operators replace a kernel that is wrong or does not run.

Triton has compiled correct kernels wrongly before, so a compiled kernel runs only after it was compared. It is known by
Triton's hash: of its source, constants and options, of the compiler, and of what Triton specialises by itself (sizes
and strides that are 1 or that 16 divides, aligned pointers). A call that is about to launch a new one first computes a
probe, by the kernels and by eager: the user's W0, random x, dY, bias, A and B in the same layout, two of the largest
tiles of tokens and a tail. Launch parameters are chosen as for the call (`table.chosen_for`), and no kernel's control
flow depends on the random numbers, so the probe launches what the call launches. If not, one of all tokens follows.

A finished comparison is kept in the tuning table's file, by the first process of a job. Another failure, such as a
missing C compiler, holds for the process; a lack of memory for the call. While a CUDA graph is captured nothing can be
compared or loaded: eager computes what did not run before, for experts as in `experts_masked.py`. `SMOA_VERIFY=0` turns
verification off.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton import __version__ as triton_version

from ..checks import first_line
from ..definition.dropout import Dropout
from ..definition.experts import ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..definition.precision import gemm_is_ieee, precision_of
from ..kernels.architectures import architecture, assembler, identity
from ..kernels.launch import Arguments, Launch, launch_arguments, launch_hook, on_device
from ..kernels.spec import bucket
from ..kernels.table import chosen_for, keep, read, user_table
from . import Gradients, eager, experts, experts_masked, triton
from .probes import ALLOWED, distance, probe

ALGORITHMS = triton.ALGORITHMS

Run: TypeAlias = Callable[..., Any]
"""Runs an operation: `run(backend's module, adapter, *tensors)`. Of these, activations have two dimensions."""


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`: x (T, C) -> y (T, N) in x's dtype, which is W0's."""

    def run(of: Any, adapter: Any, x: Tensor, bias: Tensor | None) -> Any:
        return of.forward(x, bias, adapter, algorithm if of is triton else "auto", dropout)

    y: Tensor = _run((algorithm, dropout is None), run, adapter, x.shape[0], x, bias)
    return y


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`forward`: dX where `needs_x`, dA and dB where x is given."""

    def run(of: Any, adapter: Any, dy: Tensor, x: Tensor | None) -> Any:
        return of.backward(dy, x, adapter, dropout, needs_x=x is None)

    name, nothing = ("backward", dropout is None), (None, None, None)
    _, dA, dB = nothing if x is None else _run((*name, "x"), run, adapter, dy.shape[0], dy, x)
    dx, _, _ = _run(name, run, adapter, dy.shape[0], dy, None) if needs_x else nothing
    return dx, dA, dB


def modulated_weight(adapter: PackedAdapter, *, out: Tensor | None = None) -> Tensor:
    """`W_eff`, (N, C) in W0's dtype; written to `out`, which is not W0, where that is given."""

    def run(of: Any, adapter: Any, out: Tensor | None) -> Any:
        return of.modulated_weight(
            adapter, out=out if of is triton else None
        )  # a comparison needs both results

    W_eff: Tensor = _run("weight", run, adapter, None, out)
    return W_eff if out is None or W_eff is out else out.copy_(W_eff)


def experts_forward(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) in x's dtype."""
    y: Tensor = _run(
        "experts", lambda of, one, *given: of.experts_forward(*given, one), adapter, x.shape[0], x, ends
    )
    return y


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_forward`: dX where `needs_x`, dA and dB where x is given."""

    def run(of: Any, adapter: Any, *given: Tensor | None) -> Any:
        return of.experts_backward(*given, adapter, needs_x=needs_x)

    found: Gradients = _run(("experts", needs_x, x is None), run, adapter, dy.shape[0], dy, x, ends)
    return found


# Whether a kernel may run

FEW = 2 * 256 + 37
"""Tokens of a probe: two of the largest tiles of any kernel, and a tail."""

_one_at_a_time = threading.RLock()  # backward runs in a thread for each device


class _WithheldError(RuntimeError):
    """A kernel must not run: why, and whether that holds for the process, not only for this call."""


@cache
def _is_verified(device: torch.device) -> bool:
    return device.type == "cuda" and os.environ.get("SMOA_VERIFY") != "0"


def _run(name: object, run: Run, adapter: Any, tokens: int | None, *tensors: Tensor | None) -> Any:
    """Run an operation by the kernels, or by eager where they must not run.

    `tokens`: of its activations; None if it has none.
    """
    weight, theirs = adapter.weight, eager if isinstance(adapter, PackedAdapter) else experts
    if not _is_verified(weight.device):
        return run(triton, adapter, *tensors)
    known = verdicts(weight.device)
    precision = precision_of(weight.dtype, gemm_is_ieee(weight.dtype, "cuda")).name

    def check(launch: Launch, arguments: Arguments) -> None:
        try:
            kernel = known.name_of(launch, arguments)
            if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
                if kernel in known.ran:
                    return
                raise _WithheldError(f"{kernel} did not run before the capture of this CUDA graph", False)
            with _one_at_a_time:
                for rows in (0,) if tokens is None else (FEW, tokens):
                    if kernel not in known.kernels:
                        given = probe(adapter, tensors, rows)
                        _compare(known, run, ALLOWED[precision], tokens or 0, *given)
            if kernel not in known.kernels:
                raise LookupError(f"no probe launches {kernel}")
        except _WithheldError:
            raise
        except Exception as error:  # for example there is no C compiler, or no room on the disk
            lasts = not isinstance(error, torch.OutOfMemoryError)
            raise _WithheldError(f"{type(error).__name__}: {first_line(error)}", lasts) from error
        known.ran.add(kernel)

    # Calls that are equal in this launch about the same kernels.
    question = (
        name,
        launch_arguments(adapter)[0],
        bucket(tokens or 0),
        tokens == 0,
        *(one is None for one in tensors),
    )
    if (why := known.withheld.get(question)) is None:
        try:
            with launch_hook(check, new=True):
                return run(triton, adapter, *tensors)
        except _WithheldError as error:
            why, lasts = error.args
        if lasts:
            known.withheld[question] = why
        told = f"{why} ({known.gpu}, {known.versions}). Please report wrong kernels and what `smoa-kernels info` says"
        warnings.warn(f"torch's operators compute instead of a GPU kernel: {told}", stacklevel=3)
    with on_device(weight.device):
        if theirs is experts and torch.cuda.is_current_stream_capturing():
            theirs = experts_masked
            warnings.warn(f"in a CUDA graph every expert multiplies all pairs: {why}", stacklevel=3)
    return run(theirs, adapter, *tensors)


def _compare(known: Verdicts, run: Run, allowed: float, tokens: int, rows: int, *given: Any) -> None:
    """Compare kernels and torch on a probe of `rows` for a call of `tokens`. Keeps a verdict on the new ones."""
    heard: list[str] = []
    is_packed, E = isinstance(given[0], PackedAdapter), len(given[0].weight)
    stand_ins = {rows: tokens} if is_packed else {-(-rows // E): -(-tokens // E)}  # of the average expert
    with chosen_for(stand_ins), launch_hook(lambda *launch: heard.append(known.name_of(*launch)), new=True):
        run(triton, *given)
        if known.kernels.keys() >= set(heard):
            return
        found = run(triton, *given)  # as later calls do: each `Launch` now has its compiled kernel
    far = distance(found, run(eager if is_packed else experts, *given), allowed)
    if far is None:
        raise ArithmeticError("torch's operators give zeros, or numbers that are not finite")
    known.add(heard, "" if far <= 1 else f"results differ by {far:.3g} times what rounding explains")


class Verdicts:
    """Verdicts on the kernels that were compared on a GPU, kept in its tuning table's file, for one set of `versions`.

    Attributes:
        kernels: for each, by its name and Triton's hash, why it is refused; empty if it is verified.
        ran: those that this process launched.
        withheld: why calls do not try the kernels in this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._now = now = identity(device)
        self.gpu = now.gpu
        self.versions = f"Triton {triton_version}, {assembler(architecture(device))}, kernels {now.source}"
        self.kernels = read(user_table(now.gpu), now).verdicts.get(self.versions, {})
        self.ran: set[str] = set()
        self.withheld: dict[object, str] = {}

    def name_of(self, launch: Launch, arguments: Arguments) -> str:
        """Compile a kernel and name it. Raises a _WithheldError if it is refused."""
        name = f"{launch.kernel.__name__} {launch.compiled(arguments).hash}"
        if reason := self.kernels.get(name):
            raise _WithheldError(reason, True)
        return name

    def add(self, kernels: Iterable[str], reason: str) -> None:
        """Keep a verdict on new kernels, a job's first process on disk too. Raises a _WithheldError for a reason."""
        new = [name for name in kernels if name not in self.kernels]
        found = dict.fromkeys(new, reason and f"{', '.join(new)}: {reason}")
        self.kernels |= found
        job = torch.distributed
        if not (job.is_available() and job.is_initialized() and job.get_rank()):
            with suppress(OSError, NotImplementedError):  # filelock's, where the system has no locks
                keep(self._now, verdicts={self.versions: found})
        if reason:
            raise _WithheldError(found[new[0]], True)


verdicts = cache(Verdicts)  # reads the file once
