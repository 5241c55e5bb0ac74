"""What a command cannot do without."""

from __future__ import annotations

import importlib.util

__all__ = ["needs_matplotlib", "needs_triton"]


def needs_triton(purpose: str) -> None:
    """Whether there are kernels here at all.

    Raises:
        ValueError: Triton is not installed, so there are none `purpose` (as in "to tune").
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"triton is not installed: there are no kernels {purpose}")


def needs_matplotlib(option: str) -> None:
    """Whether figures can be drawn.

    Raises:
        ValueError: matplotlib, which `option` asks for, is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{option} needs matplotlib: pip install 'smoa-kernels[plot]'")
