"""Finds the fused weights that a configuration targets and refuses those that cannot be adapted, before any change."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from transformers.integrations import moe

from ...checks import shown
from ...definition.precision import DTYPES, dtype_names
from ..config import SMoAConfig
from ..offload import execution_device
from .experts import Experts

# Attributes that transformers' decorator sets on a module of experts.
DECORATED = ("has_gate", "has_bias", "is_transposed")


def find_targets(model: nn.Module, config: SMoAConfig) -> tuple[list[str], int]:
    """List the paths of the parameters that `target_parameters` names, in the model's order; count those excluded.

    `exclude_modules` (by the path of the parameter or of its module) and `layers_to_transform` apply as for modules.

    Raises:
        ValueError: a parameter cannot be adapted (names it and its module's class), or a name matched none (names it).
    """
    wanted = config.target_parameters or []
    if not wanted:
        return [], 0
    paths, named = [], []
    # Modules inside `Experts`; their parameters are at the path of `Experts`.
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        owner = module
        if isinstance(module, Experts):
            inside.update(module.modules())
            owner = module.base_layer
        for parameter_name, parameter in owner.named_parameters(recurse=False):
            key = f"{name}.{parameter_name}" if name else parameter_name
            if any(key == target or key.endswith(f".{target}") for target in wanted):
                named.append(f".{key}")
                if not (_is_chosen(config, key) and _is_chosen(config, name)):
                    continue
                reason = (
                    _unsupported_reason(owner, parameter_name, parameter) if name else "it is the whole model"
                )
                if reason is not None:
                    raise ValueError(f"{key} of {type(owner).__name__} cannot be adapted: {reason}")
                paths.append(key)
    missed = [target for target in wanted if not any(key.endswith(f".{target}") for key in named)]
    if missed:
        raise ValueError(f"target_parameters={missed} match no parameter of the model{_hint(model)}")
    return paths, len(named) - len(paths)


def _is_chosen(config: SMoAConfig, path: str) -> bool:
    """Whether PEFT would adapt a module of this path whose name is targeted."""
    rule = copy(config)
    rule.target_modules, rule.modules_to_save = [path.rpartition(".")[2]], None
    return bool(check_target_module_exists(rule, path))


def _unsupported_reason(module: Any, parameter_name: str, parameter: Tensor) -> str | None:
    """Why a parameter cannot be adapted; None where it can."""
    own = vars(module)
    if isinstance(module, BaseTunerLayer):
        return "its module is adapted itself (by target_modules)"
    if not parameter.is_floating_point() or parameter.dtype not in DTYPES:
        return (
            f"it is stored in {parameter.dtype}, and {dtype_names(DTYPES)} are adapted; load the model with "
            "quantization_config=...Config(dequantize=True)"
        )
    if hasattr(parameter, "ds_id"):
        return "it is partitioned by DeepSpeed ZeRO-3"
    if execution_device(module) is not None:
        return "it is offloaded by accelerate: load the model without offloading its experts"
    if parameter.ndim == 2:
        return (
            "it is a matrix, not a fused weight (experts, out, in): train its module in full (modules_to_save), or "
            "adapt it by target_modules if it is a linear layer's"
        )
    if hasattr(parameter, "full_tensor"):
        return "it is sharded (a DTensor)"
    if parameter.ndim != 3 or any(name not in own for name in DECORATED):
        return (
            "its class is not one that transformers decorates with its experts interface "
            "(use_experts_implementation)"
        )
    if own.get("_is_expert_parallel"):
        return "the model runs in expert parallel"
    if "forward" in own and not hasattr(module, "_hf_hook"):
        return "the module has a forward of its own instead of its class's"
    # A subclass may compute more around the decorated forward, as Ergo's experts normalise each expert's output.
    if type(module).forward.__globals__ is not vars(moe):
        return "its class has a forward of its own around that of transformers' experts interface"
    if parameter_name not in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        return f"it is none of the weights that its class's experts multiply by, got {shown(parameter_name)}"
    return None


def _hint(model: nn.Module) -> str:
    names: Sequence[str] = sorted(
        {
            ".".join([*path.split(".")[-2:], name])
            for path, module in model.named_modules()
            if all(attribute in vars(module) for attribute in DECORATED)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3
        }
    )
    return f"; it has {', '.join(names)}" if names else ", which has no experts that can be adapted"
