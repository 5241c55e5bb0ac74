"""Random problems for tests of the operator: one small factory, so that every test means the same by them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smoa_kernels import BlockPartition, smoa_linear
from smoa_kernels.backends import resolve_backend
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import PackedAdapter, scaling_tensor
from smoa_kernels.definition.reference import reference_linear
from smoa_kernels.operator import LinearCall

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where numerical tests compute; the kernels run on the CPU under Triton's interpreter (conftest.py)."""


@dataclass(frozen=True)
class LinearProblem:
    """Arguments of `smoa_linear`, and what comes back in backward."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    partition: BlockPartition
    ranks: Tensor
    dy: Tensor
    scaling: float

    def to(self, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> LinearProblem:
        """The same values, rounded to `dtype` (the factors to `factor_dtype`)."""
        factor_dtype = factor_dtype or dtype
        return replace(
            self,
            x=self.x.to(dtype),
            weight=self.weight.to(dtype),
            bias=None if self.bias is None else self.bias.to(dtype),
            A=self.A.to(factor_dtype),
            B=self.B.to(factor_dtype),
            dy=self.dy.to(dtype),
        )

    def on(self, device: torch.device) -> LinearProblem:
        """The same problem on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, partition=self.partition.to(device), **tensors)

    def run(self, **kwargs: object) -> tuple[Tensor, ...]:
        """y, dX, dA, dB and, where there is one, dbias. `autocast`, a dtype, is on in the forward, as is usual."""
        return self._run(smoa_linear, **kwargs)

    def run_reference(self, **kwargs: object) -> tuple[Tensor, ...]:
        """The same by the definition in the problem's own dtype, gradients by autograd."""
        return self._run(reference_linear, **kwargs)

    def _run(
        self, function: object, *, autocast: torch.dtype | None = None, **kwargs: object
    ) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (self.x, self.A, self.B)]
        x, A, B = leaves
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        with nullcontext() if autocast is None else torch.autocast(DEVICE.type, autocast):
            y = function(  # type: ignore[operator]
                x, self.weight, bias, A, B, self.partition, self.ranks, scaling=self.scaling, **kwargs
            )
        y.backward(self.dy)
        return (y.detach(), *(leaf.grad for leaf in leaves), *(() if bias is None else (bias.grad,)))


def make_problem(
    *,
    tokens: int = 11,
    out_features: int = 33,
    in_features: int = 57,
    ranks: tuple[int, ...] = (3, 0, 2),
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    random_labels: bool = False,
    fill_padding: bool = True,
    seed: int = 0,
) -> LinearProblem:
    """A problem with nonzero B, on `DEVICE`: drawn on the CPU, so that every device gets the same numbers.

    Padding rows of A and B hold rubbish unless `fill_padding` is False.
    """
    with torch.device("cpu"):
        problem = _draw(
            tokens,
            out_features,
            in_features,
            ranks,
            bias=bias,
            random_labels=random_labels,
            fill_padding=fill_padding,
            seed=seed,
        )
    return problem.to(dtype).on(DEVICE)


def _draw(
    tokens: int,
    out_features: int,
    in_features: int,
    ranks: tuple[int, ...],
    *,
    bias: bool,
    random_labels: bool,
    fill_padding: bool,
    seed: int,
) -> LinearProblem:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    num_blocks, rho = len(ranks), max(ranks)
    weight = randn(out_features, in_features) / in_features**0.5
    if random_labels:
        partition = BlockPartition.from_labels(
            torch.randint(num_blocks, (out_features,), generator=generator),
            torch.randint(num_blocks, (in_features,), generator=generator),
            num_blocks,
        )
    else:
        partition = BlockPartition.from_weight(weight, num_blocks)
    problem = LinearProblem(
        x=randn(tokens, in_features),
        weight=weight,
        bias=randn(out_features) if bias else None,
        A=randn(rho, in_features),
        B=randn(out_features, rho) * 0.3,
        partition=partition,
        ranks=torch.tensor(ranks, dtype=torch.int32),
        dy=randn(tokens, out_features),
        scaling=0.7,
    )
    if not fill_padding:
        slot = torch.arange(rho)
        problem.A[slot[:, None] >= problem.ranks[partition.col_block.long()]] = 0
        problem.B[slot >= problem.ranks[partition.row_block.long(), None]] = 0
    return problem


def obstacle(backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend does not take a dtype on `DEVICE`, in its own words; None where it does."""
    try:
        resolve_backend(backend, DEVICE, dtype, 1)
    except ValueError as error:
        return str(error)
    return None


def flat_call(p: LinearProblem, dropout: Dropout | None = None, backend: str = "eager") -> tuple[Any, ...]:
    """The arguments that both operators share, flattened as they take them."""
    scaling = scaling_tensor(p.scaling, p.x.device)
    adapter = PackedAdapter(p.weight, p.A, p.B, p.partition, p.ranks, scaling, p.ranks.tolist())
    tensors, settings = LinearCall(adapter, dropout, backend).flatten()
    return *tensors, *settings


def relative_error(value: Tensor, truth: Tensor) -> float:
    """`‖value - truth‖ / ‖truth‖`, 0 where both are empty or zero."""
    value, truth = value.detach().double(), truth.detach().double()
    norm = float(torch.linalg.vector_norm(truth))
    error = float(torch.linalg.vector_norm(value - truth))
    return error / norm if norm else error


# Beside the same-dtype error, a floor for results that torch happens to get exactly.
TINY = {torch.float64: 1e-13, torch.float32: 2e-7, torch.bfloat16: 1e-4, torch.float16: 1e-5}


def error_over_budget(ours: Tensor, theirs: Tensor, truth: Tensor) -> float:
    """`err(ours) / (2 · err(same-dtype reference) + tiny)`, both against the float64 truth: 1 uses the budget up."""
    return relative_error(ours, truth) / (2 * relative_error(theirs, truth) + TINY[ours.dtype])
