"""The table keys that a step asks for, the candidates, and the heuristic, which always picks a shipped choice."""

import itertools
from dataclasses import replace

import pytest
import torch
from tuning_cases import FORWARD, needs_interpreter

from smoa_kernels import FusedSMoALinear
from smoa_kernels.backends import algorithms, experts_triton
from smoa_kernels.backends import triton as triton_backend
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.kernels import KERNELS, table
from smoa_kernels.kernels.architectures import ARCHITECTURES
from smoa_kernels.kernels.spec import ALGORITHM_KEYS, Config, Key, bucket
from smoa_kernels.tuning.plan import check_layer, job, jobs, keys
from smoa_kernels.tuning.roofline import Problem
from smoa_kernels.tuning.workloads import Operands


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (2**13, 2**13), (2**13 + 1, 2**14)],
)
def test_bucket_edges(tokens: int, expected: int) -> None:
    assert bucket(tokens) == expected


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", KERNEL_PRECISIONS)
def test_every_answer_ships(arch: str, dtype: str) -> None:
    """For every rank, number of blocks and tokens, size of the device and of the layer."""
    if dtype == "tf32" and arch.startswith("gfx"):
        pytest.skip("AMD multiplies float32 in IEEE: nobody can ask")
    asked = 0
    for rank, blocks, tokens, processors, (n, c), experts in itertools.product(
        (1, 2, 16, 17, 33, 64, 256),
        (1, 2, 4, 8, 300),
        (1, 16, 17, 300, 8192),
        (1, 16, 132, 304),
        ((4096, 14336), (576, 1536), (320, 320)),
        (0, 8),
    ):
        for key in keys(Problem(tokens, n, c, blocks, rank * blocks, dtype, experts=experts)):
            if key.kernel in KERNELS:
                kernel = KERNELS[key.kernel]
                config = kernel.default(key, arch, processors)
                assert config in kernel.shipped(ARCHITECTURES[arch], PRECISIONS[key.dtype]), key
                assert kernel.fits(config, key), key
                asked += 1
    assert asked > 10_000


@pytest.mark.parametrize("arch", ["cpu", "sm_87", "sm_103", "sm_121", "gfx950"])
def test_architectures_that_nobody_audited_get_an_answer(arch: str) -> None:
    for key in keys(Problem(2048, 4096, 4096, 4, 16)):
        if key.kernel in KERNELS:
            kernel = KERNELS[key.kernel]
            assert isinstance(kernel.default(key, arch, 100), Config)


def test_the_device_decides_how_large_a_tile_is() -> None:
    key = Key("block_matmul", "bf16", 4, 4, 4096, 4096, 2048, 1024, 1024)
    few, many = (KERNELS["block_matmul"].default(key, "sm_90", processors) for processors in (64, 4000))
    assert few.block_t * few.block_n > many.block_t * many.block_n  # type: ignore[attr-defined]
    key = Key("fused_linear", "bf16", 4, 4, 4096, 4096, 1)
    splits = [KERNELS["fused_linear"].default(key, "sm_90", processors).split for processors in (16, 132)]  # type: ignore[attr-defined]
    assert splits == [1, 4]


def test_what_is_tried_is_what_ships_and_divides_the_layout_the_default_first() -> None:
    narrow = Key("block_grad", "bf16", 4, 8, 320, 320, 512, 64, 64)
    tried = job(narrow, "sm_90", 132)
    ships = KERNELS["block_grad"].shipped(ARCHITECTURES["sm_90"], PRECISIONS["bf16"])
    assert set(tried.candidates) == {c for c in ships if c.block_n <= 64 and c.block_c <= 64}  # type: ignore[attr-defined]
    assert tried.default == KERNELS["block_grad"].default(narrow, "sm_90", 132)
    assert job(FORWARD._replace(tokens=8192), "sm_90", 132).candidates == (
        "split",
        "merged",
        "fused",
        "eager",
    )


def test_algorithms_come_after_the_kernels_they_are_made_of() -> None:
    kinds = [one.key.kernel in ALGORITHM_KEYS for one in jobs([Problem(17, 70, 90, 4, 16)], "sm_90", 132)]
    assert kinds == sorted(kinds)
    assert kinds[-1]


@pytest.mark.parametrize("names", [["grouped_linear"], ["forward", "grouped_grad"], ["fused_linear"]])
def test_a_kernel_that_no_layer_asks_for_is_an_error(names: list[str]) -> None:
    with pytest.raises(
        ValueError, match=f"no layer asks for {names[-1]}: grouped kernels are those of layers"
    ):
        jobs([Problem(8192, 4096, 4096, 4, 16)], "sm_90", 132, names)


def asked_for(monkeypatch: pytest.MonkeyPatch) -> set[Key]:
    """Collects the keys that the table is asked for."""
    asked: set[Key] = set()
    monkeypatch.setattr(table, "_fastest", lambda key, device, allowed=None: asked.add(key))
    table.forget()
    return asked


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize(
    ("tokens", "order", "granule"), [(19, "spectral", 1), (150, "spectral", 1), (150, "contiguous", 8)]
)
def test_a_training_step_asks_for_what_the_plan_holds(
    tokens: int, order: str, granule: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tuner would measure unused keys. The backward gathers 150 tokens as 128 and then 22."""
    monkeypatch.setattr(algorithms, "GRAD_PART_TOKENS", 64)
    monkeypatch.setattr(algorithms, "GRAD_PART_TILES", 1)
    asked = asked_for(monkeypatch)
    monkeypatch.setattr(table, "multiprocessors", lambda device: 132)  # so that these few tiles are split
    dx = "fused" if tokens == 19 else "merged"
    monkeypatch.setattr(triton_backend, "choose_algorithm", lambda *_: dx)
    n, c = (140, 90) if granule == 1 else (144, 96)
    layer = FusedSMoALinear(c, n, r=5, num_blocks=2, block_order=order, backend="triton")
    torch.nn.init.normal_(layer.smoa_B)
    for algorithm, dropout in (("split", 0.0), ("merged", 0.0), ("fused", 0.0), ("split", 0.3)):
        layer.algorithm, layer.dropout = algorithm, dropout
        table.forget()
        layer(torch.randn(tokens, c, requires_grad=True)).sum().backward()
    planned = {key for key in keys(Problem(tokens, n, c, 2, 5, "fp32", granule)) if key.kernel in KERNELS}
    asked = {key for key in asked if key.kernel in KERNELS}
    assert asked <= planned
    left = set() if tokens == 19 else {"fused_linear", "sum_partials"}
    assert {key.kernel for key in planned - asked} == left


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize(("blocks", "granule"), [(2, 1), (2, 8), (1, 1)])
def test_a_step_of_experts_asks_for_what_the_plan_holds(
    blocks: int, granule: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_for(monkeypatch)
    layer = Problem(4 * 19, 48, 40, blocks, 3 * blocks, "fp32", granule, experts=4)
    key = next(keys(layer))
    adapter, ends, x, dy = Operands(key._replace(tokens=19), "", torch.device("cpu")).experts()
    experts_triton.experts_product(ends, adapter)(x)
    experts_triton.experts_backward(dy, x, ends, adapter, needs_x=True)
    planned = set(keys(layer))
    assert asked <= planned
    # The remaining keys are for a model that stores its experts transposed.
    assert {key._replace(transposed=not key.transposed) for key in planned - asked} == asked


def test_a_layer_that_cannot_be_is_refused() -> None:
    good = Problem(8, 64, 48, 4, 16)
    for change, words in (
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"experts": -1}, "experts must be at least 0, got -1"),
        ({"precision": "fp64"}, "precision must be one of bf16"),
        ({"num_blocks": 49}, "blocks must be at most 48 for a layer of 64x48, got 49"),
        ({"rank": 1025}, "rank must be at most 1024 in 4 blocks"),
    ):
        with pytest.raises(ValueError, match=words):
            check_layer(replace(good, **change))  # type: ignore[arg-type]
