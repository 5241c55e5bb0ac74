"""SMoA as a PEFT method (extra `[peft]`): importing this package registers it with PEFT.

    >>> from peft import get_peft_model
    >>> from torch import nn
    >>> from smoa_kernels.peft import SMoAConfig
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> model = get_peft_model(model, SMoAConfig(r=4, num_blocks=2, target_modules=["0", "2"]))

Afterwards `save_pretrained`, `PeftModel.from_pretrained`, `merge_and_unload` and the rest of PEFT work as they do
for its own methods; a process that loads an SMoA adapter imports this package first.
"""

try:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method
except ImportError as error:
    raise ImportError(
        "smoa_kernels.peft needs PEFT and transformers: pip install 'smoa-kernels[peft]'"
    ) from error

from ..adapter_folder.format import METHOD
from ..adapter_folder.merging import MergeReport, merge_to_folder, merged_weights
from .config import SMoAConfig
from .experts.experts import Experts, ExpertsWeight
from .folder.hotswap import hotswap
from .folder.sending import SMoATrainerMixin
from .hira.accelerate import HiraReport, accelerate_hira, decelerate_hira
from .hira.convert import convert_adapter
from .injection import SMoAModel
from .layer import SMoALayer
from .linear import Linear
from .modulated import Attention, Convolution, Embedding

__all__ = [
    "Attention",
    "Convolution",
    "Embedding",
    "Experts",
    "ExpertsWeight",
    "HiraReport",
    "Linear",
    "MergeReport",
    "SMoAConfig",
    "SMoALayer",
    "SMoAModel",
    "SMoATrainerMixin",
    "accelerate_hira",
    "convert_adapter",
    "decelerate_hira",
    "hotswap",
    "merge_to_folder",
    "merged_weights",
]

if METHOD not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="smoa", config_cls=SMoAConfig, model_cls=SMoAModel, prefix=SMoAModel.prefix)
