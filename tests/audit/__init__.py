"""Inspects what the compiler makes of a kernel, without a GPU."""
