"""Backend "reference": the definition itself, slow, for tests."""

from ..definition.reference import backward, forward
from .eager import modulated_weight

__all__ = ["ALGORITHMS", "backward", "forward", "modulated_weight"]

ALGORITHMS = ("merged", "split", "expanded", "fused")
"""It accepts every name and computes the definition."""
