"""Predicted memory of the backward (smoa_kernels/tuning/roofline.py), counted by hand."""

from dataclasses import replace

import pytest

from smoa_kernels.backends import algorithms
from smoa_kernels.tuning.roofline import Problem, backward_workspace, gradient_parts


def test_backward_workspace():
    p = Problem(8192, 14336, 4096, 4, 16)
    stages = backward_workspace(p)
    gathered = 2 * 8192 * (14336 + 4096)
    partials = 4 * 4 * (14336 * 8 + 4096 * 28)  # float32, ρ = 4; a slice per 128-wide tile of the other side
    assert gathered == 288 * 2**20
    assert stages["factor gradients"] == gathered // 2 + 2 * partials  # two parts of the tokens
    assert stages["input gradient"] == 112 * 2**20
    assert max(stages.values()) < 400 * 2**20
    assert (
        backward_workspace(replace(p, tokens=8191))["factor gradients"] == gathered // 8192 * 8191 + partials
    )


@pytest.mark.parametrize(
    ("problem", "parts"),
    [
        (Problem(8192, 4096, 4096, 4, 16), (4096, 4096)),
        (Problem(8191, 4096, 4096, 4, 16), (8191,)),  # parts would be shorter than 64 steps
        (Problem(8193, 4096, 4096, 4, 16), (4160, 4033)),  # whole steps except for the last part
        (Problem(8192, 14336, 4096, 2, 256), (8192,)),  # partials of rank 128 take more
        (Problem(8192, 4096, 4096, 1, 16), (8192,)),  # nothing is copied
        (Problem(8192, 4096, 3072, 8, 16), (8192,)),  # 96 tiles do not fill a GPU: programs share the tokens
        (Problem(0, 4096, 4096, 4, 16), (0,)),
        (Problem(8192, 4096, 4096, 4, 16, granule=8), (8192,)),  # dY and x are read in place
    ],
    ids=str,
)
def test_into_how_many_parts_a_backward_gathers(problem, parts):
    assert gradient_parts(problem) == parts


@pytest.mark.parametrize("rank", [0, 16, 256])
@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (16390, 5900)])
def test_a_longer_batch_takes_no_more_for_its_copies(shape, rank):
    for tokens in (8192, 100_001, 1 << 20):
        p = Problem(tokens, *shape, 4, rank)
        parts = gradient_parts(p)
        assert sum(parts) == tokens
        assert min(parts[:-1]) == max(parts) < 2 * algorithms.GRAD_PART_TOKENS
        partials = len(parts) * algorithms.partial_bytes(p.features, p.num_blocks, p.max_rank)
        copies = 2 * max(parts) * sum(map(p.copied, shape))
        assert backward_workspace(p)["factor gradients"] == copies + partials <= 2 * copies + partials


def test_granules_are_read_in_place():
    """Only partials and W_eff remain."""
    p = Problem(8192, 4096, 4096, 4, 16, granule=8)
    partials, w_eff = 4 * 4 * 2 * 4096 * 8, 2 * 4096 * 4096
    assert backward_workspace(p) == {"factor gradients": partials, "input gradient": w_eff}


def test_one_block_that_fills_its_tiles_is_not_gathered():
    assert backward_workspace(Problem(8192, 4096, 4096, 1, 16))["factor gradients"] == 4 * 16 * 2 * 4096 * 32
