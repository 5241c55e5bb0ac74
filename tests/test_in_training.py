"""Layers in training: activation checkpointing, mixed precision with loss scaling, both compiled."""

import sys

import pytest
import torch
from problems import DEVICE, relative_error
from test_operator import Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import smoa_kernels.definition.dropout
from smoa_kernels import FusedSMoALinear


@pytest.mark.numerical
def test_compiled_checkpointing_recomputes_with_the_same_mask() -> None:
    torch.manual_seed(0)
    block, x = Block(dropout=0.3), torch.randn(12, 40, requires_grad=True)
    torch._dynamo.reset()
    again = torch.compile(
        lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    found = []
    for function, seed in ((block, 1), (again, 1), (block, 2)):
        torch.manual_seed(seed)
        y = function(x)
        wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
        found.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for expected, ours, different in zip(*found, strict=True):
        assert torch.equal(ours, expected)
        assert not torch.equal(ours, different)


@pytest.mark.numerical
def test_loss_scaling_under_autocast() -> None:
    """float16 autocast with GradScaler: float32 factors step as without scaling; an overflow skips the step."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(64, 40)
    factors = [p for p in block.parameters() if p.requires_grad and p.ndim == 2]
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        loss = block(x).float().square().mean()
    plain = torch.autograd.grad(loss, factors)
    optimizer, before = torch.optim.SGD(factors, lr=0.1), [p.detach().clone() for p in factors]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        loss = block(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    for factor, old, gradient in zip(factors, before, plain, strict=True):
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32
        assert relative_error((old - factor) / 0.1, gradient) < 2e-2  # float16 gradients in both
    changed = [p.detach().clone() for p in factors]
    optimizer.zero_grad()
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        scaler.scale(block(x).float().square().mean() * 1e30).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 256
    assert all(torch.equal(p, old) for p, old in zip(factors, changed, strict=True))


@pytest.mark.slow
def test_ahead_of_time_inductor(tmp_path: object) -> None:
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(9, 40)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: tokens},))
    try:
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/block.pt2")
    except Exception as error:  # this machine has no C++ compiler
        if "compiler" not in str(error).lower():
            raise
        pytest.skip(f"AOTInductor needs a C++ compiler: {error}")
    loaded = torch._inductor.aoti_load_package(package)
    for count in (9, 64):
        x = torch.randn(count, 40)
        torch.testing.assert_close(loaded(x), block(x).detach(), rtol=1e-4, atol=1e-5)


class NothingRead(TorchDispatchMode):
    """Forbids operators that make the host wait for a GPU: reading a value or a size that depends on values."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "is_nonzero",
        "masked_select",
        "unique",
        "bincount",
    )

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        assert function._opname not in self.FORBIDDEN, function
        return function(*args, **(kwargs or {}))


def layer_of(kind: str, backend: str, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    if kind == "fused":
        return FusedSMoALinear(40, 33, r=7, num_blocks=3, dropout=dropout, backend=backend)
    peft = pytest.importorskip("peft", reason="needs the peft extra")
    from smoa_kernels.peft import SMoAConfig

    settings = {"r": 7, "smoa_dropout": dropout, "target_modules": ["0"], "backend": backend}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(40, 33)), SMoAConfig(num_blocks=3, **settings))
    if kind == "two adapters":
        model.add_adapter("other", SMoAConfig(num_blocks=2, **settings))
        model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_graphs.py shows it on the GPU itself")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [2, 20])  # the forms for few and for many tokens
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["fused", "peft", "two adapters"])
def test_nothing_is_read_on_the_host(
    kind: str, backend: str, tokens: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="the kernels run in Triton's interpreter here")
    layer = layer_of(kind, backend, dropout)
    x = torch.randn(tokens, 40, requires_grad=True)
    layer(x).sum().backward()  # one-time work happens here
    monkeypatch.setattr(smoa_kernels.definition.dropout, "draws", lambda device: False)  # masks as on a GPU

    original = Tensor.tolist

    def tolist(self: Tensor) -> list[object]:
        caller = sys._getframe(1).f_code.co_name
        assert caller.endswith("check_ranks"), (
            f"{caller} waits for a GPU"
        )  # check_ranks reads on the CPU only
        return original(self)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    with NothingRead():
        layer(x).sum().backward()
