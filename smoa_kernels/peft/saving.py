"""Saves that an interruption cannot leave half-done: files are written beside their place and moved into it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from .peft_type import PEFT_TYPE

__all__ = ["check_seal", "install_atomic_save", "replacing"]

_SCRATCH = ".saving-"


@contextmanager
def replacing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to write to, whose files move into `folder` when the block ends without an exception.

    Each is on the disk before the first one moves, and then they move at once, configurations last: what is in
    `folder` is the old files or the new ones; a kill between two moves leaves what :func:`check_seal` finds. Where
    an exception ends the block, `folder` stays as it was.

    Raises:
        OSError: naming `folder`, of what the block could not write.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as name:
        scratch = Path(name)
        try:
            yield scratch
            moves = [
                (file, folder / file.relative_to(scratch)) for file in scratch.rglob("*") if file.is_file()
            ]
            for file, place in moves:
                place.parent.mkdir(parents=True, exist_ok=True)
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
        # A full disk's error names no file, or the one in the scratch folder; safetensors' own is no OSError.
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", 0) is None:  # a hub's, or that of a block inside this one
                raise
            raise OSError(f"cannot save to {folder}, which is as it was: {error}") from error
        for file, place in sorted(moves, key=lambda move: move[0].name == CONFIG_NAME):
            os.replace(file, place)


def seal(folder: Path) -> None:
    """Have each configuration of an SMoA adapter under `folder` name the weights beside it, by their SHA-256.

    No file system renames two files at once, so one may be left of each save, and ranks and shapes may well agree.
    """
    for path in folder.rglob(CONFIG_NAME):
        weights, values = (
            path.with_name(SAFETENSORS_WEIGHTS_NAME),
            json.loads(path.read_text(encoding="utf-8")),
        )
        if weights.is_file() and values["peft_type"] == PEFT_TYPE:
            values["weights_sha256"] = _sha256(weights)
            path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def check_seal(folder: str, expected: str | None) -> None:
    """Warn where the weights in `folder` are not those that its configuration names; one that names none takes any.

    Raises:
        ValueError: they are those of a killed save, whose configuration is still where it was written.
    """
    weights = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if expected is None or not weights.is_file():
        return
    found = _sha256(weights)
    if found == expected:
        return
    message = f"{weights} is not the file that {CONFIG_NAME} beside it was saved with: its SHA-256 is another"
    # Adapters that are not the first have a folder of their own.
    for place in (weights.parent, weights.parent.parent):
        for path in place.glob(f"{_SCRATCH}*/**/{CONFIG_NAME}"):
            if found in path.read_text(encoding="utf-8", errors="replace"):
                raise ValueError(
                    f"{message}. A save was killed; what it wrote is whole once {path} is moved here"
                )
    warnings.warn(f"{message}. Another tool wrote it, or it is damaged", UserWarning, stacklevel=2)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def install_atomic_save() -> None:
    """Have PEFT and transformers save SMoA adapters this way; they offer no hook, and other models are left alone."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    for model_class in (PeftModel, PreTrainedModel):
        if not hasattr(model_class.save_pretrained, "_is_atomic_for_smoa"):
            model_class.save_pretrained = _atomic_for_smoa(model_class.save_pretrained)


def _atomic_for_smoa(save: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        configs = getattr(self, "peft_config", {}).values()
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        writes = given.get("is_main_process", True) and not os.path.isfile(save_directory)
        ours = any(config.peft_type == PEFT_TYPE for config in configs)
        if ours and not given.get("safe_serialization", True):
            raise ValueError("safe_serialization must be True: SMoA adapters are saved as safetensors only")
        if not writes or not ours:
            save(self, save_directory, *args, **kwargs)
            return
        if given.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replacing(save_directory) as scratch:
            card = Path(save_directory, "README.md")
            if card.is_file():  # which PEFT updates
                shutil.copy(card, scratch)
            save(self, str(scratch), *args, **kwargs)
            seal(scratch)

    save_pretrained._is_atomic_for_smoa = True  # type: ignore[attr-defined]
    return save_pretrained
