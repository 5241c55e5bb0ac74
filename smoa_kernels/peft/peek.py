"""PEFT's look at whose adapter a file describes, held to the limits of what SMoA's configurations may be.

PEFT asks the file for the method's name before it asks the method, and makes objects of all of it for that.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from peft.config import PeftConfig

from .folders import is_smoa, read_json

__all__ = ["install_limited_peek"]


def install_limited_peek() -> None:
    """Wrap the reader, which offers no hook; configurations of other methods are left alone."""
    read = PeftConfig.from_json_file.__func__
    if hasattr(read, "_is_limited_for_smoa"):
        return

    @functools.wraps(read)
    def from_json_file(cls: type[PeftConfig], path_json_file: str | os.PathLike[str], **kwargs: Any) -> Any:
        # PEFT opens what `open` takes; a descriptor or a pipe can be read once only.
        if (
            isinstance(path_json_file, (str, os.PathLike))
            and os.path.isfile(path_json_file)
            and is_smoa(path_json_file)
        ):
            read_json(path_json_file)
        return read(cls, path_json_file, **kwargs)

    from_json_file._is_limited_for_smoa = True  # type: ignore[attr-defined]
    PeftConfig.from_json_file = classmethod(from_json_file)  # type: ignore[arg-type]
