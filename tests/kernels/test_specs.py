"""The audit compiles exactly the launches that the launchers make; `make audit` reads all the machine code."""

import json

import pytest
from audit.rules import Record, broken_rules
from places import ran

pytest.importorskip("triton", reason="there are no kernels to compile")
pytestmark = pytest.mark.slow  # all tests share one run of a compiling process

# Runs in a process that compiles: interpreted kernels have no signature.
PROGRAM = """
import json
import re
from dataclasses import asdict
from unittest.mock import patch
import triton
from audit.compile import compile_launch, representative_launch
from audit.run import Task, run_task
from smoa_kernels.kernels.architectures import ARCHITECTURES
from smoa_kernels.definition.precision import PRECISIONS
from smoa_kernels.kernels.registry import KERNELS

narrow_rank = [Task("contract", "r4", 0, arch, "bf16") for arch in ("sm_90", "gfx942")]
narrow_rank += [Task("sum_partials", "r4 transposed", 0, "sm_90", "bf16")]
weight, hopper = KERNELS["modulated_weight"], ARCHITECTURES["sm_90"]
config = weight.shipped(hopper, PRECISIONS["bf16"])[-1]
_, listing = compile_launch(weight.fn, representative_launch(weight, config, "bf16", "r16", hopper), hopper)
arithmetic = [i.opcode.split(".")[0] for i in listing.instructions]
few = KERNELS["fused_linear"]
two_buffers = {}
for dtype in ("bf16", "tf32"):
    config = few.shipped(hopper, PRECISIONS[dtype])[0]
    with patch.object(triton, "compile", wraps=triton.compile) as compiled:
        launch = representative_launch(few, config, dtype, "r16", hopper)
        figures, _ = compile_launch(few.fn, launch, hopper)
    text = triton.compile(*compiled.call_args.args, **compiled.call_args.kwargs).asm["ttgir"]
    buffers = re.findall(rf"local_alloc : \\(\\) -> !ttg.memdesc<(\\d)x64x{config.block_c}x", text)
    two_buffers[dtype] = figures, buffers
print(json.dumps({
    "few tokens": two_buffers,
    "narrow rank": [asdict(run_task(task)) for task in narrow_rank],
    "fused and not": [arithmetic.count(opcode) for opcode in ("FFMA", "FADD")],
}))
"""


@pytest.fixture(scope="module")
def audited() -> dict:
    # Without fusion, as is Triton 3.10's default.
    done = ran("-c", PROGRAM, TRITON_INTERPRET=None, TRITON_DEFAULT_FP_FUSION="0")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_products_are_fused_with_sums_whatever_tritons_default(audited: dict) -> None:
    """W_eff = W0 + W0 ∘ ΔM is rounded once in float32. Fusing changes the machine code of no other kernel."""
    fused, added = audited["fused and not"]
    assert fused > added == 0


def test_few_tokens_on_hopper_load_w0_a_step_ahead(audited: dict) -> None:
    """With one buffer of W0 each load would wait for the products of the step before."""
    for figures, buffers in audited["few tokens"].values():
        assert buffers == ["2"]
        assert figures["spilled"] == figures["stack"] == 0
        assert figures["registers"] <= 168  # three programs a multiprocessor


def test_partials_of_few_ranks_are_stored_and_read_as_wide_as_those_of_many(audited: dict) -> None:
    """ρ = 4 (K = 4 at r = 16): a row is one 128-bit store."""
    hopper, amd, summed = map(Record.from_json, audited["narrow rank"])

    def widths(record: Record) -> dict[str, int]:
        return {t.pointer: t.bits for t in record.traffic if t.pointer.startswith("partial")}

    assert widths(hopper) == {"partial_a_ptr": 128, "partial_b_ptr": 128}
    assert widths(amd) == {"partial_a_ptr": 128, "partial_b_ptr": 128}
    assert widths(summed) == {"partials_ptr": 128}
    assert not broken_rules(hopper)
    assert not broken_rules(amd)
