"""Executes a kernel's PTX from Triton on CPU tensors, for sm_80 to sm_90 and sm_120: README.md."""

import os

ARCH = int(os.environ.get("PTX_EMULATOR", "sm_80").removeprefix("sm_"))
"""The architecture that this process emulates."""
