"""Settings of the whole test process."""

import os

import torch

# Triton reads it when a kernel is defined, so it is set before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
