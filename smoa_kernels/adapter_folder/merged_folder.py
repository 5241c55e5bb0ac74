"""Writes a merged model's folder, a shard at a time; the folder appears only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from ..checks import check_path, shown
from .merging import FolderMerge
from .writing import replacing

# Weights in other formats; a copy would hold the base's values.
_OTHER_FORMATS = ("bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "onnx", "onnx_data", "ot")
# Written anew, or valid for the base only.
_LEFT_OUT = ("config.json", "README.md", "adapter_config.json")
# A run saves its tokenizer beside the adapter, perhaps with a chat template of its own.
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
_TEMPLATES = ("chat_template*", "additional_chat_templates/*", "*processor_config.json")


@dataclass(frozen=True)
class MergeReport:
    """A summary of the written model.

    Attributes:
        tensors: how many.
        changed: how many of them the adapter changed.
        untied: names of tensors that the base ties to another one, and that are stored of their own now.
        size: bytes of all weights.
        files: names of the files of weights.
    """

    tensors: int
    changed: int
    untied: tuple[str, ...]
    size: int
    files: tuple[str, ...]


def merge_to_folder(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Write a base model with an adapter merged into it: weights, configuration and tokenizer, as a plain model.

    One file of weights and one layer are in memory at a time. Everything is written into a hidden folder beside `out`,
    its configuration last, and renamed. So after any interruption `out` is whole or absent. A tokenizer beside the
    adapter replaces the base's.

    Args:
        base, adapter, dtype: see :func:`merged_weights`.
        out: a folder that does not exist or is empty.
        max_shard_size: bytes of a file of weights, or text such as "5GB"; a larger tensor gets a file of its own.
        progress: called with the number of finished tensors, and of all.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `merged_weights` does; `out` is taken, or `max_shard_size` is no
            size.
        OSError: the files could not be written; the message names `out`.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from smoa_kernels.peft import SMoAConfig
        >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
        >>> model.save_pretrained("base")
        >>> get_peft_model(model, SMoAConfig(target_modules=["q_proj"])).save_pretrained("adapter")
        >>> merge_to_folder("base", "adapter", "merged").changed
        1
        >>> merged = LlamaForCausalLM.from_pretrained("merged")
    """
    target = _new_folder(out)
    merge = FolderMerge(base, adapter, dtype=dtype)
    split = _split(merge, max_shard_size)
    with replacing(target, whole=True) as scratch:
        _write_weights(merge, split, scratch, progress)
        _write_beside_weights(merge, split, scratch)
    changed = sum(planned.change is not None for planned in merge.plan.values())
    size, files = split.metadata["total_size"], tuple(split.filename_to_tensors)
    return MergeReport(len(merge.plan), changed, tuple(merge.untied), size, files)


def _new_folder(out: str | os.PathLike[str]) -> Path:
    check_path("out", out)
    target = Path(out).resolve()  # a link is followed, and "." has a name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"out must be a new or an empty folder, got {target}")
    # No folder can be renamed to these; checked before the merge.
    if target.is_mount() or target == Path.cwd():
        raise ValueError(
            f"out must not be a mount point or the working folder, name a folder in it: got {target}"
        )
    return target


def _split(merge: FolderMerge, max_shard_size: int | str) -> StateDictSplit:
    """Share the tensors of the merged model out among files."""
    shapes = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in merge.plan.items()}
    try:
        return split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    except ValueError as error:  # its message does not name the argument
        raise ValueError(
            f"max_shard_size must be a size such as '5GB', got {shown(max_shard_size)}"
        ) from error


def _write_weights(
    merge: FolderMerge, split: StateDictSplit, scratch: Path, progress: Callable[[int, int], None]
) -> None:
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            progress(done, len(merge.plan))
            shard[name] = merge.tensor(name)
            done += 1
        save_file(shard, scratch / file, metadata={"format": "pt"})
        # safetensors' files are their owner's alone
        os.chmod(scratch / file, 0o666 & scratch.stat().st_mode)
        del shard  # free it before the next one is made
    progress(done, len(merge.plan))


def _write_beside_weights(merge: FolderMerge, split: StateDictSplit, scratch: Path) -> None:
    """Write everything in a model's folder except its weights; the configuration last."""
    if split.is_sharded:
        parameters = sum(planned.shape.numel() for planned in merge.plan.values())
        index = {
            "metadata": {"total_parameters": parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        _write_json(scratch / "model.safetensors.index.json", index)
    _copy(merge.base, scratch, _beside_weights(merge.base))
    if (merge.adapter / "tokenizer_config.json").is_file():
        found = (path for pattern in (*_TOKENIZER, *_TEMPLATES) for path in merge.adapter.glob(pattern))
        _copy(merge.adapter, scratch, found)
    _write_json(scratch / "config.json", _configuration(merge))


def _beside_weights(base: Path) -> Iterator[Path]:
    """The files of a base model except weights, configuration, model card, hidden files and checkpoints."""
    for path in base.rglob("*"):
        hidden = any(part.startswith((".", "checkpoint-")) for part in path.relative_to(base).parts)
        weights = path.suffix[1:] in ("safetensors", *_OTHER_FORMATS) or path.name.endswith(".index.json")
        if not (hidden or weights or path.relative_to(base).as_posix() in _LEFT_OUT):
            yield path


def _copy(source: Path, target: Path, files: Iterator[Path]) -> None:
    for path in files:
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _configuration(merge: FolderMerge) -> dict[str, Any]:
    """The base's configuration with the merged model's dtype, and whether its head is tied."""
    values: dict[str, Any] = {}
    if merge.dtype is not None:
        values["dtype"] = values["torch_dtype"] = str(merge.dtype).removeprefix("torch.")
    if merge.untied:
        values["tie_word_embeddings"] = False
    config = _with(merge.config, values)
    if (
        values.pop("torch_dtype", None) and "torch_dtype" in config
    ):  # the older name is not joined by the newer
        del values["dtype"]
    return {**config, **values}


def _with(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Replace values in a configuration, and in those nested in it, where they exist."""
    return {
        key: _with(value, values) if isinstance(value, dict) else values.get(key, value)
        for key, value in config.items()
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
