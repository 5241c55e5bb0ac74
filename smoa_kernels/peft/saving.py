"""Saves that an interruption cannot leave half-done: files are written beside their place and moved into it."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

__all__ = ["install_atomic_save", "replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A path to write to, which becomes `path` when the block ends without an exception, and vanishes otherwise."""
    folder, name = os.path.split(os.fspath(path))
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder or os.curdir) as scratch:
        temporary = os.path.join(scratch, name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def install_atomic_save() -> None:
    """Have PEFT write the weights of SMoA adapters this way; it offers no hook, and other methods' are left alone."""
    import peft.peft_model as module

    if not hasattr(module.safe_save_file, "_is_atomic_for_smoa"):
        module.safe_save_file = _atomic_for_smoa(module.safe_save_file)


def _atomic_for_smoa(save_file: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save_file)
    def save(
        tensors: Mapping[str, Tensor], filename: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        if any(key.endswith(".smoa_A") for key in tensors):
            with replacing(filename) as temporary:
                save_file(tensors, temporary, *args, **kwargs)
        else:
            save_file(tensors, filename, *args, **kwargs)

    save._is_atomic_for_smoa = True  # type: ignore[attr-defined]
    return save
