"""`fully_shard`: the results of one process, one all-gather per block and pass, checkpoints for any world size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from networks import (
    DOUBLE,
    IN,
    Traffic,
    assert_as_one_process,
    assert_factors,
    batch,
    blocks,
    build,
    each_kind,
    in_four,
    in_groups,
    in_two,
    layers,
    part,
    step,
    whole,
)
from problems import relative_error
from processes import Processes
from test_tensor_parallel import parallelize
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from smoa_kernels.distributed import average_gradients

DEPTH = 3


def shard(model: nn.Module, mesh: DeviceMesh | None = None, **options: object) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for block in blocks(model):
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@in_groups
@each_kind
def test_gradients_are_those_of_the_joint_batch(kind: str) -> None:
    model = assert_as_one_process(kind, shard, part, depth=DEPTH)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@in_groups
def test_each_pass_gathers_a_block_once() -> None:
    model = shard(build("fused", torch.float32, depth=DEPTH))
    x, target = part(batch(torch.float32))
    x.requires_grad_()  # otherwise the first block has no backward that gathers
    for _ in range(2):
        with Traffic() as forward:
            loss = nn.functional.mse_loss(model(x), target)
        assert forward.calls == {"allgather_base": DEPTH}
        with Traffic() as backward:
            loss.backward()
        assert backward.calls == {"allgather_base": DEPTH, "reduce_scatter_base": DEPTH}
    size = dist.get_world_size()
    factors = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    own = sum(p.to_local().numel() * 4 for p in (*factors, *frozen))
    padded = sum(-(-p.shape[0] // size) * size * p.shape[1:].numel() * 4 for p in factors)
    assert own <= forward.bytes["allgather_base"]
    assert backward.bytes["allgather_base"] == forward.bytes["allgather_base"]
    # Only the factors' gradients travel, each padded along dimension 0 to a multiple of the processes.
    assert backward.bytes["reduce_scatter_base"] == padded


@in_two
def test_factors_that_stay_whole() -> None:
    truth = step(build("fused", torch.float64, depth=DEPTH), *batch(torch.float64))
    model = build("fused", torch.float64, depth=DEPTH)
    factors = {p for p in model.parameters() if p.requires_grad}
    shard(model, ignored_params=factors)
    average_gradients(factors)
    with Traffic() as traffic:
        ours = step(model, *part(batch(torch.float64)))
    assert isinstance(layers(model)[0].weight, DTensor)
    assert not isinstance(layers(model)[0].smoa.A, DTensor)
    assert_factors(ours, truth)
    assert traffic.calls["reduce_scatter_base"] == 0
    assert traffic.bytes["allreduce"] == sum(p.numel() * 8 for p in factors)


@in_two
def test_half_precision() -> None:
    truth = step(build("fused", torch.float64, depth=DEPTH), *batch(torch.float64))
    single = step(build("fused", torch.bfloat16, depth=DEPTH), *batch(torch.bfloat16))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(build("fused", torch.float32, depth=DEPTH), mp_policy=policy)
    ours = step(model, *part(batch(torch.float32)))
    assert ours["y"].dtype == torch.bfloat16
    for name in (n for n in truth if "smoa." in n):
        assert ours[name].dtype == torch.float32
        allowed = 2 * relative_error(single[name], truth[name])
        assert relative_error(whole(ours[name]), truth[name]) < allowed, name


@pytest.mark.slow
@in_four
@each_kind
def test_two_dimensional_mesh(kind: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = assert_as_one_process(
        kind,
        lambda model: shard(parallelize(model, mesh["tensor"]), mesh["data"]),
        lambda tensors: part(tensors, mesh["data"].get_local_rank(), 2),
        depth=DEPTH,
    )
    assert all(p.device_mesh.ndim == 2 for p in model.parameters() if p.requires_grad)


@in_two
def test_a_model_that_only_the_first_process_has() -> None:
    """accelerate's `fsdp_cpu_ram_efficient_loading`: the others get factors, labels and s."""
    truth, first = step(build("peft", torch.float64), *batch(torch.float64)), dist.get_rank() == 0
    model = build("peft", torch.float64, spectral=first)
    if not first:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    state = model.state_dict()
    model = shard(model.to("meta"))
    fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=first), model, state)
    assert_factors(step(model, *part(batch(torch.float64))), truth)


@in_two
def test_a_merge_after_unshard() -> None:
    model = shard(build("fused", torch.float64))
    up = layers(model)[0]
    with pytest.raises(RuntimeError, match=r"sharded by fully_shard: call unshard\(\)"):
        up.merge()
    assert not up.merged
    # The operator refuses DTensors, so that nobody computes with a part of W0 by mistake.
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        up(torch.randn(3, IN, dtype=torch.float64))
    single = layers(build("fused", torch.float64))[0]
    single.merge()
    blocks(model)[0].unshard()
    up.merge()
    assert relative_error(up.weight, single.weight) < DOUBLE


# Checkpoints written by one kind of parallelism are read by any other.


def trainer(kind: str, how: str, *, spectral: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build(kind, torch.float64, depth=2, spectral=spectral)
    if how == "tensor":
        parallelize(model)
    elif how == "shards":
        shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, how: str) -> None:
    x, target = batch(torch.float64)
    if how == "shards":
        x, target = part((x, target))
    step(model, x, target)
    optimizer.step()
    optimizer.zero_grad()


OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    parameters, moments = get_state_dict(model, optimizer, options=OPTIONS)
    return {"model": parameters, "optimizer": moments}


def save(kind: str, how: str, folder: Path) -> None:
    model, optimizer = trainer(kind, how)
    train(model, optimizer, how)
    dcp.save(state(model, optimizer), checkpoint_id=folder)


def load(kind: str, how: str, folder: Path) -> dict[str, Tensor]:
    """Load into a model with other factors and, if "fused", other labels; train one step; return the whole factors."""
    model, optimizer = trainer(kind, how, spectral=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    loaded = state(model, optimizer)
    dcp.load(loaded, checkpoint_id=folder)
    given = {"model_state_dict": loaded["model"], "optim_state_dict": loaded["optimizer"]}
    set_state_dict(model, optimizer, **given, options=OPTIONS)
    train(model, optimizer, how)
    return {n: whole(p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shards", "tensor"])
@each_kind
def test_checkpoints_fit_any_world_size(
    kind: str, how: str, two: Processes, four: Processes, tmp_path: Path
) -> None:
    four.run(save, kind, how, tmp_path)
    model, optimizer = trainer(kind, "alone")
    for _ in range(2):
        train(model, optimizer, "alone")
    expected = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    other = {"shards": "tensor", "tensor": "shards"}[how]
    results = two.run(load, kind, how, tmp_path) + two.run(load, kind, other, tmp_path)
    for result in (load(kind, "alone", tmp_path), *results):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert relative_error(result[name], value) < DOUBLE, name
