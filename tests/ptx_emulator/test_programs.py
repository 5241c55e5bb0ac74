"""The machine against known results: arithmetic, reductions, products, random numbers, divergence."""

import re

import pytest
import torch
import triton

from . import ARCH, emulator
from .findings import ALLOWED
from .handwritten import run_ptx
from .samples import Product, Tile, add, matmul_chained, randoms, reduce_rows
from .sums import tensor_core_sums


@pytest.mark.parametrize("n", [1, 1000, 4099])
def test_add(n: int) -> None:
    x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
    add[(triton.cdiv(n, 256),)](x, y, out, n, BLOCK=256)
    assert torch.equal(out, x + y)


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


# Products: mma.sync, or wgmma if the architecture has it and a tile has 64 rows for each four warps

KINDS = {
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
TENSOR_CORES = list(KINDS)[:3]
SMALL = [(4, (64, 64, 32)), (8, (128, 64, 32)), (1, (16, 16, 32)), (2, (32, 64, 16))]
WGMMA = [(8, (128, 128, 32)), (4, (64, 256, 32)), (8, (128, 64, 64)), (4, (128, 16, 64)), (4, (64, 32, 16))]
WAYS = [(stages, layout) for stages in (1, 3, 4) for layout in ("nn", "tt")]


def products() -> list[object]:
    found = [(kind, *tile, *way) for kind in KINDS for tile in SMALL for way in WAYS]
    if ARCH == 90:
        found += [(kind, *tile, *way) for kind in TENSOR_CORES for tile in WGMMA for way in WAYS]
        found += [(kind, *SMALL[0], 3, layout) for kind in TENSOR_CORES for layout in ("nt", "tn")]
    return [
        pytest.param(*case, marks=[pytest.mark.smoke] if case[1] == 4 and case[3:] == (3, "tt") else [])
        for case in found
        if case[0] != "fp32" or case[2][0] * case[2][1] <= 4096
    ]


@pytest.mark.parametrize(("kind", "warps", "tile", "stages", "layout"), products())
def test_products(kind: str, warps: int, tile: Tile, stages: int, layout: str) -> None:
    """Sizes that are no multiple of a tile; the second triple allows asynchronous copies of the operands."""
    dtype, precision = KINDS[kind]
    for sizes in ((130, 150, 170), (136, 264, 192))[: 1 if stages == 1 else 2]:
        p = Product.random(dtype, *sizes, layout=layout, precision=precision)
        assert p.error(p.run(tile, warps=warps, stages=stages)) < 1e-6
        check_wgmma(kind != "fp32" and warps >= 4)


def check_wgmma(used: bool) -> None:
    """Check that Triton used wgmmas of a single shape, or none, and that nothing was found."""
    launch = emulator.launches[-1]
    shapes = {re.search(r"m64n\d+k\d+", text)[0] for text in launch.program.texts if "wgmma.mma" in text}
    assert len(shapes) == (used and ARCH == 90)
    assert not {finding.kind for finding in launch.findings} - ALLOWED.keys()


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("kind", TENSOR_CORES)
def test_last_bit_of_a_product(kind: str, warps: int) -> None:
    """Sums as in published measurements of the tensor cores."""
    dtype, precision = KINDS[kind]
    scale = torch.exp2(torch.randint(-8, 4, (64, 128)))
    a, b = (torch.randn(64, 128) * scale).to(dtype), torch.randn(128, 16).to(dtype)
    c = Product(a, b, precision).run((64, 16, 32), warps=warps)
    assert torch.equal(c, tensor_core_sums(a, b))
    check_wgmma(warps == 4)


@pytest.mark.parametrize("kind", TENSOR_CORES)
@pytest.mark.parametrize(
    ("warps", "stages", "n", "layout"),
    [
        (4, 1, 64, "nn"),
        (4, 3, 64, "nt"),
        (8, 3, 128, "nn"),
        (8, 4, 128, "nt"),
        (4, 3, 256, "nn"),
        (4, 1, 256, "nt"),
    ],
)
def test_computed_operand(kind: str, warps: int, stages: int, n: int, layout: str) -> None:
    """With a left operand in registers."""
    dtype, precision = KINDS[kind]
    p = Product.random(dtype, 128, n, 128, layout=layout, precision=precision)
    assert p.error(p.run_computed(warps=warps, stages=stages), scale=0.7) < 1e-6
    check_wgmma(True)


@pytest.mark.parametrize("kind", TENSOR_CORES)
def test_chained_products(kind: str) -> None:
    dtype, precision = KINDS[kind]
    a, b, c = torch.randn(64, 32).to(dtype), torch.randn(32, 64).to(dtype), torch.randn(64, 32).to(dtype)
    out = torch.empty(64, 32)
    matmul_chained[(1,)](a, b, c, out, 64, 64, 32, precision, num_warps=4)
    first = tensor_core_sums(a, b).to(dtype)
    assert torch.equal(out, tensor_core_sums(first, c))


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
