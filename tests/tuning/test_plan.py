"""The table keys that a step asks for, the candidates, and the heuristic, which always picks a shipped choice."""

import itertools
from dataclasses import replace

import pytest
import torch
from tuning_cases import FORWARD, needs_interpreter

from smoa_kernels import FusedSMoALinear
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.kernels import KERNELS, table
from smoa_kernels.kernels.architectures import ARCHITECTURES
from smoa_kernels.kernels.spec import ALGORITHM_KEYS, Config, Key, block_width, bucket
from smoa_kernels.tuning.plan import candidates, check_layer, jobs
from smoa_kernels.tuning.problem import Problem


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
    for kernel, rank, blocks, tokens, processors, (n, c) in itertools.product(
        KERNELS.values(),
        (1, 2, 16, 17, 33, 64, 256),
        (1, 2, 4, 8, 300),
        (1, 16, 17, 300, 8192),
        (1, 16, 132, 304),
        ((4096, 14336), (576, 1536), (320, 320)),
    ):
        widths = (block_width((-(-features // blocks),)) for features in (n, c))
        key = Key(kernel.name, dtype, rank, blocks, n, c, bucket(tokens), *widths)
        config = kernel.default(key, arch, processors)
        assert config in kernel.shipped(ARCHITECTURES[arch], PRECISIONS[dtype]), key


@pytest.mark.parametrize("arch", ["cpu", "sm_87", "sm_103", "sm_121", "gfx950"])
def test_architectures_that_nobody_audited_get_an_answer(arch: str) -> None:
    for kernel in KERNELS.values():
        key = Key(kernel.name, "bf16", 4, 4, 4096, 4096, 2048, 1024, 1024)
        assert isinstance(kernel.default(key, arch, 100), Config)


def test_the_device_decides_how_many_programs_share_a_sum() -> None:
    key = Key("fused_linear", "bf16", 4, 4, 4096, 4096, 1)
    splits = [KERNELS["fused_linear"].default(key, "sm_90", processors).split for processors in (16, 132)]  # type: ignore[attr-defined]
    assert splits == [1, 4]


def test_candidates_ship_the_default_first() -> None:
    key = Key("contract", "bf16", 4, 8, 320, 320, 0, 64, 64)
    ships = KERNELS["contract"].shipped(ARCHITECTURES["sm_90"], PRECISIONS["bf16"])
    assert candidates(key, "sm_90", 132) == ships
    assert candidates(FORWARD._replace(tokens=8192), "sm_90", 132) == ("merged", "split", "fused")
    assert candidates(FORWARD, "sm_90", 132) == ("fused", "merged", "split")


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


@needs_interpreter
@pytest.mark.parametrize(
    ("tokens", "order", "granule"), [(19, "spectral", 1), (150, "spectral", 1), (150, "contiguous", 24)]
)
def test_the_problems_of_a_training_step_are_tuned(tokens: int, order: str, granule: int) -> None:
    n, c = (140, 90) if granule == 1 else (144, 96)
    layer = FusedSMoALinear(c, n, r=5, num_blocks=2, block_order=order, backend="triton")
    asked: set[Key] = set()
    with table.answered(asked.add):
        for algorithm, dropout in (("auto", 0.0), ("split", 0.0), ("merged", 0.0), ("split", 0.3)):
            layer.algorithm, layer.dropout = algorithm, dropout
            layer(torch.randn(tokens, c, requires_grad=True)).sum().backward()
    planned = {job.key for job in jobs([Problem(tokens, n, c, 2, 5, "fp32", granule)], "cpu", 1)}
    assert {"forward", "contract", "sum_partials"} <= {key.kernel for key in asked}
    assert asked <= planned


def test_sums_of_partials_are_tuned_if_any_candidate_splits_a_sum() -> None:
    layer = Problem(17, 140, 90, 2, 5, "fp32")
    planned = {job.key: job for job in jobs([layer], "cpu", 1)}
    fused = next(job for key, job in planned.items() if key.kernel == "fused_linear")
    assert fused.candidates[0].split == 1  # type: ignore[union-attr]
    sums = planned[Key("sum_partials", "fp32", out_features=140, tokens=32)]
    assert {choice.split for choice in sums.answers.values() if isinstance(choice, Config)} == {4}


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
