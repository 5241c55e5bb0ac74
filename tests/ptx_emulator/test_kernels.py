"""Every kernel at every configuration that ships for the architecture, in all its forms and precisions.

Sizes are several whole tiles, as in most layers. tests/kernels, which also runs here, has the odd sizes.
"""

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
import triton
from audit.forms import AUDITED
from audit.workloads import WORKLOADS, Operands, configured
from problems import relative_error

from smoa_kernels.backends import miscompiled
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.kernels.architectures import limits
from smoa_kernels.kernels.registry import KERNELS
from smoa_kernels.kernels.spec import GRANULE, Config, Key

from . import ARCH, emulator

PAIRS = 72  # the average of four experts: one has several tiles, and each has a partial last tile
TOKENS, OUT_FEATURES, IN_FEATURES, BLOCKS = 512, 256, 512, 2
# Errors allowed beside twice the same-dtype one. TF32 keeps 10 bits of an operand; the other product may keep more.
FLOORS = {"bf16": 1e-4, "fp16": 1e-5, "tf32": 2e-3, "fp32": 1e-6}


def key_of(kernel: str, dtype: str, form: str) -> Key:
    transposed, rank = "transposed" in form, 64 if "r64" in form else 16
    rows, cols = (IN_FEATURES, OUT_FEATURES) if transposed else (OUT_FEATURES, IN_FEATURES)
    padded = rows // BLOCKS, cols // BLOCKS
    granule = GRANULE if "granules" in form else 1
    tokens = PAIRS if kernel.startswith("grouped") else TOKENS
    return Key(kernel, dtype, rank, BLOCKS, rows, cols, tokens, *padded, transposed, granule)


def launches() -> Iterator[object]:
    for kernel in KERNELS.values():
        for dtype in KERNEL_PRECISIONS:
            if miscompiled(ARCH // 10, dtype, triton.__version__):
                continue  # no GPU runs it
            for config in kernel.shipped(limits(f"sm_{ARCH}"), PRECISIONS[dtype]):
                for form in AUDITED[kernel.name].forms:
                    numbers = "-".join(str(value) for value in config.to_json().values())
                    name = f"{kernel.name}-{dtype}-{numbers}-{form}".replace(" ", "_")
                    yield pytest.param(kernel.name, dtype, config, form, id=name)


def is_defined(kernel: str, form: str) -> bool:
    """Whether the workload defines the result; of "permute" it defines only the first form."""
    return form == AUDITED[kernel].forms[0] or kernel != "permute"


@pytest.mark.parametrize(("kernel", "dtype", "config", "form"), list(launches()))
def test_shipped(kernel: str, dtype: str, config: Config, form: str) -> None:
    key = key_of(kernel, dtype, form)
    run, defined = WORKLOADS[kernel](Operands(key, form, torch.device("cpu")))
    with configured(kernel, config, dtype):
        found = run()
    if not is_defined(kernel, form):
        return  # only the memory checks apply here; tests/kernels compares these numbers
    same_dtype = defined(PRECISIONS[dtype].dtype)
    shares = [
        relative_error(ours, truth) / (2 * relative_error(same, truth) + FLOORS[dtype])
        for ours, same, truth in zip(found, same_dtype, defined(torch.float64), strict=True)
    ]
    assert max(shares) <= 1


@pytest.mark.parametrize("kernel", ["permute", "modulated_blocks"])
def test_lanes_gather_neighbours(kernel: str) -> None:
    """At K = 4, 32 neighbours of a block span about 8.4 sectors; if each lane read eight of its own, 32 sectors."""
    key = Key(kernel, "bf16", 16, 4, 256, 256, 64, 64, 64)
    form = AUDITED[kernel].forms[0]
    run, _ = WORKLOADS[kernel](Operands(key, form, torch.device("cpu")))
    with configured(kernel, KERNELS[kernel].default(key, f"sm_{ARCH}", 132)):
        run()
    found = [zip(launch.program.texts, launch.stats, strict=True) for launch in emulator.launches]
    gathers = [stat for text, stat in chain(*found) if "ld.global.b16" in text and stat["requests"]]
    assert gathers
    assert all(stat["sectors"] < 9 * stat["requests"] for stat in gathers)
