"""Kernels for the audit's own tests: a plain matmul that obeys every rule and a copy that reads single bytes.

Only audit workers import this file, since they compile with Triton.
"""

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from smoa_kernels.kernels.spec import Config, Kernel, Row

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


def toy_copy(x_ptr, y_ptr, stride_x, BLOCK: tl.constexpr):
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + slots, tl.load(x_ptr + slots * stride_x))


# The compiler of the second crashes.
toy_copy, crashing = triton.JITFunction(toy_copy), triton.JITFunction(toy_copy)
crashing.get_capture_scope = lambda: os.kill(os.getpid(), signal.SIGSEGV)


def matmul_work(operands: Operands, config: Config) -> Work:
    x = w = y = operands.tensor(64, 64)
    stride = 4096 if operands.form == "aligned" else 4095

    def run() -> list[torch.Tensor]:
        toy_matmul[(1, 1)](
            x, w, y, 4096, stride, stride, 4096, BLOCK=config.block, num_warps=config.num_warps, num_stages=3
        )
        return [y]

    return run, lambda dtype: []


def copy_work(fn: Any, operands: Operands, config: Config) -> Work:
    x = y = operands.tensor(64)

    def run() -> list[torch.Tensor]:
        fn[(1,)](x, y, 3, BLOCK=config.block, num_warps=config.num_warps)
        return [y]

    return run, lambda dtype: []


def toy(name: str, fn: Any, work: Callable[[Operands, Config], Work], block: int, audited: Audited) -> Kernel:
    config = Config(block=block)
    WORKLOADS[name] = lambda operands: work(operands, config)
    AUDITED[name] = audited
    return Kernel(name, fn, (Row((), (), (config,)),))


STRIDED = Audited("copy", ("strided",), {"x_ptr": "strided on purpose"})
TOYS = {
    kernel.name: kernel
    for kernel in (
        toy("toy_matmul", toy_matmul, matmul_work, 64, Audited("matmul", ("aligned",))),
        toy("toy_misaligned", toy_matmul, matmul_work, 64, Audited("matmul", ("misaligned",))),
        toy("toy_copy", toy_copy, partial(copy_work, toy_copy), 2048, STRIDED),
        toy("toy_crashing", crashing, partial(copy_work, crashing), 2048, STRIDED),
    )
}
