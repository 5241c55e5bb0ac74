"""What surrounds a layer in training: activation checkpointing, mixed precision with loss scaling, both compiled."""

import sys
from contextlib import nullcontext

import pytest
import torch
from problems import DEVICE, make_problem, relative_error
from test_operator import Block, run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import smoa_kernels.definition.dropout
from smoa_kernels import BlockPartition, FusedSMoALinear
from smoa_kernels.backends import eager
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import PackedAdapter


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.block = block
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


@pytest.mark.numerical
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "compiled"])
def test_checkpointing_recomputes_with_the_same_mask(how: str) -> None:
    torch.manual_seed(0)
    block, x = Block(dropout=0.3), torch.randn(12, 40, requires_grad=True)
    torch.manual_seed(1)
    expected = run(block, x)
    again: nn.Module = Checkpointed(block, how == "reentrant")
    if how == "compiled":
        torch._dynamo.reset()
        again = torch.compile(again, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    ours = run(again, x)
    torch.manual_seed(2)
    other = run(block, x)
    for value, same, different in zip(ours, expected, other, strict=True):
        assert torch.equal(value, same)
        assert not torch.equal(value, different)


@pytest.mark.numerical
def test_loss_scaling_under_autocast() -> None:
    """float16 autocast with GradScaler: the float32 factors' step is the unscaled one's, and an overflow skips it."""
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
        assert relative_error((old - factor) / 0.1, gradient) < 2e-2  # float16 gradients, scaled and not
    changed = [p.detach().clone() for p in factors]
    optimizer.zero_grad()
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        scaler.scale(block(x).float().square().mean() * 1e30).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 256
    assert all(torch.equal(p, old) for p, old in zip(factors, changed, strict=True))


def test_ahead_of_time_inductor(tmp_path: object) -> None:
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(9, 40)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: tokens},))
    try:
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/block.pt2")
    except Exception as error:  # no C++ compiler on this machine
        if "compiler" not in str(error).lower():
            raise
        pytest.skip(f"AOTInductor needs a C++ compiler: {error}")
    loaded = torch._inductor.aoti_load_package(package)
    for count in (9, 64):
        x = torch.randn(count, 40)
        torch.testing.assert_close(loaded(x), block(x).detach(), rtol=1e-4, atol=1e-5)


class NothingRead(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: reading a value, or a size that depends on values."""

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
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("kind", ["fused", "peft", "two adapters"])
def test_nothing_is_read_on_the_host(
    kind: str, backend: str, tokens: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="the kernels run in Triton's interpreter here")
    layer = layer_of(kind, backend, dropout)
    x = torch.randn(tokens, 40, requires_grad=True)
    layer(x).sum().backward()  # what is done once, is done
    monkeypatch.setattr(smoa_kernels.definition.dropout, "draws", lambda device: False)  # masks as on a GPU

    original = Tensor.tolist

    def tolist(self: Tensor) -> list[object]:
        caller = sys._getframe(1).f_code.co_name
        assert caller.endswith("check_ranks"), (
            f"{caller} waits for a GPU"
        )  # that one reads them on the CPU alone
        return original(self)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    with NothingRead():
        layer(x).sum().backward()


@pytest.mark.parametrize("algorithm", ["merged", "split", "expanded", "dropout"])
@pytest.mark.parametrize("host", [True, False])
def test_eager_needs_no_values(algorithm: str, host: bool) -> None:
    """On meta tensors, where whatever reads a value raises: as it must where the host is not told the ranks."""
    p = make_problem(dtype=torch.float32)
    meta = {name: t.to("meta") for name, t in vars(p).items() if isinstance(t, Tensor)}
    x, dy = meta["x"].flatten(0, -2), meta["dy"].flatten(0, -2)
    blocks = BlockPartition.from_tensors([t.to("meta") for t in p.partition.tensors()], p.partition.sizes())
    scaling, seed = torch.ones((), device="meta"), torch.ones((), dtype=torch.int64, device="meta")
    factors = (meta["weight"], meta["A"], meta["B"], blocks, meta["ranks"], scaling)
    adapter = PackedAdapter(*factors, p.ranks.tolist() if host else None)
    dropout = Dropout(seed, 0.3) if algorithm == "dropout" else None
    with nullcontext() if host else pytest.raises(RuntimeError, match="meta"):
        y = eager.forward(x, meta["bias"], adapter, "split" if dropout else algorithm, dropout)
        gradients = eager.backward(dy, x, adapter, dropout, needs_x=True)
        assert [t.shape for t in (y, *gradients)] == [t.shape for t in (dy, x, meta["A"], meta["B"])]


class Made(TorchDispatchMode):
    """Collects the shapes of what operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        self.shapes |= {result.shape} if isinstance(result, Tensor) else set()
        return result


@pytest.mark.parametrize("needs_x", [True, False])
def test_under_dropout_an_x_without_gradient_takes_no_room_for_one(needs_x: bool) -> None:
    p = make_problem(tokens=300, dtype=torch.float32)  # more than are gathered at a time
    adapter = PackedAdapter(p.weight, p.A, p.B, p.partition, p.ranks, torch.tensor(p.scaling))
    with Made() as made:
        eager.backward(p.dy, p.x, adapter, Dropout(torch.tensor(3), 0.3), needs_x=needs_x)
    assert (p.x.shape in made.shapes) == needs_x
