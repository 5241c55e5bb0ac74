"""Shapes of the linear layers of public models, as their authors publish them, and of a model on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder block with gated feed-forward and grouped-query attention.

    Attributes:
        hidden: `hidden_size`.
        intermediate: `intermediate_size`.
        heads: `num_attention_heads`.
        kv_heads: `num_key_value_heads`.
        head_dim: `head_dim`, if it is not hidden / heads.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """Features of all queries together, and of all keys (or all values)."""
        dim = self.head_dim or self.hidden // self.heads
        return self.heads * dim, self.kv_heads * dim

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out_features, in_features) of query, key, value, output, gate, up and down."""
        hidden, inner, (query, key) = self.hidden, self.intermediate, self.widths
        attention = (query, hidden), (key, hidden), (key, hidden), (hidden, query)
        return *attention, (inner, hidden), (inner, hidden), (hidden, inner)


MODELS = {
    "llama-3-8b": Decoder(4096, 14336, 32, 8),
    "llama-3-70b": Decoder(8192, 28672, 64, 8),
    "llama-3-405b": Decoder(16384, 53248, 128, 8),
    "llama-3.2-1b": Decoder(2048, 8192, 32, 8),
    "llama-3.2-3b": Decoder(3072, 8192, 24, 8),
    "qwen3-8b": Decoder(4096, 12288, 32, 8, 128),
    "qwen3-0.6b": Decoder(1024, 3072, 16, 8, 128),
    "mistral-7b": Decoder(4096, 14336, 32, 8),
    "gemma-2-9b": Decoder(3584, 14336, 16, 8, 256),
    "smollm2-135m": Decoder(576, 1536, 9, 3),
}


def read_config(path: Path) -> Decoder:
    """Read the sizes of a model on disk from its `config.json` or folder; of a multimodal model, from "text_config".

    Raises:
        ValueError: the file cannot be read, or lacks a size.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        if not file.is_file():  # reading a device or a pipe might never end
            raise FileNotFoundError(f"{file} is not a file")
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"--from-model must be a config.json or its folder, got {path}: {error}") from error
    data = data.get("text_config", data) if isinstance(data, dict) else {}

    def size(name: str, default: int | None = None) -> int:
        value = data.get(name)
        value = default if value is None else value
        if type(value) is not int or value < 0 or (value == 0 and default != 0):
            raise ValueError(f"{file} must give a positive {name}, got {value!r}")
        return value

    heads = size("num_attention_heads")
    key_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", 0) or None
    return Decoder(size("hidden_size"), size("intermediate_size"), heads, key_heads, head_dim)
