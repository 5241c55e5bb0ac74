"""Compares adapted experts with their class's own forward over W_eff, in float64."""

import copy

import torch
from problems import error_over_budget
from torch.func import functional_call

from smoa_kernels.definition.reference import reference_delta_weight


def assert_within_budget(experts, dtype):
    """y and all gradients of an adapted module of six experts of hidden size 32."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    x, dy = draw(9, 32), draw(9, 32)
    # Expert 5 gets no token, expert 0 gets all of them.
    index = torch.stack([torch.zeros(9, dtype=torch.int64), torch.arange(9) % 4 + 1], 1)
    routing = draw(9, 2).abs()
    leaves = [t.requires_grad_() for t in (x, routing)]
    factors = [f for w in experts.weights.values() for f in (w.smoa_A["default"], w.smoa_B["default"])]
    y = experts(x, index, routing)
    found = y.detach(), *torch.autograd.grad(y, [*leaves, *factors], dy)
    same = definition(experts, x, index, routing, dy)
    truth = definition(
        experts, *(t.double() if t.is_floating_point() else t for t in (x, index, routing, dy))
    )
    names = ["y", "dX", "routing", *(f"{w}.{side}" for w in experts.weights for side in "AB")]
    for name, ours, theirs, exact in zip(names, found, same, truth, strict=True):
        assert ours.dtype == (torch.float32 if "." in name else dtype), name
        assert error_over_budget(ours.to(dtype), theirs, exact) <= 1, name
    for gradient in found[3:]:
        assert not gradient[5].any()


def definition(experts, x, index, routing, dy):
    """y, and the gradients of x, the routing weights and all factors: transformers' loop over W_eff."""
    base = copy.deepcopy(experts.base_layer)
    base.config._experts_implementation = "eager"
    leaves = [t.detach().requires_grad_() for t in (x, routing)]
    changed, factors = {}, []
    for name, weight in experts.weights.items():
        adapter = weight.packed("default", weight.base_weight().to(x.dtype))
        A, B = (t.detach().to(x.dtype).requires_grad_() for t in (adapter.A, adapter.B))
        layers = adapter.experts(range(len(A)))
        scaling = float(adapter.scaling)
        deltas = [
            reference_delta_weight(e.weight, a, b, e.partition, e.ranks, scaling=scaling)
            for e, a, b in zip(layers, A, B, strict=True)
        ]
        total = adapter.weight + torch.stack(deltas)
        changed[name] = total.transpose(1, 2) if weight.fan_in_fan_out else total
        factors += [A, B]
    y = functional_call(base.to(x.dtype), changed, (leaves[0], index, leaves[1]))
    return y.detach(), *torch.autograd.grad(y, [*leaves, *factors], dy)
