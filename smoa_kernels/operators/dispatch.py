"""How the package's operators are registered with torch, and when a call must go through torch's dispatcher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = frozenset({Tensor, Parameter})


def parameter(module: Any, name: str) -> Any:
    """The attribute `name` of a module, mostly a parameter, which takes `nn.Module` four times as long to find."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def is_traced() -> bool:
    """Whether a compiler or `torch.jit.trace` records what happens."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_observed(*tensors: Tensor) -> bool:
    """Whether a compiler, tracer, transform, mode, profiler or tensor of another kind needs the dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
        or torch._C._functorch.is_functorch_wrapped_tensor(tensors[0])  # left over from a transform
        or tensors[0]._is_zerotensor()
        or tensors[0].is_neg()
    )


_LIBRARY = torch.library.Library("smoa", "DEF")


def register(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    function: Any,
    formula: Callable[..., Any],
) -> tuple[Any, Callable[..., Any]]:
    """Define an opaque operator of "smoa" with its derivative; return it, and the function that Python calls.

    That function records the derivative and then calls the operator, so that the dispatcher converts the arguments
    once. Compilers get the operator itself. `torch.library.register_autograd` searches the schema for each argument.

    Args:
        schema: "name(arguments) -> results".
        kernel: computes it, on any device.
        fake: makes results of the right shapes and dtypes, without values.
        function: the autograd function. Its arguments are the operator's, which its `forward` will be.
        formula: computes it in forward mode, or raises an error.
    """
    name = _LIBRARY.define(schema)
    operator = getattr(torch.ops.smoa, name).default
    function.forward = staticmethod(partial(_below_autograd, operator))
    untraced = torch._compile._disable_dynamo(kernel)  # else Dynamo compiles it if a caller fails

    def recorded(*args: Any) -> Any:
        tangents = (forward_ad.unpack_dual(value).tangent for value in args if isinstance(value, Tensor))
        # The plain operator's result would have no tangent, which counts as zero.
        if forward_ad._current_level >= 0 and any(tangent is not None for tangent in tangents):
            return formula(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        return _below_autograd(operator, *args)

    def call(*args: Any) -> Any:
        if is_traced():
            return operator(*args)
        if not torch._C._are_functorch_transforms_active():
            return recorded(*args)
        return formula(*args) if forward_ad._current_level >= 0 else function.apply(*args)

    def opaque(*args: Any) -> Any:
        return (untraced if "torch._dynamo" in sys.modules else kernel)(*args)

    _LIBRARY.impl(name, opaque, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, recorded, "Autograd")
    torch.library.register_fake(f"smoa::{name}", fake, lib=_LIBRARY)
    return operator, call


def _below_autograd(operator: Any, *args: Any) -> Any:
    """Call an operator without recording its derivative."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
