"""Executes the PTX that Triton makes of a kernel, for sm_80 to sm_90 and sm_120, on CPU tensors: README.md."""

import os

ARCH = int(os.environ.get("PTX_EMULATOR", "sm_80").removeprefix("sm_"))
"""Which architecture this process is to emulate."""
