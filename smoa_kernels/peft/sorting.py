"""`Sorting`: gives the weights of an injection their blocks; where these are spectral, sorts several at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..definition.block_rule import BlockRule
from ..definition.partition import BlockPartition
from ..definition.spectral_order import one_thread, order_source, spectral_orders
from .base_weight import BaseWeight, decompositions

__all__ = ["Expected", "Sorting"]

# While it is sorted, a square weight takes five to seven times its bytes in float32; a wide one takes less. Of experts,
# which are small, as many are sorted at once as there are threads.
MAX_AT_ONCE = 8
# From so many decompositions of experts on they take minutes, and a user is told so before the first.
MANY = 256


class Expected(NamedTuple):
    """A weight that an injection will ask the blocks of.

    Attributes:
        stored: the parameter, (N, C) or (E, N, C), as it is stored.
        swapped: whether that is with its last two dimensions swapped.
        rule: of the blocks.
    """

    stored: Tensor
    swapped: bool
    rule: BlockRule


class Sorting:
    """Computes the blocks of weights, each once, and those of later layers while the first one waits.

    Labels must not depend on the number of threads, so each weight is sorted on one; as many weights as there are
    intra-op threads are sorted at once. Leaving the context gives up what nothing has asked for.

    Args:
        expected: called when a layer first asks: the weights that will be asked for and have spectral blocks, in that
            order. A weight that it misses, or that is not in the CPU's memory, is sorted when it is asked for.
    """

    def __init__(self, expected: Callable[[], Iterable[Expected]]) -> None:
        self._expected = expected
        self._blocks: dict[Any, list[Future[BlockPartition]]] = {}
        self._of_shape: dict[Any, Any] = {}
        self._bar: tqdm[Any] | None = None  # once the first layer has asked
        self._until_exit = ExitStack()

    def __enter__(self) -> Sorting:
        return self

    def __exit__(self, *raised: object) -> None:
        for each in (each for blocks in self._blocks.values() for each in blocks):
            each.cancel()
        self._until_exit.close()
        self._blocks.clear()  # the traceback of an error in one of them refers back to this object

    def __call__(self, layer: BaseWeight, rule: BlockRule) -> Any:
        """Give the blocks of a layer's W0, shared by layers that share a weight.

        Raises:
            TypeError, ValueError: as :meth:`BlockRule.build` does.
        """
        if not rule.needs_weight:  # layers of one shape share their blocks
            shape = layer.stack, layer.out_features, layer.in_features, layer.adapter_device, rule
            if shape not in self._of_shape:
                self._of_shape[shape] = layer.build_blocks(rule)
            return self._of_shape[shape]
        if self._bar is None:
            self._bar = self._begin()
        key = Expected(layer._stored_weight(), layer.fan_in_fan_out, rule)
        if key not in self._blocks:
            bar = self._bar if layer.stack else None
            self._blocks[key] = [_done(each, bar) for each in decompositions(layer.base_weight(), rule)]
        # No local name for a future: it would tie its error, whose traceback leads here, to itself.
        return layer.joined(list(map(Future.result, self._blocks[key])))

    def _begin(self) -> tqdm[Any]:
        """Start to sort what is at hand; return the progress bar."""
        expected = list(self._expected())
        stacks = [each for each in expected if each.stored.ndim == 3]
        bar = self._until_exit.enter_context(_progress(stacks))
        at_once = torch.get_num_threads()
        if len(stacks) < len(expected):
            at_once = min(at_once, MAX_AT_ONCE)
        at_hand = [each for each in expected if _is_at_hand(each.stored)]
        # Within `shared_spectra` all processes must ask for one weight after another, in the same order.
        if at_once == 1 or not at_hand or order_source.get() is not spectral_orders:
            return bar
        # New threads inherit this setting. Set by the new threads themselves, it would outlast them.
        self._until_exit.enter_context(one_thread())
        pool = self._until_exit.enter_context(ThreadPoolExecutor(at_once, "smoa-sorting"))
        for each in at_hand:
            if each not in self._blocks:  # layers may share a weight
                weight = each.stored.detach().mT if each.swapped else each.stored.detach()
                self._blocks[each] = [pool.submit(compute) for compute in decompositions(weight, each.rule)]
                for block in self._blocks[each] if weight.ndim == 3 else ():
                    block.add_done_callback(lambda _: bar.update())
        return bar


def _done(compute: Callable[[], BlockPartition], bar: tqdm[Any] | None) -> Future[BlockPartition]:
    done: Future[BlockPartition] = Future()
    done.set_result(compute())
    if bar is not None:
        bar.update()
    return done


def _progress(stacks: list[Expected]) -> tqdm[Any]:
    """A bar for the decompositions of experts; where they take minutes, it is shown after a warning."""
    counts = [1 if each.rule.block_order == "shared" else len(each.stored) for each in stacks]
    total = sum(counts)
    if total >= MANY:
        rows, cols = max((sorted(each.stored.shape[1:], reverse=True) for each in stacks), key=min)
        warnings.warn(
            f"spectral blocks of these experts take {total:,} decompositions of weights of up to {rows}x{cols}, "
            "which may take tens of minutes; block_order='contiguous' takes none, and 'shared' one for each "
            "parameter (docs/experts.md)",
            UserWarning,
            stacklevel=2,
        )
    return tqdm(total=total, desc="sorting experts", disable=total < MANY)


def _is_at_hand(weight: Tensor) -> bool:
    """Whether a weight can be read as it is: not quantised, offloaded, partitioned or a `DTensor`."""
    if type(weight) is not nn.Parameter or weight.itemsize < 2:
        return False
    return weight.device.type == "cpu" and not hasattr(weight, "ds_id")
