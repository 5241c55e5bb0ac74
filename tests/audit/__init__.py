"""Inspects compiled kernels, without a GPU."""
