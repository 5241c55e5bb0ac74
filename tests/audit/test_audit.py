"""The audit (`make audit`): parsers and rules on made-up listings, and the lists of what passed."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is no compiler")

import triton

from .compile import exact_lines
from .listing import parse_amdgcn, parse_sass
from .passed import VERSION, lines_of, read, sources, update
from .pointers import pointers_by_line
from .rules import Record, Traffic, broken_rules
from .run import tasks

HOPPER_LOOP = """
	//## File "kernel.py", line 3
        /*0010*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
	//## File "kernel.py", line 10
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5+0x100], desc[UR4][R2.64] ;
        /*0030*/              @!P1 LDGSTS.E.BYPASS.128 [R6], desc[UR4][R8.64] ;
	//## File "helper.py", line 4 inlined at "kernel.py", line 12
	//## File "kernel.py", line 12
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
	//## File "kernel.py", line 20
        /*0060*/                   STG.E.U16 desc[UR4][R2.64], R7 ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""
# Blackwell's barrier waits jump out of line and back: the loop is a cycle, but no address range.
BLACKWELL_LOOP = """
.L_x_9:
        /*0000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR19], R12 ;
        /*0010*/              @!P0 BRA `(.L_x_7) ;
.L_x_15:
        /*0020*/                   UTCHMMA gdesc[UR4], gdesc[UR8], tmem[UR7], tmem[UR16], idesc[UR17], !UPT ;
        /*0030*/                   BRA.U UP1, `(.L_x_9) ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/                   EXIT ;
.L_x_7:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR19], R12 ;
        /*0070*/              @!P0 BRA `(.L_x_7) ;
        /*0080*/                   BRA `(.L_x_15) ;
"""
AMD_LOOP = """
	.file	1 "/somewhere" "kernel.py"
	.loc	1 10 9 is_stmt 1                ; kernel.py:10:9
.LBB0_1:
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_load_ushort v9, v[4:5], off
	.loc	1 0 9                           ; kernel.py:0:9
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	s_cbranch_scc1 .LBB0_1
	global_store_dwordx2 v[4:5], v[0:1], off
	s_endpgm
"""


def accesses(listing, indices):
    return [a for i in indices if (a := listing.access(listing.instructions[i]))]


def test_sass():
    listing = parse_sass(HOPPER_LOOP)
    loop = listing.main_loop()
    opcodes = [listing.instructions[i].opcode.split(".")[0] for i in loop]
    assert opcodes == ["LDGSTS", "LDGSTS", "HGMMA", "BRA"]
    assert [(a.kind, a.bits, a.asynchronous) for a in accesses(listing, loop)] == [("load", 128, True)] * 2
    assert accesses(listing, loop)[0].location == ("kernel.py", 10)
    assert listing.instructions[loop[2]].location == ("helper.py", 4)  # the innermost inlined line
    (store,) = (i for i, x in enumerate(listing.instructions) if x.opcode.startswith("STG"))
    assert store not in loop
    assert accesses(listing, [store])[0].bits == 16
    waits = parse_sass(BLACKWELL_LOOP)
    opcodes = [waits.instructions[i].opcode for i in waits.main_loop()]
    assert len(opcodes) == 7
    assert "UTCHMMA" in opcodes
    assert "STG.E.128" not in opcodes


@pytest.mark.parametrize(
    ("code", "access", "core"),
    [
        ("LDG.E R1, [R2]", ("load", 32, False), None),
        ("LDG.E.U16.CONSTANT R1, [R2]", ("load", 16, False), None),
        ("@P1 LDG.E.64 R1, [R2]", ("load", 64, False), None),
        ("UTMALDG.2D [UR8], [UR4]", ("load", 0, True), None),
        ("STG.E.128 [R2], R4", ("store", 128, False), None),
        ("LDS.128 R4, [R2]", None, None),
        ("HMMA.16816.F32.BF16 R1, R2", None, "HMMA"),
        ("UTCHMMA R1, R2", None, "UTCHMMA"),
        ("HFMA2.MMA R1, R2", None, None),
        ("WARPGROUP.ARRIVE R1, R2", None, None),
    ],
)
def test_instructions(code, access, core):
    listing = parse_sass(f"        /*0000*/    {code} ;")
    found = listing.access(listing.instructions[0])
    assert (found and (found.kind, found.bits, found.asynchronous)) == access
    assert listing.tensor_core(listing.instructions[0]) == core


def test_spilled_bytes():
    lines = ("STL.64 [R1+0x8], R4", "STL [R1], R6", "STL.64 [R1+0x8], R8", "LDL.64 R4, [R1+0x8]")
    assert parse_sass("\n".join(f"        /*0000*/    {line} ;" for line in lines)).local_bytes() == 12


REGISTER_OPERAND = """
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   FADD R60, R4, R5 ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   LDSM.16.M88.4 R4, [R9] ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   EXIT ;
"""
SECOND_GROUP = """HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0 ;
        /*0021*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0022*/                  """


@pytest.mark.parametrize(
    ("old", "new", "early"),
    [
        ("", "", 0),
        ("FADD R60, R4, R5", "FADD R7, R4, R5", 1),  # the last of four registers
        ("FADD R60, R4, R5", "LDG.E.128 R0, [R60]", 0),
        ("FADD R60, R4, R5", "LDSM.16.M88.4 R1, [R60]", 1),
        ("FADD R60, R4, R5", "STS.128 [R60], R4", 0),
        ("FADD R60, R4, R5", "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24", 0),
        (
            "/*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0",
            "/*0040*/  WARPGROUP.DEPBAR.LE gsb0, 0x1",
            1,
        ),
        ("FADD R60, R4, R5", f"{SECOND_GROUP} FADD R4, R60, R61", 0),  # its own group is complete
        ("FADD R60, R4, R5", f"{SECOND_GROUP} FADD R9, R60, R61", 1),  # the second one is not
        (
            "/*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0",
            "/*0070*/  SHFL.IDX PT, R5, R60, RZ, 0x1f",
            1,
        ),
    ],
)
def test_a_register_operand_is_written_only_after_the_wait(old, new, early):
    """On every path from the product, also around its loop."""
    assert parse_sass(REGISTER_OPERAND.replace(old, new)).early_writes() == early


def test_amdgcn():
    listing = parse_amdgcn(AMD_LOOP)
    loop = listing.main_loop()
    assert len(loop) == 4
    assert [a.bits for a in accesses(listing, loop)] == [128, 16]
    assert accesses(listing, loop)[0].location == ("/somewhere/kernel.py", 10)
    assert [core for i in loop if (core := listing.tensor_core(listing.instructions[i]))] == ["MFMA"]
    assert accesses(listing, range(len(listing.instructions)))[-1].bits == 64


def test_lines_of_two_files_stay_apart():
    """ptxas assigns a line to the previous file if only the file changes."""
    ptx = ".loc 1 77 19\n.loc 2 77 25, function_name $L0, inlined_at 1 77 19 // a.py:77:25\n.loc 1 0 9\n"
    first, second, at, none = (int(line) for line in re.findall(r"(?:loc|at) \d (\d+)", exact_lines(ptx)))
    assert (at, none) == (first, 0)
    assert first != second
    for line in (first, second):
        listing = parse_sass(f'//## File "a.py", line {line}\n        /*0000*/   EXIT ;\n')
        assert listing.instructions[0].location == ("a.py", 77)


def test_pointers_by_line():
    lines = pointers_by_line(
        """
def kernel(x_ptr, index_ptr, out_ptr, n):
    cols = tl.load(index_ptr + n)
    x_ptrs = x_ptr + cols
    for _ in range(3):
        value = tl.load(
            x_ptrs[:, None],
        )
    tl.store(out_ptr + n, tl.load(x_ptr))
"""
    )
    assert lines[3, "load"] == {"index_ptr"}
    assert lines[6, "load"] == lines[8, "load"] == {"x_ptr"}  # a loaded index is not an address in index_ptr
    assert (lines[9, "load"], lines[9, "store"]) == ({"x_ptr"}, {"out_ptr"})
    assert (2, "load") not in lines


LOADS = Traffic("x_ptr", "load", 128, True, True, 8)
GOOD = Record(
    *("fused_linear", "r16", "matmul", {"block_t": 128}, "sm_90", "bf16"),
    registers=168,
    shared=60_000,
    tensor_cores={"HGMMA": 8},
    traffic=(LOADS, Traffic("index_ptr", "load", 32, False, True, 1), Traffic("y_ptr", "store", 16, False, False, 64)),
    narrow={"index_ptr": "one per column"},
)  # fmt: skip
AMD = {"arch": "gfx942", "tensor_cores": {"MFMA": 1}}


def load(pointer: str, bits: int, asynchronous: bool) -> dict[str, object]:
    return {"traffic": (*GOOD.traffic, Traffic(pointer, "load", bits, asynchronous, True, 136))}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, None),
        ({"spilled": 12}, "spills 12 bytes"),
        ({"stack": 16}, "stack of 16 bytes"),
        ({"shared": 227 * 1024 + 1}, "shared memory 232449 above 232448 bytes"),
        ({"tensor_cores": {}}, "no tensor cores in the main loop, not HGMMA"),
        ({"tensor_cores": {}, "dtype": "fp32"}, None),
        ({"tensor_cores": {}, "dtype": "fp32", "arch": "gfx942"}, "not MFMA"),
        ({"dtype": "tf32", "tensor_cores": {"HMMA": 8}}, "HMMA in the main loop, not HGMMA"),
        *(({"arch": arch}, f"not {core}") for arch, core in (("sm_80", "HMMA"), ("sm_100", "UTCHMMA"))),
        (load("dy_ptr", 64, True), "136 loads of 64 bits through dy_ptr"),
        (load("dy_ptr", 128, False), "loads of dy_ptr are not asynchronous"),
        (AMD | load("dy_ptr", 128, False), None),
        (load("dy_ptr|index_ptr", 16, False), "through dy_ptr|index_ptr"),
        (load("?", 16, False), "through ?"),
        (AMD | load("?", 16, False), None),  # LLVM merged two accesses
        ({"traffic": GOOD.traffic[1:]}, "no loads of wide operands"),
        ({"traffic": GOOD.traffic[1:], "role": "gather"}, None),
        ({"role": "copy", "traffic": GOOD.traffic[:2]}, None),
        ({"role": "copy"}, "64 stores of 16 bits through y_ptr"),
        ({"early_writes": 2}, "2 writes to a wgmma's left operand before its wait"),
        ({"error": "OutOfResources"}, "does not compile: OutOfResources"),
    ],
)
def test_rules(change, rule):
    broken = broken_rules(replace(GOOD, **change))
    assert broken == () if rule is None else any(rule in one for one in broken), broken


MODULE = """
import triton.language as tl
from triton.runtime.jit import JITFunction as jit
WIDTH = tl.constexpr(8)
@jit
def helper(x):
    return x + WIDTH
@jit
def kernel(x_ptr):
    tl.store(x_ptr, helper(1))
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("    return x", '    """What it does."""\n    return x', True),
        ("import triton.language", "\n# a line\nimport triton.language", True),
        ("return x + WIDTH", "return (x+WIDTH)  # a word", True),
        ("return x + WIDTH", "return x - WIDTH", False),
        ("constexpr(8)", "constexpr(4)", False),
        ("helper(1)", "helper(2)", False),
    ],
)
def test_a_key_depends_on_the_code_alone(tmp_path, old, new, same):
    """On its code, the code of the functions that it calls, and the constants they read; not on layout or comments."""

    def found(name: str, text: str) -> list[str]:
        path = tmp_path / name
        path.write_text(text)
        return sources(runpy.run_path(str(path))["kernel"])

    assert (found("a.py", MODULE) == found("b.py", MODULE.replace(old, new))) == same


def test_a_list_names_kernels_that_passed_in_all_forms_as_they_are(tmp_path: Path) -> None:
    changed, broken, half = (replace(GOOD, kernel=name, key=name) for name in ("changed", "broken", "half"))
    lines = lines_of([changed, broken, half, replace(half, form="r64", key="r64")])
    assert lines["half sm_90"].startswith("2 forms, ")
    (tmp_path / f"{VERSION}.txt").write_text("changed sm_90: 1 forms, 0\nother sm_80: 1 forms, 1\n")
    update(tmp_path, lines, [replace(broken, spilled=8), half])
    assert read(tmp_path) == {"other sm_80": "1 forms, 1"}  # not asked for, so it stays
    update(tmp_path, lines, [changed])
    assert read(tmp_path) == {"changed sm_90": lines["changed sm_90"], "other sm_80": "1 forms, 1"}


def test_what_no_gpu_runs_is_not_audited(monkeypatch):
    """TF32 on Hopper and everything on Blackwell's data-centre GPUs, by a Triton that compiles them wrongly."""
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    asked = {(task.arch, task.dtype) for task in tasks(["sm_80", "sm_90", "sm_100"], ["fused_linear"])}
    precisions = {"bf16", "fp16", "tf32", "fp32"}
    assert asked == {("sm_80", p) for p in precisions} | {("sm_90", p) for p in precisions - {"tf32"}}
