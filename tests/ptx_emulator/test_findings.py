"""Correct kernels are broken on purpose, and the checks must notice: no barrier, a short wait, a shifted address."""

import re
from collections.abc import Callable

import pytest
import torch

from . import emulator
from .assembler import UnsupportedError
from .emulator import EmulationError
from .handwritten import Change, found, found_when_broken, run_ptx, without
from .samples import add, add_unmasked, matmul, neighbours, overlapping, reduce_rows

pytestmark = pytest.mark.smoke

BARRIER, WAIT = r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+(\d+);"


def longer_wait(by: int) -> Change:
    return lambda text: re.sub(WAIT, lambda m: f"cp.async.wait_group {int(m[1]) + by};", text)


def product() -> None:
    a, b, c = torch.randn(128, 128).half(), torch.randn(128, 128).half(), torch.empty(128, 128)
    sizes = 128, 128, 128, *a.stride(), *b.stride(), *c.stride(), 64, 64, 32
    matmul[(4,)](a, b, c, *sizes, "tf32", 2, num_warps=4, num_stages=3)


class TestGlobalMemory:
    def test_past_the_end(self) -> None:
        x, y, out = torch.randn(1024), torch.randn(1000), torch.empty(1000)
        assert "outside_storage" in found(lambda: add_unmasked[(4,)](x, y, out, 1000, BLOCK=256))

    def test_past_the_view(self) -> None:
        x, rows, out = torch.randn(1024), torch.randn(2, 1024), torch.empty(1000)
        assert "outside_view" in found(lambda: add_unmasked[(4,)](x, rows[0, :1000], out, 1000, BLOCK=256))

    def test_no_argument(self) -> None:
        launch = run_ptx("mov.b64 %rd1, 64;\nld.global.b32 %r5, [%rd1];", torch.zeros(8))
        assert "not_an_argument" in {finding.kind for finding in launch.errors}

    def test_two_programs_write_a_place(self) -> None:
        out = torch.zeros(2048, dtype=torch.int32)
        assert "cta_write_write" in found(lambda: overlapping[(4,)](out, BLOCK=256))

    def test_a_program_reads_what_another_writes(self) -> None:
        kinds = found(lambda: neighbours[(4,)](torch.zeros(1024), BLOCK=256))
        assert {"cta_read_after_write", "cta_write_after_read"} <= kinds

    def test_unwritten_memory(self) -> None:
        x, unwritten, out = torch.randn(1000), torch.empty(1000), torch.empty(1000)
        assert found(lambda: add[(4,)](x, unwritten, out, 1000, BLOCK=256)) == {"poison_read"}
        assert not found(lambda: add[(4,)](x, x, out, 1000, BLOCK=256))

    def test_misaligned_vector(self) -> None:
        shifted: Change = lambda text: re.sub(  # noqa: E731
            r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+) 0", r"\1 4", text, count=1
        )
        x, y, out = torch.randn(1024), torch.randn(1024), torch.empty(1024)
        assert "misaligned" in found_when_broken(lambda: add[(4,)](x, y, out, 1024, BLOCK=512), shifted)


class TestSharedMemory:
    def test_nothing_in_a_correct_product(self) -> None:
        assert not found(product)

    @pytest.mark.parametrize("by", [2, 9])
    def test_a_wait_that_is_too_short(self, by: int) -> None:
        assert "shared_in_flight" in found_when_broken(product, longer_wait(by))

    @pytest.mark.parametrize("change", [without(BARRIER), lambda text: re.sub(BARRIER, "", text, count=1)])
    def test_missing_barriers(self, change: Change) -> None:
        kinds = found_when_broken(product, change)
        assert {"race_read_after_write", "race_write_after_read", "warp_unsynced"} & kinds

    def test_missing_barriers_in_a_reduction(self) -> None:
        def run() -> None:
            reduce_rows[(1,)](torch.randn(64, 64), torch.empty(2, 64), 64, BLOCK=64)

        assert {"race_read_after_write", "shared_uninit"} & found_when_broken(run, without(BARRIER))


STORE = "mul.lo.s32 %r3, %r1, 4;\nadd.s32 %r4, %r2, %r3;\nst.shared.b32 [%r4], %r1;\n"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("shared_uninit", "ld.shared.b32 %r5, [%r2];"),
        ("shared_outside", "ld.shared.b32 %r5, [%r2+65536];"),
        ("shared_misaligned", "ld.shared.b32 %r5, [%r2+2];"),
        ("lanes_write_write", "st.shared.b32 [%r2], %r1;"),
        ("warp_unsynced", STORE + "ld.shared.b32 %r5, [%r2];"),
        ("lanes_global_write_write", "ld.param.b64 %rd1, [p0];\nst.global.b32 [%rd1], %r1;"),
    ],
)
def test_one_warp(kind: str, body: str) -> None:
    launch = run_ptx(body, torch.zeros(64))
    assert {finding.kind for finding in launch.errors} == {kind}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("race_write_write", "st.shared.b32 [%r2], %r1;"),
        (
            "race_write_after_read",
            STORE + "bar.sync 0;\nld.shared.b32 %r5, [%r2];\nst.shared.b32 [%r2], %r5;",
        ),
        ("race_read_after_write", STORE + "xor.b32 %r5, %r4, 128;\nld.shared.b32 %r6, [%r5];"),
    ],
)
def test_two_warps(kind: str, body: str) -> None:
    launch = run_ptx(body, torch.zeros(64), threads=64)
    assert kind in {finding.kind for finding in launch.errors}


def test_a_barrier_between_warps() -> None:
    body = STORE + "bar.sync 0;\nxor.b32 %r5, %r4, 128;\nld.shared.b32 %r6, [%r5];"
    assert not run_ptx(body, torch.zeros(64), threads=64).errors


@pytest.mark.parametrize(
    "body",
    [
        "setp.lt.s32 %p1, %r1, 16;\n@%p1 bra $L__a;\nbar.sync 0;\n$L__a:\nmov.b32 %r3, 0;",
        "setp.lt.s32 %p1, %r1, 16;\n@%p1 cp.async.commit_group;",
    ],
    ids=["barrier", "commit_group"],
)
def test_half_a_warp(body: str) -> None:
    with pytest.raises(EmulationError, match="divergent_sync"):
        run_ptx(body, threads=64)
    emulator.launches.clear()


def test_notes() -> None:
    """Writing one value twice is reported, but not as an error."""
    run: Callable[[str], set[str]] = lambda body: {  # noqa: E731
        finding.kind for finding in run_ptx(body, torch.zeros(64)).findings if not finding.is_error
    }
    assert run("ld.param.b64 %rd1, [p0];\nst.global.b32 [%rd1], 7;") == {"duplicate_store"}


@pytest.mark.parametrize(
    "statement",
    [
        "atom.global.add.f32 %r5, [%rd1], %r6",
        "bar.sync 1, 64",
        "mbarrier.init.shared::cta.b64 [%r2], 1",
        "frob.b32 %r1",
    ],
)
def test_unknown_instructions_are_refused(statement: str) -> None:
    with pytest.raises(UnsupportedError):
        run_ptx(f"{statement};")
