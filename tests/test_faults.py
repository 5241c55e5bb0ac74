"""Faults inside a step: a kernel that raises at launch, memory that runs out at any allocation, an interrupted merge.

The promise: the exception reaches the caller, W0 keeps every bit, and A and B each have a whole gradient or none. After
gradients are zeroed, the same step gives the same bits. All memory of the failed step is freed. Faults of a GPU void
the promise: they end the process. NaN and Inf: tests/test_contract.py.
"""

import copy
import gc
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from problems import SLOW, unsupported_reason
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smoa_kernels import FusedSMoALinear
from smoa_kernels.backends import triton_unsupported_reason
from smoa_kernels.operators import linear as operator

INTERPRETER_REASON = triton_unsupported_reason(torch.device("cpu"))
needs_interpreter = pytest.mark.skipif(INTERPRETER_REASON is not None, reason=f"on CPU: {INTERPRETER_REASON}")
TRITON = pytest.param("triton", marks=needs_interpreter)


class FailingAt(TorchDispatchMode):
    """Raise at the n-th torch operator of forward or backward; a step with fewer operators completes.

    `born` lists the memory of every result until then, whoever holds it: torch's graph, Python or nobody.
    """

    def __init__(self, n: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.error = n, error
        self.born: list[StorageWeakRef] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = {operator.linear_operator: operator._forward}
        ours[operator.linear_backward_operator] = operator._backward
        if function in ours:  # the dispatcher does not see the calls inside, so run it in this mode
            with self:
                return ours[function](*args)
        self.left -= 1
        if self.left == 0:
            raise self.error(f"at {function}")
        found = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.born += [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        return found


MANY = 10**9


def count(run: Callable[[], object]) -> int:
    """The number of torch operators that `run` calls."""
    counting = FailingAt(MANY, KeyboardInterrupt)
    with counting:
        run()
    return MANY - counting.left


def build(backend: str, algorithm: str = "auto", dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"r": 5, "num_blocks": 3, "backend": backend, "algorithm": algorithm, "dropout": dropout}
    layers = [FusedSMoALinear(24, 20, **options), nn.Tanh(), FusedSMoALinear(20, 17, **options)]
    layers = layers[:1] if backend == "triton" else layers  # the interpreter is slow
    for layer in layers[::2]:
        layer.smoa.B.data.normal_(0, 0.1)
    return nn.Sequential(*layers)


def step(model: nn.Sequential, optimizer: torch.optim.Optimizer, fault: Any = None) -> Tensor:
    """One training step on fresh data; a fault may strike its forward or backward."""
    torch.manual_seed(1)
    x = torch.randn(9, 24, requires_grad=True)
    optimizer.zero_grad()
    with fault or warnings.catch_warnings():
        loss = model(x).square().mean()
        loss.backward()
    optimizer.step()
    return loss.detach()


def check_recovers(model: nn.Sequential, fault: Callable[[], Any], error: type[BaseException]) -> None:
    """A failed step changes gradients only, and the next step gives the same bits as without the failure."""
    other = copy.deepcopy(model)
    optimizers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad]) for m in (model, other)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error):
        step(model, optimizers[0], fault())
    optimizers[0].zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    losses = [step(one, optimizer) for one, optimizer in zip((model, other), optimizers, strict=True)]
    assert torch.equal(*losses)
    for (name, ours), reference in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, reference), name
        assert ours.grad is None or torch.equal(ours.grad, reference.grad), name


@contextmanager
def replaced(module: Any, name: str, call: Callable[..., Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        yield


class LaunchError(RuntimeError):
    """The error of a failing launch."""


# The launchers of a step, by algorithm and dropout, and whether one raises after it has written.
LAUNCHERS = [
    ("gather_columns", "split", 0.0, False),
    ("modulated_blocks", "split", 0.0, True),
    ("contract", "split", 0.0, True),
    ("modulated_weight", "merged", 0.0, False),
    ("fused_linear", "fused", 0.0, True),
    ("scatter_columns", "auto", 0.3, True),
]


@SLOW
@needs_interpreter
@pytest.mark.parametrize(("name", "algorithm", "dropout", "late"), LAUNCHERS)
def test_a_kernel_that_raises(name: str, algorithm: str, dropout: float, late: bool) -> None:
    backend: Any = importlib.import_module("smoa_kernels.backends.triton")
    # The module in which the backend looks the launcher up.
    module = backend.modulate if name == "modulated_weight" else backend
    launch, calls = getattr(module, name), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if late:
            launch(*args, **kwargs)
        raise LaunchError

    model = build("triton", algorithm, dropout)
    check_recovers(model, lambda: replaced(module, name, fails), LaunchError)
    assert calls == [name]


@SLOW
@pytest.mark.parametrize(
    ("backend", "algorithm", "dropout"),
    [
        *(("eager", algorithm, 0.0) for algorithm in ("merged", "split", "expanded")),
        ("eager", "split", 0.3),
        ("native", "merged", 0.0),
        ("native", "split", 0.3),
        pytest.param("triton", "auto", 0.0, marks=needs_interpreter),
        pytest.param("triton", "auto", 0.3, marks=needs_interpreter),
    ],
)
def test_out_of_memory_at_every_call(backend: str, algorithm: str, dropout: float) -> None:
    """Each torch call of a step runs out of memory in turn; in the interpreter only every few calls."""
    if (reason := unsupported_reason(backend, torch.float32)) is not None:
        pytest.skip(reason)
    model = build(backend, algorithm, dropout)[:1]
    counting = FailingAt(MANY, KeyboardInterrupt)
    step(model, torch.optim.SGD(model.parameters(), 0.0), counting)
    calls = MANY - counting.left
    assert calls > 15  # calls inside the operator are counted; 11 are outside
    born = []
    for n in range(1, calls + 1, calls // 4 if backend == "triton" else 1):
        fault = FailingAt(n, torch.OutOfMemoryError)
        check_recovers(model, lambda fault=fault: fault, torch.OutOfMemoryError)
        born += fault.born
    gc.collect()
    own = *model.parameters(), *model.buffers(), *(layer.partition.plan for layer in model[::2])
    kept = {StorageWeakRef(t.untyped_storage()).cdata for t in own}
    assert len(born) > calls / 2
    assert all(memory.expired() or memory.cdata in kept for memory in born)


@SLOW
def test_a_layers_gradients_are_whole_or_absent() -> None:
    """When the first layer's backward fails, the last layer's may be done; `zero_grad` comes before the next step."""
    model = build("eager")
    x = torch.randn(9, 24)

    def backward() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    calls = count(backward)
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(whole) == 4
    seen = set()
    for n in range(1, calls + 1):
        with pytest.raises(torch.OutOfMemoryError), FailingAt(n, torch.OutOfMemoryError):
            backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(torch.equal(grad, whole[name]) for name, grad in found.items())
        seen.add(len(found))
    assert {0, 2} <= seen <= {0, 1, 2, 3, 4}


# Interrupted merge() and unmerge()


def peft_layer() -> Any:
    pytest.importorskip("peft", reason="needs the peft extra")
    from peft import inject_adapter_in_model

    from smoa_kernels.peft import SMoAConfig

    config = SMoAConfig(r=4, target_modules=["0"], init_weights=False)
    return inject_adapter_in_model(config, nn.Sequential(nn.Linear(24, 20)))[0]


@pytest.mark.parametrize("kind", ["eager", TRITON, "peft"])
def test_a_merge_that_is_interrupted_anywhere(kind: str) -> None:
    torch.manual_seed(0)
    layer = peft_layer() if kind == "peft" else build(kind)[0]
    linear = layer.base_layer if kind == "peft" else layer
    base = linear.weight.clone()
    calls = count(layer.merge)
    merged = linear.weight.clone()
    layer.unmerge()
    for n in range(1, calls + 1):
        with pytest.raises(KeyboardInterrupt), FailingAt(n, KeyboardInterrupt):
            layer.merge()
        assert torch.equal(linear.weight, base)
        assert not layer.merged
    layer.merge()
    assert torch.equal(linear.weight, merged)
    if kind == "peft":
        return
    # The copy back is one operator. If it fails the layer stays merged, and the next attempt is complete.
    with pytest.raises(KeyboardInterrupt), FailingAt(1, KeyboardInterrupt):
        layer.unmerge()
    assert layer.merged
    layer.unmerge()
    assert torch.equal(layer.weight, base)
