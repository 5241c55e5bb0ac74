"""The audit compiles the launches that the launchers make; `make audit` reads the machine code of all of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from audit.rules import Record, broken_rules

import smoa_kernels

pytest.importorskip("triton", reason="there are no kernels to compile")
pytestmark = pytest.mark.slow  # all read one run of a process that compiles

TESTS = Path(__file__).resolve().parents[1]

# In a process that compiles: where kernels are interpreted they have no signature.
PROGRAM = """
import json
from audit.compile import compile_launch, representative_launch
from audit.run import Task, run_task
from audit.rules import broken_rules
from audit.forms import AUDITED
from smoa_kernels.kernels.architectures import ARCHITECTURES
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.kernels import KERNELS

found = []
for kernel in KERNELS.values():
    for arch in map(ARCHITECTURES.__getitem__, ("sm_90", "gfx942")):
        for dtype in KERNEL_PRECISIONS:
            for form in AUDITED[kernel.name].forms:
                for config in kernel.shipped(arch, PRECISIONS[dtype]):
                    launch = representative_launch(kernel, config, dtype, form, arch)
                    found.append({
                        "name": f"{kernel.name} {form} {dtype} {config}",
                        "dtype": dtype,
                        "config": config.to_json(),
                        "pointers": {n: v for n, v in launch.arguments.items() if n.endswith("_ptr")},
                        "scalars": {n: v for n, v in launch.arguments.items() if not n.endswith("_ptr")},
                        "constexprs": {n: v for n, v in launch.constexprs.items() if isinstance(v, int)},
                        "options": dict(launch.options),
                    })
task = Task("permute", "gather", 0, "sm_90", "bf16")
narrow_rank = [Task("block_grad", "r4", 0, arch, "bf16") for arch in ("sm_90", "gfx942")]
narrow_rank += [Task("sum_partials", "r4 transposed", 0, "sm_90", "bf16")]
weight, hopper = KERNELS["modulated_weight"], ARCHITECTURES["sm_90"]
config = weight.shipped(hopper, PRECISIONS["bf16"])[-1]
binary = compile_launch(weight.fn, representative_launch(weight, config, "bf16", "r16", hopper), hopper)
arithmetic = [i.opcode.split(".")[0] for i in binary.listing.instructions]
print(json.dumps({
    "launches": found,
    "broken": broken_rules(run_task(task)),
    "narrow rank": [run_task(task).to_json() for task in narrow_rank],
    "fused and not": [arithmetic.count(opcode) for opcode in ("FFMA", "FADD")],
}))
"""


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> dict:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["SMOA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    environment["PYTHONPATH"] = f"{TESTS}:{TESTS.parent}"
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"  # as Triton 3.10 compiles where nothing is said
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_launches_at_every_configuration(audited: dict) -> None:
    launches = audited["launches"]
    assert len({launch["name"].split()[0] for launch in launches}) >= 6
    for launch in launches:
        kinds = launch["pointers"].values()
        assert all(kind is None or kind.startswith("*") for kind in kinds), launch["name"]
        wide = {"bf16": "*bf16", "fp16": "*fp16"}.get(launch["dtype"], "*fp32")
        assert wide in kinds, launch["name"]  # the operands have the dtype that was asked for
        assert all(isinstance(value, (int, float)) for value in launch["scalars"].values()), launch["name"]


def test_the_configuration_reaches_the_kernel(audited: dict) -> None:
    for launch in audited["launches"]:
        given = {**launch["options"], **launch["constexprs"]}
        tile = {
            name: size for name, size in launch["config"].items() if name not in ("block", "block_r", "split")
        }
        if launch["name"].startswith("block_matmul") and "granules" in launch["name"]:
            tile["num_stages"] = 2 * tile["num_stages"] - 1  # half of them for the index
        # Sums divide their block by the rank, a rank is bounded, a split is the launcher's; tiles are constexprs.
        reached = {name: given.get(name.upper(), given.get(name)) for name in tile}
        assert reached == tile, launch["name"]


def test_a_shipped_configuration_meets_the_rules(audited: dict) -> None:
    """One, so that a change of Triton shows here too."""
    assert audited["broken"] == []


def test_products_are_fused_with_sums_whatever_triton_does_by_itself(audited: dict) -> None:
    """W_eff = W0 + W0 ∘ ΔM is rounded once in float32; of no other kernel does the machine code change."""
    fused, added = audited["fused and not"]
    assert fused > added == 0


def test_partials_of_few_ranks_are_stored_and_read_as_wide_as_those_of_many(audited: dict) -> None:
    """ρ = 4, as K = 4 at r = 16 has it. A row is one store of 128 bits; Hopper gives dA's tile two threads a group."""
    hopper, amd, summed = map(Record.from_json, audited["narrow rank"])

    def widths(record: Record) -> dict[str, int]:
        return {t.pointer: t.bits for t in record.traffic if t.pointer.startswith("partial")}

    assert widths(hopper) == {"partial_a_ptr": 64, "partial_b_ptr": 128}
    assert widths(amd) == {"partial_a_ptr": 128, "partial_b_ptr": 128}
    assert widths(summed) == {"partials_ptr": 128}
    assert not broken_rules(hopper)
    assert not broken_rules(amd)


def test_what_another_checkout_compiled_says_nothing_of_this_one(tmp_path: Path) -> None:
    """Triton's cache knows a kernel by its text; the lines of a binary name the file that it was compiled from."""
    program = "import smoa_kernels, audit.run as a\n" + (
        "task = a.Task('permute', 'gather', 0, 'sm_90', 'bf16')\n"
        "print(smoa_kernels.__file__, sorted({entry.pointer for entry in a.run_task(task).traffic}))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "triton")
    for name in ("first", "second"):
        checkout = tmp_path / name
        shutil.copytree(Path(smoa_kernels.__file__).parent, checkout / "smoa_kernels")
        environment |= {
            "SMOA_CACHE": str(tmp_path / f"records of {name}"),
            "PYTHONPATH": f"{checkout}:{TESTS}",
        }
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=checkout
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(checkout)), done.stdout
        assert "?" not in done.stdout, name
        shutil.rmtree(checkout)
