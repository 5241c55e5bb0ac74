"""Finds how a base model's files store the parameters that an adapter's file names.

Most are stored as the model names them. transformers renames others while it loads them, makes some out of several
stored tensors (the fused weight of experts out of one for each), and ties some to others, which alone are stored.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from functools import cached_property, partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

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
        return self._sources[0].get(name) if stored is None else stored

    def get(self, name: str) -> Tensor | None:
        """Read a parameter as the model has it, made of its parts where it is; None where the folder lacks it."""
        stored = self.find(name)
        if stored is not None:
            return self.folder.get(stored)
        return self.assembled(name) if self.parts(name) else None

    def parts(self, name: str) -> list[str]:
        """Names of the stored tensors that transformers makes a parameter of; empty where it makes it of none."""
        return [stored for stored, _ in self._sources[1].get(name, ())]

    def assembled(self, name: str) -> Tensor:
        """Make a parameter of its parts, as transformers does while it loads them."""
        sources = self._sources[1][name]
        converter = copy.deepcopy(self._converters[sources[0][1]])
        for stored, pattern in sources:
            converter.add_tensor(name, stored, pattern, partial(self.folder.get, stored))
        converted = converter.convert(name, model=self._model, config=self._model.config)
        if isinstance(converted, tuple):  # transformers 5.0 gives errors too
            converted = converted[0]
        (made,) = converted.values()
        return cast(Tensor, made[0] if isinstance(made, list) else made)

    def taken_apart(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Undo :meth:`assembled`, as transformers does while it saves: parts by stored name."""
        return dict(revert_weight_conversion(self._model, {name: value}))

    @cached_property
    def tied(self) -> dict[str, str]:
        """Names of parameters that are others, which are stored: in most models the head is the embedding."""
        return {} if self._model is None else dict(self._model.all_tied_weights_keys)

    @cached_property
    def _transforms(self) -> list[Any]:
        return [] if self._model is None else get_model_conversion_mapping(self._model)

    @cached_property
    def _converters(self) -> dict[str, WeightConverter]:
        """What makes parameters of stored tensors, by the patterns that their names match."""
        return {
            pattern: transform
            for transform in self._transforms
            if isinstance(transform, WeightConverter)
            for pattern in transform.source_patterns
        }

    @cached_property
    def _sources(self) -> tuple[dict[str, str], dict[str, list[tuple[str, str]]]]:
        """By the model's names: stored names; of parameters that are made, those of their parts with their patterns."""
        renamed: dict[str, str] = {}
        made = defaultdict(list)
        if self._model is not None:
            renamings = [each for each in self._transforms if isinstance(each, WeightRenaming)]
            converters = [each for each in self._transforms if isinstance(each, WeightConverter)]
            prefix, state = self._model.base_model_prefix, self._model.state_dict()
            for stored in sorted(self.folder.files, key=dot_natural_key):
                name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
                if pattern is None:
                    renamed[name] = stored
                elif len(self._converters[pattern].target_patterns) == 1:  # not cut out of a tensor
                    made[name].append((stored, pattern))
        return renamed, made

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
