"""Settings of the whole test process."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# Triton reads this variable when a kernel is defined, so it is set before any kernel is imported.
if os.environ.get("PTX_EMULATOR"):  # an architecture: kernels are compiled for it and run on the CPU
    os.environ |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    pytest_plugins = ["ptx_emulator.plugin"]
elif os.environ.get("CPU_EMULATOR"):  # a processor: code is compiled for it and its instructions are emulated
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    pytest_plugins = ["cpu_emulator.plugin"]
elif os.environ.get("SANITIZED"):
    os.environ["TRITON_INTERPRET"] = "1"
    pytest_plugins = ["sanitized"]
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trust", type=Path, help="write the largest shares of error budgets to this file")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the trust report: the share of its error budget that each result used, in the tests that ran."""
    if (path := session.config.getoption("--trust")) is None:
        return
    from problems import DEVICE, NAMES, SHARES  # imports the kernels

    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, Triton interpreted"
    rows = [f"| {' | '.join(case.split('-'))} | " for case in SHARES]
    cells = [" | ".join(f"{found.get(name, 0):.2f}" for name in NAMES) for found in SHARES.values()]
    lines = [
        f"Share of the error budget used up ({where}, torch {torch.__version__}); at most 1 is asked.\n",
        f"| backend | algorithm | dtype | {' | '.join(NAMES)} |",
        "|---" * (3 + len(NAMES)) + "|",
        *(f"{row}{cell} |" for row, cell in zip(rows, cells, strict=True)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


GUARD = 65  # numbers on each side of a tensor; odd, so that the tensor begins inside a cache line
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Seed every test alike, so that an error budget met once is always met."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Numerical tests make their tensors and layers on the GPU if there is one."""
    from problems import DEVICE  # imports the kernels

    if DEVICE.type == "cpu" or request.node.get_closest_marker("numerical") is None:
        yield
    else:
        with DEVICE:
            yield


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory of `torch.empty` and its relatives with NaN (all bits set), so that unwritten memory shows."""
    with torch.device("cpu"):
        torch.empty(0)  # torch caches the functions of a default device, before they are replaced below

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.view(BITS[tensor.element_size()]).fill_(-1)
            return tensor

        return filled

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill memory of `Tensor.new_empty` with NaN, and check that nothing is written just before or behind it.

    While this fixture is active every workspace comes from `new_empty`.
    """
    monkeypatch.setattr("smoa_kernels.backends.pages.LARGE", sys.maxsize)
    allocate, kept = Tensor.new_empty, []

    def guarded(like: Tensor, *size: Any, **options: Any) -> Tensor:
        shape = torch.Size(size if isinstance(size[0], int) else size[0])
        whole = allocate(like, shape.numel() + 2 * GUARD, **options)
        kept.append(whole.view(BITS[whole.element_size()]).fill_(-1))
        return whole[GUARD:-GUARD].view(shape)

    monkeypatch.setattr(Tensor, "new_empty", guarded)
    yield
    for bits in kept:
        assert (bits[:GUARD] == -1).all()
        assert (bits[-GUARD:] == -1).all()


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the compiled GEMM multiply in float32 on every processor; half types are widened."""
    module = "smoa_kernels.backends.native.backend"
    routes = importlib.import_module(module)
    kept = [row for row in routes.ROUTES if row.path in (routes.Path.FEW, routes.Path.FLOAT)]
    monkeypatch.setattr(f"{module}.ROUTES", tuple(kept))


@pytest.fixture
def only_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where torch's operators compute in place of compiled code."""
    for name in ("forward", "backward"):
        monkeypatch.setattr(f"smoa_kernels.backends.eager.{name}", lambda *_, **__: pytest.fail("eager"))


if importlib.util.find_spec("hypothesis") is not None:
    from draws import PROFILES
    from hypothesis import settings

    for profile, number in PROFILES.items():
        # Changes are checked with the same problems every time; nightly runs draw new ones.
        settings.register_profile(profile, max_examples=number, deadline=None, derandomize=profile == "ci")
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
