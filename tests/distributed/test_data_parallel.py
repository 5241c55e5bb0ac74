"""DistributedDataParallel: gradients of the joint batch; processes exchange the factors' bytes and nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from networks import Traffic, assert_as_one_process, batch, blocks, build, each_kind, in_groups, in_two, part
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smoa_kernels import BlockPartition, FusedSMoALinear
from smoa_kernels.distributed import average_gradients, ignore_buffers, smoa_buffers
from smoa_kernels.distributed.data_parallel import agree_on_buffers
from smoa_kernels.peft import SMoAConfig

DEPTH = 2


def wrapped(model: nn.Module) -> nn.Module:
    ignore_buffers(model)
    return DistributedDataParallel(model, find_unused_parameters=False)


@in_groups
@each_kind
def test_gradients_are_those_of_the_joint_batch(kind: str) -> None:
    assert_as_one_process(kind, wrapped, part, depth=DEPTH)


@in_groups
def test_traffic_is_the_bytes_of_the_factors() -> None:
    model = build("fused", torch.float32, depth=DEPTH)
    parallel = wrapped(model)
    x, target = part(batch(torch.float32))
    with Traffic() as forward:
        y = parallel(x)
    assert not forward.calls  # no labels, ranks or sketches
    with Traffic() as backward:
        nn.functional.mse_loss(y, target).backward()
    factors = [p for p in model.parameters() if p.requires_grad]
    assert backward.bytes["allreduce"] == sum(p.numel() * p.itemsize for p in factors)
    assert set(backward.calls) == {"allreduce"}


# Labels are agreed on once.


def normed() -> nn.Sequential:
    """An adapted layer, followed by one with buffers that must be broadcast."""
    torch.manual_seed(0)
    lin = FusedSMoALinear.from_linear(nn.Linear(12, 10), r=5, num_blocks=3)
    return nn.Sequential(OrderedDict(lin=lin, norm=nn.BatchNorm1d(10)))


def other_labels() -> BlockPartition:
    """Labels that no spectrum of the layer gives, with other block sizes."""
    return BlockPartition.from_labels(torch.arange(10) // 4, torch.arange(12) // 5, 3)


def gathered(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def sent_buffers(model: nn.Module) -> set[int]:
    return {id(buffer) for buffer in DistributedDataParallel(model).modules_buffers}


@in_two
def test_labels_are_shared() -> None:
    untold = normed()
    assert id(untold.lin.smoa.row_block) in sent_buffers(untold)
    model = normed()
    if dist.get_rank() == 1:
        model.lin.smoa.set_blocks(other_labels(), ranks=(1, 2, 2))
    assert not torch.equal(*gathered(model.lin.smoa.row_block))
    nn.init.ones_(model.lin.smoa.B)
    ignore_buffers(model)
    for buffer in smoa_buffers(model).values():
        assert torch.equal(*gathered(buffer))
    assert model.lin.partition == BlockPartition.from_weight(model.lin.weight, 3)
    assert model.lin.block_ranks == (2, 2, 1)
    assert torch.equal(*gathered(model.lin(torch.ones(2, 12)).detach()))
    sent = sent_buffers(model)
    assert sent  # the norm's buffers
    assert not sent & {id(buffer) for buffer in smoa_buffers(model).values()}


@in_two
def test_labels_of_pefts_layers_are_shared() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10))
    # The user of the base model names this buffer, and that must be respected.
    base._ddp_params_and_buffers_to_ignore = ["1.num_batches_tracked"]
    model = get_peft_model(base, SMoAConfig(r=5, num_blocks=3, target_modules=["0"]))
    layer, norm = blocks(model)
    # The model itself tells DDP to share no labels; here they agree already.
    sent = sent_buffers(model)
    assert sent
    assert not sent & {id(buffer) for buffer in smoa_buffers(model).values()}
    assert id(norm.num_batches_tracked) not in sent
    if dist.get_rank() == 1:
        layer.smoa["default"].set_blocks(other_labels(), torch.zeros(33))
    ignore_buffers(model)
    assert layer.partition("default") == BlockPartition.from_weight(layer.base_weight(), 3)
    assert "base_model.model.1.num_batches_tracked" in model._ddp_params_and_buffers_to_ignore


@in_groups
def test_half_of_the_processes_agree_among_themselves() -> None:
    """Each half has its own mean of the gradients, and the buffers of its own first process."""
    half, _ = dist.new_subgroups(dist.get_world_size() // 2)
    members, rank = dist.get_process_group_ranks(half), dist.get_rank()
    layer = normed().lin
    layer.smoa.sketch.fill_(rank)
    agree_on_buffers(layer, half)
    assert (layer.smoa.sketch == members[0]).all()
    average_gradients([layer.smoa.B], half)
    layer.smoa.B.backward(torch.full_like(layer.smoa.B, rank))
    assert (layer.smoa.B.grad == sum(members) / len(members)).all()


@pytest.mark.parametrize("call", [average_gradients, agree_on_buffers])
def test_a_process_outside_the_group_is_refused(call: Callable[..., object]) -> None:
    """For such a process torch's group is an int, and gradients would be divided by a wrong size."""
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup, got int"):
        call(nn.Linear(1, 1), dist.GroupMember.NON_GROUP_MEMBER)


def test_without_processes_names_are_noted() -> None:
    model = normed()
    ignore_buffers(model)
    ignored = model._ddp_params_and_buffers_to_ignore
    assert {"lin.smoa.row_block", "lin.smoa.ranks", "lin.smoa.sketch"} <= set(ignored)
    assert not any(name.startswith("norm") for name in ignored)
