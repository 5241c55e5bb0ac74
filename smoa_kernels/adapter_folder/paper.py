"""Converts adapters from and to the layout of the paper's own code: a pair of factors for each block of each layer.

    <path>.lora_A.<adapter>.<k>.weight   A_k (r_k, C_k)
    <path>.lora_B.<adapter>.<k>.weight   B_k (N_k, r_k)

The coordinates of a block are in spectral order. The blocks themselves are not in the file, since that code computes
them at each load, so both directions need the base weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from ..definition.packed import pack_factors, unpack_factors
from ..definition.partition import BlockPartition
from ..definition.sketch import sketch_weight
from .format import STATE_KEYS, LayerBlocks, pack_blocks, read_blocks
from .reading import PREFIX

__all__ = ["from_paper_layout", "to_paper_layout"]

_PAPER_KEY = re.compile(r"(.+)\.lora_([AB])\.([^.]+)\.(\d+)\.weight")


def from_paper_layout(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the paper's tensors into those that an SMoA adapter's `adapter_model.safetensors` holds.

    Args:
        state: tensors of one adapter in the paper's layout.
        weights: W0 (N, C) of each adapted layer, by the layer's path in the base model.

    Raises:
        ValueError: a key has another form, there is more than one adapter, a layer lacks its base weight or a block, or
            factors do not fit the blocks of the base weight.

    Example:
        >>> import torch
        >>> weights = {"proj": torch.randn(6, 8)}
        >>> name = "base_model.model.proj.lora_{}.default.{}.weight"
        >>> theirs = {name.format("A", k): torch.randn(2, 4) for k in range(2)}
        >>> theirs |= {name.format("B", k): torch.randn(3, 2) for k in range(2)}
        >>> ours = from_paper_layout(theirs, weights)
        >>> [key.removeprefix("base_model.model.") for key in ours]
        ['proj.smoa_A', 'proj.smoa_B', 'proj.smoa_blocks']
    """
    layers: defaultdict[str, dict[tuple[str, int], Tensor]] = defaultdict(dict)
    adapters = set()
    for key, tensor in state.items():
        match = _PAPER_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key} is not of the form <path>.lora_A.<adapter>.<block>.weight")
        path, side, adapter, block = match.groups()
        layers[path.removeprefix(PREFIX)][side, int(block)] = tensor
        adapters.add(adapter)
    if len(adapters) > 1:
        raise ValueError(f"the tensors must be those of one adapter, got {', '.join(sorted(adapters))}")
    result: dict[str, Tensor] = {}
    for path, factors in layers.items():
        num_blocks = 1 + max(block for _, block in factors)
        # A file may give a block any number: only as many are looked for as there are factors.
        first = range(min(num_blocks, len(factors)))
        missing = [f"lora_{s} of block {k}" for s in "AB" for k in first if (s, k) not in factors]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        weight = _weight(weights, path)
        partition = BlockPartition.from_weight(weight, num_blocks)
        try:
            A_blocks, B_blocks = ([factors[side, k] for k in range(num_blocks)] for side in "AB")
            A, B, ranks = pack_factors(A_blocks, B_blocks, partition)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tensors = {"A": A, "B": B, "blocks": pack_blocks(partition, ranks, sketch_weight(weight))}
        result |= {f"{PREFIX}{path}.smoa_{name}": tensor.cpu() for name, tensor in tensors.items()}
    return result


def to_paper_layout(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Convert an SMoA adapter's tensors into the paper's; the inverse of :func:`from_paper_layout`.

    Args:
        state: tensors of an SMoA adapter, as `adapter_model.safetensors` holds them.
        weights: W0 (N, C) of each adapted layer, by the layer's path in the base model.
        adapter_name: the name to write into the paper's keys.

    Raises:
        ValueError: a layer lacks its base weight or a tensor, or its blocks are not those of the base weight's
            spectrum (the paper's code would compute other blocks than the adapter was trained with).

    Example:
        >>> import torch
        >>> weights = {"proj": torch.randn(6, 8)}
        >>> shapes = {"A": (2, 8), "B": (6, 2)}
        >>> theirs = {f"proj.lora_{side}.default.0.weight": torch.randn(*shapes[side]) for side in "AB"}
        >>> sorted(to_paper_layout(from_paper_layout(theirs, weights), weights))
        ['base_model.model.proj.lora_A.default.0.weight', 'base_model.model.proj.lora_B.default.0.weight']
    """
    result = {}
    for stem in (key.removesuffix(".smoa_A") for key in state if key.endswith(".smoa_A")):
        path = stem.removeprefix(PREFIX)
        given = {key: state.get(f"{stem}.{key}") for key in STATE_KEYS}
        found = read_blocks(path, given)
        if not isinstance(found, LayerBlocks):
            raise ValueError(f"{path}: the paper's code has no adapters of experts")
        stored, ranks, _ = found
        partition = BlockPartition.from_weight(_weight(weights, path).cpu(), stored.num_blocks)
        if partition != stored:
            raise ValueError(
                f"{path}: the adapter's blocks are not those that the base weight's spectrum gives"
            )
        factors = unpack_factors(state[f"{stem}.smoa_A"], state[f"{stem}.smoa_B"], partition, ranks)
        for side, blocks in zip("AB", factors, strict=True):
            for k, factor in enumerate(blocks):
                result[f"{PREFIX}{path}.lora_{side}.{adapter_name}.{k}.weight"] = factor.contiguous()
    return result


def _weight(weights: Mapping[str, Tensor], path: str) -> Tensor:
    if path not in weights:
        raise ValueError(f"weights must hold W0 of {path}")
    return weights[path]
