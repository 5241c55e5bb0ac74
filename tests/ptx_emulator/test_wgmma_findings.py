"""Warpgroup products broken on purpose: dropped fences, waits, commits and barriers, and shifted descriptors."""

import re

import pytest
import torch

from . import ARCH, emulator
from .assembler import UnsupportedError
from .handwritten import Change, found_when_broken, without
from .handwritten_wgmma import run_wgmma
from .samples import matmul, matmul_computed

pytestmark = [pytest.mark.skipif(ARCH != 90, reason="only sm_90 has wgmma"), pytest.mark.smoke]

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


def before_fence(text: str) -> Change:
    return lambda ptx: ptx.replace(f"\t{FENCE}", f"{text}\n\t{FENCE}", 1)


def replaced(old: str, new: str = "") -> Change:
    return lambda ptx: ptx.replace(old, new)


def kinds_of(
    *, registers: bool = False, between: str = "", change: Change = lambda text: text, notes: bool = False
) -> set[str]:
    a, b = torch.randint(-4, 5, (64, 16)).float(), torch.randint(-4, 5, (16, 32)).float()
    options = {"left": None} if registers else {}
    _, launch = run_wgmma("f16", a, b, between=between, change=change, **options)  # type: ignore[arg-type]
    return {finding.kind for finding in launch.findings if finding.is_error or notes}


@pytest.mark.parametrize(
    ("kind", "between"),
    [
        pytest.param("wgmma_register", product(16), id="another shape on accumulators under way"),
        pytest.param("wgmma_register", "\tadd.s32 %r9, %acc3, 1;", id="an accumulator read"),
        pytest.param("wgmma_register", "\tmov.b32 %acc3, 0;", id="an accumulator written"),
        pytest.param("wgmma_overwrite", "\tst.shared.b32 [%r2+32768], %r1;", id="a store over an operand"),
        pytest.param(
            "wgmma_overwrite",
            "\tbar.sync 0;\n\tsetp.eq.s32 %p3, %r1, 100;\n\t@%p3 st.shared.b32 [%r2+32768], %r1;\n\tbar.sync 0;",
            id="another warp's store, behind a barrier",
        ),
        pytest.param(
            "wgmma_overwrite",
            "\tcp.async.cg.shared.global [%r2+32768], [%rd1], 16;",
            id="the start of a copy over an operand",
        ),
    ],
)
def test_between_product_and_wait(kind: str, between: str) -> None:
    assert kind in kinds_of(between=between)


def test_operand_in_registers() -> None:
    assert "wgmma_register" in kinds_of(registers=True, between="\tmov.b32 %r21, 0;")
    assert "wgmma_operand_read" in kinds_of(registers=True, between="\tadd.s32 %r9, %r21, 0;", notes=True)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param("wgmma_register", replaced(WAIT), id="no wait: a register"),
        pytest.param("wgmma_not_waited", replaced(WAIT), id="no wait"),
        pytest.param("wgmma_register", replaced(WAIT, WAIT.replace("0", "1")), id="a wait one short"),
        pytest.param("wgmma_register", replaced(COMMIT), id="no commit"),
        pytest.param("wgmma_unfenced", replaced(FENCE), id="no fence"),
        pytest.param(
            "wgmma_unfenced",
            replaced(FENCE, f"{FENCE}\n\tmov.b32 %acc3, 0;"),
            id="a register written after the fence",
        ),
        pytest.param("wgmma_proxy", replaced(PROXY), id="no proxy fence"),
        pytest.param("race_read_after_write", replaced("bar.sync 0;"), id="no barrier"),
        pytest.param(
            "wgmma_divergent",
            before_fence("\tshr.u32 %r9, %r1, 5;\n\tcvt.u64.u32 %rd11, %r9;\n\tadd.s64 %rd6, %rd6, %rd11;"),
            id="warps with different descriptors",
        ),
        pytest.param(
            "wgmma_divergent",
            before_fence("\tcvt.u64.u32 %rd11, %r1;\n\tadd.s64 %rd6, %rd6, %rd11;"),
            id="lanes with different descriptors",
        ),
        pytest.param("shared_outside", before_fence("\tadd.s64 %rd6, %rd6, 2040;"), id="past the end"),
        pytest.param("wgmma_descriptor", before_fence("\tadd.s64 %rd6, %rd6, 16384;"), id="reserved bits"),
    ],
)
def test_broken(kind: str, change: Change) -> None:
    assert kind in kinds_of(change=change)


def test_operand_register_written_after_the_fence() -> None:
    change = replaced(FENCE, f"{FENCE}\n\tmov.b32 %r21, 0;")
    assert "wgmma_unfenced" in kinds_of(registers=True, change=change)


@pytest.mark.parametrize(
    ("between", "change"),
    [
        pytest.param(product(32), replaced("", ""), id="a product on the same accumulators"),
        pytest.param(
            "",
            replaced(f"{PROXY}\n\tbar.sync 0;", "bar.sync 0;\n\tfence.proxy.async;"),
            id="a proxy fence after the barrier",
        ),
        pytest.param("\tst.shared.b32 [%r2+60000], %r1;", replaced("", ""), id="a store elsewhere"),
    ],
)
def test_allowed(between: str, change: Change) -> None:
    assert not kinds_of(between=between, change=change) - {"lanes_write_write", "race_write_write"}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            replaced("\twgmma.mma_async", "\tsetp.lt.s32 %p3, %r1, 40;\n\t@%p3 wgmma.mma_async"),
            id="a part of a warp",
        ),
        pytest.param(
            before_fence(
                "\tcp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                "[%r2], [%rd1, {%r1, %r1}], [%r3];"
            ),
            id="TMA",
        ),
        pytest.param(replaced("m64n32k16.f32.f16.f16", "m64n32k32.f32.e4m3.e4m3"), id="fp8"),
    ],
)
def test_refused(change: Change) -> None:
    with pytest.raises((emulator.EmulationError, UnsupportedError)):
        kinds_of(change=change)
    emulator.launches.clear()


# Triton's own kernels


class Product:
    """Fixed operands, so that a wrong result is recognised."""

    def __init__(self) -> None:
        self.a, self.b = torch.randn(128, 192).half(), torch.randn(192, 128).half()
        self.c = torch.empty(128, 128)

    def run(self, stages: int = 3) -> None:
        sizes = 128, 128, 192, *self.a.stride(), *self.b.stride(), *self.c.stride(), 64, 64, 32
        matmul[(4,)](self.a, self.b, self.c, *sizes, "tf32", 2, num_warps=4, num_stages=stages)

    def computed(self) -> None:
        sizes = *self.a.stride(), *self.b.stride(), 0.7, 128, 192, 64, 32
        matmul_computed[(2,)](self.a, self.b, self.c, *sizes, "tf32", num_warps=4, num_stages=3)

    @property
    def is_wrong(self) -> bool:
        truth = self.a.double() @ self.b.double()
        return not float((self.c - truth).norm() / truth.norm()) < 1e-3


ANY_WAIT = r"wgmma\.wait_group\.sync\.aligned\s+\d+;"
RACES = {"race_read_after_write", "race_write_after_read"}


@pytest.mark.parametrize(
    ("expected", "change", "stages"),
    [
        pytest.param({"wgmma_register"}, without(ANY_WAIT), 3, id="waits"),
        pytest.param({"wgmma_unfenced"}, without(re.escape(FENCE)), 3, id="fences"),
        pytest.param({"wgmma_register"}, without(re.escape(COMMIT)), 3, id="commits"),
        pytest.param({"wgmma_proxy_copy"}, without(re.escape(PROXY)), 3, id="proxy fences after copies"),
        pytest.param({"wgmma_proxy"}, without(re.escape(PROXY)), 1, id="proxy fences after stores"),
        pytest.param(RACES, without(r"bar\.sync\s+0;"), 3, id="barriers"),
        pytest.param(RACES, without(r"bar\.sync\s+0;"), 1, id="barriers, one stage"),
        pytest.param(
            {"shared_in_flight"},
            lambda t: re.sub(r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 9;", t),
            3,
            id="waits for copies",
        ),
        pytest.param(
            {"wgmma_register"},
            lambda t: re.sub(r"(wgmma\.wait_group\.sync\.aligned)\s+0;", r"\1 1;", t),
            3,
            id="the last wait one short",
        ),
        pytest.param(
            {"wgmma_overwrite"},
            lambda t: re.sub(r"(wgmma\.wait_group\.sync\.aligned)\s+1;", r"\1 2;", t),
            3,
            id="the loop's wait one short",
        ),
    ],
)
def test_missing_in_tritons_kernel(expected: set[str], change: Change, stages: int) -> None:
    assert expected & found_when_broken(lambda: Product().run(stages), change)


@pytest.mark.parametrize(
    ("expected", "change"),
    [("wgmma_register", without(ANY_WAIT)), ("wgmma_unfenced", without(re.escape(FENCE)))],
)
def test_missing_with_a_computed_operand(expected: str, change: Change) -> None:
    assert expected in found_when_broken(Product().computed, change)


def shifted(by: int, operand: int) -> Change:
    """Shifts the descriptor of an operand of a wgmma in the middle of a kernel."""

    def change(text: str) -> str:
        hits = list(re.finditer(r"wgmma\.mma_async[^;]*", text))
        m = hits[len(hits) // 2]
        register = re.findall(r"%rd\d+", m[0])[operand]
        added = f".reg .b64 %shifted;\n\tadd.s64 %shifted, {register}, {by};\n\t"
        return text[: m.start()] + added + m[0].replace(register, "%shifted") + text[m.end() :]

    return change


@pytest.mark.parametrize("operand", [0, 1], ids=["left", "right"])
@pytest.mark.parametrize("by", [1, 2, -64, 1 << 32, 1 << 62])
def test_shifted_descriptor(by: int, operand: int) -> None:
    """By 16 bytes, 32 bytes, 1 KiB or a stride, or to another swizzle; either a finding or a wrong result shows it."""
    p = Product()
    p.run()
    assert not p.is_wrong
    assert found_when_broken(p.run, shifted(by, operand)) or p.is_wrong
