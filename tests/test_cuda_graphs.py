"""On a GPU, forward and backward never wait for the device, and a CUDA graph can capture them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from problems import relative_error
from torch import Tensor, nn

from smoa_kernels import FusedSMoALinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float32]


def network(kind: str, dtype: torch.dtype, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 768), nn.GELU(), nn.Linear(768, 512)).to("cuda", dtype)
    if kind == "peft":
        peft = pytest.importorskip("peft", reason="needs the peft extra")
        from smoa_kernels.peft import SMoAConfig

        config = SMoAConfig(r=16, num_blocks=4, smoa_dropout=dropout, target_modules=["0", "2"])
        model = peft.get_peft_model(base, config)
    else:
        for name in ("0", "2"):
            backend = "eager" if kind == "eager" else "auto"
            settings = {"r": 16, "num_blocks": 4, "dropout": dropout, "backend": backend}
            layer = FusedSMoALinear.from_linear(base[int(name)], **settings)
            setattr(base, name, layer)
        model = base
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def passes(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        y = model(x)
        y.float().square().mean().backward()
        return y

    return run


def clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


@contextmanager
def syncs_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [8, 1024])  # the forms for few and for many tokens
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["fused", "eager", "peft"])
def test_the_host_waits_for_nothing(kind: str, dtype: torch.dtype, dropout: float, tokens: int) -> None:
    model = network(kind, dtype, dropout)
    run = passes(model, torch.randn(tokens, 512, device="cuda", dtype=dtype, requires_grad=True))
    run()  # compiles the kernels; compilation may wait
    torch.cuda.synchronize()
    with syncs_are_errors():
        run()


@pytest.mark.parametrize("tokens", [8, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["fused", "eager", "peft"])
def test_a_captured_step_replays_on_new_inputs(kind: str, dtype: torch.dtype, tokens: int) -> None:
    model = network(kind, dtype, dropout=0.0)
    x = torch.randn(tokens, 512, device="cuda", dtype=dtype, requires_grad=True)
    run = passes(model, x)
    graph, y = captured(model, run)
    fresh = torch.randn_like(x)
    with torch.no_grad():
        x.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [y.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    clear(model)
    x.grad = None
    expected = [run().detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for ours, value in zip(replayed, expected, strict=True):
        assert relative_error(ours, value) < 1e-6


@pytest.mark.parametrize("kind", ["fused", "eager"])
def test_each_replay_draws_another_mask(kind: str) -> None:
    """The seed is drawn during capture, so each replay advances the generator's offset."""
    model = network(kind, torch.bfloat16, dropout=0.3)
    run = passes(model, torch.randn(256, 512, device="cuda", dtype=torch.bfloat16))
    graph, y = captured(model, run)
    graph.replay()
    first = y.clone()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.isfinite(first).all()
    assert not torch.equal(first, y)


def captured(model: nn.Module, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one step. Each replay writes the gradients anew and does not accumulate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            clear(model)
            run()
    torch.cuda.current_stream().wait_stream(side)
    clear(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph, y
