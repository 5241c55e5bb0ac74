"""A single wgmma, broken on purpose: dropped fences, waits, commits, barriers. The kernels' tests check its results."""

from collections.abc import Callable

import pytest
import torch

from . import ARCH, emulator
from .assembler import UnsupportedError
from .handwritten import Change, run_ptx
from .library import library

pytestmark = [pytest.mark.skipif(ARCH != 90, reason="only sm_90 has wgmma"), pytest.mark.smoke]

HALF = 32768  # bytes of shared memory for each operand
ACCUMULATORS = 16  # of each thread, for 64 x 32 results

PROGRAM = """
	ld.param.b64 %rd1, [p0];
	ld.param.b64 %rd2, [p1];
	shl.b32 %r3, %r1, 2;
$L__copy:
	setp.ge.u32 %p1, %r3, 65536;
	@%p1 bra $L__done;
	cvt.u64.u32 %rd3, %r3;
	add.s64 %rd4, %rd1, %rd3;
	ld.global.b32 %r4, [%rd4];
	add.s32 %r5, %r2, %r3;
	st.shared.b32 [%r5], %r4;
	add.s32 %r3, %r3, 512;
	bra.uni $L__copy;
$L__done:
	fence.proxy.async.shared::cta;
	bar.sync 0;
	mov.b64 %rd6, RIGHT;
	mov.b64 %rd5, LEFT;
SETUP
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {ACCUMULATORS}, OPERAND, %rd6, 0, 1, 1, FLAGS;
	wgmma.commit_group.sync.aligned;
BETWEEN
	wgmma.wait_group.sync.aligned 0;
	mul.lo.s32 %r6, %r1, 64;
	cvt.u64.u32 %rd9, %r6;
	add.s64 %rd10, %rd2, %rd9;
STORES
"""
LOAD_LEFT = """
	ld.param.b64 %rd7, [p2];
	mul.wide.u32 %rd8, %r1, 16;
	add.s64 %rd7, %rd7, %rd8;
	ld.global.v4.b32 {%r20,%r21,%r22,%r23}, [%rd7];
"""

FENCE, COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
PROXY = "fence.proxy.async.shared::cta;"


def product(columns: int) -> str:
    """Another product of the same operands, added to the first accumulators."""
    accumulators = ",".join(f"%acc{i}" for i in range(columns // 2))
    shape = f"m64n{columns}k16.f32.f16.f16"
    return (
        f"\twgmma.mma_async.sync.aligned.{shape} {{{accumulators}}}, %rd5, %rd6, 1, 1, 1, 0, 0;\n\t{COMMIT}"
    )


def replaced(old: str, new: str = "") -> dict[str, Change]:
    return {"change": lambda ptx: ptx.replace(old, new)}


def before_fence(text: str) -> dict[str, Change]:
    return replaced(f"\t{FENCE}", f"{text}\n\t{FENCE}")


def between(text: str) -> dict[str, str]:
    """PTX between the product and the wait for it."""
    return {"between": text}


def findings(
    *, registers: bool = False, between: str = "", change: Callable[[str], str] = lambda text: text
) -> set[str]:
    """The kinds of findings, notes too, of the product of zeros.

    Args:
        registers: holds the left operand in %r20 to %r23.
        between: PTX between the product and the wait for it.
        change: of the whole PTX.
    """
    # K contiguous, a swizzle of 128 bytes, rows of eight 1024 bytes apart
    left, right = ((library().shared_base + at) >> 4 | 1024 >> 4 << 32 | 1 << 62 for at in (0, HALF))
    filled = {
        "RIGHT": right,
        "LEFT": left,
        "OPERAND": "{%r20,%r21,%r22,%r23}" if registers else "%rd5",
        "SETUP": "".join(f"\tmov.b32 %acc{i}, 0;\n" for i in range(ACCUMULATORS)) + LOAD_LEFT * registers,
        "ACCUMULATORS": ",".join(f"%acc{i}" for i in range(ACCUMULATORS)),
        "FLAGS": "0" if registers else "0, 0",
        "BETWEEN": between,
        "STORES": "".join(f"\tst.global.b32 [%rd10+{4 * i}], %acc{i};\n" for i in range(ACCUMULATORS)),
    }
    text = PROGRAM
    for name, value in filled.items():
        text = text.replace(name, str(value))
    tensors = (torch.zeros(size) for size in (HALF // 2, 128 * ACCUMULATORS, 128 * 4))
    launch = run_ptx(change(text), *tensors, threads=128, shared=2 * HALF)
    return {finding.kind for finding in launch.findings}


IN_REGISTERS = {"registers": True}
ANOTHER_WARPS_STORE = """
	bar.sync 0;
	setp.eq.s32 %p3, %r1, 100;
	@%p3 st.shared.b32 [%r2+32768], %r1;
	bar.sync 0;
"""
BY_WARP = "\tshr.u32 %r9, %r1, 5;\n\tcvt.u64.u32 %rd11, %r9;\n\tadd.s64 %rd6, %rd6, %rd11;"
BY_LANE = "\tcvt.u64.u32 %rd11, %r1;\n\tadd.s64 %rd6, %rd6, %rd11;"
BROKEN: dict[str, tuple[str, dict[str, object]]] = {
    "another shape on accumulators under way": ("wgmma_register", between(product(16))),
    "an accumulator read": ("wgmma_register", between("\tadd.s32 %r9, %acc3, 1;")),
    "an accumulator written": ("wgmma_register", between("\tmov.b32 %acc3, 0;")),
    "a left operand written": ("wgmma_register", IN_REGISTERS | between("\tmov.b32 %r21, 0;")),
    "a left operand read": ("wgmma_operand_read", IN_REGISTERS | between("\tadd.s32 %r9, %r21, 0;")),
    "a store over an operand": ("wgmma_overwrite", between("\tst.shared.b32 [%r2+32768], %r1;")),
    "another warp's store, behind a barrier": ("wgmma_overwrite", between(ANOTHER_WARPS_STORE)),
    "the start of a copy over an operand": (
        "wgmma_overwrite",
        between("\tcp.async.cg.shared.global [%r2+32768], [%rd1], 16;"),
    ),
    "no wait: a register": ("wgmma_register", replaced(WAIT)),
    "no wait": ("wgmma_not_waited", replaced(WAIT)),
    "a wait one short": ("wgmma_register", replaced(WAIT, WAIT.replace("0", "1"))),
    "no commit": ("wgmma_register", replaced(COMMIT)),
    "no fence": ("wgmma_unfenced", replaced(FENCE)),
    "a register written after the fence": (
        "wgmma_unfenced",
        replaced(FENCE, f"{FENCE}\n\tmov.b32 %acc3, 0;"),
    ),
    "a left operand written after the fence": (
        "wgmma_unfenced",
        IN_REGISTERS | replaced(FENCE, f"{FENCE}\n\tmov.b32 %r21, 0;"),
    ),
    "no proxy fence": ("wgmma_proxy", replaced(PROXY)),
    "no barrier": ("race_read_after_write", replaced("bar.sync 0;")),
    "warps with different descriptors": ("wgmma_divergent", before_fence(BY_WARP)),
    "lanes with different descriptors": ("wgmma_divergent", before_fence(BY_LANE)),
    "past the end": ("shared_outside", before_fence("\tadd.s64 %rd6, %rd6, 2040;")),
    "reserved bits": ("wgmma_descriptor", before_fence("\tadd.s64 %rd6, %rd6, 16384;")),
}
TMA = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
REFUSED: dict[str, dict[str, object]] = {
    "a part of a warp": replaced("\twgmma.mma_async", "\tsetp.lt.s32 %p3, %r1, 40;\n\t@%p3 wgmma.mma_async"),
    "TMA": before_fence(f"\t{TMA} [%r2], [%rd1, {{%r1, %r1}}], [%r3];"),
    "fp8": replaced("m64n32k16.f32.f16.f16", "m64n32k32.f32.e4m3.e4m3"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken(what: str) -> None:
    kind, options = BROKEN[what]
    assert kind in findings(**options)


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    with pytest.raises((emulator.EmulationError, UnsupportedError)):
        findings(**REFUSED[what])
    emulator.launches.clear()
