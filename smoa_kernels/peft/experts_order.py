"""Gives the fused weights of experts their blocks; a model may have thousands of experts to sort."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..definition.block_rule import BlockRule
from ..definition.experts import ExpertBlocks
from ..definition.partition import BlockPartition
from ..definition.spectral_order import one_thread, order_source, spectral_orders

__all__ = ["ExpertSorting", "expert_order"]

# From so many decompositions on they take minutes, and a user is told so before the first.
MANY = 256


def expert_order(layer: Any, rule: BlockRule, done: Callable[[], object] = lambda: None) -> ExpertBlocks:
    """Compute the blocks of an `ExpertsWeight`; its W0 is read only where they depend on its values.

    Args:
        layer: whose adapter is new.
        rule: how blocks are made.
        done: called for each decomposition.
    """
    if not rule.needs_weight:
        partitions = [rule.of_shape((layer.out_features, layer.in_features), layer.adapter_device)]
    elif rule.block_order == "shared":
        partitions = [BlockPartition.from_experts(layer.base_weight(), rule.num_blocks, granule=rule.granule)]
        done()
    else:
        partitions = []
        for partition in _sorted(layer.base_weight().detach(), rule):
            partitions.append(partition)
            done()
    rows, cols = (torch.stack([getattr(p, side) for p in partitions]) for side in ("row_block", "col_block"))
    return ExpertBlocks.from_labels(rows, cols, rule.num_blocks)


def _sorted(weight: Tensor, rule: BlockRule) -> Iterator[BlockPartition]:
    """The spectral blocks of each expert: each sorted on one thread, as many at once as there are threads."""
    at_once = min(torch.get_num_threads(), len(weight))
    # Within `shared_spectra` all processes must ask for one weight after another, in the same order.
    if at_once == 1 or weight.device.type != "cpu" or order_source.get() is not spectral_orders:
        yield from map(rule.build, weight)
        return
    # New threads inherit this setting.
    with one_thread(), ThreadPoolExecutor(at_once, "smoa-sorting") as pool:
        waiting = [pool.submit(rule.build, each) for each in weight]
        try:
            for each in waiting:
                yield each.result()
        finally:  # Ctrl-C: what has begun ends, the rest does not begin
            for each in waiting:
                each.cancel()


class ExpertSorting:
    """Computes the blocks of an injection's fused weights, and shows a progress bar where they take minutes.

    Args:
        expected: shape (E, N, C) of each weight that will get blocks, and the rule of these.
    """

    def __init__(self, expected: Iterable[tuple[tuple[int, int, int], BlockRule]]) -> None:
        counts = [
            (1 if rule.block_order == "shared" else shape[0], shape)
            for shape, rule in expected
            if rule.needs_weight
        ]
        total = sum(count for count, _ in counts)
        if total >= MANY:
            _, rows, cols = max((shape for _, shape in counts), key=lambda shape: min(shape[1:]))
            warnings.warn(
                f"spectral blocks of these experts take {total:,} decompositions of weights of up to {rows}x{cols}, "
                "which may take tens of minutes; block_order='contiguous' takes none, and 'shared' one for each "
                "parameter (docs/experts.md)",
                UserWarning,
                stacklevel=2,
            )
        self._bar = tqdm(total=total, desc="sorting experts", disable=total < MANY)

    def __enter__(self) -> ExpertSorting:
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()

    def __call__(self, layer: Any, rule: BlockRule) -> Any:
        """Give the blocks of an `ExpertsWeight`."""
        return expert_order(layer, rule, self._bar.update)
