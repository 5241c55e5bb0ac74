"""Random problems for tests of the operator, from one factory for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoa_kernels import BlockPartition, FusedSMoALinear, smoa_linear
from smoa_kernels.backends import BACKEND_CHOICES, algorithms_of, resolve_backend
from smoa_kernels.definition import reference
from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import PackedAdapter, padding_masks, scaling_tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where numerical tests compute; the kernels run on the CPU under Triton's interpreter (conftest.py)."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = DTYPES[2:]
SLOW = pytest.mark.slow
LEAVES = ("x", "A", "B", "bias")
NAMES = ("y", "dX", "dA", "dB", "dbias")
"""What a run returns, the gradients in the order of `LEAVES`."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "column-major": lambda t: t.T.contiguous().T,
    "padded rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "strided columns": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda t: torch.cat([t[:1], t])[-t.shape[0] or t.shape[0] + 1 :],
    "negated": lambda t: torch._neg_view(-t),  # like the imaginary part of a lazy conjugate
}
"""The same matrix, stored otherwise."""

_PRIMES = {"granule": 8, "out_features": 31, "in_features": 29, "ranks": (2, 0, 1)}
ORDERS: dict[str, dict[str, Any]] = {
    "spectral": {},
    "contiguous": {"block_order": "contiguous"},
    "granules of 4": {"granule": 4, "out_features": 36, "in_features": 48},
    "granules of 8": {"granule": 8, "out_features": 40, "in_features": 64},
    "granules of 16": {"granule": 16, "out_features": 64, "in_features": 80},
    "short granules": {"granule": 8},
    "granules of 8, primes": _PRIMES,
    "contiguous granules of 8, primes": {**_PRIMES, "block_order": "contiguous"},
    "random granules of 8, primes": {**_PRIMES, "block_order": "random"},
    "random": {"block_order": "random"},
    "one contiguous block": {"block_order": "contiguous", "ranks": (4,), "bias": False},
    "one random granule": {"block_order": "random", "granule": 64, "ranks": (4,)},
}
"""How blocks are made, and the sizes. Where sizes are multiples of the granule, the eager backend copies runs."""

# The second order of each case, in turn. The eager backend has its own code for contiguous blocks in every algorithm.
_IN_TURN = ("contiguous", "short granules", "contiguous", "random")


def packed(
    weight: Tensor, A: Tensor, B: Tensor, partition: BlockPartition, ranks: Tensor, *, scaling: float | Tensor
) -> PackedAdapter:
    return PackedAdapter(weight, A, B, partition, ranks, scaling_tensor(scaling, weight.device))


def reference_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *factors: Any,
    scaling: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """The definition, with the arguments of `smoa_linear`."""
    return reference.forward(x, bias, packed(weight, *factors, scaling=scaling), "auto", dropout)


@dataclass(frozen=True)
class LinearProblem:
    """Arguments of `smoa_linear`, and dY for the backward."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    partition: BlockPartition
    ranks: Tensor
    dy: Tensor
    scaling: float | Tensor

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

    def on(self, device: torch.device | str) -> LinearProblem:
        """The same problem on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, partition=self.partition.to(device), **tensors)

    def stored(self, layout: Callable[[Tensor], Tensor]) -> LinearProblem:
        """The same problem with all matrices in another layout."""
        names = ("x", "weight", "A", "B", "dy")
        return replace(self, **{name: layout(getattr(self, name)) for name in names})

    def leaves(self, *names: str) -> LinearProblem:
        """The same memory as leaves of a graph; the named ones (from `LEAVES`) require a gradient."""
        given = {name: getattr(self, name) for name in LEAVES if getattr(self, name) is not None}
        return replace(self, **{n: t.detach().requires_grad_(n in names) for n, t in given.items()})

    def forward(self, function: Callable[..., Tensor] = smoa_linear, **options: object) -> Tensor:
        """Y of one call."""
        factors = (self.A, self.B, self.partition, self.ranks)
        return function(self.x, self.weight, self.bias, *factors, scaling=self.scaling, **options)

    def run(self, **options: object) -> tuple[Tensor, ...]:
        """y, dX, dA and dB, with a bias also dbias. `autocast` is a dtype; it is on in the forward only."""
        return self._run(smoa_linear, **options)

    def run_reference(self, *, dropout: Dropout | None = None) -> tuple[Tensor, ...]:
        """The same results by the definition in the problem's own dtype, gradients by autograd."""
        return self._run(reference_linear, dropout=dropout)

    def _run(
        self, function: Callable[..., Tensor], *, autocast: torch.dtype | None = None, **options: object
    ) -> tuple[Tensor, ...]:
        leaves = self.leaves(*LEAVES)
        with nullcontext() if autocast is None else torch.autocast(DEVICE.type, autocast):
            y = leaves.forward(function, **options)
        y.backward(self.dy)
        found = [getattr(leaves, name) for name in LEAVES]
        return (y.detach(), *(leaf.grad for leaf in found if leaf is not None))

    def delta_weight(self) -> Tensor:
        """ΔW by the definition, in the problem's dtype."""
        return reference.delta_weight(self.adapter())

    def adapter(self, place: Callable[[Tensor], Tensor] = lambda t: t) -> PackedAdapter:
        """The packed adapter; each of its matrices passes through `place` (strides, guards)."""
        matrices = map(place, (self.weight, self.A, self.B))
        return packed(*matrices, self.partition, self.ranks, scaling=self.scaling)

    def layer(self, **settings: object) -> FusedSMoALinear:
        """A layer made from these tensors; its blocks come from W0's spectrum unless `partition` is given."""
        base = nn.Linear(self.x.shape[1], self.dy.shape[1], bias=self.bias is not None, dtype=self.x.dtype)
        base.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            base.bias = nn.Parameter(self.bias)
        ranks = self.ranks.tolist()
        sizes = {"r": sum(ranks), "num_blocks": len(ranks), "block_ranks": ranks}
        layer = FusedSMoALinear.from_linear(base, alpha=self.scaling * sum(ranks), **sizes, **settings)
        layer.smoa.A, layer.smoa.B = nn.Parameter(self.A), nn.Parameter(self.B)
        return layer


@dataclass(frozen=True)
class Case:
    """One way to compute the layer. An axis added here reaches every test of the contract.

    Attributes:
        backend: one that runs here.
        algorithm: one of its algorithms, or "dropout".
        dtype: one that it takes.
        order: one of `ORDERS`.
    """

    backend: str
    algorithm: str
    dtype: torch.dtype
    order: str = "spectral"

    def __str__(self) -> str:
        name = f"{self.backend}-{self.algorithm}-{str(self.dtype).removeprefix('torch.')}"
        return name if self.order == "spectral" else f"{name}-{self.order}"

    @property
    def dropout(self) -> Dropout | None:
        seed = torch.tensor(5, device=DEVICE)
        return Dropout(seed, 0.3) if self.algorithm == "dropout" else None

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments for `smoa_linear`."""
        dropout, algorithm = self.dropout, {"algorithm": self.algorithm}
        if dropout is not None:
            algorithm = {"dropout_p": dropout.p, "dropout_seed": dropout.seed}
        return {"backend": self.backend, **algorithm}

    def problem(self, *, random_labels: bool = False, **sizes: object) -> LinearProblem:
        """A problem in the case's dtype and order (:func:`make_problem`); random labels stand in for spectral ones."""
        labels = {"random_labels": random_labels} if self.order == "spectral" else ORDERS[self.order]
        return make_problem(dtype=self.dtype, **(labels | sizes))  # type: ignore[arg-type]

    def definition(self, p: LinearProblem) -> tuple[Tensor, ...]:
        """The definition's results for a problem, in the problem's dtype, with the case's mask."""
        return p.run_reference(dropout=self.dropout)


def cases(backend: str) -> Iterator[Case]:
    """Every algorithm of a backend in every supported dtype, the widest dtype first.

    Each case of the CPU's backends comes in a second order too.
    """
    dtypes = [dtype for dtype in DTYPES if unsupported_reason(backend, dtype) is None]
    if dtypes:
        algorithms = ("auto",) if backend == "reference" else algorithms_of(backend)
        for i, algorithm in enumerate((*algorithms, "dropout")):
            for j, dtype in enumerate(dtypes):
                case = Case(backend, algorithm, dtype)
                yield case
                if backend in ("eager", "native"):
                    yield replace(case, order=_IN_TURN[(i + j) % len(_IN_TURN)])


def in_orders(cases: Iterable[Case], *orders: str) -> list[Case]:
    """Each backend, algorithm and dtype of these cases in these orders."""
    return [replace(case, order=order) for case in cases if case.order == "spectral" for order in orders]


def interpreted(case: Case) -> bool:
    """Whether a case runs in Triton's interpreter, which takes half a second."""
    return case.backend == "triton" and DEVICE.type == "cpu"


def each(
    values: Callable[[str], list[Case]], *, slow: Callable[[Case], bool] = lambda case: False
) -> pytest.MarkDecorator:
    """A test for each case of every backend. A backend that does not run here gives one skipped test, with the reason.

    Cases marked `slow` run in `make test-all` only; the others cover most of the same code.
    """
    found = []
    for backend in BACKEND_CHOICES[1:]:
        found += [
            pytest.param(case, id=str(case), marks=[SLOW] if slow(case) else []) for case in values(backend)
        ]
        if (reason := unsupported_reason(backend)) is not None:
            found.append(pytest.param(None, id=backend, marks=pytest.mark.skip(reason=reason)))
    return pytest.mark.parametrize("case", found)


def widest(backend: str) -> list[Case]:
    """Each algorithm of a backend in its widest dtype, with spectral blocks and in one other order."""
    found = {(case.algorithm, case.order == "spectral"): case for case in reversed(list(cases(backend)))}
    return list(found.values())


def some(backend: str, *dtypes: torch.dtype) -> list[Case]:
    return [case for case in cases(backend) if case.dtype in dtypes]


def make_problem(
    *,
    tokens: int = 11,
    out_features: int = 33,
    in_features: int = 57,
    ranks: tuple[int, ...] = (3, 0, 2),
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    random_labels: bool = False,
    block_order: str = "spectral",
    granule: int = 1,
    fill_padding: bool = True,
    seed: int = 0,
) -> LinearProblem:
    """A problem with nonzero B, on `DEVICE`. It is drawn on the CPU, so that every device gets the same numbers.

    Padding rows of A and B hold rubbish unless `fill_padding` is False.
    """
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        def labels(size: int) -> Tensor:
            return torch.randint(num_blocks, (size,), generator=generator)

        num_blocks, rho = len(ranks), max(ranks)
        weight = randn(out_features, in_features) / in_features**0.5
        if random_labels:
            partition = BlockPartition.from_labels(labels(out_features), labels(in_features), num_blocks)
        else:
            partition = BlockRule(num_blocks, block_order, granule).build(weight)
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
            used_A, used_B = padding_masks(partition, problem.ranks, rho)
            problem.A[~used_A], problem.B[~used_B] = 0, 0
    return problem.to(dtype).on(DEVICE)


def unsupported_reason(backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """A backend's own reason for refusing a dtype on `DEVICE`; None if it takes it."""
    try:
        resolve_backend(backend, DEVICE, dtype, 1)
    except ValueError as error:
        return str(error)
    return None


def if_it_runs(backend: str, *marks: pytest.MarkDecorator) -> object:
    """A test's parameter, skipped with the reason where the backend does not run."""
    reason = unsupported_reason(backend)
    return pytest.param(backend, marks=[*marks, pytest.mark.skipif(reason is not None, reason=str(reason))])


def relative_error(value: Tensor, truth: Tensor) -> float:
    """`‖value - truth‖ / ‖truth‖`; 0 if both are empty or zero."""
    value, truth = value.detach().double(), truth.detach().double()
    norm = float(torch.linalg.vector_norm(truth))
    error = float(torch.linalg.vector_norm(value - truth))
    return error / norm if norm else error


# A floor for the error of the reference, because torch sometimes computes a result exactly.
TINY = {torch.float64: 1e-13, torch.float32: 3.5e-7, torch.bfloat16: 1e-4, torch.float16: 1e-5}


def error_over_budget(ours: Tensor, same: Tensor, truth: Tensor) -> float:
    """`err(ours) / (2 · err(same-dtype reference) + tiny)`, both against the float64 truth; above 1 is over budget.

    There are two errors, the norm's and the largest element's; the larger quotient counts. A few very large elements
    decide both. For them `tiny` allows one rounding, since the reference may by luck have none.
    """
    size = truth.abs()
    few = int((size > size.max() / 4).sum() if size.numel() else 0) < 32
    tiny = max(TINY[ours.dtype], torch.finfo(ours.dtype).eps / 2) if few else TINY[ours.dtype]
    norm = relative_error(ours, truth) / (2 * relative_error(same, truth) + tiny)
    if not truth.numel():
        return norm
    furthest, allowed = (float((value.double() - truth).abs().max()) for value in (ours, same))
    element = furthest / (2 * allowed + tiny * float(size.max())) if furthest else 0.0
    return norm if norm != norm else max(norm, element)


def shares(found: Sequence[Tensor], same: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    """The share of its error budget that each result of a run uses, by its name."""
    for value, rounded, exact in zip(found, same, truth, strict=True):
        assert (value.dtype, value.shape) == (rounded.dtype, exact.shape)
    return dict(zip(NAMES, map(error_over_budget, found, same, truth), strict=False))


SHARES: dict[str, dict[str, float]] = {}
"""The largest share of its error budget that each result has used, by backend, algorithm and dtype (`make trust`)."""


def assert_within_budget(found: tuple[Tensor, ...], case: Case, p: LinearProblem) -> None:
    """Asserts that every error of a run is at most twice the definition's error in that dtype."""
    used = shares(found, case.definition(p), case.definition(p.to(torch.float64)))
    worst = SHARES.setdefault(str(replace(case, order="spectral")), {})
    for name, share in used.items():
        worst[name] = max(share, worst.get(name, 0.0), key=lambda s: (s != s, s))  # NaN counts as the largest
    assert all(share <= 1 for share in used.values()), used


def small_update(
    case: Case, tokens: int, bias: bool, in_features: int = 16, delta: float = 1e-4
) -> LinearProblem:
    """A problem with an update of `delta` of the weights in rms and factors in float32."""
    p = make_problem(tokens=tokens, out_features=192, in_features=in_features, ranks=(4,), bias=bias)
    relative = p.scaling * (p.B @ p.A).square().mean().sqrt()
    return replace(p, B=p.B * (delta / relative)).to(case.dtype, torch.float32)


def survival(case: Case, p: LinearProblem, run: Callable[[LinearProblem], Tensor]) -> tuple[float, float]:
    """The fraction of the exact adapter output that arrives in a run's output, and the noise of this measure."""
    base = replace(p, B=torch.zeros_like(p.B))
    truth = case.definition(p.to(torch.float64))[0] - case.definition(base.to(torch.float64))[0]
    share = float(((run(p).double() - run(base).double()) * truth).sum() / truth.square().sum())
    # y errs by 2^-9·|y|/√3 per element (bf16) against an adapter output of 1e-4·|y|.
    return share, {torch.bfloat16: 11, torch.float16: 1.5}[case.dtype] * 2**0.5 / truth.numel() ** 0.5
