"""transformers' own `load_adapter`, held to what loading through PEFT promises.

It reads the folder without asking the configuration and fills layers without asking the tuner, so the folder is checked
before, the adapter once it is in place, and it is taken out where it does not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from .config import SMoAConfig
from .folders import is_smoa
from .loading import check_adapter
from .model import forget_adapter, remove_adapter
from .peft_type import PEFT_TYPE

__all__ = ["install_checked_load"]


def install_checked_load() -> None:
    """Wrap the method, which offers no hook; adapters of other methods are left alone."""
    from transformers.integrations.peft import PeftAdapterMixin

    if not hasattr(PeftAdapterMixin.load_adapter, "_is_checked_for_smoa"):
        PeftAdapterMixin.load_adapter = _checked(PeftAdapterMixin.load_adapter)


def _checked(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_adapter(self: Any, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        before = set(getattr(self, "peft_config", {}))
        had_adapters, trained = self._hf_peft_config_loaded, [p for p in self.parameters() if p.requires_grad]
        if peft_model_id is not None:
            _check_folder(Path(peft_model_id, (kwargs.get("adapter_kwargs") or {}).get("subfolder") or ""))
        try:
            found = load(self, peft_model_id, *args, **kwargs)
            for name in _added(self, before):
                state = {key: value for key, value in self.state_dict().items() if key.endswith(f".{name}")}
                for key in found.missing_keys:
                    state.pop(key, None)
                state |= dict.fromkeys(found.unexpected_keys)
                check_adapter(self, name, state, strict_base=self.peft_config[name].strict_base)
        except BaseException:  # Ctrl-C too
            added = _added(self, before)
            for name in added:
                remove_adapter(self, name)
                forget_adapter(self, name)
            if added:
                self._hf_peft_config_loaded = had_adapters
                for parameter in trained:
                    parameter.requires_grad_(True)
            raise
        return found

    load_adapter._is_checked_for_smoa = True  # type: ignore[attr-defined]
    return load_adapter


def _check_folder(folder: Path) -> None:
    """What can be checked without the model, where `folder` is one and its adapter is SMoA's."""
    config = folder / CONFIG_NAME
    if config.is_file() and is_smoa(config):
        SMoAConfig.from_pretrained(str(folder))


def _added(model: Any, before: set[str]) -> list[str]:
    configs = getattr(model, "peft_config", {})
    return [name for name in configs if name not in before and configs[name].peft_type == PEFT_TYPE]
