"""Fast, lean and exact SMoA (Spectrum Modulation Adapter, arXiv 2605.21147) for PyTorch and PEFT."""

from ._version import __version__
from .definition.partition import BlockPartition
from .functional import smoa_linear
from .layers import FusedSMoAConv1d, FusedSMoAConv2d, FusedSMoAConv3d, FusedSMoAEmbedding, FusedSMoALinear

__all__ = [
    "BlockPartition",
    "FusedSMoAConv1d",
    "FusedSMoAConv2d",
    "FusedSMoAConv3d",
    "FusedSMoAEmbedding",
    "FusedSMoALinear",
    "__version__",
    "smoa_linear",
]
