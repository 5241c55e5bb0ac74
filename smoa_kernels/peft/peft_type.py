"""Adds SMOA to `PeftType`, the enum by which PEFT finds methods; it has no hook for new ones."""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType

__all__ = ["PEFT_TYPE"]


def _enum_member(enum: Any, name: str) -> Any:
    """Return the member `name` of a string enum, with the name as its value; add it if it is missing."""
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
