"""Bad arguments of `BlockPartition`'s constructors."""

from typing import Any

import pytest
import torch

from smoa_kernels import BlockPartition
from smoa_kernels.definition.block_rule import BlockRule

from .harness import NESTED, World, check, one

MATRIX = torch.ones(3, 4)

# (weight, num_blocks), the exception, its words.
WEIGHTS: list[tuple[tuple[Any, Any], type[Exception], str]] = [
    (([[1.0]], 1), TypeError, "weight must be a tensor, got list"),
    ((MATRIX.long(), 1), TypeError, "weight must be floating point, got torch.int64"),
    ((MATRIX + 0j, 1), TypeError, "weight must be floating point"),
    ((MATRIX.to(torch.float8_e4m3fn), 1), TypeError, "weight must be of 16 bits or more"),
    ((MATRIX.to_sparse(), 1), TypeError, "weight must be a dense tensor"),
    ((NESTED, 1), TypeError, "weight must be a dense tensor, got layout torch.nested"),
    ((MATRIX.to("meta"), 1), ValueError, "weight must hold numbers .* got a meta tensor"),
    ((torch.ones(3), 1), ValueError, r"weight must be a matrix .* got shape \(3,\)"),
    ((MATRIX * float("nan"), 1), ValueError, "weight must be finite"),
    ((MATRIX * float("inf"), 1), ValueError, "weight must be finite"),
    ((torch.ones(0, 4), 1), ValueError, "num_blocks must be at most .* = 0"),
    ((MATRIX, 0), ValueError, "num_blocks must be at least 1, got 0"),
    ((MATRIX, 4), ValueError, "num_blocks must be at most .* = 3 .* got 4"),
    ((MATRIX, 2.0), TypeError, "num_blocks must be an int, got 2.0"),
    ((MATRIX, True), TypeError, "num_blocks must be an int, got True"),
    ((MATRIX, one(1)), TypeError, r"num_blocks must be an int, got tensor\(\[1\]\)"),
]

# (row_block, col_block, num_blocks), the exception, its words.
LABELS: list[tuple[tuple[Any, Any, Any], type[Exception], str]] = [
    ((one(0, 2), one(0), 2), ValueError, r"row_block must lie in \[0, 2\).* 0 to 2"),
    ((one(0), one(-1), 2), ValueError, r"col_block must lie in \[0, 2\)"),
    ((one(2**40).to(torch.uint64), one(0), 2), ValueError, r"row_block must lie in \[0, 2\)"),
    ((one(0)[None], one(0), 1), ValueError, "row_block must have one dimension"),
    ((one(0) / 1, one(0), 1), TypeError, "row_block must be an integer tensor, got torch.float32"),
    (([0], one(0), 1), TypeError, "row_block must be an integer tensor, got list"),
    ((one(0).to_sparse(), one(0), 1), TypeError, "row_block must be a dense tensor, got .*sparse_coo"),
    ((one(0), torch.nested.nested_tensor([one(0)]), 1), TypeError, "col_block must be a dense tensor"),
    ((one(0).to("meta"), one(0), 1), ValueError, "row_block must hold numbers, got a meta tensor"),
    ((one(0), one(0), 10**9), ValueError, "num_blocks must be at most 65536, got 1000000000"),
]

# A rule for a weight of 12 rows and 8 columns, the exception, its words.
RULES: list[tuple[BlockRule, type[Exception], str]] = [
    (BlockRule(2, granule=0), ValueError, "granule must be at least 1"),
    (BlockRule(2, granule=True), TypeError, "granule must be an int"),
    (BlockRule(2, granule=2.0), TypeError, "granule must be an int"),  # type: ignore[arg-type]
    (BlockRule(3, granule=4), ValueError, r"granule must leave .* got granule=4, which leaves 3 and 2"),
    (BlockRule(9), ValueError, "num_blocks must be at most"),
    (BlockRule(2, "sorted"), ValueError, "block_order must be one of spectral, contiguous, random"),
    (BlockRule(2, "random", block_seed=-1), ValueError, "seed must be at least 0"),
    (BlockRule(2, "random", block_seed=1.5), TypeError, "seed must be an int"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("order", ["spectral", "contiguous", "random"])
@pytest.mark.parametrize(("rule", "error", "words"), RULES)
def test_rules(rule: BlockRule, error: type[Exception], words: str, order: str, world: World) -> None:
    rule = rule._replace(block_order=order) if rule.block_order == "spectral" else rule
    check(world, lambda _: rule.check((12, 8)), error, words)
    check(world, lambda _: rule.build(torch.ones(12, 8)), error, words)


@pytest.mark.parametrize(("arguments", "error", "words"), WEIGHTS)
def test_from_weight(arguments: Any, error: type[Exception], words: str, world: World) -> None:
    check(world, lambda _: BlockPartition.from_weight(*arguments), error, words)


@pytest.mark.parametrize(("arguments", "error", "words"), LABELS)
def test_from_labels(arguments: Any, error: type[Exception], words: str, world: World) -> None:
    check(world, lambda _: BlockPartition.from_labels(*arguments), error, words)


@pytest.mark.parametrize(("tensors", "sizes"), [(5, 4), (6, 3), (6, 2)])
def test_from_tensors(tensors: int, sizes: int) -> None:
    with pytest.raises(ValueError, match=rf"6 tensors and 2K \+ 2 sizes, got {tensors} and {sizes}"):
        BlockPartition.from_tensors([torch.zeros(2)] * tensors, [1] * sizes)
