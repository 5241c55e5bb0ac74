"""Backend "reference": the definition itself, slow, for tests."""

from ..definition.reference import backward, forward
from .eager import modulated_weight

__all__ = ["ALGORITHMS", "backward", "forward", "modulated_weight"]

ALGORITHMS = ("merged", "split", "expanded", "fused")
"""It takes every name, and computes all of them in its own way."""
