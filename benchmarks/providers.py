"""The layers that are compared: the peers from PEFT, the paper's dense way, and ours.

Every provider is a module over its own copy of the same frozen weight. So it can be checked before it is timed, and no
provider finds another's operands in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoa_kernels import BlockPartition, FusedSMoALinear
from smoa_kernels.backends import native_unsupported_reason, triton_unsupported_reason
from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.definition.reference import delta_weight

from .protocol import DEVICE

if TYPE_CHECKING:
    import peft  # takes seconds, so only processes that compare import it

BF16 = torch.bfloat16
FROZEN, LORA, HIRA, PAPER, SMOA = "frozen", "PEFT LoRA", "PEFT HiRA", "paper, dense", "SMoA"
CONTIGUOUS = f"{SMOA}, contiguous"  # with contiguous blocks; those of SMOA are spectral
ACCELERATED = f"{HIRA}, accelerated"  # by smoa_kernels.peft.accelerate_hira
# For a layer in half precision PEFT keeps the factors in float32 by default.
DEFAULT_HIRA = f"{HIRA}, float32 factors"
DEFAULT_ACCELERATED = f"{DEFAULT_HIRA}, accelerated"


@dataclass(frozen=True)
class Case:
    """One problem: T tokens through an (N, C) layer with rank budget r in K blocks."""

    tokens: int
    out_features: int
    in_features: int
    num_blocks: int
    rank: int
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0

    def __str__(self) -> str:
        dropout = f" dropout={self.dropout}" if self.dropout else ""
        return (
            f"T={self.tokens} {self.out_features}x{self.in_features} K={self.num_blocks} r={self.rank} "
            f"{name_of(self.dtype)}{dropout}"
        )

    def record(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self) | {"dtype": name_of(self.dtype)}

    @property
    def multiplications(self) -> int:
        """Multiplications of a frozen forward."""
        return self.tokens * self.out_features * self.in_features

    def smoke(self) -> Case:
        """The same at a tiny size."""
        return replace(self, tokens=min(self.tokens, 24), out_features=96, in_features=80)

    def base(self) -> nn.Linear:
        """The frozen layer, seeded so that every provider gets equal values."""
        torch.manual_seed(0)
        base = nn.Linear(self.in_features, self.out_features, bias=False, dtype=self.dtype, device=DEVICE)
        return base.requires_grad_(False)

    def input(self) -> Tensor:
        """x (T, C), which requires a gradient, as inside a network."""
        torch.manual_seed(1)
        return torch.randn(self.tokens, self.in_features, dtype=self.dtype, device=DEVICE).requires_grad_()

    def output_gradient(self) -> Tensor:
        """dY (T, N)."""
        torch.manual_seed(2)
        return torch.randn(self.tokens, self.out_features, dtype=self.dtype, device=DEVICE)


Provider = Callable[[Case], nn.Module]


def frozen(case: Case) -> nn.Module:
    """The base layer alone."""
    return case.base()


def lora(case: Case) -> nn.Module:
    """PEFT's LoRA at the same rank."""
    from peft import LoraConfig

    return _inject(case, LoraConfig(r=case.rank, target_modules=["0"], lora_dropout=case.dropout))


def hira(case: Case, factors: torch.dtype | None = None) -> nn.Module:
    """PEFT's HiRA at the same rank; its K is 1."""
    from peft import HiraConfig

    config = HiraConfig(r=case.rank, target_modules=["0"], hira_dropout=case.dropout)
    return _inject(case, config, factors)


def accelerated_hira(case: Case, factors: torch.dtype | None = None) -> nn.Module:
    """The same layer after `accelerate_hira`."""
    from smoa_kernels.peft import accelerate_hira

    layer = hira(case, factors)
    accelerate_hira(layer)
    return layer


class PaperDense(nn.Module):
    """The paper's way: a dense ΔW assembled block by block, a second full GEMM, plain autograd."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layer = smoa()(case)

    def forward(self, x: Tensor) -> Tensor:
        """y (T, N)."""
        layer = self.layer
        delta = smoa_delta(layer, layer.weight, layer.smoa.A, layer.smoa.B)
        return F.linear(x, layer.weight) + F.linear(F.dropout(x, layer.dropout, self.training), delta)


def smoa(
    algorithm: str = "auto", backend: str = "auto", block_order: str = "spectral"
) -> Callable[[Case], FusedSMoALinear]:
    """Provider of `FusedSMoALinear` with a forced algorithm and backend, and blocks of an order."""

    def build(case: Case) -> FusedSMoALinear:
        weight_alone = replace(case, tokens=1, rank=1, dropout=0.0)
        layer = FusedSMoALinear.from_linear(
            case.base(),
            partition=_partition(weight_alone) if block_order == "spectral" else None,
            r=case.rank,
            num_blocks=case.num_blocks,
            block_order=block_order,
            dropout=case.dropout,
            algorithm=algorithm,
            backend=backend,
        )
        fill(layer)
        return layer

    return build


@functools.lru_cache(maxsize=8)
def _partition(case: Case) -> BlockPartition:
    """The spectral blocks of a case's weight, shared by all providers: computing them takes longer than all timings."""
    return BlockPartition.from_weight(case.base().weight, case.num_blocks)


def smoa_delta(layer: FusedSMoALinear, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The definition's ΔW with a layer's blocks, ranks and scaling."""
    return delta_weight(PackedAdapter(weight, A, B, layer.partition, layer.smoa.ranks, layer.smoa.scaling))


def layer_providers(case: Case, algorithms: Sequence[str]) -> dict[str, Provider]:
    """All providers that can run a case here: the peers, and ours by algorithm and by this device's backends.

    Ours under "auto" is called SMoA, with contiguous blocks "SMoA, contiguous"; a forced algorithm or backend follows
    the name.
    """
    providers: dict[str, Provider] = {
        FROZEN: frozen,
        LORA: lora,
        HIRA: hira,
        ACCELERATED: accelerated_hira,
        PAPER: PaperDense,
    }
    if case.dtype != torch.float32:
        providers[DEFAULT_HIRA] = functools.partial(hira, factors=torch.float32)
        providers[DEFAULT_ACCELERATED] = functools.partial(accelerated_hira, factors=torch.float32)
    ours = [(SMOA, algorithm, "spectral") for algorithm in algorithms]
    for name, algorithm, order in [*ours, (CONTIGUOUS, "auto", "contiguous")]:
        name = name if algorithm == "auto" else f"{name} {algorithm}"
        providers[name] = smoa(algorithm, block_order=order)
        kernels = _kernels_run(case.dtype) and algorithm in ("auto", "merged", "split")
        if kernels or (algorithm == "auto" and native_unsupported_reason(DEVICE, case.dtype) is None):
            providers[f"{name}, eager"] = smoa(algorithm, "eager", order)
    return providers


def few_token_algorithms() -> tuple[str, ...]:
    """The forms of a forward for few tokens that this device's backend has."""
    return ("auto", "merged", "split", "fused" if _kernels_run() else "expanded")


def _kernels_run(dtype: torch.dtype = torch.float32) -> bool:
    # On the CPU they would run in Triton's interpreter, whose time means nothing.
    return DEVICE.type == "cuda" and triton_unsupported_reason(DEVICE, dtype) is None


def _inject(case: Case, config: peft.PeftConfig, factors: torch.dtype | None = None) -> nn.Module:
    """Add PEFT's adapter; factors are in the case's dtype, as for all providers, unless another is given."""
    from peft import inject_adapter_in_model

    model: nn.Module = inject_adapter_in_model(config, nn.Sequential(case.base()))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(factors or case.dtype)
    fill(model)
    return model


def fill(model: nn.Module, std: float = 0.05) -> None:
    """Make B nonzero, because an adapter that does nothing cannot be checked."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("_B" in name or name.endswith(".B")):
                parameter.normal_(std=std)


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name in tables."""
    return str(dtype).removeprefix("torch.")
