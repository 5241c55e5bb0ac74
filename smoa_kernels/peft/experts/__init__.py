"""Adapters of the fused weights of experts (docs/experts.md)."""
