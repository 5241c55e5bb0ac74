"""Making PEFT know a method that is not its own."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .config import SMoAConfig
from .model import SMoAModel
from .peek import install_limited_peek
from .peft_type import PEFT_TYPE
from .saving import install_atomic_save
from .transformers_loading import install_checked_load

__all__ = ["register"]


def register() -> None:
    """Enter config, tuner and prefix into PEFT's tables; again does nothing."""
    install_atomic_save()
    install_checked_load()
    install_limited_peek()
    if PEFT_TYPE not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="smoa", config_cls=SMoAConfig, model_cls=SMoAModel)
