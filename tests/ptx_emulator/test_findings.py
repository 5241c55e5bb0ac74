"""Correct kernels are broken on purpose, and the checks must notice: no barrier, a short wait, a shifted address.

That they find nothing in a correct kernel is what the tests of our kernels show.
"""

import re
from collections.abc import Callable

import pytest
import torch

from . import ARCH, emulator
from .assembler import UnsupportedError
from .emulator import EmulationError
from .findings import LACKS_FENCES
from .handwritten import Change, found, found_when_broken, run_ptx
from .samples import Product, add, add_unmasked, neighbours, overlapping, reduce_rows

pytestmark = pytest.mark.smoke


def unmasked(y: torch.Tensor) -> None:
    add_unmasked[(4,)](torch.randn(1024), y, torch.empty(1000), 1000, BLOCK=256)


def added(y: torch.Tensor) -> None:
    add[(4,)](torch.randn(1000), y, torch.empty(1000), 1000, BLOCK=256)


GLOBAL: dict[str, tuple[set[str], Callable[[], object]]] = {
    "past the end": ({"outside_storage"}, lambda: unmasked(torch.randn(1000))),
    "past the view": ({"outside_view"}, lambda: unmasked(torch.randn(2, 1024)[0, :1000])),
    "two programs write a place": (
        {"cta_write_write"},
        lambda: overlapping[(4,)](torch.zeros(2048, dtype=torch.int32), BLOCK=256),
    ),
    "a program reads what another writes": (
        {"cta_read_after_write", "cta_write_after_read"},
        lambda: neighbours[(4,)](torch.zeros(1024), BLOCK=256),
    ),
    "unwritten memory": ({"poison_read"}, lambda: added(torch.empty(1000))),
}


@pytest.mark.parametrize("what", GLOBAL)
def test_global_memory(what: str) -> None:
    expected, run = GLOBAL[what]
    assert expected <= found(run)


# Triton's kernels, with instructions dropped or changed


def replaced(pattern: str, new: str | Callable[[re.Match[str]], str] = "", count: int = 0) -> Change:
    return lambda text: re.sub(pattern, new, text, count=count)


def product(stages: int = 3) -> Callable[[], object]:
    p = Product.random(torch.float16, 128, 128, 192)
    return lambda: p.run(stages=stages)


def computed() -> object:
    return Product.random(torch.float16, 128, 128, 192).run_computed()


def reduced() -> None:
    reduce_rows[(1,)](torch.randn(64, 64), torch.empty(2, 64), 64, BLOCK=64)


def vectors() -> None:
    add[(4,)](torch.randn(1024), torch.randn(1024), torch.empty(1024), 1024, BLOCK=512)


BARRIER, WAIT = r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+(\d+);"
PROXY, WGMMA_WAIT = r"fence\.proxy\.async\.shared::cta;", r"(wgmma\.wait_group\.sync\.aligned)\s+{};"
RACES = {"race_read_after_write", "race_write_after_read", "warp_unsynced"}
BROKEN: dict[str, tuple[set[str], Callable[[], object], Change]] = {
    "a shifted vector": (
        {"misaligned"},
        vectors,
        replaced(r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+) 0", r"\1 4", count=1),
    ),
    "a wait two short": (
        {"shared_in_flight"},
        product(),
        replaced(WAIT, lambda m: f"cp.async.wait_group {int(m[1]) + 2};"),
    ),
    "no waits for copies": ({"shared_in_flight"}, product(), replaced(WAIT, "cp.async.wait_group 9;")),
    "no barriers": (RACES, product(), replaced(BARRIER)),
    "no barriers, one stage": (RACES, product(1), replaced(BARRIER)),
    "one barrier fewer": (RACES, product(), replaced(rf"({WAIT}\s*){BARRIER}", r"\1", count=1)),
    "no barriers in a reduction": ({"race_read_after_write", "shared_uninit"}, reduced, replaced(BARRIER)),
}
if ARCH == 90 and not LACKS_FENCES:
    BROKEN["no proxy fences after copies"] = {"wgmma_proxy_copy"}, product(), replaced(PROXY)
if ARCH == 90:
    BROKEN |= {
        "the loop's wait one short": (
            {"wgmma_overwrite"},
            product(),
            replaced(WGMMA_WAIT.format(1), r"\1 2;"),
        ),
        "no waits, a computed operand": (
            {"wgmma_register"},
            computed,
            replaced(WGMMA_WAIT.format(r"\d+")),
        ),
    }


@pytest.mark.parametrize("what", BROKEN)
def test_broken(what: str) -> None:
    expected, run, change = BROKEN[what]
    assert expected & found_when_broken(run, change)


# Handwritten PTX

STORE = "mul.lo.s32 %r3, %r1, 4;\nadd.s32 %r4, %r2, %r3;\nst.shared.b32 [%r4], %r1;\n"
PLACE = "ld.param.b64 %rd1, [p0];\n"
NEXT_WARPS = "xor.b32 %r5, %r4, 128;\nld.shared.b32 %r6, [%r5];"


@pytest.mark.parametrize(
    ("warps", "kinds", "body"),
    [
        (1, {"not_an_argument"}, "mov.b64 %rd1, 64;\nld.global.b32 %r5, [%rd1];"),
        (1, {"shared_uninit"}, "ld.shared.b32 %r5, [%r2];"),
        (1, {"shared_outside"}, "ld.shared.b32 %r5, [%r2+65536];"),
        (1, {"shared_misaligned"}, "ld.shared.b32 %r5, [%r2+2];"),
        (1, {"lanes_write_write"}, "st.shared.b32 [%r2], %r1;"),
        (1, {"warp_unsynced"}, STORE + "ld.shared.b32 %r5, [%r2];"),
        # A place that is written twice is noted; it is an error if the values differ.
        (1, {"duplicate_store"}, PLACE + "st.global.b32 [%rd1], 7;"),
        (1, {"duplicate_store", "lanes_global_write_write"}, PLACE + "st.global.b32 [%rd1], %r1;"),
        (2, {"race_write_write", "lanes_write_write"}, "st.shared.b32 [%r2], %r1;"),
        (
            2,
            {"race_write_after_read"},
            STORE + "bar.sync 0;\nld.shared.b32 %r5, [%r2];\nst.shared.b32 [%r2], %r5;",
        ),
        (2, {"race_read_after_write"}, STORE + NEXT_WARPS),
        (2, set(), STORE + "bar.sync 0;\n" + NEXT_WARPS),
    ],
)
def test_accesses(warps: int, kinds: set[str], body: str) -> None:
    launch = run_ptx(body, torch.zeros(64), threads=32 * warps)
    noticed = {finding.kind for finding in launch.findings}
    assert kinds <= noticed if warps > 1 and kinds else kinds == noticed
    notes = {"duplicate_store", "same_value_write_write"}
    assert {finding.kind for finding in launch.errors} == noticed - notes


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        (
            "setp.lt.s32 %p1, %r1, 16;\n@%p1 bra $L__a;\nbar.sync 0;\n$L__a:\nmov.b32 %r3, 0;",
            EmulationError,
            "divergent_sync",
        ),
        ("setp.lt.s32 %p1, %r1, 16;\n@%p1 cp.async.commit_group;", EmulationError, "divergent_sync"),
        ("atom.global.add.f32 %r5, [%rd1], %r6;", UnsupportedError, "atom"),
        ("bar.sync 1, 64;", UnsupportedError, "bar"),
        ("mbarrier.init.shared::cta.b64 [%r2], 1;", UnsupportedError, "mbarrier"),
        ("frob.b32 %r1;", UnsupportedError, "frob"),
    ],
)
def test_undefined_or_unknown_instructions_are_refused(body: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        run_ptx(body, threads=64)
    emulator.launches.clear()
