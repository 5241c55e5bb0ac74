"""Patches of PEFT, transformers and bitsandbytes, which lack hooks. Each says which upstream change would end it."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils.peft_types import PeftType
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from ..adapter_folder.format import CONFIG_NAME, METHOD
from ..adapter_folder.reading import read_json
from ..adapter_folder.writing import replacing, seal
from .config import SMoAConfig
from .folder.loading import Snapshot, check_adapter


def add_method(enum: Any) -> None:
    """Add "SMOA" to `PeftType`. Ends when PEFT's `register_peft_method` takes names that it does not list."""
    if METHOD not in enum.__members__:
        member = str.__new__(enum, METHOD)
        member._name_ = member._value_ = METHOD
        member._sort_order_ = len(enum.__members__)
        setattr(enum, METHOD, member)  # before the maps: the metaclass refuses to rebind a known member
        enum._member_names_.append(METHOD)
        enum._member_map_[METHOD] = enum._value2member_map_[METHOD] = member


def named_read(read: Any) -> Any:
    """Wrap PEFT's reader of configurations, which reads the file before it knows the method.

    Ends when its errors name the file that is no JSON object.
    """

    @classmethod  # type: ignore[misc]  # of PEFT's class
    @functools.wraps(read.__func__)
    def from_json_file(cls: Any, path_json_file: Any, **kwargs: Any) -> Any:
        if isinstance(path_json_file, (str, os.PathLike)):  # a descriptor can be read once only
            read_json(path_json_file)  # its error names the file and the fault
        return read.__func__(cls, path_json_file, **kwargs)

    return from_json_file


def checked_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap transformers' `load_adapter`; adapters of other methods load as before.

    Ends when it reads the configuration by its class's `from_pretrained`, and the weights by PEFT's
    `set_peft_model_state_dict`, whose hooks the tuner has.
    """

    @functools.wraps(load)
    def load_adapter(self: Any, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if peft_model_id is not None:
            folder = Path(peft_model_id, (kwargs.get("adapter_kwargs") or {}).get("subfolder") or "")
            config = folder / CONFIG_NAME
            if config.is_file() and read_json(config).get("peft_type") == METHOD:
                SMoAConfig.from_pretrained(str(folder))  # checks all that needs no model
        known, had_adapters, before = set(_adapters(self)), self._hf_peft_config_loaded, Snapshot(self)
        try:
            loaded = load(self, peft_model_id, *args, **kwargs)
            for name in set(_adapters(self)) - known:
                state = {key: value for key, value in self.state_dict().items() if f".{name}." in key}
                for key in loaded.missing_keys:
                    state.pop(key, None)
                state |= dict.fromkeys(loaded.unexpected_keys)
                # transformers loads what the model has, and a new adapter has no groups yet.
                if lost := [key for key in loaded.unexpected_keys if key.endswith(".col_group")]:
                    raise ValueError(f"load_adapter loses {lost[0]}: load by PeftModel.from_pretrained")
                check_adapter(self, name, state, strict_base=self.peft_config[name].strict_base)
        except BaseException:  # Ctrl-C too
            for name in set(_adapters(self)) - known:
                before.restore(name)
                self._hf_peft_config_loaded = had_adapters
            raise
        return loaded

    return load_adapter


def _adapters(model: Any) -> list[str]:
    configs = getattr(model, "peft_config", {})
    return [name for name in configs if configs[name].peft_type == METHOD]


def atomic_save(save: Callable[..., None]) -> Callable[..., None]:
    """Wrap a `save_pretrained` of PEFT or transformers; models without SMoA adapters are left alone.

    Ends when both write elsewhere and rename, and let a method write the weights' digest and refuse pickles.
    """
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        writes = given.get("is_main_process", True) and not os.path.isfile(save_directory)
        ours = bool(_adapters(self))
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


def keep_packing(base: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for the CPU in the first evaluation.

    `dequantize_4bit` misreads repacked weights, and their scales are rounded to bfloat16. Ends when it reads them.
    """
    if not getattr(base, "support_avx512bf16_for_cpu", False):
        return
    base.support_avx512bf16_for_cpu = False
    weight = base.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        functional = importlib.import_module("bitsandbytes.functional")
        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(
            weight.data, weight.quant_state
        )


add_method(PeftType)
PeftConfig.from_json_file = named_read(PeftConfig.from_json_file)
PeftAdapterMixin.load_adapter = checked_load(PeftAdapterMixin.load_adapter)
PeftModel.save_pretrained = atomic_save(PeftModel.save_pretrained)
PreTrainedModel.save_pretrained = atomic_save(PreTrainedModel.save_pretrained)
