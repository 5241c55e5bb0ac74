"""Computes the blocks of the layers that an injection added; sorts several weights at once if they are spectral."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..adapter_folder.naming import naming
from ..definition.block_rule import BlockRule
from ..definition.partition import BlockPartition
from ..definition.spectral_order import one_thread, order_source, spectral_orders
from .base_weight import BlockSource
from .layer import SMoALayer

__all__ = ["initialize_all"]

# Sorting a square weight takes five to seven times its bytes in float32; a wide one takes less. Experts are small, so
# as many are sorted at once as there are threads.
MAX_AT_ONCE = 8
# From this number on, decompositions of experts take minutes, and the user is warned before the first.
MANY = 256

_Wanted = tuple[SMoALayer, BlockRule]


def initialize_all(layers: Mapping[str, SMoALayer], adapter_name: str) -> None:
    """Compute the blocks of an adapter in these layers, by name, and draw its weights, layer by layer.

    Layers that share a weight share its blocks, as do layers of one shape whose blocks do not depend on values.

    Raises:
        TypeError, ValueError: naming the layer, as :meth:`BlockRule.build` does.
    """
    with _sorting([(layer, layer.settings[adapter_name].rule) for layer in layers.values()]) as blocks_of:
        for name, layer in layers.items():
            with naming(name):
                layer.initialize(adapter_name, blocks_of)


@contextmanager
def _sorting(wanted: Sequence[_Wanted]) -> Iterator[BlockSource]:
    """Give a function that computes a layer's blocks; those of later layers are computed meanwhile.

    Labels must not depend on the number of threads, so each weight is sorted on one thread, and as many weights at once
    as there are intra-op threads. Weights that are not in CPU memory are sorted when they are asked for.
    """
    spectral = [each for each in wanted if each[1].needs_weight and each[0].known_blocks(each[1]) is None]
    # The keys are made before any weight is loaded: an offloaded one is a new object each time it is loaded.
    keys = {layer: _key(layer, rule) for layer, rule in wanted}
    found: dict[Any, Any] = {}
    begun: dict[Any, list[Future[BlockPartition]]] = {}
    with ExitStack() as until_exit:
        until_exit.callback(
            begun.clear
        )  # breaks a cycle: a future's error refers to this frame by its traceback
        bar = until_exit.enter_context(_progress([each for each in spectral if each[0].stack]))

        def decompositions(layer: SMoALayer, rule: BlockRule) -> list[Callable[[], BlockPartition]]:
            each = layer.decompositions(rule)
            return [_counted(one, bar) for one in each] if layer.stack else each

        def blocks_of(layer: SMoALayer, rule: BlockRule) -> Any:
            key = keys[layer]
            if key not in found and not rule.needs_weight:
                found[key] = layer.build_blocks(rule)
            elif key not in found:
                if key not in begun:
                    begun[key] = [_done(each) for each in decompositions(layer, rule)]
                # No local name for a future: its error's traceback refers to this frame, which would be a cycle.
                found[key] = layer.joined(list(map(Future.result, begun.pop(key))))
            return found[key]

        at_hand = [each for each in spectral if _is_at_hand(each[0])]
        at_once = torch.get_num_threads()
        if not all(layer.stack for layer, _ in spectral):
            at_once = min(at_once, MAX_AT_ONCE)
        # Within `shared_spectra` all processes must ask for one weight after another, in the same order.
        if at_once > 1 and at_hand and order_source.get() is spectral_orders:
            # New threads inherit this setting. If they set it themselves, it would outlast them.
            until_exit.enter_context(one_thread())
            pool = ThreadPoolExecutor(at_once, "smoa-sorting")
            until_exit.callback(pool.shutdown, cancel_futures=True)
            for layer, rule in at_hand:
                if keys[layer] not in begun:
                    begun[keys[layer]] = list(map(pool.submit, decompositions(layer, rule)))
        yield blocks_of


def _key(layer: SMoALayer, rule: BlockRule) -> Any:
    """A key that is equal for layers that share their blocks."""
    if rule.needs_weight:
        weight = layer.parameter
        return id(layer.innermost() if weight is None else weight), layer.fan_in_fan_out, rule
    return layer.stack, layer.out_features, layer.in_features, layer.adapter_device, rule


def _is_at_hand(layer: SMoALayer) -> bool:
    """Whether a weight can be read in place: it is not computed, quantised, offloaded, partitioned or a `DTensor`."""
    weight = layer.parameter
    if type(weight) is not nn.Parameter or layer.quantization_backend is not None:
        return False
    return weight.device.type == "cpu" and not hasattr(weight, "ds_id")


def _done(compute: Callable[[], BlockPartition]) -> Future[BlockPartition]:
    done: Future[BlockPartition] = Future()
    done.set_result(compute())
    return done


def _counted(compute: Callable[[], BlockPartition], bar: tqdm[Any]) -> Callable[[], BlockPartition]:
    def counted() -> BlockPartition:
        found = compute()
        bar.update()
        return found

    return counted


def _progress(stacks: Sequence[_Wanted]) -> tqdm[Any]:
    """A bar for the decompositions of experts; if they take minutes, it is shown, after a warning."""
    total = sum(len(layer.decompositions(rule)) for layer, rule in stacks)
    if total >= MANY:
        rows, cols = max(
            (sorted((layer.out_features, layer.in_features), reverse=True) for layer, _ in stacks), key=min
        )
        warnings.warn(
            f"spectral blocks of these experts take {total:,} decompositions of weights of up to {rows}x{cols}, "
            "which may take tens of minutes; block_order='contiguous' takes none, and 'shared' one for each "
            "parameter (docs/experts.md)",
            UserWarning,
            stacklevel=2,
        )
    return tqdm(total=total, desc="sorting experts", disable=total < MANY)
