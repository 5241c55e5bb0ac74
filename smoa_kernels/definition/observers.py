"""Who watches a call: compilers, tracers, transforms, modes and profilers, which must see operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = frozenset({Tensor, Parameter})


def is_traced() -> bool:
    """Whether a compiler or `torch.jit.trace` records what happens."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_observed(*tensors: Tensor) -> bool:
    """Whether a compiler, tracer, transform, mode, profiler or tensor of another kind needs the dispatcher."""
    return (
        is_traced()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
        or tensors[0]._is_zerotensor()
        or tensors[0].is_neg()
    )
