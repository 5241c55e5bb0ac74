"""bfloat16 in compiled code: its workspace, its rounding, and weights that tiles leave to other code.

The promises of all backends are tested in tests/test_contract.py, shapes around its tiles in tests/test_native.py.
"""

import ctypes
import mmap
from dataclasses import replace
from functools import partial

import compiled
import pytest
import torch
from compiled import needs_avx512_bf16, needs_bf16, needs_library, system_has
from places import ran
from problems import LAYOUTS, Case, assert_within_budget, relative_error

from smoa_kernels import BlockPartition
from smoa_kernels.backends import pages
from smoa_kernels.backends.native import backend, library
from smoa_kernels.definition.packed import padding_masks
from smoa_kernels.definition.thresholds import ORIGIN, Place, round_weight

BF16 = torch.bfloat16
FORMS = {form: Case("native", form, BF16) for form in ("merged", "split", "dropout")}
each_form = pytest.mark.parametrize("form", FORMS)
on_cpu = partial(compiled.on_cpu, BF16)

SYSTEM_HAS_AMX = system_has("amx_bf16")
FAST = SYSTEM_HAS_AMX or not system_has("GenuineIntel")  # faster than FMA in float32


@needs_library
@each_form
@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "order"),
    [(31, 33, 31, "spectral"), (12, 300, 160, "contiguous"), (12, 64, 147, "contiguous")],
)
def test_nothing_behind_the_workspace_or_w0_is_read(
    form: str,
    tokens: int,
    rows: int,
    cols: int,
    order: str,
    only_compiled: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both end before a page without read access. The workspace is filled with -2, the label of absent rows."""
    mapped, page = [], mmap.PAGESIZE

    def before_nothing(like: torch.Tensor, floats: int) -> torch.Tensor:
        size = -(-4 * floats // page) * page
        memory = torch.frombuffer(mmap.mmap(-1, size + page), dtype=torch.int32).fill_(-2)
        mapped.append(memory)
        behind = ctypes.c_void_p(memory.data_ptr() + size)
        assert ctypes.CDLL(None).mprotect(behind, ctypes.c_size_t(page), 0) == 0
        return memory[: size // 4][-floats:].view(torch.float32)

    monkeypatch.setattr(library, "workspace", before_nothing)
    p = on_cpu(tokens=tokens, out_features=rows, in_features=cols, ranks=(40, 3), block_order=order)
    count = p.weight.numel()
    last = before_nothing(p.weight, -(-count // 2)).view(BF16)[-count:].view_as(p.weight)
    p = replace(p, weight=last.copy_(p.weight))
    assert_within_budget(p.run(**FORMS[form].options), FORMS[form], p)


@needs_library
@each_form
def test_a_workspace_is_as_large_as_offsets_ask(
    form: str, only_compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`from_tensors` does not check the sizes; compiled code uses the offsets, so the workspace must too."""
    asked = []

    def enough(like: torch.Tensor, floats: int) -> torch.Tensor:
        asked.append(floats)
        return pages.workspace(like, 9 * floats)

    monkeypatch.setattr(library, "workspace", enough)
    p = on_cpu(tokens=64, out_features=600, in_features=600, ranks=(2, 3), random_labels=True)
    whole = torch.tensor([0, 600, 600], dtype=torch.int32)
    tensors = [*p.partition.tensors()[:4], whole, whole]
    *_, granule, contiguous = p.partition.sizes()
    for sizes in ([600, 0, 600, 0], [300, 300, 300, 300]):
        partition = BlockPartition.from_tensors(tensors, [*sizes, granule, contiguous])
        replace(p, partition=partition).run(**FORMS[form].options)
    assert asked[: len(asked) // 2] == asked[len(asked) // 2 :]


@needs_bf16
@pytest.mark.parametrize("order", ["spectral", "contiguous"])
@pytest.mark.parametrize("layout", ["contiguous", "column-major"])
@pytest.mark.parametrize("place", [ORIGIN, ORIGIN.part(3, 50)], ids=["whole", "shard"])
def test_w_eff_is_rounded_by_its_thresholds(
    order: str, layout: str, place: Place, only_compiled: None
) -> None:
    """One-hot tokens give W_eff itself. Its numbers are few enough bits for float32 to hold them before rounding."""
    p = on_cpu(tokens=1, out_features=97, in_features=150, ranks=(2, 0, 3), block_order=order, bias=False)
    A, B = (2.0**-6 * torch.randint(-8, 9, factor.shape) for factor in (p.A, p.B))
    p = replace(p, A=A, B=B, scaling=0.5).stored(LAYOUTS[layout])
    used_A, used_B = padding_masks(p.partition, p.ranks, 3)
    inside = p.partition.row_block[:, None] == p.partition.col_block
    exact = p.weight.float() * (1 + 0.5 * inside * ((B * used_B) @ (A * used_A)))
    expected = round_weight(exact, BF16, place)
    assert (expected != p.weight).sum() > 1000
    adapter = replace(p.adapter(), place=place)
    assert torch.equal(backend.modulated_weight(adapter), expected)
    found = backend.forward(torch.eye(150, dtype=BF16), None, adapter, "auto", None)
    assert torch.equal(found, expected.T)
    found = backend.backward(torch.eye(97, dtype=BF16), None, adapter, None, needs_x=True)[0]
    assert torch.equal(found, expected)


@needs_library
@each_form
def test_float32_factors_are_not_rounded(form: str, only_compiled: None) -> None:
    """dA and dB have float32's error: the factors and H = s G ∘ W0 are not rounded to bfloat16."""
    p = on_cpu(tokens=64, out_features=96, in_features=160, ranks=(4, 9))
    p = replace(p, A=p.A.float() * 1.001, B=p.B.float() * 1.001)  # not representable in bfloat16
    exact = FORMS[form].definition(p.to(torch.float64))
    for found, expected in zip(p.run(**FORMS[form].options)[2:4], exact[2:4], strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-6


@needs_library
@each_form
def test_factors_of_the_other_half_type(form: str, guarded_memory: None, only_compiled: None) -> None:
    """Under autocast a float16 layer's factors meet W0 in bfloat16; their gradients are float16."""
    p = on_cpu(tokens=40, out_features=61, in_features=147, ranks=(3, 0, 18))
    exact = FORMS[form].definition(p.to(torch.float64))
    for found, expected in zip(
        p.to(BF16, torch.float16).run(autocast=BF16, **FORMS[form].options)[2:4], exact[2:4], strict=True
    ):
        assert found.dtype == torch.float16
        assert relative_error(found, expected) < 4e-3


@needs_library
def test_one_gradient_alone() -> None:
    p = on_cpu(tokens=40, ranks=(2, 3))
    adapter = p.adapter()
    dx, dA, dB = backend.backward(p.dy, p.x, adapter, None, needs_x=True)
    assert backend.backward(p.dy, p.x, adapter, None, needs_x=False)[0] is None
    alone = backend.backward(p.dy, None, adapter, None, needs_x=True)
    assert alone[1:] == (None, None)
    assert torch.equal(alone[0], dx)
    assert dA.shape == p.A.shape
    assert dB.shape == p.B.shape


@needs_library
@pytest.mark.parametrize("order", ["spectral", "contiguous"])  # columns of y are written at other places
@pytest.mark.parametrize("tokens", [1, 12, 32, 40])  # few; by tiles W0 in place without AMX; W0 packed
def test_a_bias_is_added_before_the_one_rounding(
    tokens: int, order: str, guarded_memory: None, only_compiled: None
) -> None:
    p = on_cpu(tokens=tokens, out_features=600, in_features=160, ranks=(4, 9), block_order=order)
    base = replace(p, B=torch.zeros_like(p.B))  # whose W_eff is W0
    for q, algorithm in ((p, "split"), (base, "auto")):
        exact = FORMS["split"].definition(q.to(torch.float64))[0]
        # The rms error of one rounding is 0.21 eps; a second rounding of the same size would give 0.30 eps.
        assert relative_error(q.run(algorithm=algorithm)[0], exact) < 0.25 * torch.finfo(BF16).eps


@needs_library
@pytest.mark.parametrize("tokens", [32, 40])
def test_one_row_for_all_tokens(tokens: int) -> None:
    p = on_cpu(tokens=tokens, out_features=64, in_features=96, ranks=(2, 3))
    x, dy = (rows[:1].expand_as(rows) for rows in (p.x, p.dy))
    found = backend.backward(dy, x, p.adapter(), None, needs_x=True)
    copied = backend.backward(dy.clone(), x.clone(), p.adapter(), None, needs_x=True)
    assert all(map(torch.equal, found, copied))
    y, again = (backend.forward(each, None, p.adapter(), "split", None) for each in (x, x.clone()))
    assert torch.equal(y, again)


@needs_library
@each_form
def test_weights_of_any_layout(form: str, only_compiled: None) -> None:
    p = on_cpu(tokens=40, ranks=(2, 3))
    for weight in (p.weight.T.contiguous().T, p.weight[:1].expand_as(p.weight)):
        other = replace(p, weight=weight)
        assert_within_budget(other.run(**FORMS[form].options), FORMS[form], other)


@needs_avx512_bf16
@needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "there", "amx"),
    [
        ("AVX512_CORE", False, False),
        ("avx512_core_bf16", True, False),
        ("AVX512_CORE_AMX", FAST, SYSTEM_HAS_AMX),
        ("default", FAST, SYSTEM_HAS_AMX),
        ("", FAST, SYSTEM_HAS_AMX),
    ],
)
def test_a_limit_of_torchs_gemms_is_its_own(limit: str, there: bool, amx: bool) -> None:
    program = "from smoa_kernels.backends.native.library import has; print(has('bf16'), has('amx'))"
    done = ran("-c", program, ONEDNN_MAX_CPU_ISA=limit)
    assert done.stdout.split() == [str(there), str(amx)], done.stderr
