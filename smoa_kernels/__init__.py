"""Fast, lean and exact SMoA (Spectrum Modulation Adapter) for PyTorch and PEFT."""

from ._version import __version__

__all__ = ["__version__"]
