"""Computes the blocks of the layers that an injection added; sorts several weights at once if they are spectral."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..checks import naming
from ..definition.partition import BlockPartition
from ..definition.spectral_order import one_thread, order_source, spectral_orders, within_one_thread
from .layer import SMoALayer

# Sorting a square weight takes five to seven times its bytes in float32, a wide weight less. Experts are small, so as
# many are sorted at once as there are threads.
MAX_AT_ONCE = 8
# So many matrices take minutes, and a bar shows them.
MANY = 64
_BAR = "sorting weights (block_order='contiguous' sorts none)"


def initialize_all(layers: Mapping[str, SMoALayer], adapter_name: str) -> None:
    """Compute the blocks of an adapter in these layers, by name, and draw its weights, layer by layer.

    Layers that share a weight share its blocks, as do layers of one shape whose blocks do not depend on values.

    Raises:
        TypeError, ValueError: naming the layer, as :meth:`BlockRule.build` does.
    """
    # The keys are made before any weight is loaded: an offloaded weight is a new object each time it is loaded.
    keys = {layer: _key(layer, adapter_name) for layer in layers.values()}
    # The weights that are to be sorted, each in the first layer that has it.
    wanted: dict[Any, tuple[str, SMoALayer]] = {}
    for name, layer in layers.items():
        if layer.settings[adapter_name].rule.needs_weight and layer.known_blocks(adapter_name) is None:
            wanted.setdefault(keys[layer], (name, layer))
    matrices = sum(layer.stack[0] if layer.stack else 1 for _, layer in wanted.values())
    with tqdm(total=len(wanted), desc=_BAR, disable=matrices < MANY) as bar:
        at_hand = {key: entry for key, entry in wanted.items() if _is_at_hand(entry[1])}
        blocks = _sorted_at_once(at_hand, adapter_name, bar)
        for name, layer in layers.items():
            key = keys[layer]
            with naming(name):
                layer.initialize(adapter_name, blocks.get(key))
            if key not in blocks:
                blocks[key] = layer.partition(adapter_name)
                bar.update(key in wanted)


def _sorted_at_once(
    weights: Mapping[Any, tuple[str, SMoALayer]], adapter_name: str, bar: tqdm[Any]
) -> dict[Any, Any]:
    """Compute the spectral blocks of weights in CPU memory, each on one thread: labels must not depend on threads."""
    # Within `shared_spectra` all processes must ask for one weight after another, in the same order.
    if not weights or order_source.get() is not spectral_orders:
        return {}
    at_once = torch.get_num_threads()
    if not all(layer.stack for _, layer in weights.values()):
        at_once = min(at_once, MAX_AT_ONCE)
    with one_thread():
        if torch.get_num_threads() != 1:  # in vLLM's process: each would take all threads
            at_once = 1
        begun: dict[Any, list[Future[BlockPartition]]] = {}
        pool = ThreadPoolExecutor(at_once, "smoa-sorting", initializer=within_one_thread)
        try:
            for key, (_, layer) in weights.items():
                begun[key] = [pool.submit(task) for task in layer.computations(adapter_name)]
            blocks = {}
            for key, (name, layer) in weights.items():
                with naming(name):
                    # No local name for a future: its error's traceback refers to this frame, which would be a cycle.
                    blocks[key] = layer.joined(list(map(Future.result, begun.pop(key))))
                bar.update()
            return blocks
        finally:
            begun.clear()
            pool.shutdown(cancel_futures=True)


def _key(layer: SMoALayer, adapter_name: str) -> Any:
    """A key that is equal for layers that share their blocks."""
    groups = layer.smoa[adapter_name].col_group
    rule = layer.settings[adapter_name].rule, None if groups is None else tuple(groups.tolist())
    if rule[0].needs_weight:
        weight = layer.parameter
        return id(layer.get_base_layer() if weight is None else weight), layer.fan_in_fan_out, rule
    return layer.stack, layer.out_features, layer.in_features, layer.adapter_device, rule


def _is_at_hand(layer: SMoALayer) -> bool:
    """Whether a weight can be read in place: it is not computed, quantised, offloaded, partitioned or a `DTensor`."""
    weight = layer.parameter
    if type(weight) is not nn.Parameter or layer.quantization_backend is not None:
        return False
    return weight.device.type == "cpu" and not hasattr(weight, "ds_id")
