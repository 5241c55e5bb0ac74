"""The three adapters that are compared: their PEFT configurations, and how many parameters LoRA would train."""

from collections.abc import Sequence
from typing import Literal

from peft import HiraConfig, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from smoa_kernels.peft import SMoAConfig

Method = Literal["smoa", "lora", "hira"]
NAME: dict[Method, str] = {"smoa": "SMoA", "lora": "LoRA", "hira": "HiRA"}

# The best on 300 of TREC's validation questions (never the test split), SmolLM2-135M, 60 steps of 16, r=8:
#   LoRA 2e-3 81.0 %, 3e-3 83.3, 5e-3 86.3, 1e-2 71.3;  HiRA 5e-3 72.3, 1e-2 82.3, 2e-2 82.0, 5e-2 58.7
# SMoA takes LoRA's rate, without a search (`use_lora_rate`).
LEARNING_RATE: dict[Method, float] = {"smoa": 5e-3, "lora": 5e-3, "hira": 1e-2}


def adapter_config(
    method: Method,
    r: int,
    target_modules: Sequence[str],
    num_blocks: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> PeftConfig:
    """Return PEFT's configuration of an adapter; `num_blocks` None means 2, `alpha` None means r.

    Raises:
        ValueError: if an option is out of range, or does not belong to the method.
    """
    if num_blocks is not None and method != "smoa":
        raise ValueError(f"--num-blocks {num_blocks}: only --method smoa has blocks, not {method}")
    if alpha is not None and method == "hira":
        raise ValueError(f"--alpha {alpha:g}: --method hira has no scaling; smoa and lora do")
    shared = {"r": r, "target_modules": list(target_modules), "task_type": "CAUSAL_LM"}
    if method == "hira":
        return HiraConfig(**shared, hira_dropout=dropout)
    if method == "lora":
        return LoraConfig(**shared, lora_alpha=alpha or r, lora_dropout=dropout)
    blocks = num_blocks or 2
    return SMoAConfig(
        **shared, num_blocks=blocks, smoa_alpha=alpha or r, smoa_dropout=dropout, use_lora_rate=True
    )


def lora_parameters(model: nn.Module, r: int) -> int:
    """Return how many parameters LoRA of rank ``r`` trains on the adapted layers: r·(in + out) each."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return sum(r * sum(layer.get_base_layer().weight.shape) for layer in layers)
