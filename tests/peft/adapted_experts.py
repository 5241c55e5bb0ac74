"""Compares adapted experts with their class's own forward over W_eff, in float64."""

import torch
from problems import error_over_budget

from benchmarks.experts import computed, defined


def assert_within_budget(experts, dtype):
    """y and all gradients of an adapted module of six experts of hidden size 32."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    x, dy = draw(9, 32), draw(9, 32)
    # Expert 5 gets no token, expert 0 gets all of them.
    index = torch.stack([torch.zeros(9, dtype=torch.int64), torch.arange(9) % 4 + 1], 1)
    given = x.requires_grad_(), index, draw(9, 2).abs().requires_grad_()
    found = computed(experts, experts, *given, dy)
    same, truth = (defined(experts, *given, dy, into) for into in (dtype, torch.float64))
    names = ["y", "dX", "routing", *(f"{w}.{side}" for w in experts.weights for side in "AB")]
    for name, ours, reference, exact in zip(names, found, same, truth, strict=True):
        assert ours.dtype == (torch.float32 if "." in name else dtype), name
        assert error_over_budget(ours.to(dtype), reference, exact) <= 1, name
    for gradient in found[3:]:
        assert not gradient[5].any()
