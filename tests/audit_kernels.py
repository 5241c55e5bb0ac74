"""Kernels for the audit's own tests: a plain matmul that obeys every rule and a copy that reads bytes.

Imported by audit workers only, where Triton compiles.
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.language as tl

from smoa_kernels.audit.compile import Launch
from smoa_kernels.audit.registry import KernelSpec


@dataclass(frozen=True)
class ToyConfig:
    block: int
    num_warps: int
    num_stages: int = 3


@triton.jit
def toy_matmul(x_ptr, w_ptr, y_ptr, C, stride_x, stride_w, stride_y, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, 64)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, C, 64):
        x = tl.load(x_ptr + rows[:, None] * stride_x + start + inner[None, :])
        w_ptrs = w_ptr + cols[None, :] * stride_w + start
        w = tl.load(w_ptrs + inner[:, None])
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + rows[:, None] * stride_y + cols[None, :], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def toy_copy(x_ptr, y_ptr, stride_x, BLOCK: tl.constexpr):
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + slots, tl.load(x_ptr + slots * stride_x))


def matmul_launch(config: ToyConfig, dtype: str, variant: str) -> Launch:
    pointer = f"*{dtype}"
    stride = 4096 if variant == "aligned" else 4095
    return Launch(
        {
            "x_ptr": pointer,
            "w_ptr": pointer,
            "y_ptr": pointer,
            "C": 4096,
            "stride_x": stride,
            "stride_w": stride,
            "stride_y": 4096,
        },
        {"BLOCK": config.block},
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def copy_launch(config: ToyConfig, dtype: str, variant: str) -> Launch:
    return Launch(
        {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "stride_x": 3},
        {"BLOCK": config.block},
        {"num_warps": config.num_warps},
    )


MATMUL = KernelSpec(
    "toy_matmul",
    toy_matmul,
    "matmul",
    ("aligned",),
    lambda arch, dtype, variant: (ToyConfig(64, 4),),
    matmul_launch,
)
MISALIGNED = KernelSpec(
    "toy_misaligned",
    toy_matmul,
    "matmul",
    ("misaligned",),
    lambda arch, dtype, variant: (ToyConfig(64, 4),),
    matmul_launch,
)
COPY = KernelSpec(
    "toy_copy",
    toy_copy,
    "copy",
    ("strided",),
    lambda arch, dtype, variant: (ToyConfig(1024, 4),),
    copy_launch,
    narrow={"x_ptr": "strided on purpose"},
)


def crashing_launch(config: ToyConfig, dtype: str, variant: str) -> Launch:
    """What a compiler does that crashes: always at the block of 64, once at the block of 256."""
    first = Path(os.environ["SMOA_CACHE"]) / "crashed"
    if config.block == 64 or (config.block == 256 and not first.exists()):
        first.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return copy_launch(config, dtype, variant)


CRASHING = KernelSpec(
    "toy_crashing",
    toy_copy,
    "copy",
    ("strided",),
    lambda arch, dtype, variant: tuple(ToyConfig(block, 4) for block in (256, 128, 64, 512, 1024, 2048)),
    crashing_launch,
    narrow={"x_ptr": "strided on purpose"},
)
CRASHES = (CRASHING,)
TOYS = (MATMUL, MISALIGNED, COPY)
