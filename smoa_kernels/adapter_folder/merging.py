"""Merges an adapter's folder into a base model's: of each file of weights, load, change what matches, write.

No model is built; one layer is in memory, and one file of weights where tensors get other sizes. The merged model has
the base's files. If it needs others, as a head that is no longer tied does, PEFT's `merge_and_unload` makes it. Of a
quantised base only scales change (`quantized.py`).

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
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checks import check_new, check_path, naming
from .base_model import INDEX
from .changes import Merge, check_keeps_dtype
from .quantized import Rescaled, Rescaling
from .reading import opened, read_adapter
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


def merged_weights(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor of a base model with an adapter merged into it, under its stored name, one after another.

    One layer is in memory at a time. The tensors of an SMoA adapter are bit for bit those of
    `PeftModel.from_pretrained(...).merge_and_unload()` over the base in `dtype`. Into bfloat16 and float16 W_eff is
    rounded by thresholds, as a layer's forward does, so that small updates survive (docs/numerics.md).

    Args:
        base: folder of a base model in safetensors files. If it is quantised, the adapter's groups of columns must be
            the base's, or consist of them; the scales change.
        adapter: folder of an SMoA adapter, or of a HiRA adapter of PEFT.
        dtype: of all floating-point tensors; each keeps its own where None. W0 is converted to it first.

    Raises:
        TypeError: a folder is not a path.
        ValueError, FileNotFoundError: a file is missing or cannot be read, an argument is not allowed, the base is
            quantised in a format that cannot be merged into or in other groups than the adapter's, lacks a tensor that
            the adapter changes, or ties it to another. Later, at a tensor: the adapter was trained on another one,
            or the result is not finite. The message names the tensor.
    """
    merge = Merge(base, adapter, dtype)
    return merge.tensors(name for names in merge.files.values() for name in names)


@dataclass(frozen=True)
class MergeReport:
    """The written model: `tensors`, of which the adapter changed `changed`, in `files` of `size` bytes together.

    Of the scales of a quantised model `flipped` changed their sign, and `outside` left their type's range.
    """

    tensors: int
    changed: int
    size: int
    files: tuple[str, ...]
    flipped: int = 0
    outside: int = 0


def merge_to_folder(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Write a base model with an adapter merged into it: weights, configuration and tokenizer, as a plain model.

    It has the base's files of weights. Where their tensors keep their sizes they are copied and partly overwritten;
    otherwise one is in memory at a time. All is written into a hidden folder beside `out`, then renamed: after any
    interruption `out` is whole or absent. A tokenizer beside the adapter replaces the base's.

    Args:
        base, adapter, dtype: see :func:`merged_weights`; `base` may also be a GGUF file.
        out: a folder that does not exist or is empty.
        progress: called with the number of finished tensors, and of all; in a GGUF file, of those that change.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `merged_weights` does; `out` is taken.
        OSError: the files could not be written; the message names `out`.
    """
    target = _new_folder(out)
    check_path("base", base)
    if Path(base).suffix == ".gguf":
        return _gguf_to_folder(Path(base), adapter, target, dtype, progress)
    merge = Merge(base, adapter, dtype)
    total, done = sum(map(len, merge.files.values())), 0
    with replacing(target, new=True) as scratch:
        for path, names in merge.files.items():
            shard: dict[str, Tensor] = {}  # the last one is freed before this one is made
            progress(done, total)
            if merge.keeps_sizes or path not in merge.touched:
                changed = [name for name in names if name in merge.changes]
                done += len(names) - len(changed)
                shutil.copyfile(path, scratch / path.name)
                for _ in _overwrite(scratch / path.name, merge.tensors(changed)):
                    done += 1
                    progress(done, total)
                continue
            for name, tensor in merge.tensors(names):
                shard[name], done = tensor, done + 1
                progress(done, total)
            with opened(path) as file:
                metadata = file.metadata() or {"format": "pt"}
            save_file(shard, scratch / path.name, metadata=metadata)
            # safetensors' files are their owner's alone
            os.chmod(scratch / path.name, 0o666 & scratch.stat().st_mode)
        progress(done, total)
        report = _report(scratch, total, len(merge.changes), merge.rescaled)
        _write_beside_weights(merge, scratch)
    return report


def _gguf_to_folder(
    base: Path,
    adapter: str | os.PathLike[str],
    target: Path,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None],
) -> MergeReport:
    """The same for a GGUF file: a copy of it, in which scales are overwritten."""
    from .gguf_file import GgufFile

    check_path("adapter", adapter)
    check_keeps_dtype(dtype)
    given, counts = read_adapter(Path(adapter)), []
    if given.in_full:
        raise ValueError(
            f"the adapter changes {min(given.in_full)}, and in a GGUF file only scales can change"
        )

    def changes(file: GgufFile) -> Iterator[Rescaling]:
        for name, layer in given.layers.items():
            with naming(name):
                yield Rescaling(f"{name}.weight", file.layer(name), layer)

    for change in changes(GgufFile(base)):
        change.read()
    with replacing(target, new=True) as scratch:
        shutil.copyfile(base, scratch / base.name)
        file = GgufFile(scratch / base.name, writable=True)
        for done, change in enumerate(changes(file)):
            progress(done, len(given.layers))
            weight = change.read()
            counts.append(change.new_scales(weight))
            weight.store(counts[-1].scales)
        progress(len(given.layers), len(given.layers))
        return _report(scratch, file.tensors, len(given.layers), counts, level=4)


def _report(
    scratch: Path, tensors: int, changed: int, scales: Sequence[Rescaled], *, level: int = 3
) -> MergeReport:
    """Describe the files; warn the caller, `level` frames above, of scales that may not do what they should."""
    flipped, outside = sum(new.flipped for new in scales), sum(new.outside for new in scales)
    if flipped or outside:
        warnings.warn(
            f"{flipped} of the base's scales changed their sign, and {outside} left the range of their type: compare "
            "the merged model with the adapter over its base",
            UserWarning,
            stacklevel=level,
        )
    files = sorted(scratch.iterdir())
    size, names = sum(file.stat().st_size for file in files), tuple(file.name for file in files)
    return MergeReport(tensors, changed, size, names, flipped, outside)


def _new_folder(out: str | os.PathLike[str]) -> Path:
    check_path("out", out)
    target = Path(out).resolve()  # a link is followed, and "." has a name
    check_new("out", target)
    # No folder can be renamed to these; checked before the merge.
    if target.is_mount() or target == Path.cwd():
        raise ValueError(
            f"out must not be a mount point or the working folder, name a folder in it: got {target}"
        )
    return target


def _write_beside_weights(merge: Merge, scratch: Path) -> None:
    """Write everything in a model's folder except its weights, which are there; the configuration last."""
    size = sum(_data_bytes(path) for path in scratch.iterdir())
    for path in merge.base.rglob("*"):
        inside = path.relative_to(merge.base)
        hidden = any(part.startswith((".", "checkpoint-")) for part in inside.parts)
        weights = path.suffix[1:] in ("safetensors", *_OTHER_FORMATS) or path.name.endswith(".index.json")
        if not (hidden or weights or inside.as_posix() in _LEFT_OUT):
            _copy(path, scratch / inside)
    if (merge.adapter / "tokenizer_config.json").is_file():
        for path in (path for pattern in _TOKENIZER for path in merge.adapter.glob(pattern)):
            _copy(path, scratch / path.relative_to(merge.adapter))
    config, index = merge.model.config, merge.model.index
    if index:
        kept = {name: file for name, file in index["weight_map"].items() if name not in merge.removed}
        index = {**index, "metadata": {**index.get("metadata", {}), "total_size": size}, "weight_map": kept}
    if merge.dtype is not None:
        name = str(merge.dtype).removeprefix("torch.")
        config = {**({} if "torch_dtype" in config else {"dtype": name}), **_with_dtype(config, name)}
    if index:
        _write_json(scratch / INDEX, index)
    _write_json(scratch / "config.json", config)


def _overwrite(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Write tensors over those of these names in a safetensors file, one at each step."""
    with path.open("r+b") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(start - 8))
        for name, tensor in tensors:
            first, end = header[name]["data_offsets"]
            if tensor.nbytes != end - first:
                raise ValueError(
                    f"{name} has {end - first} bytes in {path.name}, its merged tensor {tensor.nbytes}"
                )
            stream.seek(start + first)
            stream.write(tensor.flatten().view(torch.uint8).numpy().data)
            yield


def _data_bytes(path: Path) -> int:
    """The bytes of the tensors in a safetensors file: all behind the header, which begins with its length."""
    with path.open("rb") as stream:
        return path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Replace the dtype in a configuration, and in those nested in it, where it is given."""
    nested = {k: _with_dtype(v, name) if isinstance(v, dict) else v for k, v in config.items()}
    return {**nested, **{key: name for key in ("dtype", "torch_dtype") if key in config}}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
