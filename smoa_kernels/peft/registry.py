"""Making PEFT know a method that is not its own.

PEFT looks methods up by members of its `PeftType` enum and has no plug-in point to add one.
"""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType

__all__ = ["PEFT_TYPE", "register"]


def _enum_member(enum: Any, name: str) -> Any:
    """Member `name` (its own value) of a string enum, added where the enum lacks it."""
    if name not in enum.__members__:
        member = str.__new__(enum, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(enum.__members__)
        setattr(enum, name, member)  # before the maps: the metaclass refuses to rebind a known member
        enum._member_names_.append(name)
        enum._member_map_[name] = member
        enum._value2member_map_[name] = member
    return enum.__members__[name]


PEFT_TYPE = _enum_member(PeftType, "SMOA")


def register() -> None:
    """Enter config, tuner and prefix into PEFT's tables; again does nothing."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    from .config import SMoAConfig
    from .model import SMoAModel
    from .saving import install_atomic_save
    from .transformers_loading import install_checked_load

    install_atomic_save()
    install_checked_load()
    if PEFT_TYPE not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="smoa", config_cls=SMoAConfig, model_cls=SMoAModel)
