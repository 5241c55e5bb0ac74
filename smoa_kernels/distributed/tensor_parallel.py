"""Tensor parallelism: `parallelize_module` styles for `FusedSMoALinear` and PEFT's SMoA layers."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from ..adapter import Adapter
from ..checks import check_kind
from ..definition.shard import LayerShard
from .data_parallel import agree_on_buffers


class _SMoAParallel:
    """Cuts dimension `dim` of W0, and all tensors along it.

    Before, every process of the mesh holds the whole layer. Values, labels and ranks become those of the first process
    (`parallelize_module`'s `src_data_rank`).
    """

    dim: int
    src_data_rank: int | None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not any(isinstance(child, Adapter) for child in module.modules()):
            return cast(nn.Module, super()._apply(module, device_mesh))  # type: ignore[misc]  # torch's style is next
        style: Any = self
        for name in ("input_layouts", "output_layouts"):
            check_kind(name, getattr(style, name)[0], Placement)
        _check(module, device_mesh, self.dim)
        if self.src_data_rank is not None:
            agree_on_buffers(module, device_mesh.get_group())
        self._distribute(cast(Any, module), device_mesh)
        wanted = (Replicate() if self.dim == 0 else Shard(-1),)
        enter = partial(style._prepare_input_fn, style.input_layouts, wanted)
        leave = partial(style._prepare_output_fn, style.output_layouts, style.use_local_output)
        module.register_forward_pre_hook(lambda m, inputs: enter(m, inputs, device_mesh))
        module.register_forward_hook(lambda m, inputs, outputs: leave(m, outputs, device_mesh))
        return module

    def _distribute(self, layer: Any, mesh: DeviceMesh) -> None:
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        stored_transposed = getattr(layer, "fan_in_fan_out", False)

        def cut(parameter: Tensor, dim: int | None) -> nn.Parameter:
            placement = Replicate() if dim is None else Shard(dim)
            value = distribute_tensor(parameter, mesh, (placement,), src_data_rank=self.src_data_rank)
            return nn.Parameter(value, requires_grad=parameter.requires_grad)

        base.weight = cut(base.weight, dim=1 - self.dim if stored_transposed else self.dim)
        if base.bias is not None:
            base.bias = cut(base.bias, dim=0 if self.dim == 0 else None)
        dims = (None, 0) if self.dim == 0 else (1, None)
        for adapter in [child for child in layer.modules() if isinstance(child, Adapter)]:
            adapter.A, adapter.B = cut(adapter.A, dim=dims[0]), cut(adapter.B, dim=dims[1])
        layer._cut(LayerShard(mesh, self.dim, layer.out_features, layer.in_features))


class ColwiseSMoAParallel(_SMoAParallel, ColwiseParallel):
    """Cut W0's rows (the output's columns), the factor B (N, ρ) and the row labels; each process holds A (ρ, C) whole.

    It replaces torch's `ColwiseParallel`: same arguments, same layouts of input (replicated) and output (sharded by
    its last dimension), same behaviour for modules without an adapter. C and N are the layer's inputs and outputs, ρ is
    the largest rank of its blocks. Outputs, gradients, dropout masks and merged weights are those of one process.
    Parallelize after adapters are injected or loaded and before the optimiser is made; then use `fully_shard` over
    another dimension of the mesh, if at all.

    With dropout, all processes of the mesh must be seeded alike, since all draw the masks.

    Raises:
        ValueError, TypeError: by `parallelize_module`, before the layer was changed: it is merged or quantised, its
            labels are not loaded yet, or it has dropout and the processes' random generators differ; or a layout is
            not a `Placement`.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from smoa_kernels import FusedSMoALinear
        >>> model = nn.ModuleDict({"up": FusedSMoALinear(8, 32), "down": FusedSMoALinear(32, 8)})
        >>> plan = {"up": ColwiseSMoAParallel(), "down": RowwiseSMoAParallel()}
        >>> model = parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
        >>> model["down"](model["up"](torch.randn(3, 8))).shape
        torch.Size([3, 8])
    """

    dim = 0


class RowwiseSMoAParallel(_SMoAParallel, RowwiseParallel):
    """Cut W0's columns (the input's), the factor A (ρ, C) and the column labels; each process holds B (N, ρ) whole.

    It replaces torch's `RowwiseParallel`: the input is sharded by its last dimension, the output is replicated, or
    sharded by `output_layouts`. All else is as for :class:`ColwiseSMoAParallel`.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor import Replicate
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from smoa_kernels import FusedSMoALinear
        >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        >>> style = RowwiseSMoAParallel(input_layouts=Replicate())  # the whole x comes in
        >>> parallelize_module(FusedSMoALinear(8, 6), mesh, style)(torch.randn(3, 8)).shape
        torch.Size([3, 6])
    """

    dim = 1


def _check(layer: Any, mesh: DeviceMesh, dim: int) -> None:
    """Raise an error if the layer cannot be cut along a dimension."""
    if not (hasattr(layer, "get_base_layer") or isinstance(layer, nn.Linear)):
        raise TypeError(f"of layers with adapters only linear ones can be cut, got {type(layer).__name__}")
    adapters = [child for child in layer.modules() if isinstance(child, Adapter)]
    groups = [adapter.group_size for adapter in adapters]
    if dim == 1 and any(adapter.col_group is not None for adapter in adapters):
        raise ValueError("the layer's columns are in groups that a cut divides (col_group): cut its rows")
    if dim == 1 and max(groups) > 1 and any(layer.in_features % (size * mesh.size()) for size in groups):
        raise ValueError(
            f"the layer's {layer.in_features} columns must be cut between groups, got group_size={max(groups)} and "
            f"{mesh.size()} processes"
        )
    if getattr(layer, "_shard", None) is not None:
        raise ValueError("the layer is parallelized already")
    if layer.merged:
        raise ValueError("the layer is merged: unmerge it before parallelize_module")
    if hasattr(layer, "get_base_layer"):
        if layer.quantization_backend is not None or not layer._reads_weight:
            raise TypeError(
                "a PEFT layer must be over a plain nn.Linear or Conv1D to be cut, got one over "
                f"{type(layer.get_base_layer()).__name__}"
            )
        adapters = layer.smoa.items()
        waiting = [name for name, own in adapters if not (own.ranks.is_meta or own.has_blocks)]
        if waiting:
            raise ValueError(
                f"adapters {waiting} await their block labels: load them before parallelize_module"
            )
        drops = any(settings.smoa_dropout for settings in layer.settings.values())
    else:
        drops = layer.dropout > 0
    if drops and not _same_generators(mesh):
        raise ValueError(
            "dropout needs the random generators of all processes in one state: call torch.manual_seed with the same "
            "seed on each of them before parallelize_module"
        )


def _same_generators(mesh: DeviceMesh) -> bool:
    device: Any = torch if mesh.device_type == "cpu" else torch.get_device_module(mesh.device_type)
    states: list[Any] = [None] * mesh.size()
    dist.all_gather_object(states, bytes(device.get_rng_state().tolist()), mesh.get_group())
    return len(set(states)) == 1
