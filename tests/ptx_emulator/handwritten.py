"""Handwritten PTX, and PTX that is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
from torch import Tensor

from . import ARCH, emulator
from .driver import Argument, Kernel
from .emulator import Launch

Change: TypeAlias = Callable[[str], str]

MODULE = """
.version 8.0
.target sm_{arch}
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry handwritten({parameters})
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<99>;
	.reg .b32 %r<199>;
	.reg .b64 %rd<99>;
	.reg .b32 %acc<129>;
	mov.u32 %r1, %tid.x;
	mov.b32 %r2, global_smem;
{body}
	ret;
}}
"""


def run_ptx(body: str, *tensors: Tensor, threads: int = 32, shared: int = 65536) -> Launch:
    """Run instructions. The parameters p0, p1, ... are the tensors, %r1 is the thread, and %r2 is shared memory."""
    parameters = ",".join(f".param .u64 p{i}" for i in range(len(tensors) + 2))
    text = MODULE.format(arch=ARCH, parameters=parameters, threads=threads, body=body)
    kernel = Kernel("handwritten", text, threads // 32, shared, ARCH)
    arguments = [Argument(f"p{i}", "*fp32", tensor) for i, tensor in enumerate(tensors)]
    emulator.launch(kernel, (1, 1, 1), arguments)
    return emulator.launches.pop()


def found(run: Callable[[], object]) -> set[str]:
    """The kinds of errors in the last launch of `run`."""
    run()
    launch = emulator.launches[-1]
    emulator.launches.clear()
    return {finding.kind for finding in launch.errors}


def found_when_broken(run: Callable[[], object], change: Change) -> set[str]:
    """The kinds of errors of a correct kernel after `change` has broken its PTX."""
    original = emulator.program_of

    def broken(text: str) -> object:
        changed = change(text)
        assert changed != text, "the change changed nothing"
        return original(changed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "program_of", broken)
        return found(run)
