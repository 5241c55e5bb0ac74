"""What is timed and checked for a key: a kernel's own workload, or an algorithm's.

A choice whose numbers are wrong is never timed: its error against the definition in float64 may be at most twice that
of the definition in the kernel's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backends import triton as triton_backend
from ..definition.precision import PRECISIONS
from ..definition.reference import backward as reference_backward
from ..definition.reference import forward as reference_forward
from ..kernels import KERNELS
from ..kernels.spec import Key, Operands, Work, in_dtype

__all__ = ["Workload", "WrongNumbersError", "workload"]


class WrongNumbersError(ArithmeticError):
    """A choice computes something else than the definition."""


@dataclass(frozen=True)
class Workload:
    """One key's operands and what to do with them.

    Attributes:
        key: the problem.
        run: launches with a choice and returns what was computed.
        defined: the same by the definition, with the operands in a dtype.
    """

    key: Key
    run: Callable[[Any], Sequence[Tensor]]
    defined: Callable[[torch.dtype], Sequence[Tensor]]

    def prepare(self) -> None:
        """Compute what results are compared with, once; it needs more memory than any choice does."""
        _ = self._expected

    def check(self, choice: Any) -> None:
        """Run once and compare.

        Raises:
            WrongNumbersError: naming the error and what was allowed.
        """
        for value, truth, allowed in zip(self.run(choice), *self._expected, strict=True):
            error = _relative(value.double(), truth)
            if not error <= allowed:
                raise WrongNumbersError(f"wrong numbers: relative error {error:.1e}, at most {allowed:.1e}")

    @contextmanager
    def precision(self) -> Iterator[None]:
        """PyTorch's own float32 products as the key has them: in TF32 or in IEEE."""
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if self.key.dtype == "tf32" else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before

    @cached_property
    def _expected(self) -> tuple[Sequence[Tensor], Sequence[float]]:
        exact = self.defined(torch.float64)
        precision = PRECISIONS[self.key.dtype]
        same = self.defined(precision.dtype)
        budgets = [2 * _relative(s.double(), t) + precision.floor for s, t in zip(same, exact, strict=True)]
        return exact, budgets


def _relative(value: Tensor, truth: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(truth))
    error = float(torch.linalg.vector_norm(value - truth))
    return error / norm if norm else error


def workload(key: Key, device: torch.device) -> Workload:
    """What to run and check for a key on `device`, the same at each call."""
    if key.kernel in KERNELS:
        kernel = KERNELS[key.kernel]
        return Workload(key, *kernel.workload(Operands(key, kernel.forms[0], device)))
    of_algorithm = _forward if key.kernel == "forward" else _input_gradient
    return Workload(key, *of_algorithm(Operands(key, "", device)))


def _forward(operands: Operands) -> Work:
    adapter = operands.adapter()
    x = operands.tensor(operands.key.tokens, operands.key.in_features)

    def run(algorithm: Any) -> list[Tensor]:
        return [triton_backend.forward(x, None, adapter, algorithm, None)]

    return run, lambda dtype: [reference_forward(x.to(dtype), None, in_dtype(adapter, dtype), "auto", None)]


def _input_gradient(operands: Operands) -> Work:
    adapter = operands.adapter()
    dy = operands.tensor(operands.key.tokens, operands.key.out_features)

    def run(algorithm: Any) -> list[Tensor]:
        return [triton_backend.input_gradient(dy, adapter, algorithm, None)]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        dx, _, _ = reference_backward(dy.to(dtype), None, in_dtype(adapter, dtype), None, needs_x=True)
        assert dx is not None
        return [dx]

    return run, defined
