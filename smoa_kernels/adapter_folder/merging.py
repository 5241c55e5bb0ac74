"""Merges an adapter's folder into a base model's: of each file of weights, load, change what matches, write.

No model is built; one file of weights and one layer are in memory. The merged model has the base's files. If it needs
others, as a head that is no longer tied does, PEFT's `merge_and_unload` makes it.

    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from smoa_kernels.peft import SMoAConfig, merge_to_folder, merged_weights
    >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 8}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    >>> model.save_pretrained("base")
    >>> get_peft_model(model, SMoAConfig(target_modules=["q_proj"])).save_pretrained("adapter")
    >>> merge_to_folder("base", "adapter", "merged", dtype=torch.bfloat16).changed
    1
    >>> weights = dict(merged_weights("base", "adapter"))
    >>> weights["model.layers.0.self_attn.q_proj.weight"].dtype
    torch.float32
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..backends import eager
from ..checks import check_path, naming
from ..definition.precision import DTYPES, dtype_names
from ..definition.sketch import TOLERANCE
from .base_model import INDEX, BaseModel
from .format import HIRA, METHOD, StoredAdapter
from .reading import read_adapter, read_json
from .writing import replacing

# Weights in other formats; a copy would hold the base's values.
_OTHER_FORMATS = ("bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "onnx", "onnx_data", "ot")
# Written anew, or valid for the base only.
_LEFT_OUT = ("config.json", "README.md", "adapter_config.json")
# A run saves its tokenizer beside the adapter, perhaps with a chat template of its own.
_TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "additional_chat_templates/*", "*processor_config.json"),
)
_INSTEAD = "merge with PEFT's merge_and_unload(), then save_pretrained()"


def merged_weights(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor of a base model with an adapter merged into it, under its stored name, one after another.

    One layer is in memory at a time. The tensors of an SMoA adapter are bit for bit those of
    `PeftModel.from_pretrained(...).merge_and_unload()` over the base in `dtype`. Into bfloat16 and float16 W_eff is
    rounded by thresholds, as a layer's forward does, so that small updates survive (docs/numerics.md).

    Args:
        base: folder of a base model in safetensors files, not quantised.
        adapter: folder of an SMoA adapter, or of a HiRA adapter of PEFT.
        dtype: of all floating-point tensors; each keeps its own where None. W0 is converted to it first.

    Raises:
        TypeError: a folder is not a path.
        ValueError, FileNotFoundError: a file is missing or cannot be read, an argument is not allowed, the base is
            quantised, lacks a tensor that the adapter changes, or ties it to another. Later, at a tensor: the adapter
            was trained over another one, or the result is not finite. The message names the tensor.
    """
    merge = _Merge(base, adapter, dtype)
    return merge.tensors(name for names in merge.files.values() for name in names)


@dataclass(frozen=True)
class MergeReport:
    """The written model: `tensors`, of which the adapter changed `changed`, in `files` of `size` bytes together."""

    tensors: int
    changed: int
    size: int
    files: tuple[str, ...]


def merge_to_folder(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Write a base model with an adapter merged into it: weights, configuration and tokenizer, as a plain model.

    It has the base's files of weights; one is in memory at a time. All is written into a hidden folder beside `out`,
    then renamed: after any interruption `out` is whole or absent. A tokenizer beside the adapter replaces the base's.

    Args:
        base, adapter, dtype: see :func:`merged_weights`.
        out: a folder that does not exist or is empty.
        progress: called with the number of finished tensors, and of all.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `merged_weights` does; `out` is taken.
        OSError: the files could not be written; the message names `out`.
    """
    target = _new_folder(out)
    merge = _Merge(base, adapter, dtype)
    total, done, size = len(merge.model.files), 0, 0
    with replacing(target, whole=True) as scratch:
        for path, names in merge.files.items():
            shard: dict[str, Tensor] = {}  # the last one is freed before this one is made
            progress(done, total)
            if dtype is None and not merge.changes.keys() & set(names):
                shutil.copyfile(path, scratch / path.name)
                done += len(names)
                continue
            for name, tensor in merge.tensors(names):
                shard[name], done, size = tensor, done + 1, size + tensor.nbytes
                progress(done, total)
            save_file(shard, scratch / path.name, metadata={"format": "pt"})
            # safetensors' files are their owner's alone
            os.chmod(scratch / path.name, 0o666 & scratch.stat().st_mode)
        progress(done, total)
        files = sorted(scratch.iterdir())
        report = MergeReport(
            total,
            len(merge.changes),
            sum(file.stat().st_size for file in files),
            tuple(file.name for file in files),
        )
        _write_beside_weights(merge, size, scratch)
    return report


class Change(NamedTuple):
    """How an adapter changes a parameter of the model."""

    name: str
    # In which W0 may be stored; the adapter's own, (N, C) or (E, N, C), comes first.
    shapes: Sequence[tuple[int, ...]]
    # W_eff from W0, both as they are stored, which may be transposed; ValueError if it is not the W0 of the training.
    effective: Callable[[Tensor], Tensor]
    is_layer: bool = True  # else the tensor is saved in full

    def fitting(self, stored: Tensor) -> Tensor:
        """The base's tensor, if it has a shape of the adapter's."""
        shape = tuple(stored.shape)
        if self.is_layer and len(self.shapes[0]) == 2 and stored.ndim > 2:  # a convolution's
            shape = tuple(stored.flatten(1).shape)
        if shape not in self.shapes:
            raise ValueError(
                f"it has shape {tuple(stored.shape)} in the base, and {' or '.join(map(str, self.shapes))} in the "
                "adapter. If tokens were added, resize the base's embeddings as before training and save it first"
            )
        return stored


class _Merge:
    """A merge, checked and ready: the base's files, and the change of each stored tensor that the adapter changes."""

    def __init__(
        self, base: str | os.PathLike[str], adapter: str | os.PathLike[str], dtype: torch.dtype | None
    ) -> None:
        check_path("base", base)
        check_path("adapter", adapter)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {dtype_names(DTYPES)}, got {dtype}")
        self.base, self.adapter, self.dtype = Path(base), Path(adapter), dtype
        self.model = BaseModel(self.base)
        self.files = self.model.by_file()
        self.config = _read_plain_config(self.base)
        changes = [*_read_changes(self.adapter, self.model, dtype)]
        self._check_ties([change.name for change in changes])
        self.changes = {stored: change for change in changes for stored in self._stored(change)}
        # Of the changed parameters that are made of several tensors, the new tensors that were not asked for yet.
        self._made: dict[str, Tensor] = {}

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Make these tensors of the merged model, in memory of their own."""
        for name in names:
            stored, change = self.model.read(name), self.changes.get(name)
            value = stored if change is None else self._changed(name, change, stored)
            dtype = self.dtype or stored.dtype if stored.dtype in DTYPES else stored.dtype
            tensor = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
            if change is not None and not _is_finite(tensor):
                raise ValueError(f"{name}: the merged tensor holds NaN or Inf in {dtype_names([dtype])}")
            yield name, tensor

    def _changed(self, name: str, change: Change, stored: Tensor) -> Tensor:
        if name not in self._made:
            with naming(change.name):
                if self.model.stored_name(change.name) == name:
                    return change.effective(stored)
                architecture = self.model.architecture
                W0 = change.fitting(architecture.assemble(change.name, self.model.read))
                self._made |= architecture.take_apart(change.name, change.effective(W0))
                if name not in self._made:
                    raise ValueError(f"transformers cannot split it into the stored tensors: {_INSTEAD}")
        return self._made.pop(name)

    def _stored(self, change: Change) -> list[str]:
        """The stored tensors that hold a parameter: one, or those that transformers makes it of."""
        if (stored := self.model.stored_name(change.name)) is not None:
            with naming(change.name):
                change.fitting(self.model.read(stored))
            return [stored]
        if parts := self.model.architecture.parts.get(change.name):
            return parts
        raise ValueError(
            f"{self.base} stores no {change.name}, which the adapter changes. A new head: save the base with it "
            f"first. A parameter that is a part of another: {_INSTEAD}"
        )

    def _check_ties(self, changed: Sequence[str]) -> None:
        """Raise if the adapter changes a parameter that the base ties to another."""
        if all(any(part.isdigit() for part in name.split(".")) for name in changed):
            return  # to those of numbered layers nothing is tied; importing transformers takes seconds
        stored = {self.model.stored_name(name) or name for name in changed}
        for pair in self.model.architecture.tied.items():
            if stored & {self.model.stored_name(name) or name for name in pair}:
                raise ValueError(
                    f"the adapter changes {' or '.join(pair)}, which {self.base} ties to each other: {_INSTEAD}"
                )


def _read_plain_config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no config.json in {base}")
    config = read_json(path)
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"{base} is quantised ({method}): merge into the model that it was quantised from, or save "
            "the result of model.dequantize() and merge into that"
        )
    return config


def _read_changes(folder: Path, base: BaseModel, dtype: torch.dtype | None) -> Iterator[Change]:
    """Read how an SMoA or HiRA adapter changes parameters, by the base model's names."""
    adapter = read_adapter(folder, (METHOD, HIRA))
    for key, tensor in adapter.whole.items():
        name = key.replace(".base_layer.", ".")
        yield Change(name, [tuple(tensor.shape)], partial(lambda own, _: own, tensor), False)
    for name, stored in adapter.layers.items():
        # For experts the file names the parameter itself.
        parameter = name if stored.of_experts else base.weight_name(name)
        shape = stored.shape
        # HiRA has no sketch. fan_in_fan_out is not used: PEFT corrects it for each layer by the layer's class.
        swapped = base.stores_swapped(name, stored.shape) if adapter.is_hira else None
        effective = partial(_effective, stored, dtype, swapped)
        yield Change(parameter, [shape, (*shape[:-2], shape[-1], shape[-2])], effective)


def _effective(
    adapter: StoredAdapter, dtype: torch.dtype | None, swapped: bool | None, stored: Tensor
) -> Tensor:
    """W_eff of a matrix or of a stack of them, in its stored orientation; `swapped` is None if the sketch shows it."""
    if stored.dtype not in DTYPES:
        raise ValueError(f"W0 must be {dtype_names(DTYPES)} to be merged, got {stored.dtype}")
    if adapter.of_experts:
        experts = zip(adapter.matrices(), stored, strict=True)
        return torch.stack([_effective(one, dtype, None, weight) for one, weight in experts])
    if stored.ndim > 2:
        return _effective(adapter, dtype, swapped, stored.flatten(1)).view_as(stored)
    if swapped is None:
        weight, distance = adapter.orient(stored)
        if not distance <= TOLERANCE:
            raise ValueError(
                f"the adapter was trained over another base weight (it differs by about {distance:.0%}, the same base "
                f"in another precision by at most {TOLERANCE:.0%})"
            )
    else:
        weight = stored.T if swapped else stored
    W_eff = eager.modulated_weight(adapter.packed(weight.to(dtype or weight.dtype)))
    return W_eff if weight is stored else W_eff.T


def _is_finite(tensor: Tensor) -> bool:
    # A NaN is among the extremes; `isfinite` of the whole tensor would take a copy's memory.
    return not tensor.numel() or all(math.isfinite(value) for value in tensor.aminmax())


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


def _write_beside_weights(merge: _Merge, size: int, scratch: Path) -> None:
    """Write everything in a model's folder except its weights, which take `size` bytes; the configuration last."""
    for path in merge.base.rglob("*"):
        inside = path.relative_to(merge.base)
        hidden = any(part.startswith((".", "checkpoint-")) for part in inside.parts)
        weights = path.suffix[1:] in ("safetensors", *_OTHER_FORMATS) or path.name.endswith(".index.json")
        if not (hidden or weights or inside.as_posix() in _LEFT_OUT):
            _copy(path, scratch / inside)
    if (merge.adapter / "tokenizer_config.json").is_file():
        for path in (path for pattern in _TOKENIZER for path in merge.adapter.glob(pattern)):
            _copy(path, scratch / path.relative_to(merge.adapter))
    config, index = merge.config, merge.model.index
    if merge.dtype is not None:
        index = index and {**index, "metadata": {**index.get("metadata", {}), "total_size": size}}
        name = str(merge.dtype).removeprefix("torch.")
        config = {**({} if "torch_dtype" in config else {"dtype": name}), **_with_dtype(config, name)}
    if index:
        _write_json(scratch / INDEX, index)
    _write_json(scratch / "config.json", config)


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Replace the dtype in a configuration, and in those nested in it, where it is given."""
    nested = {
        key: _with_dtype(value, name) if isinstance(value, dict) else value for key, value in config.items()
    }
    return {**nested, **{key: name for key in ("dtype", "torch_dtype") if key in config}}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
