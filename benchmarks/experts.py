"""Experts: one layer of them, its adapters, and the gate that each provider passes before it is timed."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import _grouped_linear
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from smoa_kernels.definition.reference import delta_weight
from smoa_kernels.peft import Experts, SMoAConfig

from .gate import check_error
from .protocol import DEVICE
from .providers import CONTIGUOUS, FROZEN, LORA, SMOA, name_of

IDEAL = "ideal grouped LoRA"
"""LoRA with its two products grouped over experts, like the frozen one: no library's, but the least LoRA could cost."""
SHARED = f"{SMOA}, shared"
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class ExpertsCase:
    """Tokens that each go to `top_k` experts, so that each expert gets `pairs`; 0 stands for a single token."""

    pairs: int
    hidden: int
    intermediate: int
    experts: int = 16
    top_k: int = 2
    num_blocks: int = 4
    rank: int = 8
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        """T."""
        return max(1, self.pairs * self.experts // self.top_k)

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "tokens": self.tokens, "dtype": name_of(self.dtype)}

    def smoke(self) -> ExpertsCase:
        """The same on tiny sizes."""
        return replace(self, pairs=min(self.pairs, 2), hidden=16, intermediate=24, experts=4)

    def __str__(self) -> str:
        pairs = f"{self.pairs} pairs, " if self.pairs else ""
        return f"{pairs}H={self.hidden}, I={self.intermediate}, E={self.experts}, {name_of(self.dtype)}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, each token's experts (each as often as any other) and routing weights."""
        generator = torch.Generator(DEVICE).manual_seed(1)
        x = torch.randn(self.tokens, self.hidden, device=DEVICE, generator=generator).to(self.dtype)
        first = torch.arange(self.tokens, device=DEVICE)
        index = torch.stack(
            [(first + k * self.experts // self.top_k) % self.experts for k in range(self.top_k)], 1
        )
        routing = torch.rand(self.tokens, self.top_k, device=DEVICE, generator=generator).to(self.dtype)
        return x.requires_grad_(), index, routing

    def output_gradient(self) -> Tensor:
        """dY."""
        generator = torch.Generator(DEVICE).manual_seed(2)
        return torch.randn(self.tokens, self.hidden, device=DEVICE, generator=generator).to(self.dtype)


class Layer(nn.Module):
    """Owns the experts, like a decoder layer."""

    def __init__(self, case: ExpertsCase) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=case.hidden,
            moe_intermediate_size=case.intermediate,
            num_experts=case.experts,
            num_experts_per_tok=case.top_k,
        )
        config._experts_implementation = "grouped_mm"
        self.experts = Qwen3MoeExperts(config).to(DEVICE, case.dtype)
        generator = torch.Generator(DEVICE).manual_seed(0)
        for weight in self.experts.parameters():
            weight.requires_grad_(False).copy_(
                torch.randn(weight.shape, device=DEVICE, generator=generator) / weight.shape[-1] ** 0.5
            )

    def forward(self, x: Tensor, index: Tensor, routing: Tensor) -> Tensor:
        """Compute the experts' output."""
        y: Tensor = self.experts(x, index, routing)
        return y


class IdealLora(nn.Module):
    """LoRA's three products, grouped over experts; see `IDEAL`."""

    def __init__(self, case: ExpertsCase) -> None:
        super().__init__()
        self.layer = Layer(case)
        for name, weight in self.layer.experts.named_parameters():
            count, rows, cols = weight.shape
            for side, shape in (("A", (count, case.rank, cols)), ("B", (count, rows, case.rank))):
                factor = torch.randn(shape, device=DEVICE, dtype=case.dtype) * 0.02
                self.register_parameter(f"{name}_{side}", nn.Parameter(factor))

    def forward(self, x: Tensor, index: Tensor, routing: Tensor) -> Tensor:
        """Compute the adapted experts' output."""
        base: Any = self.layer.experts
        experts, order = torch.sort(index.reshape(-1), stable=True)
        numbers = torch.arange(base.num_experts, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        inner = base._apply_gate(self._linear("gate_up_proj", x[order // index.shape[1]], ends))
        y = self._linear("down_proj", inner, ends) * routing.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        return y[back].view(*index.shape, -1).sum(1)

    def _linear(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        A, B = getattr(self, f"{name}_A"), getattr(self, f"{name}_B")
        low = _grouped_linear(x, A, ends)
        y: Tensor = _grouped_linear(x, getattr(self.layer.experts, name), ends)
        return y.add(_grouped_linear(low, B, ends))


def providers(case: ExpertsCase) -> dict[str, nn.Module]:
    """Every layer that is compared, with random factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    made: dict[str, nn.Module] = {FROZEN: Layer(case)}
    lora = LoraConfig(r=case.rank, target_modules=[], target_parameters=TARGETS, init_lora_weights=False)
    made[LORA] = get_peft_model(Layer(case), lora).base_model.model
    made[IDEAL] = IdealLora(case)
    for name, order in ((CONTIGUOUS, "contiguous"), (SHARED, "shared"), (SMOA, "spectral")):
        smoa = SMoAConfig(
            r=case.rank,
            num_blocks=case.num_blocks,
            block_order=order,
            target_parameters=TARGETS,
            init_weights=False,
            smoa_alpha=1.0,
        )
        made[name] = get_peft_model(Layer(case), smoa).base_model.model
    return made


def checked(case: ExpertsCase) -> dict[str, nn.Module]:
    """Every provider's layer, after ours and frozen were checked against transformers' loop over W_eff in float64.

    Raises:
        RedGateError: naming the case, the provider and the tensor.
    """
    layers = providers(case)
    for name, layer in layers.items():
        experts: Any = layer.get_submodule("experts") if hasattr(layer, "experts") else None
        # LoRA's layers are not checked: one is PEFT's, one an ideal.
        if isinstance(experts, (Experts, Qwen3MoeExperts)):
            x, index, routing = case.inputs()
            given = x, index, routing.requires_grad_()
            found = computed(experts, layer, *given, case.output_gradient())
            truth, same = (
                defined(experts, *given, case.output_gradient(), dtype)
                for dtype in (torch.float64, case.dtype)
            )
            names = ("y", "dX", "routing", *("dA" if i % 2 == 0 else "dB" for i in range(len(found) - 3)))
            for what, value, exact, plain in zip(names, found, truth, same, strict=True):
                check_error(f"{case}: {what} of {name}", value, exact, plain)
    return layers


def computed(
    experts: Any, layer: nn.Module, x: Tensor, index: Tensor, routing: Tensor, dy: Tensor
) -> list[Tensor]:
    """y, and the gradients of x, the routing weights and every factor, of experts inside a layer."""
    weights = experts.weights.values() if isinstance(experts, Experts) else ()
    factors = [f for w in weights for f in (w.smoa["default"].A, w.smoa["default"].B)]
    y = layer(x, index, routing)
    return [y.detach(), *torch.autograd.grad(y, [x, routing, *factors], dy)]


def defined(
    experts: Any, x: Tensor, index: Tensor, routing: Tensor, dy: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The same by the definition in a dtype: transformers' loop over W_eff."""
    base = copy.deepcopy(getattr(experts, "base_layer", experts)).to(dtype)
    base.config._experts_implementation = "eager"
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, routing)]
    changed = {}
    for name, weight in experts.weights.items() if isinstance(experts, Experts) else ():
        adapter = weight.packed("default", weight.base_weight().to(dtype))
        A, B = (t.detach().to(dtype).requires_grad_() for t in (adapter.A, adapter.B))
        each = replace(adapter, A=A, B=B).experts(range(len(A)))
        total = adapter.weight + torch.stack([delta_weight(one) for one in each])
        changed[name] = total.transpose(1, 2) if weight.fan_in_fan_out else total
        leaves += [A, B]
    y = functional_call(base, changed, (leaves[0], index, leaves[1]))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]
