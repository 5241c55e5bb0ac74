"""Predicted memory of the backward (smoa_kernels/tuning/roofline.py), counted by hand."""

from smoa_kernels.tuning.roofline import Problem, backward_workspace


def test_backward_workspace():
    p = Problem(8192, 14336, 4096, 4, 16)
    stages = backward_workspace(p)
    gathered = 2 * 8192 * (14336 + 4096)
    partials = 4 * 4 * (14336 * 8 + 4096 * 28)  # float32, ρ = 4; a slice per 128-wide tile of the other side
    assert gathered == 288 * 2**20
    assert stages["factor gradients"] == gathered + partials
    assert stages["input gradient"] == 112 * 2**20


def test_granules_are_read_in_place():
    """Only partials and W_eff remain."""
    p = Problem(8192, 4096, 4096, 4, 16, granule=8)
    partials, w_eff = 4 * 4 * 2 * 4096 * 8, 2 * 4096 * 4096
    assert backward_workspace(p) == {"factor gradients": partials, "input gradient": w_eff}


def test_one_block_that_fills_its_tiles_is_not_gathered():
    assert backward_workspace(Problem(8192, 4096, 4096, 1, 16))["factor gradients"] == 4 * 16 * 2 * 4096 * 32
