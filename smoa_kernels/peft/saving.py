"""Saves that an interruption cannot leave half-done: files are written beside their place and moved into it."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .peft_type import PEFT_TYPE

__all__ = ["install_atomic_save", "replacing"]


@contextmanager
def replacing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to write to, whose files move into `folder` when the block ends without an exception.

    Each is on the disk before the first one moves, and then they move at once: what is in `folder` is the old files
    or the new ones. Where an exception ends the block, `folder` stays as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        scratch = Path(name)
        yield scratch
        moves = [(file, folder / file.relative_to(scratch)) for file in scratch.rglob("*") if file.is_file()]
        for file, place in moves:
            place.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        for file, place in moves:
            os.replace(file, place)


@contextmanager
def naming(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Say where a save failed: safetensors' own error says "I/O error" and is no OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot save to {folder}, which is as it was: {error}") from error


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
        with naming(save_directory), replacing(save_directory) as scratch:
            card = Path(save_directory, "README.md")
            if card.is_file():  # which PEFT updates
                shutil.copy(card, scratch)
            save(self, str(scratch), *args, **kwargs)

    save_pretrained._is_atomic_for_smoa = True  # type: ignore[attr-defined]
    return save_pretrained
