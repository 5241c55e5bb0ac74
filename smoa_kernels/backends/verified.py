"""Backend "triton" as the package uses it: torch's operators replace a kernel that is wrong or does not run.

Triton has compiled correct kernels wrongly before, and no version is known to be free of that. So when an operation
first launches a form of a kernel on a GPU (`kernels.launch.Launch.form`), the kernels and the eager backend
both compute it, from the user's own x, dY and W0. If they agree within rounding, the kernels compute it from then on,
which costs one look-up per call. If they do not, or if a launch raises, one warning says so and eager computes.
Dropout's mask is the same in both.

The comparison uses large random factors. The user's B is zero at the first step and small for long, so an error in the
adapter's part would be lost in the base's.

Each new form costs one pass of the kernels, one of eager and the memory of both, once. A GPU's first form costs one
pass of the kernels more: `kernels.launch` calls a kernel that it knows directly, not by Triton's launcher, and this
call is checked too. Verdicts are kept in the tuning table's file, for one GPU, Triton, ptxas and source of the kernels.
While a CUDA graph is captured nothing can be compared: eager computes forms that were not verified before, for experts
as in `experts_masked.py`. `SMOA_VERIFY=0` turns verification off.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
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
from ..kernels.launch import Launch, Pointers, described, heard_by, short_way, use_tritons_launcher
from ..kernels.spec import bucket
from ..kernels.table import keep, read, user_table
from . import Gradients, eager, experts, experts_masked, triton

ALGORITHMS = triton.ALGORITHMS

Run: TypeAlias = Callable[[Any, Any, Any], Any]
"""Runs an operation of a backend's module with an adapter and a dropout."""


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`: x (T, C) -> y (T, N) in x's dtype, which is W0's."""

    def run(backend: Any, adapter: Any, dropout: Any) -> Any:
        return backend.forward(x, bias, adapter, algorithm if backend is triton else "auto", dropout)

    y: Tensor = _run(f"forward {algorithm}", run, x, adapter, dropout)
    return y


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`forward`: dX where `needs_x`, dA and dB where x is given."""

    def of_factors(backend: Any, adapter: Any, dropout: Any) -> Any:
        return backend.backward(dy, x, adapter, dropout, needs_x=False)

    def of_input(backend: Any, adapter: Any, dropout: Any) -> Any:
        return backend.backward(dy, None, adapter, dropout, needs_x=True)

    nothing: Gradients = None, None, None
    _, dA, dB = nothing if x is None else _run("factors", of_factors, dy, adapter, dropout)
    dx, _, _ = _run("input", of_input, dy, adapter, dropout) if needs_x else nothing
    return dx, dA, dB


def modulated_weight(adapter: PackedAdapter, *, out: Tensor | None = None) -> Tensor:
    """`W_eff`, (N, C) in W0's dtype; written to `out`, which is not W0, where that is given."""

    def run(backend: Any, given: Any, _: Any) -> Any:  # without `out`: the comparison must not write to it
        return backend.modulated_weight(given, out=out if given is adapter else None)

    W_eff: Tensor = _run("weight", run, adapter.weight, adapter)
    return W_eff


def experts_forward(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) in x's dtype."""
    y: Tensor = _run("experts", lambda of, adapter, _: of.experts_forward(x, ends, adapter), x, adapter)
    return y


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_forward`: dX where `needs_x`, dA and dB where x is given."""

    def run(backend: Any, adapter: Any, _: Any) -> Any:
        return backend.experts_backward(dy, x, ends, adapter, needs_x=needs_x)

    found: Gradients = _run(f"experts' gradients {needs_x} {x is None}", run, dy, adapter)
    return found


def _run(
    operation: str,
    run: Run,
    x: Tensor,
    adapter: PackedAdapter | ExpertsAdapter,
    dropout: Dropout | None = None,
) -> Any:
    """Run an operation by the kernels if they are verified for it, else by eager."""
    theirs: Any = eager
    if isinstance(adapter, PackedAdapter):
        layout: tuple[object, ...] = described(adapter)[0]
    else:
        theirs, w, blocks = experts, adapter.weight, adapter.blocks
        layout = w.device, w.dtype, w.shape, w.stride(), blocks.granule, blocks.is_contiguous
    # These properties decide which forms are launched. If two sets launch the same forms, the second compares nothing.
    factors, ieee = (adapter.A.dtype, adapter.A.shape[-2]), gemm_is_ieee(x.dtype, "cuda")
    question = operation, layout, factors, bucket(x.shape[0]), ieee, dropout is None
    sound = _answers.get(question)
    if sound is None:
        allowed = ALLOWED[precision_of(x.dtype, ieee=ieee).name]
        with _one_at_a_time:
            sound = _verify(run, theirs, x, adapter, dropout, allowed)
        if sound is not None:
            _answers[question] = sound
    if sound:
        return run(triton, adapter, dropout)
    if theirs is experts and torch.cuda.is_current_stream_capturing():
        theirs = experts_masked
        refused = "are refused: every expert multiplies all pairs"
        unknown = "are not verified: every expert multiplies all pairs; run a step of these sizes before the capture"
        warnings.warn(
            f"a CUDA graph of experts is captured whose kernels {unknown if sound is None else refused}",
            stacklevel=2,
        )
    return run(theirs, adapter, dropout)


# Whether the kernels may compute it

# How far two right results may lie apart, as a share of the norm of a row or column. In half types twice the spacing of
# numbers; in TF32 more, since cuBLAS may truncate operands; in float32 long sums have different orders.
ALLOWED = {"bf16": 2.0**-6, "fp16": 2.0**-9, "tf32": 2.0**-8, "fp32": 2.0**-14}
_FEWEST = 32  # numbers of a row or column that is compared by itself
# Each number must satisfy |ours - eager's| <= share * (|eager's| + _OUTLIER * r). r is the root mean square of its row
# or column, whichever is larger. Rounding the terms of a sum moves a number by share * r / 7 on average, so two
# right results differ by share * r / 5. 4 * share * r is 20 times that.
_OUTLIER = 4
LAUNCHER = "the short way to launch"
"""This launcher gets a verdict like a form (`kernels.launch.use_tritons_launcher`)."""

_answers: dict[object, bool] = {}
_one_at_a_time = threading.RLock()  # backward runs in a thread for each device


class _RefusedError(RuntimeError):
    """A form that was refused before is about to be launched."""


def _is_verified(device: torch.device) -> bool:
    return device.type == "cuda" and os.environ.get("SMOA_VERIFY") != "0"


def _verify(
    run: Run, theirs: Any, x: Tensor, adapter: Any, dropout: Dropout | None, allowed: float
) -> bool | None:
    """Whether the forms that an operation launches are right; None if they cannot be compared now."""
    if not _is_verified(x.device):
        return True
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing() or not x.any():
        return None
    known, probe = verdicts(x.device), _with_random_factors(adapter)
    heard: list[str] = []

    def hear(launch: Launch, pointers: Pointers) -> None:
        heard.append(launch.form(pointers))
        if reason := known.forms.get(heard[-1]):
            raise _RefusedError(reason)

    def new() -> list[str]:
        return [form for form in dict.fromkeys(heard) if form not in known.forms]

    try:
        with heard_by(hear):
            found = run(triton, probe, dropout)
        if not new():
            return True
        expected = run(theirs, probe, dropout)
        far = again = distance(found, expected, allowed)
        if far is not None and LAUNCHER not in known.forms:
            again = distance(run(triton, probe, dropout), expected, allowed)
    except _RefusedError as error:
        return known.refuse(heard[-1:], str(error))
    except torch.OutOfMemoryError as error:
        return known.refuse([], f"there is no memory to verify a kernel: {first_line(error)}")
    except Exception as error:  # the device reports faults late, so any new form may be at fault
        if not new():
            raise
        return known.refuse(new(), f"{type(error).__name__}: {first_line(error)}")
    if far is None or again is None:
        return None
    if not far <= 1:
        return known.refuse(new(), f"results differ from eager's by {far:.3g} times what rounding explains")
    if not again <= 1:
        use_tritons_launcher(f"results of the short way differ by {again:.3g} times what rounding explains")
    known.add(dict.fromkeys([*new(), *[LAUNCHER] * short_way.taken], ""))
    return True


def _with_random_factors(adapter: Any) -> Any:
    """The adapter with a random A and B that make ΔW about as large as W0."""
    generator = torch.Generator(adapter.weight.device).manual_seed(0)
    A, B = (torch.empty_like(factor).normal_(generator=generator) for factor in (adapter.A, adapter.B))
    return replace(adapter, A=A, B=B.div_(A.shape[-2] ** 0.5), scaling=torch.ones_like(adapter.scaling))


def distance(found: Any, expected: Any, allowed: float) -> float | None:
    """The largest distance of a row, column or number over the allowed one; None if eager's result proves nothing."""
    shares = []
    for ours, theirs in zip(_matrices(found), _matrices(expected), strict=True):
        if not theirs.isfinite().all() or not theirs.any():
            return None
        # Subnormal numbers have the spacing of the smallest normal one.
        kind = torch.finfo(theirs.dtype)
        floor = kind.smallest_normal * kind.eps * max(theirs.shape) ** 0.5
        error, usual = (ours.float() - theirs.float()).abs(), theirs.new_zeros((), dtype=torch.float32)
        long: list[tuple[int, ...]] = [(dim,) for dim in (0, 1) if theirs.shape[dim] >= _FEWEST]
        for dim in long or [(0, 1)]:
            norm = torch.linalg.vector_norm(theirs, dim=dim, keepdim=True, dtype=torch.float32)
            distance = torch.linalg.vector_norm(error, dim=dim, keepdim=True)
            shares.append((distance / (allowed * norm + floor)).max())
            usual = torch.maximum(usual, norm * (norm.numel() / theirs.numel()) ** 0.5)
        shares.append((error / (allowed * (theirs.abs() + _OUTLIER * usual) + floor)).max())
    return float(torch.stack(shares).max()) if shares else None


def _matrices(results: Any) -> Iterator[Tensor]:
    """The results that are not None; those of all experts as one matrix."""
    for result in results if isinstance(results, tuple) else (results,):
        if result is not None:
            yield result.flatten(0, -2)


# What is kept


class Verdicts:
    """Verdicts on the forms that ran on one GPU, for one Triton, ptxas and source of the kernels; kept in its table.

    Args:
        device: the GPU.

    Attributes:
        gpu: the driver's name of it.
        versions: of Triton, ptxas and the kernels' source.
        forms: for each form the reason why it is refused; empty if it is verified.
    """

    def __init__(self, device: torch.device) -> None:
        self._now = now = identity(device)
        self.gpu = now.gpu
        self.versions = f"Triton {triton_version}, {assembler(architecture(device))}, kernels {now.source}"
        self.forms = read(user_table(now.gpu), now).verdicts.get(self.versions, {})
        self._told: set[str] = set()

    def add(self, forms: dict[str, str]) -> None:
        """Keep verdicts. If they cannot be written to disk, they hold for this process."""
        self.forms |= forms
        if short_way.obstacle:
            self.forms[LAUNCHER] = short_way.obstacle
        with suppress(OSError, NotImplementedError):  # filelock's, where the system has no locks
            keep(self._now, verdicts={self.versions: self.forms})

    def refuse(self, forms: Sequence[str], reason: str) -> bool:
        """Record that forms are refused and warn once per process. Returns False."""
        new = [form for form in forms if form not in self.forms]
        if new:
            self.add(dict.fromkeys(new, reason))
        if not self._told.issuperset(forms or (reason,)):
            self._told.update(forms or (reason,))
            warnings.warn(
                f"a GPU kernel is refused, torch's operators compute instead: {reason}. {'; '.join(forms)} "
                f"({self.gpu}, {self.versions}). Please report it with the output of `smoa-kernels info`",
                stacklevel=2,
            )
        return False


@cache
def verdicts(device: torch.device) -> Verdicts:
    """Read a GPU's verdicts for the current versions."""
    found = Verdicts(device)
    if reason := found.forms.get(LAUNCHER):
        short_way.obstacle = reason
    return found
