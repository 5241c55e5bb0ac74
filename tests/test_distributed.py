"""Two processes under DistributedDataParallel: labels agree, are not sent again, and gradients are the mean's."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smoa_kernels import BlockPartition, FusedSMoALinear
from smoa_kernels.distributed import ignore_buffers, smoa_buffers


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = FusedSMoALinear.from_linear(nn.Linear(12, 10), r=5, num_blocks=3)
        self.norm = nn.BatchNorm1d(10)  # has buffers that are to be broadcast

    def forward(self, x):
        return self.norm(self.lin(x))


def peft_model(num_blocks=3):
    from peft import get_peft_model

    from smoa_kernels.peft import SMoAConfig

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10))
    # Named by the user of the base model, whose wish is kept.
    base._ddp_params_and_buffers_to_ignore = ["1.num_batches_tracked"]
    return get_peft_model(base, SMoAConfig(r=5, num_blocks=num_blocks, target_modules=["0"]))


def other_labels():
    """Labels that no spectrum of the layer gives."""
    return BlockPartition.from_labels(torch.arange(10) % 3, torch.arange(12) % 3, 3)


def start(rank, port):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)


def gathered(tensor):
    parts = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def train_one_step(model, rank):
    parallel = DistributedDataParallel(model)
    sent = {id(buffer) for buffer in parallel.modules_buffers}
    assert sent  # the norm's
    assert not sent & {id(buffer) for buffer in smoa_buffers(model).values()}
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(rank))
    parallel(x).square().mean().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert torch.equal(*gathered(parameter.grad))
    return sent


def fused(rank, port):
    start(rank, port)
    untold = Model()
    sent = {id(buffer) for buffer in DistributedDataParallel(untold).modules_buffers}
    assert id(untold.lin.smoa_row_block) in sent
    model = Model()
    if rank == 1:
        model.lin.partition = other_labels()
    assert not torch.equal(*gathered(model.lin.smoa_row_block))
    ignore_buffers(model)
    for buffer in smoa_buffers(model).values():
        assert torch.equal(*gathered(buffer))
    assert model.lin.partition == BlockPartition.from_weight(model.lin.weight, 3)
    train_one_step(model, rank)
    dist.destroy_process_group()


def peft(rank, port):
    start(rank, port)
    model = peft_model()
    layer = model.base_model.model[0]
    # DDP is told by the model itself, and shares no label: here they agree already.
    sent = train_one_step(model, rank)
    assert id(model.base_model.model[1].num_batches_tracked) not in sent
    if rank == 1:
        layer._set_blocks("default", other_labels(), layer.ranks("default"), torch.zeros(33))
    ignore_buffers(model)
    assert layer.partition("default") == BlockPartition.from_weight(layer.base_weight(), 3)
    assert "base_model.model.1.num_batches_tracked" in model._ddp_params_and_buffers_to_ignore
    dist.destroy_process_group()


def run(worker):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port,), nprocs=2, join=True)


def test_layers_under_ddp():
    run(fused)


def test_peft_models_under_ddp():
    run(peft)


def test_without_processes_names_are_noted():
    model = Model()
    ignore_buffers(model)
    ignored = model._ddp_params_and_buffers_to_ignore
    assert {"lin.smoa_row_block", "lin.smoa_ranks", "lin.smoa_sketch"} <= set(ignored)
    assert not any(name.startswith("norm") for name in ignored)
