"""The compared methods. All adapt the same layers for the same number of steps, over the same learning rates."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from peft.tuners.hira import HiraLayer
from peft.tuners.lora import LoraLayer
from spectrum import effective_number
from torch import nn

from smoa_kernels import BlockPartition
from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft.layer import SMoALayer

from .four_bits import GROUP, INT4, NF4, free_scales

Kind = Literal["none", "lora", "hira", "smoa", "scales"]
RANK = 8
# Every method tries these; if the best is at an end, the search goes on along the ladder (`study.Slice.search`).
LEARNING_RATES = (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1)
LADDER = (1e-4, 2e-4, 5e-4, 1e-3, *LEARNING_RATES, 1.0, 2.0)
LEADING = (1, 8, 64)  # numbers of leading singular values of ΔW whose share of its energy is recorded
ALL = "all"  # the modules that the study adapts by default


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: in records and tables.
        kind: whose adapter.
        r: rank budget.
        num_blocks: K, for SMoA.
        random: SMoA with random blocks of the same sizes, drawn by the run's seed, in place of the spectral ones.
        block_order, granule: as in SMoAConfig.
        scaling: factor of the update, alpha / r; HiRA has none.
        kappa: 3 K with `use_lora_rate`, which also multiplies SMoA's update by kappa / rms(W0); 0 without.
        modules: the adapted linear layers, by a name in ``CutModel.targets``.
        as_large: whether to raise r until these modules have as many parameters as ``r`` gives all modules.
        rate_of: the method whose learning rate is taken; None to search for its own.
        times: factor of that rate.
        bits: the adapted layers are quantised so, see `four_bits.quantize`; "" for float32.
        group_size: as in SMoAConfig.
        dropout: of LoRA's input.
        weight_decay: AdamW's, on the factors.
    """

    name: str
    kind: Kind
    r: int = RANK
    num_blocks: int = 1
    random: bool = False
    block_order: str = "spectral"
    granule: int = 1
    scaling: float = 1.0
    kappa: float = 0.0
    modules: str = ALL
    as_large: bool = False
    rate_of: str | None = None
    times: float = 1.0
    bits: str = ""
    group_size: int = 1
    dropout: float = 0.0
    weight_decay: float = 0.0

    @property
    def base(self) -> str:
        """The name of the method that this one is a variation of."""
        return self.name.partition(",")[0]

    def sized(self, model: nn.Module, targets: dict[str, str]) -> Method:
        """Return the method with the rank that it has on this model."""
        if not self.as_large:
            return self
        rank = round(self.r * width(model, targets[ALL]) / width(model, targets[self.modules]))
        return replace(self, r=rank, as_large=False)

    def adapt(self, model: nn.Module, targets: dict[str, Any], seed: int) -> nn.Module:
        """Return the model with this adapter, its factors drawn from torch's generator, its base frozen.

        `targets` are PEFT's arguments that name what is adapted.
        """
        model.requires_grad_(False)
        if self.kind == "none":
            return model
        shared: dict[str, Any] = {"r": self.r, **targets}
        alpha = self.scaling * self.r
        if self.kind == "lora":
            adapted: nn.Module = get_peft_model(
                model, LoraConfig(**shared, lora_alpha=alpha, lora_dropout=self.dropout)
            )
        elif self.kind == "hira":
            adapted = get_peft_model(model, HiraConfig(**shared))
        elif self.kind == "scales":
            adapted = free_scales(model, targets["target_modules"])
        else:
            blocks: dict[str, Any] = {
                "num_blocks": self.num_blocks,
                "block_order": self.block_order,
                "granule": self.granule,
                "group_size": self.group_size,
            }
            if self.kappa:
                blocks["use_lora_rate"] = True
            adapted = get_peft_model(model, SMoAConfig(**shared, smoa_alpha=alpha, **blocks))
        if self.random:
            shuffle_blocks(adapted, seed)
        return adapted


# Equal r first (and LoRA at SMoA's budget for K=2), then equal parameters, then the ablation, then other orders.
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
    Method("SMoA K=8, r=64", "smoa", r=64, num_blocks=8),
    Method("random K=2", "smoa", num_blocks=2, random=True),
    Method("random K=4, r=32", "smoa", r=32, num_blocks=4, random=True),
    Method("contiguous K=2", "smoa", num_blocks=2, block_order="contiguous"),
    Method("contiguous K=4, r=32", "smoa", r=32, num_blocks=4, block_order="contiguous"),
    Method("granule 8 K=2", "smoa", num_blocks=2, granule=8),
)
_LORA, _SMOA, ORDERED, ORDERED_4 = METHODS[1], METHODS[4], METHODS[12], METHODS[13]
# Variations of one thing, everything else as above. Which learning rate goes with which alpha:
SCALINGS = (
    *(replace(_SMOA, name=f"SMoA K=2, alpha={s}r", scaling=s) for s in (4, 16, 64)),
    *(replace(_SMOA, name=f"SMoA K={k}, alpha=16r", num_blocks=k, scaling=16) for k in (4, 8)),
    *(replace(_LORA, name=f"LoRA, alpha={s}r", scaling=s) for s in (2, 16)),
)
# Whether another rank can keep r=8's learning rate: alpha as large as r, growing as √r (`use_rslora`), and constant.
RULES = {"alpha=r": 0.0, "alpha=√(8r)": -0.5, "alpha=8": -1.0}
RANKS = tuple(
    replace(_SMOA, name=f"SMoA K=2, r={r}, {rule}", r=r, scaling=(r / RANK) ** power, rate_of=_SMOA.name)
    for r in (4, 32) for rule, power in RULES.items()
)  # fmt: skip
# At LoRA's own best rate: each K, rank and order; with another rank alpha grows with r, as above, or stays 8.
AT_LORAS = (
    *(
        Method(f"SMoA K={k}, r={r}, LoRA's rate", "smoa", r=r, num_blocks=k, kappa=3 * k, rate_of=_LORA.name)
        for k, r in ((2, 8), (4, 8), (1, 8), (2, 16), (2, 32), (4, 32))
    ),
    replace(ORDERED, name="contiguous K=2, LoRA's rate", kappa=6, rate_of=_LORA.name),
    replace(ORDERED, name="contiguous K=4, LoRA's rate", num_blocks=4, kappa=12, rate_of=_LORA.name),
    replace(
        ORDERED_4,
        name="contiguous K=4, r=32, alpha=8, LoRA's rate",
        scaling=0.25,
        kappa=12,
        rate_of=_LORA.name,
    ),
    Method("SMoA K=2, r=32, alpha=8, LoRA's rate", "smoa", r=32, scaling=0.25, kappa=6, rate_of=_LORA.name),
    Method("LoRA, r=32, LoRA's rate", "lora", r=32, rate_of=_LORA.name),
    Method("LoRA, r=32, alpha=8, LoRA's rate", "lora", r=32, scaling=0.25, rate_of=_LORA.name),
    # At twice the alpha, and the rate that is LoRA's best there:
    Method("SMoA K=2, alpha=2r, LoRA's rate", "smoa", scaling=2, kappa=6, rate_of="LoRA, alpha=2r"),
)
# Once the rate as well: the records of the base methods are older than the note of a run's worst loss.
STEADY = (
    AT_LORAS[0],
    *(replace(base, name=f"{base.name}, 1 times the rate", rate_of=base.name) for base in (_LORA, _SMOA)),
    *(
        replace(base, name=f"{base.name}, {times} times the rate", rate_of=base.rate_of or base.name, times=times)
        for times in (2, 4) for base in (AT_LORAS[0], _LORA, _SMOA)
    ),
)  # fmt: skip
# Which modules to adapt, at equal r and at equal parameters:
MODULES = tuple(
    replace(base, name=f"{base.name}, {modules}{', as large' * large}", modules=modules, as_large=large)
    for base in (_LORA, _SMOA) for large in (False, True) for modules in ("query and value", "attention", "MLP")
)  # fmt: skip
# Over a model in four bits, and merged into it. The first method's rate is LoRA's.
FOUR_BITS = {
    bits: (
        Method(f"LoRA over {bits}", "lora", bits=bits),
        *(
            Method(f"SMoA K={k} over {bits}{rate}", "smoa", num_blocks=k, kappa=3 * k, bits=bits, group_size=GROUP,
                   rate_of=f"LoRA over {bits}" if rate else None)
            for rate in ("", ", LoRA's rate") for k in (1, 2)
        ),
        Method(f"LoRA over {bits}, r=4", "lora", r=4, bits=bits),
        Method(f"scales over {bits}", "scales", r=0, bits=bits, group_size=GROUP),
    )
    for bits in (INT4, NF4)
}  # fmt: skip
# K=4 and 8 at LoRA's size are a sweep of their own: without them a task's slice stays below 30 minutes of two cores.
_LARGE = tuple(method for method in METHODS if method.r > 2 * RANK)
_COMPARED = tuple(method for method in METHODS if method not in _LARGE)
SWEEPS = {"methods": _COMPARED, "larger": _LARGE, "alpha": SCALINGS, "rank": RANKS, "modules": MODULES}
SWEEPS |= {"lora-rate": AT_LORAS, "steady": STEADY}
SWEEPS |= FOUR_BITS
BY_NAME = {method.name: method for sweep in SWEEPS.values() for method in sweep}
# The spectral method of each random one, its ablation.
ABLATIONS = {"random K=2": "SMoA K=2", "random K=4, r=32": "SMoA K=4, r=32"}
# The spectral method with as many parameters as each one with another order.
ORDERS = {"contiguous K=2": "SMoA K=2", "contiguous K=4, r=32": "SMoA K=4, r=32", "granule 8 K=2": "SMoA K=2"}


def width(model: nn.Module, pattern: str) -> int:
    """Return the number of parameters that rank 1 takes in the linear layers whose names match."""
    layers = [m for name, m in model.named_modules() if re.fullmatch(pattern, name)]
    return sum(m.in_features + m.out_features for m in layers if isinstance(m, nn.Linear))


def shuffled(partition: BlockPartition, generator: torch.Generator) -> BlockPartition:
    """Return blocks of the same sizes over coordinates drawn at random."""
    rows, cols = partition.row_block, partition.col_block
    return BlockPartition.from_labels(
        rows[torch.randperm(len(rows), generator=generator)],
        cols[torch.randperm(len(cols), generator=generator)],
        partition.num_blocks,
    )


def shuffle_blocks(model: nn.Module, seed: int) -> None:
    """Give every SMoA layer random blocks, and new factors for them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, SMoALayer):
            packed = layer.packed("default", layer.base_weight())
            layer.fill("default", replace(packed, partition=shuffled(packed.partition, generator)), "default")
            layer.smoa["default"].reset()
            layer.smoa["default"].requires_grad_(True)


@torch.no_grad()
def update_spectrum(model: nn.Module) -> dict[str, float]:
    """Return statistics of the singular values of ΔW, means over the linear layers; nothing without any.

    "rank" and "effective_rank" are divided by the largest possible rank; the latter is Roy and Vetterli's (2007),
    `e^H(τ / Σ τ)` of the singular values τ, not of their energies. "energy_8" is the share of `Σ τ²` in the first 8.
    """
    found = []
    for layer in model.modules():
        if isinstance(layer, SMoALayer | HiraLayer | LoraLayer):
            adapter: Any = layer
            update = adapter.get_delta_weight("default").float()
            if isinstance(layer, HiraLayer):  # PEFT returns the factor that multiplies W0
                update = update * adapter.base_layer.weight
            if update.dim() > 2 or not update.isfinite().all():
                continue  # the stack of an expert's matrices, or the run diverged
            values = torch.linalg.svdvals(update)
            noise = values[0] * max(update.shape) * torch.finfo(values.dtype).eps
            energies = values.double().square()
            found.append(
                {
                    "rank": float((values > noise).sum()) / len(values),
                    "effective_rank": effective_number(values) / len(values),
                    **{f"energy_{n}": float(energies[:n].sum() / energies.sum()) for n in LEADING},
                }
            )
    return {name: sum(one[name] for one in found) / len(found) for name in (found[0] if found else ())}
