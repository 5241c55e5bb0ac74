"""Reads quantised weights of a GGUF file, and writes their scales in place; needs the package `gguf`.

Types Q4_0 and Q8_0 hold a row as blocks of 32 numbers: the scale d in float16, then the integers. llama.cpp's converter
gives tensors names of its own, which `gguf` knows. In Llama's attention it pairs the rows of each head's halves; the
sketch of the weight that was trained on shows whether a layer's rows are in this order.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .quantized import QuantizedLayer, QuantizedWeight, column_groups

try:
    import gguf
except ImportError as error:
    raise ImportError("GGUF files are read with gguf: pip install gguf") from error

_BLOCK = 32


class GgufFile:
    """A GGUF file, mapped into memory.

    Args:
        path: of the file.
        writable: whether `store` of a weight writes to it.

    Raises:
        ValueError: it is damaged, no GGUF file, one part of several, or of an architecture that `gguf` does not know.

    Attributes:
        tensors: how many it holds.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self._path = path
        try:
            reader: Any = gguf.GGUFReader(path, "r+" if writable else "r")
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            values = {
                key: field.contents()
                for key, field in reader.fields.items()
                if not key.startswith("tokenizer")
            }
            kind = values["general.architecture"]
            architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[kind]
            self._names: Any = gguf.get_tensor_name_map(architecture, int(values[f"{kind}.block_count"]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is truncated or no GGUF file of a known model: {error!r}") from error
        if values.get("split.count", 0) > 1 or reader.byte_order != "I":
            raise ValueError(
                f"{path} is one of several parts, which llama-gguf-split --merge joins, or big-endian"
            )
        self.tensors = len(self._tensors)
        heads = (values.get(f"{kind}.attention.{key}", []) for key in ("head_count", "head_count_kv"))
        self._heads = {count for entry in heads for count in (entry if isinstance(entry, list) else [entry])}

    def layer(self, name: str) -> QuantizedLayer:
        """The layer of this name in the model.

        Raises:
            ValueError: the file has no such layer, or holds it in another type.
        """
        stored = self._names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        tensor = self._tensors.get(stored)
        if tensor is None:
            raise ValueError(f"{self._path} has no tensor of it: {stored or 'gguf has no name for it'}")
        kind = tensor.tensor_type.name
        if kind not in ("Q4_0", "Q8_0"):
            why = "the scales of its groups have six bits" if "_K" in kind else "only Q4_0 and Q8_0 are read"
            raise ValueError(f"{stored} in {self._path} is {kind}, whose scales cannot be multiplied: {why}")
        return QuantizedLayer({}, partial(self._read, tensor.data, kind))

    def _read(self, data: Any, kind: str) -> QuantizedWeight:
        rows = data.shape[0]
        # (N, G, 2 + 16 or 32) bytes
        blocks = data.reshape(rows, -1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
        cols = blocks.shape[1] * _BLOCK
        scales = torch.from_numpy(blocks[..., :2].copy().view(np.float16)[..., 0])

        def codes() -> Tensor:
            numbers = blocks[..., 2:].copy()
            if kind == "Q8_0":
                return torch.from_numpy(numbers.view(np.int8)).float().view(rows, cols)
            halves = np.concatenate([numbers & 15, numbers >> 4], axis=-1)
            return torch.from_numpy(halves).float().sub_(8).view(rows, cols)

        def store(new: Tensor) -> dict[str, Tensor | None]:
            blocks[..., :2] = new.contiguous().numpy()[..., None].view(np.uint8)
            return {}

        groups, pairs = column_groups(cols, blocks.shape[1]), (2 * count for count in self._heads if count)
        order = torch.arange(rows)
        paired = [order.view(size // 2, -1, 2).mT.flatten() for size in pairs if rows % size == 0]
        return QuantizedWeight(codes, scales, groups, store, (order, *paired))
