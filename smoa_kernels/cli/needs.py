"""Clear errors for packages that a command needs and that are not installed."""

from __future__ import annotations

import importlib.util

__all__ = ["needs_triton"]


def needs_triton(purpose: str) -> None:
    """Raise a ValueError if Triton is not installed: there are no kernels `purpose` (as in "to tune")."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"triton is not installed: there are no kernels {purpose}; pip install 'smoa-kernels[triton]'"
        )
