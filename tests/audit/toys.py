"""Kernels for the audit's own tests: a plain matmul that obeys every rule and a copy that reads single bytes.

Only audit workers import this file, since they compile with Triton.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from smoa_kernels.kernels.spec import Config, Kernel

from .forms import AUDITED, Audited
from .workloads import WORKLOADS, Operands, Work


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


def matmul_work(operands: Operands) -> Work:
    x = w = y = operands.tensor(64, 64)
    stride = 4096 if operands.form == "aligned" else 4095

    def run(config: Any) -> list[torch.Tensor]:
        toy_matmul[(1, 1)](
            x, w, y, 4096, stride, stride, 4096, BLOCK=config.block, num_warps=config.num_warps, num_stages=3
        )
        return [y]

    return run, lambda dtype: []


def copy_work(operands: Operands) -> Work:
    x = y = operands.tensor(64)

    def run(config: Any) -> list[torch.Tensor]:
        toy_copy[(1,)](x, y, 3, BLOCK=config.block, num_warps=config.num_warps)
        return [y]

    return run, lambda dtype: []


def crashing_work(operands: Operands) -> Work:
    """Simulates a crashing compiler: always at block 64, once at block 256."""
    run, truth = copy_work(operands)
    first = Path(os.environ["SMOA_CACHE"]) / "crashed"

    def crash(config: Any) -> Any:
        if config.block == 64 or (config.block == 256 and not first.exists()):
            first.touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        return run(config)

    return crash, truth


def toy(
    name: str,
    fn: Any,
    role: Literal["matmul", "copy"],
    form: str,
    work: Callable[[Operands], Work],
    *blocks: int,
    **narrow: str,
) -> Kernel:
    configs = tuple(Config(block=block) for block in blocks)
    WORKLOADS[name] = work
    AUDITED[name] = Audited(role, (form,), narrow)
    return Kernel(name, fn, lambda arch, precision: configs)


REASON = "strided on purpose"
TOYS = {
    kernel.name: kernel
    for kernel in (
        toy("toy_matmul", toy_matmul, "matmul", "aligned", matmul_work, 64),
        toy("toy_misaligned", toy_matmul, "matmul", "misaligned", matmul_work, 64),
        toy("toy_copy", toy_copy, "copy", "strided", copy_work, 1024, x_ptr=REASON),
    )
}
CRASHES = {
    "toy_crashing": toy(
        "toy_crashing",
        toy_copy,
        "copy",
        "strided",
        crashing_work,
        *(256, 128, 64, 512, 1024, 2048),
        x_ptr=REASON,
    )
}
