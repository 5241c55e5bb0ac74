"""Single wgmmas in every form against exact sums, and broken on purpose: dropped fences, waits, commits, barriers."""

import pytest
import torch
from torch import Tensor

from . import ARCH, emulator
from .assembler import UnsupportedError
from .handwritten import Change
from .handwritten_wgmma import KINDS, Operand, run_wgmma

pytestmark = pytest.mark.skipif(ARCH != 90, reason="only sm_90 has wgmma")


def integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


FORMS = [
    pytest.param(kind, n, left, right, id=f"{kind}-{n}-{name}-{width}-{'MN' if major else 'K'}")
    for kind in KINDS
    for n in (8, 24, 64, 256)
    for width in (16, 32, 64, 128)
    for major in ((False, True) if kind != "tf32" else (False,))
    for name, left, right in (
        ("left", Operand(width, major), Operand()),
        ("right", None, Operand(width, major)),
    )
]


@pytest.mark.parametrize(("kind", "n", "left", "right"), FORMS)
def test_every_form(kind: str, n: int, left: Operand | None, right: Operand) -> None:
    """All swizzles and contiguous dimensions, and a left operand in registers."""
    depth = KINDS[kind][1]
    a, b = integers(64, depth), integers(depth, n)
    out, launch = run_wgmma(kind, a, b, left=left, right=right)
    assert torch.equal(out, a @ b)
    assert not launch.findings


@pytest.mark.parametrize(
    ("options", "sign", "added"),
    [
        ({"scale_d": "%p2", "start": 3.0}, 1, 3.0),
        ({"scale_d": "0", "start": 3.0}, 1, 0.0),
        ({"signs": (-1, 1)}, -1, 0.0),
        ({"signs": (1, -1)}, -1, 0.0),
        ({"signs": (-1, -1)}, 1, 0.0),
    ],
    ids=str,
)
def test_accumulators_and_signs(options: dict[str, object], sign: int, added: float) -> None:
    a, b = integers(64, 16), integers(16, 32)
    out, _ = run_wgmma("bf16", a, b, **options)  # type: ignore[arg-type]
    assert torch.equal(out, sign * (a @ b) + added)


# Broken on purpose

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


def findings(*, registers: bool = False, **options: object) -> set[str]:
    """The kinds of findings, notes too; `registers` holds the left operand."""
    left = {"left": None} if registers else {}
    _, launch = run_wgmma("f16", integers(64, 16), integers(16, 32), **left, **options)  # type: ignore[arg-type]
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
ALLOWED: dict[str, dict[str, object]] = {
    "a product on the same accumulators": between(product(32)),
    "a proxy fence after the barrier": replaced(
        f"{PROXY}\n\tbar.sync 0;", "bar.sync 0;\n\tfence.proxy.async;"
    ),
    "a store elsewhere": between("\tst.shared.b32 [%r2+60000], %r1;"),
}
TMA = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
REFUSED: dict[str, dict[str, object]] = {
    "a part of a warp": replaced("\twgmma.mma_async", "\tsetp.lt.s32 %p3, %r1, 40;\n\t@%p3 wgmma.mma_async"),
    "TMA": before_fence(f"\t{TMA} [%r2], [%rd1, {{%r1, %r1}}], [%r3];"),
    "fp8": replaced("m64n32k16.f32.f16.f16", "m64n32k32.f32.e4m3.e4m3"),
}


@pytest.mark.smoke
@pytest.mark.parametrize("what", BROKEN)
def test_broken(what: str) -> None:
    kind, options = BROKEN[what]
    assert kind in findings(**options)


@pytest.mark.smoke
@pytest.mark.parametrize("what", ALLOWED)
def test_allowed(what: str) -> None:
    assert not findings(**ALLOWED[what]) - {"lanes_write_write", "race_write_write"}


@pytest.mark.smoke
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    with pytest.raises((emulator.EmulationError, UnsupportedError)):
        findings(**REFUSED[what])
    emulator.launches.clear()
