"""A single handwritten wgmma; its operands lie in shared memory in the PTX manual's canonical layouts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .emulator import Launch
from .handwritten import Change, run_ptx
from .library import library

KINDS = {"f16": (torch.float16, 16), "bf16": (torch.bfloat16, 16), "tf32": (torch.float32, 8)}
"""For each kind of operand, the dtype and the depth K of one product."""
SWIZZLE_CODES = {16: 0, 128: 1, 64: 2, 32: 3}  # codes in a descriptor; 16 bytes: no swizzle
HALF = 32768  # bytes of shared memory for each operand

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
	mov.pred %p2, -1;
	mov.b64 %rd6, RIGHT_DESCRIPTOR;
	mov.b64 %rd5, LEFT_DESCRIPTOR;
SETUP
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.SHAPE {ACCUMULATORS}, LEFT_OPERAND, %rd6, SCALE_D, SIGNS FLAGS;
	wgmma.commit_group.sync.aligned;
BETWEEN
	wgmma.wait_group.sync.aligned 0;
STORES
"""
LOAD_LEFT = """
	ld.param.b64 %rd7, [p2];
	mul.wide.u32 %rd8, %r1, 16;
	add.s64 %rd7, %rd7, %rd8;
	ld.global.v4.b32 {%r20,%r21,%r22,%r23}, [%rd7];
"""


@dataclass(frozen=True)
class Operand:
    """The layout of a matrix (M or N by K) in shared memory.

    Attributes:
        width: bytes of the swizzle; 16 means none.
        major: M or N is contiguous, not K.
    """

    width: int = 128
    major: bool = False

    def steps(self, extent: int, item: int) -> tuple[int, int]:
        """The descriptor's leading and stride offsets, in bytes."""
        if self.width == 16:
            return 16384, 256  # gaps between the core matrices
        if self.major and extent * item > self.width:
            return 16 * self.width, 8 * self.width
        return 0, 8 * self.width

    def descriptor(self, extent: int, item: int, at: int) -> int:
        lead, stride = self.steps(extent, item)
        start = library().shared_base + at
        return start >> 4 | lead >> 4 << 16 | stride >> 4 << 32 | SWIZZLE_CODES[self.width] << 62

    def image(self, values: Tensor, kind: str) -> np.ndarray:
        """The bytes: core matrices of 8 × 16 bytes; the swizzle is an exclusive or of address bits."""
        stored = bits(values, kind)
        item, out = stored.itemsize, np.zeros(HALF, np.uint8)
        lead, stride = self.steps(values.shape[0], item)
        width, per = self.width, 16 // item
        for (i, k), value in np.ndenumerate(stored):
            if self.major and width == 16:
                at = i % per * item + i // per * stride + k % 8 * 16 + k // 8 * lead
            elif self.major:
                row = width // item
                at = i % row * item + i // row * lead + k % 8 * width + k // 8 * stride
            elif width == 16:
                at = i % 8 * 16 + i // 8 * stride + k % per * item + k // per * lead
            else:
                at = i % 8 * width + i // 8 * stride + k * item
            if width > 16:
                at ^= (at >> 7 & (width // 16 - 1)) << 4
            out[at : at + item] = np.frombuffer(value.tobytes(), np.uint8)
        return out


def run_wgmma(
    kind: str,
    a: Tensor,
    b: Tensor,
    *,
    left: Operand | None = Operand(),
    right: Operand = Operand(),
    signs: tuple[int, int] = (1, 1),
    scale_d: str = "0",
    start: float = 0.0,
    between: str = "",
    change: Change = lambda text: text,
) -> tuple[Tensor, Launch]:
    """`a b` (64, n) of A (64, K) and B (K, n), by four warps; exact if the values are small integers.

    Args:
        kind: a key of `KINDS`.
        left: the layout of A in shared memory; None if A is in registers %r20 to %r23.
        right: the layout of B.
        signs: -1 negates an operand.
        scale_d: a predicate: whether to add to the accumulators.
        start: the accumulators' initial value.
        between: PTX between the product and the wait for it.
        change: applied to the whole PTX.
    """
    (dtype, depth), n = KINDS[kind], b.shape[1]
    item, count = dtype.itemsize, n // 2
    images = [np.zeros(HALF, np.uint8) if left is None else left.image(a, kind), right.image(b.T, kind)]
    results = torch.zeros(128 * count)
    tensors = [torch.from_numpy(np.concatenate(images).view(np.float32)), results]
    setup = "".join(f"\tmov.b32 %acc{i}, {np.float32(start).view(np.uint32)};\n" for i in range(count))
    flags = [] if left is None else [int(left.major)]
    if left is None:
        tensors.append(torch.from_numpy(fragments(a, kind).view(np.float32)))
        setup += LOAD_LEFT
    flags = [] if kind == "tf32" else [*flags, int(right.major)]
    stores = f"\tmul.lo.s32 %r6, %r1, {2 * n};\n\tcvt.u64.u32 %rd9, %r6;\n\tadd.s64 %rd10, %rd2, %rd9;\n"
    stores += "".join(f"\tst.global.b32 [%rd10+{4 * i}], %acc{i};\n" for i in range(count))
    filled = {
        "LEFT_DESCRIPTOR": (left or Operand()).descriptor(64, item, 0),
        "RIGHT_DESCRIPTOR": right.descriptor(n, item, HALF),
        "LEFT_OPERAND": "{%r20,%r21,%r22,%r23}" if left is None else "%rd5",
        "SETUP": setup,
        "SHAPE": f"m64n{n}k{depth}.f32.{kind}.{kind}",
        "ACCUMULATORS": ",".join(f"%acc{i}" for i in range(count)),
        "SCALE_D": scale_d,
        "SIGNS": f"{signs[0]}, {signs[1]}",
        "FLAGS": "".join(f", {flag}" for flag in flags),
        "BETWEEN": between,
        "STORES": stores,
    }
    text = PROGRAM
    for name, value in filled.items():
        text = text.replace(name, str(value))
    launch = run_ptx(change(text), *tensors, threads=128, shared=2 * HALF)
    thread, out = torch.arange(128), torch.zeros(64, n)
    for i in range(count):
        rows = thread // 32 * 16 + thread % 32 // 4 + 8 * (i >> 1 & 1)
        out[rows, 8 * (i >> 2) + 2 * (thread % 4) + (i & 1)] = results.view(128, count)[:, i]
    return out, launch


def bits(values: Tensor, kind: str) -> np.ndarray:
    """The values as stored integers."""
    dtype = KINDS[kind][0]
    integers = torch.int32 if dtype.itemsize == 4 else torch.int16
    stored: np.ndarray = values.to(dtype).contiguous().view(integers).numpy()
    return stored


def fragments(a: Tensor, kind: str) -> np.ndarray:
    """The four registers of A in each of 128 threads."""
    stored, held = bits(a, kind), np.zeros((128, 4), np.uint32)
    for thread in range(128):
        for i in range(4):
            row, group = thread // 32 * 16 + thread % 32 // 4 + i % 2 * 8, thread % 4
            if kind == "tf32":
                held[thread, i] = np.uint32(stored[row, group + i // 2 * 4])
            else:
                first = group * 2 + i // 2 * 8
                held[thread, i] = stored[row, first : first + 2].view(np.uint32)[0]
    return held
