"""The three adapters of the comparison: their PEFT configurations, their models, their parameters."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peft import HiraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from smoa_kernels.peft import SMoAConfig

# PEFT 0.21 reads it from every model; it is between PEFT and transformers to settle, no user can act on it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

Method = Literal["smoa", "lora", "hira"]
NAME: dict[Method, str] = {"smoa": "SMoA", "lora": "LoRA", "hira": "HiRA"}

# The best on 300 of TREC's validation questions (never the test split), SmolLM2-135M, 60 steps of 16, r=8, K=2:
#   SMoA 1e-2 75.7 %, 2e-2 84.0, 3e-2 84.3 (second seed 88.0), 5e-2 86.3 (second seed 88.3)
#   LoRA 2e-3 81.0, 3e-3 83.3, 5e-3 86.3, 1e-2 71.3;  HiRA 5e-3 72.3, 1e-2 82.3, 2e-2 82.0, 5e-2 58.7
# SMoA and HiRA scale weights far below 1 instead of adding to them, hence their larger steps. SMoA is not at its best:
# at 5e-2 the rounding of a GEMM decides whether a run recovers from a spike of the loss (docs/choosing.md).
LEARNING_RATE: dict[Method, float] = {"smoa": 3e-2, "lora": 5e-3, "hira": 1e-2}


@dataclass(frozen=True)
class AdapterOptions:
    """What the command line says about the adapter; ``None`` stands for the method's default."""

    method: Method
    r: int
    num_blocks: int | None
    alpha: float | None
    dropout: float
    target_modules: tuple[str, ...]

    def config(self) -> PeftConfig:
        """Return the PEFT configuration.

        Raises:
            ValueError: if an option is out of range, or does not belong to the method.
        """
        shared = {"r": self.r, "target_modules": list(self.target_modules), "task_type": "CAUSAL_LM"}
        if self.num_blocks is not None and self.method != "smoa":
            raise ValueError(
                f"--num-blocks {self.num_blocks}: only --method smoa has blocks, not {self.method}"
            )
        if self.method == "hira":
            if self.alpha is not None:
                raise ValueError(f"--alpha {self.alpha:g}: --method hira has no scaling; smoa and lora do")
            return HiraConfig(**shared, hira_dropout=self.dropout)
        alpha = self.r if self.alpha is None else self.alpha
        if self.method == "lora":
            return LoraConfig(**shared, lora_alpha=alpha, lora_dropout=self.dropout)
        return SMoAConfig(
            **shared,
            num_blocks=2 if self.num_blocks is None else self.num_blocks,
            smoa_alpha=alpha,
            smoa_dropout=self.dropout,
        )


def adapt(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Return ``base`` with a new adapter, the only part of it that is trained."""
    # Conv1D stores its weight transposed. PEFT would find that out by itself, and warn.
    config.fan_in_fan_out = any(
        isinstance(layer, Conv1D) for layer in adapted_layers(base, config.target_modules)
    )
    return get_peft_model(base, config)


def load(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """Return ``base`` with the adapter that was saved in a folder; SMoA's is known by this module's imports."""
    return PeftModel.from_pretrained(base, str(adapter))


def adapted_layers(model: nn.Module, target_modules: Sequence[str]) -> list[nn.Module]:
    """Return the linear layers whose name ends with one of ``target_modules``, as PEFT will choose them.

    Raises:
        ValueError: if one of the names matches no linear layer; the message lists those that would.
    """
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    found: dict[str, nn.Module] = {}
    for target in target_modules:
        matches = {name: layer for name, layer in linear.items() if f".{name}".endswith(f".{target}")}
        if not matches:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"no linear layer is called {target!r}; this model has {known}")
        found |= matches
    return list(found.values())


def lora_parameters(layers: Sequence[nn.Module], r: int) -> int:
    """Return how many parameters LoRA of rank ``r`` trains on ``layers``: r·(in + out) each."""
    return sum(r * sum(layer.weight.shape) for layer in layers)
