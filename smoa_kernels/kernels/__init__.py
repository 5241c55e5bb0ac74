"""Triton kernels, one file each. Imported only where they are launched: the package works without Triton."""
