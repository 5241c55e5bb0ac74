"""`Sorting`: gives the weights of an injection their blocks; where these are spectral, sorts several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..definition.block_rule import BlockRule
from ..definition.partition import BlockPartition
from ..definition.spectral_order import one_thread, order_source, spectral_orders
from .layer import SMoALayer, order_of

__all__ = ["Sorting"]

# While it is sorted, a square weight takes five to seven times its bytes in float32; a wide one takes less.
MAX_AT_ONCE = 8


class Sorting:
    """Computes the blocks of weights, each once, and those of later layers while the first one waits.

    Labels must not depend on the number of threads, so each weight is sorted on one; as many weights as there are
    intra-op threads are sorted at once. Leaving the context gives up what nothing has asked for.

    Args:
        expected: called when a layer first asks: the linear layers whose weights will be asked for, in that order,
            each with the rule of its blocks. A weight that it misses, or that is not in the CPU's memory, is sorted
            when it is asked for.
    """

    def __init__(self, expected: Callable[[], Iterable[tuple[nn.Linear | Conv1D, BlockRule]]]) -> None:
        self._expected = expected
        self._has_begun = False
        # Keys: the stored weight, or the layer that holds it quantised; whether it is stored (C, N); the rule.
        self._blocks: dict[tuple[object, bool, BlockRule], Future[BlockPartition]] = {}
        self._of_shape: dict[tuple[object, BlockRule], BlockPartition] = {}
        self._until_exit = ExitStack()

    def __enter__(self) -> Sorting:
        return self

    def __exit__(self, *raised: object) -> None:
        for blocks in self._blocks.values():
            blocks.cancel()
        self._until_exit.close()
        self._blocks.clear()  # the traceback of an error in one of them refers back to this object

    def __call__(self, layer: SMoALayer, rule: BlockRule) -> BlockPartition:
        """Give the blocks of a layer's W0, shared by layers that share a weight.

        Raises:
            TypeError, ValueError: as :meth:`BlockRule.build` does.
        """
        if not rule.needs_weight:  # layers of one shape share their blocks
            shape = layer.out_features, layer.in_features, layer.adapter_device
            if (shape, rule) not in self._of_shape:
                self._of_shape[shape, rule] = order_of(layer, rule)
            return self._of_shape[shape, rule]
        if not self._has_begun:
            self._has_begun = True
            self._begin()
        base: Any = layer.innermost()
        key = (getattr(base, "weight", base), layer.fan_in_fan_out, rule)
        if key not in self._blocks:
            partition = rule.build(layer.base_weight())
            self._blocks[key] = Future()
            self._blocks[key].set_result(partition)
        return self._blocks[key].result()

    def _begin(self) -> None:
        at_once = min(torch.get_num_threads(), MAX_AT_ONCE)
        # Within `shared_spectra` all processes must ask for one weight after another, in the same order.
        if at_once == 1 or order_source.get() is not spectral_orders:
            return
        at_hand = [(base, rule) for base, rule in self._expected() if _is_at_hand(base)]
        if not at_hand:
            return
        # New threads inherit this setting. Set by the new threads themselves, it would outlast them.
        self._until_exit.enter_context(one_thread())
        pool = self._until_exit.enter_context(ThreadPoolExecutor(at_once, "smoa-sorting"))
        for base, rule in at_hand:
            stored_transposed = isinstance(base, Conv1D)
            key = base.weight, stored_transposed, rule
            if key not in self._blocks:  # layers may share a weight
                weight = base.weight.T if stored_transposed else base.weight
                self._blocks[key] = pool.submit(rule.build, weight)


def _is_at_hand(base: nn.Module) -> bool:
    """Whether a layer's weight can be read as it is: not quantised, offloaded, partitioned or a `DTensor`."""
    weight = base._parameters.get("weight")  # not a parametrised one, which is computed at each access
    if type(weight) is not nn.Parameter or weight.itemsize < 2:
        return False
    return weight.device.type == "cpu" and not hasattr(weight, "ds_id")
