"""The audit (smoa_kernels/audit): parsers and rules on fabricated listings, and real compiles of toy kernels.

The process that runs these tests may interpret Triton; the audit compiles in processes of its own.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from smoa_kernels.audit.compile import exact_lines
from smoa_kernels.audit.listing import parse_amdgcn, parse_sass
from smoa_kernels.audit.pointers import argument_offsets, argument_pointers, pointers_by_line
from smoa_kernels.audit.rules import Record, Traffic, broken_rules
from smoa_kernels.audit.run import run_audit
from smoa_kernels.cli import main
from smoa_kernels.files import cache_folder
from smoa_kernels.kernels.architectures import ARCHITECTURES, occupancy

TOYS = "audit_kernels:TOYS"
CRASHES = "audit_kernels:CRASHES"

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


def accesses(listing, indices):
    return [a for i in indices if (a := listing.access(listing.instructions[i]))]


class TestSass:
    def test_main_loop(self):
        listing = parse_sass(HOPPER_LOOP)
        loop = listing.main_loop()
        names = [listing.instructions[i].opcode.split(".")[0] for i in loop]
        assert names == ["LDGSTS", "LDGSTS", "HGMMA", "BRA"]
        loads = accesses(listing, loop)
        assert [(a.kind, a.bits, a.asynchronous) for a in loads] == [("load", 128, True)] * 2
        assert loads[0].location == ("kernel.py", 10)
        mma = listing.instructions[loop[2]]
        assert listing.tensor_core(mma) == "HGMMA"
        assert mma.location == ("helper.py", 4)  # the innermost inlined line
        stores = [i for i, x in enumerate(listing.instructions) if x.opcode.startswith("STG")]
        assert not set(stores) & set(loop)
        assert accesses(listing, stores)[0].bits == 16

    def test_wait_moved_past_the_end_stays_in_the_loop(self):
        """Blackwell's barrier waits jump out of line and back: no interval, but one cycle of control flow."""
        listing = parse_sass(
            """
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
        )
        names = [listing.instructions[i].opcode for i in listing.main_loop()]
        assert "UTCHMMA" in names
        assert "STG.E.128" not in names
        assert len(names) == 7

    def test_first_multiplying_loop_is_the_main_one(self):
        body = "\n".join(f"        /*{i:04x}*/                   FFMA R1, R2, R3, R1 ;" for i in range(40))
        plain = f".L_x_1:\n{body}\n        /*0100*/               @P0 BRA `(.L_x_1) ;\n"
        scalar = ".L_x_0:\n        /*0000*/   IADD3 R1, R1, R2, RZ ;\n        /*0010*/  @P0 BRA `(.L_x_0) ;\n"
        later = ".L_x_3:\n        /*0200*/   HMMA.16816.F32 R1, R2, R3, R1 ;\n        /*0210*/  @P0 BRA `(.L_x_3) ;\n"
        listing = parse_sass(scalar + plain + later)
        loop = [listing.instructions[i].opcode for i in listing.main_loop()]
        assert loop.count("FFMA") == 40
        assert "HMMA.16816.F32" not in loop

    def test_spilled_bytes(self):
        listing = parse_sass(
            """
        /*0000*/                   STL.64 [R1+0x8], R4 ;
        /*0010*/                   STL [R1], R6 ;
        /*0020*/                   STL.64 [R1+0x8], R8 ;
        /*0030*/                   LDL.64 R4, [R1+0x8] ;
"""
        )
        assert listing.local_bytes() == 12

    @pytest.mark.parametrize(
        ("opcode", "found"),
        [
            ("LDG.E R1, [R2]", ("load", 32, False)),
            ("LDG.E.U16.CONSTANT R1, [R2]", ("load", 16, False)),
            ("@P1 LDG.E.64 R1, [R2]", ("load", 64, False)),
            ("UTMALDG.2D [UR8], [UR4]", ("load", 0, True)),
            ("STG.E.128 [R2], R4", ("store", 128, False)),
            ("LDS.128 R4, [R2]", None),
        ],
    )
    def test_accesses(self, opcode, found):
        (instruction,) = parse_sass(f"        /*0000*/    {opcode} ;").instructions
        access = parse_sass("").access(instruction)
        assert (access and (access.kind, access.bits, access.asynchronous)) == found

    @pytest.mark.parametrize(
        ("opcode", "core"),
        [
            ("HMMA.16816.F32.BF16", "HMMA"),
            ("UTCHMMA", "UTCHMMA"),
            ("DMMA.8x8x4", "DMMA"),
            ("HFMA2.MMA", None),
            ("WARPGROUP.ARRIVE", None),
        ],
    )
    def test_tensor_cores(self, opcode, core):
        (instruction,) = parse_sass(f"        /*0000*/    {opcode} R1, R2 ;").instructions
        assert parse_sass("").tensor_core(instruction) == core


def test_lines_of_two_files_stay_apart():
    """ptxas takes a line for one of the file before where only the file changes."""
    ptx = ".loc 1 77 19\n.loc 2 77 25, function_name $L0, inlined_at 1 77 19 // a.py:77:25\n.loc 1 0 9\n"
    first, second, at, none = (int(line) for line in re.findall(r"(?:loc|at) \d (\d+)", exact_lines(ptx)))
    assert (at, none) == (first, 0)
    assert first != second
    for line in (first, second):
        listing = parse_sass(f'//## File "a.py", line {line}\n        /*0000*/   EXIT ;\n')
        assert listing.instructions[0].location == ("a.py", 77)


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


def test_amdgcn():
    listing = parse_amdgcn(AMD_LOOP)
    loop = listing.main_loop()
    assert len(loop) == 4
    assert [a.bits for a in accesses(listing, loop)] == [128, 16]
    assert accesses(listing, loop)[0].location == ("/somewhere/kernel.py", 10)
    assert [core for i in loop if (core := listing.tensor_core(listing.instructions[i]))] == ["MFMA"]
    assert accesses(listing, range(len(listing.instructions)))[-1].bits == 64


def test_amd_addresses_lead_back_to_their_argument():
    """Buffer descriptors through moves, flat addresses through arithmetic; loaded values carry nothing on."""
    code = [
        ("s_load_dwordx4", "s[4:7], s[0:1], 0x0"),
        ("s_load_dword", "s8, s[0:1], 0x10"),
        ("s_mov_b64", "s[12:13], s[6:7]"),
        ("buffer_load_dword", "v3, v1, s[12:15], 0 offen"),
        ("v_lshl_add_u64", "v[4:5], v[6:7], 1, s[4:5]"),
        ("global_load_ushort", "v9, v[4:5], off"),
        ("v_lshl_add_u64", "v[4:5], v[8:9], 1, s[6:7]"),
        ("global_store_dwordx2", "v[4:5], v[10:11], off"),
        ("global_load_dword", "v2, v9, s[2:3]"),
    ]
    aligned = [("n", "i32"), ("x_ptr", "*i8"), ("m", "i32"), ("k", "i64"), ("y_ptr", "*i8")]
    assert argument_pointers(aligned) == {8: "x_ptr", 32: "y_ptr"}
    names = argument_pointers([("x_ptr", "*bf16"), ("y_ptr", "*fp32"), ("n", "i32")])
    assert names == {0: "x_ptr", 8: "y_ptr"}
    found = [{names[o] for o in offsets if o in names} for offsets in argument_offsets(code)]
    assert found[3:] == [{"y_ptr"}, set(), {"x_ptr"}, set(), {"y_ptr"}, set()]


def test_pointers_by_line():
    lines = pointers_by_line(
        """
def kernel(x_ptr, index_ptr, out_ptr, n):
    cols = tl.load(index_ptr + n)
    x_ptrs = x_ptr + cols
    x_ptrs += 4
    for _ in range(3):
        value = tl.load(
            x_ptrs[:, None],
            mask=n > 0,
        )
    tl.store(out_ptr + n, tl.load(x_ptr))
"""
    )
    assert lines[3, "load"] == {"index_ptr"}
    assert lines[7, "load"] == lines[9, "load"] == {"x_ptr"}  # a loaded index is no address in index_ptr
    assert lines[11, "load"] == {"x_ptr"}
    assert lines[11, "store"] == {"out_ptr"}
    assert lines[5, "address"] == frozenset()
    assert (2, "load") not in lines


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        ("sm_80", 128, 48 * 1024, 4, 3),  # shared memory: 164 / 49
        ("sm_80", 255, 0, 8, 1),  # registers: 2 warps per scheduler
        ("sm_90", 168, 100 * 1024, 4, 2),
        ("sm_90", 32, 0, 1, 32),  # the block limit
        ("sm_86", 40, 0, 8, 6),  # 48 warps
        ("sm_120", 64, 100 * 1024, 4, 0),  # does not fit
        ("gfx942", 128, 32 * 1024, 4, 2),
        ("gfx942", 512, 0, 4, 1),
    ],
)
def test_occupancy(arch, registers, shared, warps, blocks):
    found = occupancy(ARCHITECTURES[arch], registers=registers, shared=shared, warps=warps)
    assert found == blocks


GOOD = Record(
    kernel="block_matmul",
    variant="loaded",
    role="matmul",
    config={"block_t": 128},
    arch="sm_90",
    dtype="bf16",
    registers=168,
    shared=100_000,
    warps=8,
    blocks_per_multiprocessor=1,
    tensor_cores={"HGMMA": 8},
    traffic=(
        Traffic("x_ptr", "load", 128, True, True, 8),
        Traffic("index_ptr", "load", 32, False, True, 1),
        Traffic("out_ptr", "store", 16, False, False, 64),
    ),
    narrow={"index_ptr": "one per column"},
)


def with_load(pointer: str, bits: int, asynchronous: bool) -> Record:
    return replace(GOOD, traffic=(*GOOD.traffic, Traffic(pointer, "load", bits, asynchronous, True, 136)))


class TestRules:
    def test_good_record_breaks_none(self):
        assert broken_rules(GOOD) == ()

    @pytest.mark.parametrize(
        ("record", "rule"),
        [
            (replace(GOOD, spilled=12), "spills 12 bytes"),
            (replace(GOOD, stack=16), "stack of 16 bytes"),
            (replace(GOOD, shared=228 * 1024), "shared memory"),
            (replace(GOOD, blocks_per_multiprocessor=0), "not one block fits"),
            (replace(GOOD, tensor_cores={}), "no tensor cores in the main loop, not HGMMA"),
            (replace(GOOD, dtype="tf32", tensor_cores={"HMMA": 8}), "HMMA in the main loop, not HGMMA"),
            (with_load("dy_ptr", 64, True), "136 loads of 64 bits through dy_ptr"),
            (with_load("dy_ptr", 128, False), "loads of dy_ptr are not asynchronous"),
            (with_load("dy_ptr|index_ptr", 16, False), "through dy_ptr|index_ptr"),
            (with_load("?", 16, False), "through ?"),
            (replace(GOOD, traffic=GOOD.traffic[1:]), "no loads of wide operands"),
            (replace(GOOD, error="OutOfResources"), "does not compile: OutOfResources"),
        ],
    )
    def test_each_rule_can_fail(self, record, rule):
        assert any(rule in broken for broken in broken_rules(record)), broken_rules(record)

    @pytest.mark.parametrize(
        ("arch", "core"),
        [("sm_80", "HMMA"), ("sm_100", "UTCHMMA"), ("sm_120", "HMMA"), ("gfx942", "MFMA")],
    )
    def test_each_architecture_wants_its_own_class(self, arch, core):
        record = replace(GOOD, arch=arch, shared=60_000)
        assert any(f"not {core}" in rule for rule in broken_rules(record))
        assert broken_rules(replace(record, tensor_cores={core: 4})) == ()

    def test_ieee_float32_has_none_on_nvidia_but_on_amd(self):
        ieee = replace(GOOD, dtype="fp32", tensor_cores={})
        assert broken_rules(ieee) == ()
        assert broken_rules(replace(ieee, arch="gfx942", shared=0)) != ()

    def test_amd_loads_need_not_be_asynchronous(self):
        record = replace(with_load("dy_ptr", 128, False), arch="gfx942", shared=0, tensor_cores={"MFMA": 1})
        assert broken_rules(record) == ()

    @pytest.mark.parametrize(
        ("arch", "kib"), [("sm_80", 163), ("sm_86", 99), ("sm_89", 99), ("sm_90", 227), ("gfx942", 64)]
    )
    def test_shared_memory_limits(self, arch, kib):
        record = replace(GOOD, arch=arch, tensor_cores={ARCHITECTURES[arch].tensor_core: 1})
        assert broken_rules(replace(record, shared=kib * 1024)) == ()
        assert broken_rules(replace(record, shared=kib * 1024 + 1)) != ()

    def test_copies_are_wide_but_for_what_is_declared(self):
        copy = replace(GOOD, role="copy", tensor_cores={}, traffic=GOOD.traffic[:2])
        assert broken_rules(copy) == ()
        stores = Traffic("out_ptr", "store", 64, False, False, 4)
        assert broken_rules(replace(copy, traffic=(stores,))) == ("4 stores of 64 bits through out_ptr",)

    def test_records_survive_json(self):
        assert Record.from_json(json.loads(json.dumps(GOOD.to_json()))) == GOOD


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    return tmp_path


def audited(**arguments) -> dict[str, Record]:
    records = [r for _, r in run_audit(registry=TOYS, dtypes=("bf16",), jobs=1, **arguments) if r]
    return {record.kernel: record for record in records}


class TestRealCompiles:
    """Toy kernels (audit_kernels.py), compiled for GPUs that are not here, even where this process interprets."""

    @pytest.mark.parametrize(
        ("arch", "core"),
        [
            pytest.param("sm_90", "HGMMA", marks=pytest.mark.slow),
            pytest.param("sm_100", "UTCHMMA", marks=pytest.mark.slow),
            pytest.param("gfx942", "MFMA", marks=pytest.mark.slow),
        ],
    )
    def test_good_and_bad_kernels(self, cache, monkeypatch, arch, core):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        records = audited(archs=(arch,), kernels=("toy_matmul", "toy_misaligned"))
        good, bad = records["toy_matmul"], records["toy_misaligned"]
        assert broken_rules(good) == ()
        assert good.tensor_cores[core] > 0
        assert good.registers > 32
        assert good.shared >= 16 * 1024
        assert good.blocks_per_multiprocessor >= 1
        assert good.binary_bytes > 1000
        assert {t.pointer for t in good.traffic if t.in_main_loop} == {"x_ptr", "w_ptr"}
        broken = broken_rules(bad)
        assert any("loads of 16 bits through x_ptr" in rule for rule in broken), broken

    @pytest.mark.slow
    def test_declared_narrow_side(self, cache):
        (record,) = audited(archs=("sm_80",), kernels=("toy_copy",)).values()
        assert broken_rules(record) == ()
        assert {t.bits for t in record.traffic if t.pointer == "x_ptr"} == {16}
        assert broken_rules(replace(record, narrow={})) == ("8 loads of 16 bits through x_ptr",)

    @pytest.mark.slow
    @pytest.mark.long
    def test_cache(self, cache):
        first = audited(archs=("sm_80",), kernels=("toy_copy",))
        (path,) = (cache / "audit").glob("*")
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({**stored, "registers": 99}))
        assert audited(archs=("sm_80",), kernels=("toy_copy",))["toy_copy"].registers == 99
        path.write_text(json.dumps(stored)[:40])  # as a crash without atomic writes would leave it
        assert audited(archs=("sm_80",), kernels=("toy_copy",)) == first
        assert json.loads(path.read_text()) == stored
        assert list((cache / "audit").glob("*")) == [path]

    @pytest.mark.slow
    @pytest.mark.long
    def test_command_line(self, cache, tmp_path, capsys):
        path = tmp_path / "audit.json"
        common = ["audit", "--registry", TOYS, "--arch", "sm_90", "--dtype", "bf16", "--jobs", "1"]
        assert main([*common, "--kernel", "toy_copy", "--full"]) == 0
        out = capsys.readouterr().out
        assert "1 compilations, 0 break a rule" in out
        assert "narrow by nature: toy_copy x_ptr (strided on purpose)" in out
        assert main([*common, "--kernel", "toy_misaligned", "--json", str(path)]) == 1
        assert "1 break a rule" in capsys.readouterr().out
        (entry,) = json.loads(path.read_text())
        assert entry["kernel"] == "toy_misaligned"
        assert entry["broken_rules"]

    @pytest.mark.slow
    def test_a_kernel_of_ours_without_a_gpu(self, cache, monkeypatch, capsys):
        """Its launches are captured where no driver answers; on a terminal a bar says how much is left."""
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        assert (
            main(["audit", "--kernel", "sum_partials", "--arch", "sm_90", "--dtype", "bf16", "--jobs", "1"])
            == 0
        )
        out, err = capsys.readouterr()
        assert re.search(r"\b0(\x1b\[\S*?m)* break a rule", out)
        assert re.search(r"compiling .*(\d+)/\1\b.*(\d:\d\d:\d\d|-:--:--)", err)

    @pytest.mark.slow
    @pytest.mark.long
    def test_a_compiler_that_crashes_is_a_finding(self, cache):
        """Alone of its kind; one that crashed only once counts as what it compiled to."""
        found = list(run_audit(registry=CRASHES, archs=("sm_80",), dtypes=("bf16",), jobs=2))
        assert [left for left, _ in found] == [6, 5, 4, 3, 2, 1, 0]
        records = {record.config["block"]: record for _, record in found if record}
        assert set(records) == {256, 128, 64, 512, 1024, 2048}
        assert records.pop(64).error == "the compiler ended its process"
        assert all(record.error is None for record in records.values())

    @pytest.mark.slow
    def test_unknown_kernel(self, cache, capsys):
        assert main(["audit", "--registry", TOYS, "--kernel", "toy"]) == 2
        assert "kernel must be one of toy_matmul" in capsys.readouterr().err


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SMOA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "smoa-kernels"
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_the_audits_parent_never_imports_triton():
    """It may interpret: only workers compile."""
    program = (
        "import sys; sys.modules['triton'] = None; "
        "import smoa_kernels.audit.run, smoa_kernels.audit.rules, smoa_kernels.cli.app"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
