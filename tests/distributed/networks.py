"""The small network of these tests, and the results of one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from problems import relative_error
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smoa_kernels import FusedSMoALinear
from smoa_kernels.peft import SMoAConfig

IN, HIDDEN, BLOCKS, RANK = 20, 30, 3, 7
DOUBLE = 1e-10

# A test runs in each process of a group of two, of four, or of both sizes in turn (`conftest.py`).
in_two, in_four, in_groups = map(pytest.mark.usefixtures, ("two", "four", "group"))
each_kind = pytest.mark.parametrize("kind", ["fused", "peft"])


class Feedforward(nn.Module):
    """x + down(gelu(up(norm(x)))); 30 hidden features do not divide by 4."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(IN, dtype=dtype)
        self.up = nn.Linear(IN, HIDDEN, dtype=dtype)
        self.down = nn.Linear(HIDDEN, IN, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def build(
    kind: str, dtype: torch.dtype, *, dropout: float = 0.0, spectral: bool = True, depth: int = 1
) -> nn.Module:
    """`depth` blocks with adapters whose B is not zero. The same `kind` gives the same numbers.

    "two" is PEFT's with two active adapters of different blocks. Unless `spectral`, blocks are contiguous, so that one
    process's rows or columns belong to only some of the blocks.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(Feedforward(torch.float64) for _ in range(depth)))
    settings = {"r": RANK, "num_blocks": BLOCKS, "block_order": "spectral" if spectral else "contiguous"}
    if kind == "fused":
        for block in model:
            block.norm.requires_grad_(False)
            for name in ("up", "down"):
                linear = getattr(block, name)
                setattr(block, name, FusedSMoALinear.from_linear(linear, **settings, dropout=dropout))
    else:
        config = SMoAConfig(**settings, smoa_dropout=dropout, target_modules=["up", "down"])
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        if kind == "two":
            model.add_adapter("other", replace(config, r=4, num_blocks=2))
            model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.3)
        if parameter.requires_grad:
            parameter.data = parameter.data.double()
    return model.to(dtype)


def batch(dtype: torch.dtype, tokens: int = 24) -> tuple[Tensor, Tensor]:
    """x and the target."""
    generator = torch.Generator().manual_seed(2)
    x, target = (torch.randn(4, tokens // 4, IN, dtype=torch.float64, generator=generator) for _ in range(2))
    return x.to(dtype), target.to(dtype)


def part(tensors: tuple[Tensor, ...], rank: int | None = None, size: int | None = None) -> tuple[Tensor, ...]:
    """This process's share of a batch."""
    rank, size = rank if rank is not None else dist.get_rank(), size or dist.get_world_size()
    return tuple(t.chunk(size)[rank] for t in tensors)


def step(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every factor, named as in the unwrapped model."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = model(x)
    nn.functional.mse_loss(y, target.to(y.dtype)).backward()  # torch 2.11 needs equal dtypes
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {
        "y": y.detach(),
        "x": x.grad,
        **{n.removeprefix("_orig_mod.").removeprefix("module."): g for n, g in grads.items()},
    }


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_factors(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = DOUBLE) -> None:
    """Asserts that the factors' gradients are the expected ones."""
    factors = [name for name in expected if "smoa." in name]
    assert len(factors) == len([n for n in ours if "smoa." in n]) > 0
    for name in factors:
        assert relative_error(whole(ours[name]), expected[name]) < tolerance, name


def assert_as_one_process(
    kind: str,
    wrap: Callable[[nn.Module], nn.Module],
    share: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None,
    **settings: Any,
) -> nn.Module:
    """The wrapped model computes the results of one process, in two steps in a row.

    In float64 results agree to a few roundings, in float32 within twice one process's own error. If each process has a
    share of the batch, this is checked for its part of y and for the factors' gradients.
    """
    dtypes = torch.float64, torch.float32
    single = {dtype: step(build(kind, dtype, **settings), *batch(dtype)) for dtype in dtypes}
    truth = single[torch.float64]
    names = [name for name in truth if share is None or "smoa." in name]
    for dtype in single:
        model = wrap(build(kind, dtype, **settings))
        for _ in range(2):
            model.zero_grad()
            ours = step(model, *(batch(dtype) if share is None else share(batch(dtype))))
        assert ours.keys() == truth.keys()
        if share is not None and dtype == torch.float64:
            assert relative_error(ours["y"], share((truth["y"],))[0]) < DOUBLE
        for name in names:
            budget = 2 * relative_error(single[torch.float32][name], truth[name]) + 1e-7
            allowed = DOUBLE if dtype == torch.float64 else budget
            assert relative_error(whole(ours[name]), truth[name]) < allowed, name
    return model


def blocks(model: nn.Module) -> nn.Sequential:
    return model.base_model.model if hasattr(model, "base_model") else model


def layers(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The layers up and down of the first block."""
    return blocks(model)[0].up, blocks(model)[0].down


class Traffic(TorchDispatchMode):
    """Counts calls and bytes of each collective while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._opname.strip("_")
            # the tensors that a process sends; in these two calls the first argument is the result
            sent = args[1] if name in ("allgather_base", "reduce_scatter_base") else args[0]
            tensors = [t for t in tree_leaves(sent) if isinstance(t, Tensor)]
            self.calls[name] += 1
            self.bytes[name] += sum(t.numel() * t.itemsize for t in tensors)
        return function(*args, **(kwargs or {}))
