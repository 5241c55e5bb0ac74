"""Experts under DDP and FSDP2, sharded by decoder layer or as their own modules, train as in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from networks import in_two
from tiny_experts import adapt, tiny_experts
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def adapted() -> nn.Module:
    return adapt(tiny_experts(), block_order="random").train()


def sharded(part: str) -> nn.Module:
    model = adapted()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer if part == "layers" else layer.mlp.experts)
    return fully_shard(model)


WAYS = {
    "DDP": lambda: DistributedDataParallel(adapted()),
    "FSDP2, by layer": lambda: sharded("layers"),
    "FSDP2, by experts": lambda: sharded("experts"),
}


def losses(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The losses of three steps; each step is large enough to change the next loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


@in_two
@pytest.mark.parametrize("way", WAYS)
def test_experts_train_as_in_one_process(way: str) -> None:
    tokens = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(1))
    expected = torch.stack(losses(adapted(), tokens))
    assert (expected.diff() < -1e-3).all()
    found = torch.stack(losses(WAYS[way](), tokens.chunk(2)[dist.get_rank()]))
    dist.all_reduce(found)
    torch.testing.assert_close(found / 2, expected, rtol=1e-6, atol=0)
