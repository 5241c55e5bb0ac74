"""Finds the names under which a base model's files store the parameters that an adapter's file names.

Most are stored as the model names them. transformers renames others while it loads them, makes some out of several
stored tensors, and ties some to others, which alone are stored.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .folders import ModelFolder

__all__ = ["StoredNames"]


class StoredNames:
    """The names of a model's parameters in its folder.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder

    def find(self, name: str) -> str | None:
        """The stored name of a parameter; None where no stored tensor holds exactly its values."""
        stored = self.folder.stored_name(name)
        return self._renamed.get(name) if stored is None else stored

    @cached_property
    def tied(self) -> dict[str, str]:
        """Names of parameters that are others, which are stored: in most models the head is the embedding."""
        return {} if self._model is None else dict(self._model.all_tied_weights_keys)

    @cached_property
    def _renamed(self) -> dict[str, str | None]:
        """Stored names by the model's; None for a parameter that transformers computes while it loads it."""
        model = self._model
        if model is None:
            return {}
        transforms = get_model_conversion_mapping(model)
        renamings, converters = (
            [transform for transform in transforms if isinstance(transform, kind)]
            for kind in (WeightRenaming, WeightConverter)
        )
        found: dict[str, str | None] = {}
        state = model.state_dict()
        for stored in self.folder.files:
            name, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
            found[name] = stored if converter is None else None
        return found

    @cached_property
    def _model(self) -> Any:
        """The model without values; None where transformers lacks the architecture that the configuration names."""
        try:
            config = AutoConfig.from_pretrained(os.fspath(self.folder.folder), trust_remote_code=False)
        except (OSError, ValueError):
            return None
        architecture = getattr(transformers, (config.architectures or [""])[0], None)
        if architecture is None:
            return None
        with torch.device("meta"):
            return architecture(config)
