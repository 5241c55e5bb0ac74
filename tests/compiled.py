"""Shared by the tests of compiled CPU code: problems, and a check with several threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import HALF, NAMES, Case, LinearProblem, assert_within_budget, make_problem
from torch_calls import on_threads

from smoa_kernels.backends import native_unsupported_reason
from smoa_kernels.backends.native import library


def system_has(flag: str) -> bool:
    """Whether Linux names this flag of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and flag in cpuinfo.read_text()


CPU = torch.device("cpu")
needs_amx = pytest.mark.skipif(
    not library.has("amx"), reason="needs a processor with AMX, and a system and a compiler that know it"
)
needs_bf16 = pytest.mark.skipif(
    not library.has("bf16"),
    reason="needs AMX, or AVX512-BF16 of AMD's processors, and a compiler that knows them",
)
needs_avx512_bf16 = pytest.mark.skipif(
    not system_has("avx512_bf16"), reason="needs a processor with AVX512-BF16"
)
REASON = native_unsupported_reason(CPU)
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# merged and expanded multiply by W_eff, split by W0 and ΔW; dropout is split with masked elements of x.
FORMS = {form: Case("native", form, torch.float32) for form in ("merged", "expanded", "split", "dropout")}
each_form = pytest.mark.parametrize("form", FORMS)
# Half types take other code than float32; bfloat16 and float16 share it except for the number format.
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=lambda dtype: str(dtype)[6:])
each_half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])


def on_cpu(dtype: torch.dtype = torch.float32, **options: object) -> LinearProblem:
    return make_problem(dtype=dtype, **options).on(CPU)  # type: ignore[arg-type]


def assert_threads_agree(case: Case, p: LinearProblem) -> None:
    """Results are within their budgets on one thread and on three, and the same bits but for sums over threads.

    Threads share the rows of W0, or of W0ᵀ where W0 is column-major.
    """
    summed = "dA" if p.weight.stride(1) == 1 else "dB"
    found = []
    for count in (1, 3, 3):
        with on_threads(count):
            found.append(p.run(**case.options))
        assert_within_budget(found[-1], case, p)
    for name, one, three, again in zip(NAMES, *found, strict=True):
        assert torch.equal(three, again), name
        if name != summed:
            assert torch.equal(one, three), name
