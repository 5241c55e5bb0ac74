"""Triton kernels, one file each. `registry` names them all.

They are imported when they are launched: the package works without Triton, and so do `architectures`, `spec` and
`table`.
"""
