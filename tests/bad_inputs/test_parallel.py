"""Layers that the tensor-parallel styles cannot cut, in a group of one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from smoa_kernels import FusedSMoALinear
from smoa_kernels.distributed import ColwiseSMoAParallel, RowwiseSMoAParallel

from .harness import World, check

STYLES = pytest.mark.parametrize("style", [ColwiseSMoAParallel, RowwiseSMoAParallel])


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@STYLES
def test_a_merged_layer(style: type[Any], world: World, mesh: DeviceMesh) -> None:
    world.layer.merge()
    check(
        world,
        lambda w: parallelize_module(w.layer, mesh, style()),
        ValueError,
        "the layer is merged: unmerge it before",
    )


@pytest.mark.parametrize("style", [ColwiseSMoAParallel(), RowwiseSMoAParallel()])
@pytest.mark.parametrize("method", ["reset_parameters", "reset_adapter"])
def test_a_layer_that_is_cut_is_not_drawn_anew(method: str, style: Any, mesh: DeviceMesh) -> None:
    layer = FusedSMoALinear(8, 6)
    parallelize_module(layer, mesh, style)
    before: torch.Tensor = layer.weight.to_local().clone()  # type: ignore[operator]  # it is a DTensor
    with pytest.raises(RuntimeError, match=rf"the layer is sharded: call {method}\(\) before"):
        getattr(layer, method)()
    assert torch.equal(layer.weight.to_local(), before)  # type: ignore[operator]
    with pytest.raises(ValueError, match="the layer is parallelized already"):
        parallelize_module(layer, mesh, style)
