"""Every kernel of a layer takes operands of any strides, touches nothing beside them, and takes no tokens at all."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch
from kernel_cases import CHECKED, Guarded, Place, as_it_is, far_apart, results
from problems import LinearProblem, make_problem, relative_error
from test_permute import gather
from torch import Tensor

from smoa_kernels.definition.packed import padding_masks
from smoa_kernels.kernels.permute import scatter_columns

pytestmark = pytest.mark.numerical


def permute(p: LinearProblem, place: Place) -> Iterator[Tensor]:
    blocked = gather(place(p.x), p.partition)
    yield blocked
    yield scatter_columns(blocked, p.partition, place(torch.full_like(p.x, torch.nan)))


KERNELS = permute, *(partial(results, kernel) for kernel in CHECKED)
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=["permute", *CHECKED])


def problem(tokens: int, granules: bool, dtype: torch.dtype = torch.float32) -> LinearProblem:
    sizes = {"tokens": tokens, "ranks": (3, 0, 20), "fill_padding": False, "dtype": dtype}
    if granules:
        return make_problem(out_features=80, in_features=144, block_order="random", granule=8, **sizes)  # type: ignore[arg-type]
    return make_problem(out_features=70, in_features=45, random_labels=True, **sizes)  # type: ignore[arg-type]


@cache
def plain(kernel: Callable[..., Iterator[Tensor]], granules: bool) -> list[Tensor]:
    return list(kernel(problem(21, granules), as_it_is))


@pytest.mark.parametrize(
    ("granules", "layout"),
    [
        (False, "padded rows"),
        (False, "column-major"),
        (True, "padded rows"),
        pytest.param(True, "column-major", marks=pytest.mark.slow),
        pytest.param(False, "every other number", marks=pytest.mark.slow),
        pytest.param(True, "every other number", marks=pytest.mark.slow),
    ],
)
@each_kernel
def test_strides_and_guards(
    kernel: Callable[..., Iterator[Tensor]], granules: bool, layout: str, guarded: Guarded
) -> None:
    """NaN lies around the operands and in the factors' padding."""
    p = problem(21, granules)
    used_A, used_B = padding_masks(p.partition, p.ranks, 20)
    p.A[~used_A], p.B[~used_B] = torch.nan, torch.nan

    pairs: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        if layout == "every other number":
            pairs.append(torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1))
            return pairs[-1][..., 0]
        turned = layout == "column-major" and tensor.ndim == 2
        return guarded(tensor.T.contiguous().T if turned else tensor, row_padding=8)

    for ours, reference in zip(list(kernel(p, place)), plain(kernel, granules), strict=True):
        if layout == "column-major":  # a transposed weight is summed in another order
            assert relative_error(ours, reference) < 1e-6
        else:
            assert torch.equal(ours, reference)
    assert all(both[..., 1].isnan().all() for both in pairs)


of_tokens = pytest.mark.parametrize("kernel", [permute, *KERNELS[3:]], ids=["permute", *CHECKED[2:]])


@of_tokens
def test_offsets_beyond_int32(kernel: Callable[..., Iterator[Tensor]]) -> None:
    """Of x, dY and y; W0's are those of experts (test_grouped.py)."""
    p = problem(12, False, torch.bfloat16)

    def place(tensor: Tensor) -> Tensor:
        return far_apart(tensor, 2**31 // 8) if len(tensor) == 12 else tensor

    for ours, reference in zip(list(kernel(p, place)), list(kernel(p, as_it_is)), strict=True):
        assert torch.equal(ours, reference)


@of_tokens
def test_no_tokens(kernel: Callable[..., Iterator[Tensor]]) -> None:
    found = list(kernel(problem(0, False), as_it_is))
    shapes = [tuple(0 if size == 21 else size for size in some.shape) for some in plain(kernel, False)]
    assert [tuple(result.shape) for result in found] == shapes
    assert not any(result.any() for result in found)
