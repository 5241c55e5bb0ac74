"""SMoA's member of PEFT's `PeftType`: PEFT looks methods up by that enum and has no plug-in point to add one."""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType

__all__ = ["PEFT_TYPE"]


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
