"""The heuristic: always an answer, always one that the audit has compiled, from what it may look at alone."""

import itertools

import pytest
import torch
from tuning_cases import forget, needs_interpreter

from smoa_kernels import FusedSMoALinear
from smoa_kernels.backends import triton as triton_backend
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.kernels import KERNELS, block_matmul, sizes, table
from smoa_kernels.kernels.architectures import ARCHITECTURES
from smoa_kernels.kernels.sizes import bucket
from smoa_kernels.kernels.spec import Key
from smoa_kernels.tuning.gpus import GPUS
from smoa_kernels.tuning.matmul_tiling import matmul_tile
from smoa_kernels.tuning.plan import Layer, keys
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
def test_every_answer_is_an_audited_configuration(arch: str, dtype: str) -> None:
    """Whatever the rank, the blocks, the tokens, the device's size and the layer's."""
    if dtype == "tf32" and arch.startswith("gfx"):
        pytest.skip("AMD multiplies float32 in IEEE: nobody can ask")
    asked = 0
    for rank, blocks, tokens, processors, (n, c) in itertools.product(
        (1, 2, 16, 17, 33, 64, 256),
        (1, 2, 4, 8, 300),
        (1, 16, 17, 300, 8192),
        (1, 16, 132, 304),
        ((4096, 14336), (576, 1536), (320, 320)),
    ):
        for key in keys(Layer(n, c, tokens, dtype, rank * blocks, blocks)):
            if key.kernel in KERNELS:
                kernel = KERNELS[key.kernel]
                config = kernel.default(key, arch, processors)
                assert config in kernel.shipped(ARCHITECTURES[arch], PRECISIONS[key.dtype]), key
                assert kernel.fits(config, key), key
                asked += 1
    assert asked > 10_000


@pytest.mark.parametrize("arch", ["cpu", "sm_87", "sm_103", "sm_121", "gfx950"])
def test_architectures_that_nobody_audited_get_an_answer(arch: str) -> None:
    for key in keys(Layer(4096, 4096, 2048)):
        if key.kernel in KERNELS:
            kernel = KERNELS[key.kernel]
            assert isinstance(kernel.default(key, arch, 100), kernel.config)


def test_the_device_decides_how_large_a_tile_is() -> None:
    key = Key("block_matmul", "bf16", 4, 4, 4096, 4096, 2048, 1024, 1024)
    few, many = (KERNELS["block_matmul"].default(key, "sm_90", processors) for processors in (64, 4000))
    assert few.block_t * few.block_n > many.block_t * many.block_n  # type: ignore[attr-defined]
    one_token = Key("fused_linear", "bf16", 4, 4, 4096, 4096, 1)
    assert [
        KERNELS["fused_linear"].default(one_token, "sm_90", processors).split for processors in (16, 132)
    ] == [1, 4]  # type: ignore[attr-defined]


def test_the_cost_model_counts_the_tile_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of y, at few tokens and many, in blocks that fill the largest tile and in narrow ones."""
    monkeypatch.setattr(block_matmul, "OLD_TRITON", False)  # with that fewer tiles ship
    kernel = KERNELS["block_matmul"]
    for gpu, dtype, tokens, blocks, (n, c) in itertools.product(
        GPUS.values(),
        KERNEL_PRECISIONS,
        (1, 17, 64, 100, 300, 2048, 8192),
        (1, 4, 8, 300),
        ((4096, 14336), (576, 1536), (320, 320)),
    ):
        if dtype == "tf32" and gpu.arch.startswith("gfx"):
            continue
        precision = PRECISIONS[dtype]
        problem = Problem(tokens, n, c, blocks, blocks, precision.dtype)
        asked = keys(Layer(n, c, tokens, dtype, blocks, blocks))
        key = next(key for key in asked if key.kernel == kernel.name)
        shipped = kernel.default(key, gpu.arch, gpu.multiprocessors)
        expected = shipped.block_t, shipped.block_n  # type: ignore[attr-defined]
        assert matmul_tile(problem, gpu, precision.ieee, n) == expected, key


def step(layer: FusedSMoALinear, tokens: int, **options: object) -> None:
    x = torch.randn(tokens, layer.weight.shape[1], requires_grad=True)
    layer(x).sum().backward()


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize(
    ("tokens", "order", "granule"), [(19, "spectral", 1), (150, "spectral", 1), (150, "contiguous", 8)]
)
def test_a_training_step_asks_for_what_the_plan_holds(
    tokens: int, order: str, granule: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise what is tuned would never be looked up. 150 tokens are gathered as 128 and then 22 in the backward."""
    monkeypatch.setattr(sizes, "GRAD_PART_TOKENS", 64)
    monkeypatch.setattr(sizes, "GRAD_PART_TILES", 1)
    asked: set[Key] = set()
    monkeypatch.setattr(table, "_fastest", lambda key, device, allowed=None: asked.add(key))
    monkeypatch.setattr(table, "multiprocessors", lambda device: 132)  # so few tiles are split and summed
    dx = "fused" if tokens == 19 else "merged"
    monkeypatch.setattr(triton_backend, "choose_algorithm", lambda *_: dx)
    n, c = (140, 90) if granule == 1 else (144, 96)
    layer = FusedSMoALinear(c, n, r=5, num_blocks=2, block_order=order, backend="triton")
    torch.nn.init.normal_(layer.smoa_B)
    for algorithm, dropout in (("split", 0.0), ("merged", 0.0), ("fused", 0.0), ("split", 0.3)):
        layer.algorithm, layer.dropout = algorithm, dropout
        forget()
        step(layer, tokens)
    planned = {key for key in keys(Layer(n, c, tokens, "fp32", 5, 2, granule)) if key.kernel in KERNELS}
    asked = {key for key in asked if key.kernel in KERNELS}
    assert asked <= planned
    left = set() if tokens == 19 else {"fused_linear", "sum_partials"}
    assert {key.kernel for key in planned - asked} == left
