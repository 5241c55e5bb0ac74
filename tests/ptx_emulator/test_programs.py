"""The machine against known results: arithmetic, reductions, products, random numbers, divergence."""

import pytest
import torch
import triton
from torch import Tensor

from . import ARCH, emulator
from .handwritten import run_ptx
from .samples import add, matmul, randoms, reduce_rows, softmax
from .sums import cut_off, tensor_core_sums


@pytest.mark.parametrize("n", [1, 1000, 4099])
def test_add(n: int) -> None:
    x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
    add[(triton.cdiv(n, 256),)](x, y, out, n, BLOCK=256)
    assert torch.equal(out, x + y)


def test_softmax() -> None:
    x = torch.randn(7, 300)
    out = torch.empty_like(x)
    softmax[(7,)](x, out, 300, BLOCK=512)
    torch.testing.assert_close(out, torch.softmax(x, 1), rtol=1e-5, atol=1e-7)


def test_reductions() -> None:
    x, out = torch.randn(64, 64), torch.empty(2, 64)
    reduce_rows[(1,)](x, out, 64, BLOCK=64)
    torch.testing.assert_close(out[0], x.sum(1), rtol=0, atol=1e-5)
    assert torch.equal(out[1], x.amax(0))


def philox(seed: int, counter: int) -> list[int]:
    word = 0xFFFFFFFF
    keys, c = [seed & word, seed >> 32], [counter, 0, 0, 0]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ keys[0], second & word, (first >> 32) ^ c[3] ^ keys[1], first & word]
        keys = [(keys[0] + 0x9E3779B9) & word, (keys[1] + 0xBB67AE85) & word]
    return c


def test_random_numbers() -> None:
    """Philox, which multiplies to 64 bits."""
    seed, out = 0x123456789ABCDEF, torch.empty(4, 128, dtype=torch.int32)
    randoms[(1,)](seed, out, BLOCK=128)
    truth = torch.tensor([philox(seed, i) for i in range(128)], dtype=torch.int64).T
    assert torch.equal(out.long() & 0xFFFFFFFF, truth)


TILES = ((4, (64, 64, 32)), (8, (128, 64, 32)), (1, (16, 16, 32)), (2, (32, 64, 16)))
PRODUCTS = [
    pytest.param(
        dtype,
        precision,
        stages,
        warps,
        tile,
        layout,
        id=f"{name}-{stages}-{warps}-{'x'.join(map(str, tile))}-{layout}",
        marks=[pytest.mark.smoke] if (stages, warps, layout) == (3, 4, "tt") else [],
    )
    for name, dtype, precision in (
        ("fp16", torch.float16, "ieee"),
        ("bf16", torch.bfloat16, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("fp32", torch.float32, "ieee"),
    )
    for stages in (1, 3, 4)
    for warps, tile in TILES
    for layout in ("nn", "tt")
    if name != "fp32" or tile[0] * tile[1] <= 4096
]


def stored(t: Tensor, transposed: bool) -> Tensor:
    return t.T.contiguous().T if transposed else t


@pytest.mark.parametrize(("dtype", "precision", "stages", "warps", "tile", "layout"), PRODUCTS)
def test_products(
    dtype: torch.dtype, precision: str, stages: int, warps: int, tile: tuple[int, int, int], layout: str
) -> None:
    """Loops with asynchronous copies, on sizes that are no multiple of a tile."""
    M, N, K = 130, 150, 170
    a = stored(torch.randn(M, K).to(dtype), layout[0] == "t")
    b = stored(torch.randn(K, N).to(dtype), layout[1] == "t")
    c = torch.empty(M, N)
    grid = (triton.cdiv(M, tile[0]) * triton.cdiv(N, tile[1]),)
    sizes = M, N, K, *a.stride(), *b.stride(), *c.stride(), *tile
    matmul[grid](a, b, c, *sizes, precision, 2, num_warps=warps, num_stages=stages)
    if precision == "tf32":
        a, b = cut_off(a), cut_off(b)
    truth = a.double() @ b.double()
    assert float((c - truth).norm() / truth.norm()) < 1e-6


@pytest.mark.parametrize("warps", [1, 4])  # mma.sync; wgmma if the architecture has it
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32")],
    ids=str,
)
def test_last_bit_of_a_product(dtype: torch.dtype, precision: str, warps: int) -> None:
    """Sums as in published measurements of the tensor cores."""
    scale = torch.exp2(torch.randint(-8, 4, (64, 128)))
    a, b = (torch.randn(64, 128) * scale).to(dtype), torch.randn(128, 16).to(dtype)
    c = torch.empty(64, 16)
    sizes = 64, 16, 128, *a.stride(), *b.stride(), *c.stride(), 64, 16, 32
    matmul[(1,)](a, b, c, *sizes, precision, 2, num_warps=warps)
    assert torch.equal(c, tensor_core_sums(a, b))
    uses_wgmma = any("wgmma.mma" in text for text in emulator.launches[-1].program.texts)
    assert uses_wgmma == (ARCH == 90 and warps == 4)


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
