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
        (Problem(8192, 4096, 4096, 4, 16), (4096, 4096)),  # 128 MiB of copies; W_eff and dX take 96
        (Problem(8191, 4096, 4096, 4, 16), (8191,)),  # parts would be shorter than 64 steps
        (Problem(8193, 4096, 4096, 4, 16), (4160, 4033)),  # whole steps except for the last part
        (Problem(8192, 4096, 14336, 4, 16), (8192,)),  # W_eff and dX take more than the copies
        (Problem(32768, 14336, 4096, 4, 16), (8192, 8192, 8192, 8192)),  # 1152 MiB over 368
        (Problem(8192, 14336, 4096, 2, 256), (8192,)),  # partials of 224 MiB, copies of 288
        (Problem(8192, 4096, 4096, 1, 16), (8192,)),  # nothing is copied
        (Problem(8192, 4096, 4096, 8, 16), (4096, 4096)),  # 128 tiles fill a GPU
        (Problem(8192, 4096, 3072, 8, 16), (8192,)),  # 96 do not: programs share the tokens already
        (Problem(0, 4096, 4096, 4, 16), (0,)),
        (Problem(8192, 4096, 4096, 4, 16, granule=8), (8192,)),  # dY and x are read in place
        (Problem(8192, 4096, 4096, 4, 16, granule=12), (4096, 4096)),
    ],
    ids=str,
)
def test_into_how_many_parts_a_backward_gathers(problem, parts):
    assert gradient_parts(problem) == parts


@pytest.mark.parametrize(("num_blocks", "rank"), [(4, 16), (2, 256), (4, 1024), (2, 0)])
def test_parts_take_no_more_than_dx_where_they_may_be_short_enough(num_blocks, rank, monkeypatch):
    for tokens in (8192, 16384, 100_001, 1 << 20):
        for shape in ((4096, 4096), (14336, 4096), (28672, 1024), (1024, 28672), (16390, 590)):
            p = Problem(tokens, *shape, num_blocks, rank)
            parts = gradient_parts(p)
            assert sum(parts) == tokens
            assert min(parts[:-1], default=tokens) == max(parts)
            stages, dx = backward_workspace(p), 2 * tokens * p.in_features
            partials = len(parts) * algorithms.partial_bytes(p.features, p.num_blocks, p.max_rank)
            copies = stages["factor gradients"] - partials
            step = 2 * algorithms.GRAD_STEP * sum(p.padded(n) for n in shape)  # parts are whole steps
            one = partials // len(parts)
            worth_more = len(parts) * copies >= (len(parts) + 1) ** 2 * one  # than another part's partials
            if len(parts) < tokens // algorithms.GRAD_PART_TOKENS and worth_more:
                assert copies <= stages["input gradient"] + dx + step
            with monkeypatch.context() as patch:
                patch.setattr(algorithms, "GRAD_PART_TOKENS", tokens)  # one part
                whole = backward_workspace(p)["factor gradients"]
            assert stages["factor gradients"] <= whole + step


def test_backward_workspace_counts_padding():
    aligned, odd = (backward_workspace(Problem(64, n, 512, 4, 16)) for n in (512, 516))
    # 129 rows per block are padded to 256; dY alone doubles
    assert odd["factor gradients"] - aligned["factor gradients"] >= 2 * 64 * 512


def test_granules_are_read_in_place():
    """Only partials and W_eff remain."""
    p = Problem(8192, 4096, 4096, 4, 16, granule=8)
    partials, w_eff = 4 * 4 * 2 * 4096 * 8, 2 * 4096 * 4096
    assert backward_workspace(p) == {"factor gradients": partials, "input gradient": w_eff}


def test_one_block_that_fills_its_tiles_is_not_gathered():
    assert backward_workspace(Problem(8192, 4096, 4096, 1, 16))["factor gradients"] == 4 * 16 * 2 * 4096 * 32
