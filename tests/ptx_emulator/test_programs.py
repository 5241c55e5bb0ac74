"""The machine against known results; what is not here is left to the tests of kernels."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from . import ARCH, emulator
from .handwritten import run_ptx
from .samples import Product

KINDS = {"fp16": (torch.float16, "ieee"), "bf16": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32")}


def cut_off(t: Tensor) -> Tensor:
    """float32 without the 13 bits that a TF32 product ignores; other dtypes unchanged."""
    return (t.contiguous().view(torch.int32) & -8192).view(torch.float32) if t.dtype == torch.float32 else t


def tensor_core_sums(a: Tensor, b: Tensor) -> Tensor:
    """`a b`, summed like an A100's tensor cores (Fasi et al., 2021), or on sm_90 like an H100's (arXiv 2511.10909).

    A few products and the accumulator are aligned to the largest exponent and truncated some bits below float32's last.
    Their sum is truncated to float32.
    """
    tf32, hopper = a.dtype == torch.float32, ARCH == 90
    block = (8 if tf32 else 16) if hopper else (4 if tf32 else 8)
    kept = 25 if hopper else 24
    least = -14 if a.dtype == torch.float16 else -126
    x, y = (cut_off(t).float().numpy().astype(np.float64) for t in (a, b))
    total = np.zeros((x.shape[0], y.shape[1]))
    for k in range(0, x.shape[1], block):
        left, right = x[:, k : k + block, None], y[None, k : k + block, :]
        terms = np.concatenate([left * right, total[:, None, :]], 1)
        exponents = [_exponent(left, least) + _exponent(right, least), _exponent(total, -126)[:, None, :]]
        top = np.concatenate(exponents, 1).max(1)
        exact = np.ldexp(np.trunc(np.ldexp(terms, kept - top[:, None, :])).sum(1), top - kept)
        rounded = exact.astype(np.float32)
        too_large = np.abs(rounded.astype(np.float64)) > np.abs(exact)
        total = np.where(too_large, np.nextafter(rounded, np.float32(0)), rounded).astype(np.float64)
    return torch.from_numpy(total.astype(np.float32))


def _exponent(x: np.ndarray, least: int) -> np.ndarray:
    return np.where(x == 0, -(10**5), np.maximum(np.frexp(x)[1] - 1, least))


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_last_bit_of_a_product(kind: str, warps: int) -> None:
    """Sums as in published measurements of the tensor cores."""
    dtype, precision = KINDS[kind]
    scale = torch.exp2(torch.randint(-8, 4, (64, 128)))
    a, b = (torch.randn(64, 128) * scale).to(dtype), torch.randn(128, 16).to(dtype)
    c = Product(a, b, precision).run((64, 16, 32), warps=warps)
    assert torch.equal(c, tensor_core_sums(a, b))
    products = [text for text in emulator.launches[-1].program.texts if "wgmma.mma" in text]
    shapes = {re.search(r"m64n\d+k\d+", text)[0] for text in products}
    assert len(shapes) == (warps == 4 and ARCH == 90)


DIVERGENT = """
	ld.param.b64 %rd1, [p0];
	mov.b32 %r3, 0;
	setp.gt.s32 %p1, %r1, 6;
	@%p1 bra $L__after;
$L__loop:
	setp.ge.s32 %p2, %r3, %r1;
	@%p2 bra $L__after;
	add.s32 %r3, %r3, 1;
	bra.uni $L__loop;
$L__after:
	add.s32 %r3, %r3, 1;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	st.global.b32 [%rd3], %r3;
"""


@pytest.mark.smoke
def test_divergent_loops() -> None:
    """Lanes below 7 loop as often as their number, the others not at all; then all add one."""
    out = torch.full((32,), -1, dtype=torch.int32)
    run_ptx(DIVERGENT, out)
    assert out.tolist() == [i + 1 if i < 7 else 1 for i in range(32)]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("stride", "width", "offset", "sectors"),
    [(4, 1, 0, 4), (4, 1, 4, 5), (8, 1, 0, 8), (0, 1, 0, 1), (64, 1, 0, 32), (16, 4, 0, 16)],
)
def test_sectors_that_a_load_touches(stride: int, width: int, offset: int, sectors: int) -> None:
    x = torch.zeros(4096)
    start = offset - x.data_ptr() % 32 + 32
    load = "ld.global.b32 %r5" if width == 1 else "ld.global.v4.b32 {%r5,%r6,%r7,%r8}"
    address = f"mul.wide.u32 %rd2, %r1, {stride};\nadd.s64 %rd3, %rd1, %rd2;\nadd.s64 %rd3, %rd3, {start};\n"
    launch = run_ptx(f"ld.param.b64 %rd1, [p0];\n{address}{load}, [%rd3];", x)
    assert launch.stats[-3]["sectors"] == sectors  # the last two are the end instructions
