"""block_grad's predicted share of a large GEMM's rate (smoa_kernels/cost/grad_share.py), each limit by hand."""

from dataclasses import replace

import pytest

from smoa_kernels.cost.estimate import Problem
from smoa_kernels.cost.gpus import GPUS
from smoa_kernels.cost.grad_share import block_grad_share

H100 = GPUS["h100"]
SQUARE = Problem(8192, 4096, 4096, num_blocks=4, rank=16)


def test_the_goals_case_by_hand():
    """4 blocks of 8 × 8 tiles in two waves over 132, twice, each over half of the tokens: 64 steps and 8 for the end;
    64 flops a byte at 10.05 TB/s."""
    found = block_grad_share(SQUARE, H100)
    assert found.tiles == 1
    assert found.waves == pytest.approx(256 / (2 * 132))
    assert found.main_loop == pytest.approx(64 / 72)
    assert found.cache == pytest.approx(64 * 3 * 3.35e12 / 700e12)
    assert found.share == pytest.approx(found.waves * found.main_loop * found.cache)


def test_each_limit_moves_with_what_it_depends_on():
    found = block_grad_share(SQUARE, H100)
    assert block_grad_share(SQUARE, replace(H100, multiprocessors=128)).waves == 1
    assert block_grad_share(replace(SQUARE, tokens=1024), H100).main_loop == pytest.approx(16 / 24)
    assert block_grad_share(replace(SQUARE, tokens=8191), H100).main_loop == pytest.approx(128 / 136)
    assert block_grad_share(SQUARE, replace(H100, memory_tbps=4.8)).cache == 1 > found.cache
    # 129 rows and columns of a block fill two tiles each; 8193 tokens begin another step.
    odd = Problem(512, 516, 516, num_blocks=4, rank=16)
    assert block_grad_share(odd, H100).tiles == pytest.approx((129 / 256) ** 2)
    assert block_grad_share(replace(SQUARE, tokens=8193), H100).tiles == pytest.approx(8193 / (2 * 65 * 64))


def test_few_tiles_share_their_tokens():
    """4 × 1 × 2 tiles: T in 16 parts of 512, for a part keeps as many steps as its end costs."""
    found = block_grad_share(Problem(8192, 512, 1024, num_blocks=4, rank=16), H100)
    assert found.waves == pytest.approx(128 / 132)
    assert found.main_loop == pytest.approx(0.5)


def test_no_tokens():
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        block_grad_share(replace(SQUARE, tokens=0), H100)
