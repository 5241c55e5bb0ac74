"""The cost model (smoa_kernels/cost/estimate.py): totals known beforehand, hand counts, and the choice of `auto`."""

import itertools
from dataclasses import replace

import pytest
import torch

from smoa_kernels.cost.counts import WAYS, parts
from smoa_kernels.cost.estimate import choose_algorithm, estimate, fused_token_limit
from smoa_kernels.cost.gpus import GPUS, match_gpu
from smoa_kernels.cost.problem import Problem

H100 = GPUS["h100"]
SQUARE = Problem(tokens=8192, out_features=4096, in_features=4096, num_blocks=4, rank=16)
DOWN = replace(SQUARE, in_features=14336)


def over_frozen(problem: Problem, algorithm: str) -> float:
    return estimate(problem, H100, algorithm).seconds() / estimate(problem, H100, "frozen").seconds()


def part(problem: Problem, algorithm: str, name: str, stage: str = "forward"):
    (found,) = (p for p in parts(problem, algorithm) if p.name == name and p.stage == stage)
    return found


@pytest.mark.parametrize(
    ("problem", "algorithm", "design"),
    [
        (SQUARE, "merged", 1.28),
        (SQUARE, "split", 1.49),
        (SQUARE, "lora", 1.41),
        (DOWN, "lora", 1.23),
        (DOWN, "merged", 1.24),
        (DOWN, "split", 1.42),
    ],
)
def test_totals_of_the_design(problem, algorithm, design):
    assert over_frozen(problem, algorithm) == pytest.approx(design, rel=0.02)


def test_flop_floors():
    """Without memory traffic: 1 + 1/(2K) merged, 1 + 1/K split."""
    infinite = replace(H100, memory_tbps=1e9)
    for blocks in (1, 2, 4, 8):
        p = replace(SQUARE, tokens=1 << 20, num_blocks=blocks)
        frozen = estimate(p, infinite, "frozen").seconds()
        assert estimate(p, infinite, "merged").seconds() / frozen == pytest.approx(
            1 + 1 / (2 * blocks), rel=1e-3
        )
        assert estimate(p, infinite, "split").seconds() / frozen == pytest.approx(1 + 1 / blocks, rel=1e-3)
        assert estimate(p, infinite, "hira").seconds() / frozen == pytest.approx(2.5, rel=1e-3)


def test_frozen_is_two_units():
    e = estimate(SQUARE, H100, "frozen")
    assert e.flops("forward") == 2 * 8192 * 4096 * 4096 == e.flops("backward")
    assert e.seconds() == pytest.approx(2 * 2 * 8192 * 4096 * 4096 / 700e12)


def test_bytes_counted_by_hand():
    """T=8, N=6, C=4, K=1, r=2 in float32, each pass written out."""
    p = Problem(8, 6, 4, 1, 2, torch.float32)
    size, x, y, w = 4, 8 * 4, 8 * 6, 6 * 4
    assert part(p, "frozen", "base GEMM").bytes == size * (x + w + y)
    assert part(p, "merged", "build W_eff").bytes == size * (2 * w + 2 * (6 + 4))
    assert part(p, "lora", "h = x·Aᵀ").bytes == size * (x + 2 * 4 + 8 * 2)
    assert part(p, "lora", "scale").bytes == size * 2 * y
    assert part(p, "lora", "add to y").bytes == size * 3 * y
    assert part(p, "lora", "add to dX", "backward").bytes == size * 3 * x
    assert part(p, "hira", "W0 ∘ BA").bytes == size * 3 * w
    assert part(p, "split", "y, read to accumulate").bytes == size * y
    # gathers read what is there and write the padded layout: one block of 4 columns padded to 64
    assert part(p, "split", "gather x").bytes == size * (x + 8 * 64)


def test_peers_pay_for_dropout_and_ours_for_a_split_dx():
    for algorithm, stage in itertools.product(("lora", "hira", "paper_dense"), ("forward", "backward")):
        dry, wet = (estimate(replace(SQUARE, dropout=d), H100, algorithm) for d in (0.0, 0.05))
        x = SQUARE.tokens * SQUARE.in_features
        assert wet.bytes(stage) - dry.bytes(stage) == x * (2 + 2 + 1)  # bf16 in and out, a byte of mask
    dry, wet = (estimate(replace(SQUARE, dropout=d), H100, "split") for d in (0.0, 0.05))
    assert wet.seconds("forward") == dry.seconds("forward")
    assert wet.seconds("backward") > dry.seconds("backward")


def test_cost_grows_with_tokens_and_rank():
    for algorithm in WAYS:
        costs = [
            estimate(replace(SQUARE, tokens=t), H100, algorithm).seconds() for t in (0, 1, 64, 1024, 8192)
        ]
        assert costs == sorted(costs)
        assert costs[0] < costs[-1]
    for algorithm in ("lora", "hira", "paper_dense", "merged", "split", "fused", "expanded"):
        low, high = (estimate(replace(SQUARE, rank=r), H100, algorithm).bytes() for r in (16, 64))
        assert low < high, algorithm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ieee", [False, True])
def test_half_precision_is_never_merged(dtype, ieee):
    for gpu, tokens, blocks, rank in itertools.product(
        GPUS.values(), (1, 16, 100, 512, 8192, 1 << 17), (1, 2, 8), (1, 16, 256)
    ):
        p = Problem(tokens, 4096, 4096, blocks, rank, dtype)
        assert choose_algorithm(p, gpu, ieee) in ("split", "fused")


def test_many_tokens_follow_the_multiplying_dtype():
    single = replace(SQUARE, dtype=torch.float32)
    assert choose_algorithm(single, H100, True) == "merged"
    assert choose_algorithm(single, H100, False) == "split"
    assert choose_algorithm(replace(SQUARE, dtype=torch.float64), H100, True) == "merged"
    assert choose_algorithm(SQUARE, H100, False) == "split"


def test_dropout_always_splits():
    for tokens, dtype, ieee in itertools.product(
        (1, 64, 8192), (torch.bfloat16, torch.float32), (True, False)
    ):
        p = replace(SQUARE, tokens=tokens, dtype=dtype, dropout=0.05)
        assert choose_algorithm(p, H100, ieee) == "split"


def test_fused_up_to_the_limit_and_no_further():
    limit = fused_token_limit(SQUARE, H100, False)
    assert 32 < limit < 512  # "a few hundred tokens"
    for tokens in (1, limit // 2, limit):
        assert choose_algorithm(replace(SQUARE, tokens=tokens), H100, False) == "fused"
    for tokens in (limit + 1, 2 * limit, 8192):
        assert choose_algorithm(replace(SQUARE, tokens=tokens), H100, False) == "split"


def test_limit_is_where_the_predictions_cross():
    for gpu, rank, dtype, ieee in itertools.product(
        GPUS.values(), (1, 16, 64), (torch.bfloat16, torch.float32), (True, False)
    ):
        p = Problem(0, 4096, 14336, 4, rank, dtype)
        limit = fused_token_limit(p, gpu, ieee)
        assert limit < 4096
        other = choose_algorithm(replace(p, tokens=1 << 16), gpu, ieee)
        for tokens in (1, limit, limit + 1, 4 * limit + 64):
            at = replace(p, tokens=tokens)
            fused, many = (estimate(at, gpu, a, ieee=ieee).seconds("forward") for a in ("fused", other))
            assert (fused <= many) == (tokens <= limit), (gpu.name, rank, tokens, limit)


@pytest.mark.parametrize(
    ("dtype", "ieee", "most"),
    [
        (torch.bfloat16, False, 64),
        (torch.bfloat16, True, 64),
        (torch.float32, False, 64),
        (torch.float32, True, 16),
    ],
)
def test_fused_only_where_it_reads_the_weight_once(dtype, ieee, most):
    fits, too_large = (Problem(1, 4096, 4096, 1, rank, dtype) for rank in (most, most + 1))
    assert choose_algorithm(fits, H100, ieee) == "fused"
    assert choose_algorithm(too_large, H100, ieee) != "fused"


def test_limit_comes_out_of_the_gpu():
    """More bandwidth per flop: building W_eff hurts less, so the one-kernel form pays less long."""
    fast_memory = replace(H100, memory_tbps=2 * H100.memory_tbps)
    assert fused_token_limit(SQUARE, fast_memory, False) < fused_token_limit(SQUARE, H100, False)


def test_one_block_that_fills_its_tiles_is_not_gathered():
    p = Problem(8192, 4096, 4096, 1, 16)
    assert not [q for q in parts(p, "split") if q.name.startswith("gather")]
    wet = [q.name for q in parts(replace(p, dropout=0.1), "split") if q.name.startswith("gather")]
    assert wet == ["gather x", "gather x"]  # the mask makes it a copy
    assert [q for q in parts(replace(p, in_features=4000), "split") if q.name == "gather x"]


def test_match_gpu():
    assert match_gpu("NVIDIA H100 80GB HBM3", (9, 0), 132) is GPUS["h100"]
    assert match_gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108) is GPUS["a100"]
    assert match_gpu("NVIDIA GeForce RTX 4090", (8, 9), 128) is GPUS["rtx4090"]
    assert match_gpu("AMD Instinct MI300X", None, 304) is GPUS["mi300x"]
    small = match_gpu("NVIDIA RTX A4000", (8, 6), 42)
    assert small.arch == "sm_86"
    assert small.memory_tbps == pytest.approx(GPUS["a40"].memory_tbps / 2)
    unseen = match_gpu("NVIDIA X999", (13, 0), 200)
    assert unseen.arch == "sm_120"
    slice_ = match_gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 16)
    assert slice_.matmul_tflops["bf16"] < 100


def test_no_tokens():
    empty = replace(SQUARE, tokens=0)
    assert estimate(empty, H100, "frozen").flops() == 0
    assert choose_algorithm(empty, H100, False) == "fused"
