"""What is compared. Every method adapts the same layers, for as many steps, over the same learning rates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from peft.tuners.hira import HiraLayer
from peft.tuners.lora import LoraLayer
from torch import nn

from smoa_kernels import BlockPartition
from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft.layer import SMoALayer

Kind = Literal["none", "lora", "hira", "smoa"]
RANK = 8
LEARNING_RATES = (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1)


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: in records and tables.
        kind: whose adapter.
        r: rank budget; scaling is 1 for all (alpha = r; HiRA has none).
        num_blocks: K, for SMoA.
        random: SMoA with as large blocks of coordinates drawn by the run's seed, in place of the spectral ones.
    """

    name: str
    kind: Kind
    r: int = RANK
    num_blocks: int = 1
    random: bool = False

    def adapt(self, model: nn.Module, targets: tuple[str, ...], seed: int) -> nn.Module:
        """Return the model with this adapter, its factors drawn from torch's generator, its base frozen."""
        model.requires_grad_(False)
        shared: dict[str, Any] = {"r": self.r, "target_modules": list(targets)}
        if self.kind == "none":
            return model
        if self.kind == "lora":
            adapted: nn.Module = get_peft_model(model, LoraConfig(**shared, lora_alpha=self.r))
        elif self.kind == "hira":
            adapted = get_peft_model(model, HiraConfig(**shared))
        else:
            adapted = get_peft_model(model, SMoAConfig(**shared, num_blocks=self.num_blocks))
        if self.random:
            shuffle_blocks(adapted, seed)
        return adapted


# Equal r first (and LoRA at SMoA's budget for K=2), then equal parameters, then the ablation.
METHODS = (
    Method("none", "none", r=0),
    Method("LoRA", "lora"),
    Method("LoRA, r=4", "lora", r=4),
    Method("HiRA", "hira"),
    Method("SMoA K=2", "smoa", num_blocks=2),
    Method("SMoA K=4", "smoa", num_blocks=4),
    Method("SMoA K=8", "smoa", num_blocks=8),
    Method("SMoA K=2, r=16", "smoa", r=16, num_blocks=2),
    Method("SMoA K=4, r=32", "smoa", r=32, num_blocks=4),
    Method("random K=2", "smoa", num_blocks=2, random=True),
    Method("random K=4, r=32", "smoa", r=32, num_blocks=4, random=True),
)
BY_NAME = {method.name: method for method in METHODS}
# Which spectral method each random one is the ablation of.
ABLATIONS = {"random K=2": "SMoA K=2", "random K=4, r=32": "SMoA K=4, r=32"}


def shuffled(partition: BlockPartition, generator: torch.Generator) -> BlockPartition:
    """Return blocks of the same sizes over coordinates drawn at random."""
    rows, cols = partition.row_block, partition.col_block
    return BlockPartition.from_labels(
        rows[torch.randperm(len(rows), generator=generator)],
        cols[torch.randperm(len(cols), generator=generator)],
        partition.num_blocks,
    )


def shuffle_blocks(model: nn.Module, seed: int) -> None:
    """Give every SMoA layer random blocks, and factors drawn anew for them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, SMoALayer):
            packed = layer.packed("default", layer.base_weight())
            layer.fill("default", replace(packed, partition=shuffled(packed.partition, generator)))
            layer.reset_adapter("default")
            layer.smoa_A["default"].requires_grad_(True)
            layer.smoa_B["default"].requires_grad_(True)


@torch.no_grad()
def update_ranks(model: nn.Module) -> tuple[float, float]:
    """Return rank and effective rank of ΔW, each over the most that is possible, mean over the layers.

    The effective rank is Roy and Vetterli's (2007): the exponential of the entropy of the singular values' shares.
    """
    ranks, effective = [], []
    for layer in model.modules():
        if isinstance(layer, SMoALayer | HiraLayer | LoraLayer):
            adapter: Any = layer
            update = adapter.get_delta_weight("default").float()
            if isinstance(layer, HiraLayer):  # PEFT gives the factor that W0 is modulated by
                update = update * adapter.base_layer.weight
            values = torch.linalg.svdvals(update)
            noise = values[0] * max(update.shape) * torch.finfo(values.dtype).eps
            shares = values / values.sum()
            ranks.append(float((values > noise).sum()) / len(values))
            effective.append(float(torch.special.entr(shares).sum().exp()) / len(values))
    return (sum(ranks) / len(ranks), sum(effective) / len(effective)) if ranks else (0.0, 0.0)
