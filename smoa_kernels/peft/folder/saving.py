"""Makes PEFT and transformers save SMoA adapters atomically, and as safetensors only."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...adapter_folder.writing import replacing, seal
from ..config import PEFT_TYPE


def atomic_save(save: Callable[..., None]) -> Callable[..., None]:
    """Wrap a `save_pretrained` of PEFT or transformers; models without SMoA adapters are left alone."""
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
            if card.is_file():  # PEFT updates the old card
                shutil.copy(card, scratch)
            save(self, str(scratch), *args, **kwargs)
            seal(scratch)

    return save_pretrained
