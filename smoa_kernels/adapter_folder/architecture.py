"""How a base model's parameters are stored: transformers renames stored tensors while it loads them, makes some
parameters from several tensors (the fused weight of experts from one per expert), and does not store parameters that
are tied to others.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
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
from transformers.pytorch_utils import Conv1D


class Architecture:
    """The class of a model, from the configuration in its folder; everything is empty if transformers lacks it.

    Attributes:
        renamed: stored name of each renamed parameter.
        parts: names of the stored tensors of each parameter that is made from several.
        swapped: names of weights that are stored (C, N); None if transformers lacks the class.
        tied: the stored parameter of each parameter that is tied to it: in most models the head is the embedding.
    """

    def __init__(self, folder: Path, stored: Iterable[str]) -> None:
        self._model = _without_values(folder)
        self.renamed: dict[str, str] = {}
        self.parts: defaultdict[str, list[str]] = defaultdict(list)
        self.swapped: list[str] | None = None
        self.tied: dict[str, str] = {}
        # The converter that makes a parameter of each part, and the part's pattern in it.
        self._sources: dict[str, tuple[WeightConverter, str]] = {}
        if self._model is None:
            return
        conv1d = (name for name, module in self._model.named_modules() if isinstance(module, Conv1D))
        self.swapped = [f"{name}.weight" for name in conv1d]
        self.tied = dict(self._model.all_tied_weights_keys)
        transforms = get_model_conversion_mapping(self._model)
        renamings = [change for change in transforms if isinstance(change, WeightRenaming)]
        converters = [change for change in transforms if isinstance(change, WeightConverter)]
        by_pattern = {pattern: change for change in converters for pattern in change.source_patterns}
        prefix, state = self._model.base_model_prefix, self._model.state_dict()
        for part in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(part, renamings, converters, prefix, state)
            if pattern is None:
                self.renamed[name] = part
            # Of several targets each parameter is a part of a tensor.
            elif len(by_pattern[pattern].target_patterns) == 1:
                self.parts[name].append(part)
                self._sources[part] = by_pattern[pattern], pattern

    def assemble(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Make a parameter of its parts, as transformers does while it loads them."""
        parts = self.parts[name]
        converter = copy.deepcopy(self._sources[parts[0]][0])
        for part in parts:
            converter.add_tensor(name, part, self._sources[part][1], partial(read, part))
        converted = converter.convert(name, model=self._model, config=self._model.config)
        if isinstance(converted, tuple):  # transformers 5.0 also returns errors
            converted = converted[0]
        (made,) = converted.values()
        return cast(Tensor, made[0] if isinstance(made, list) else made)

    def take_apart(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Undo :meth:`assemble`, as transformers does while it saves: parts by stored name."""
        return dict(revert_weight_conversion(self._model, {name: value}))


def _without_values(folder: Path) -> Any:
    """The model on the meta device; None if transformers lacks the configuration's architecture."""
    try:
        config = AutoConfig.from_pretrained(os.fspath(folder), trust_remote_code=False)
    except (OSError, ValueError):
        return None
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        return None
    with torch.device("meta"):
        return kind(config)
