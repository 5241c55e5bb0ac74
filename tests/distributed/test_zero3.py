"""DeepSpeed's ZeRO-3 on two processes: W0 is partitioned, and gathered for each layer's forward and backward."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import batch, build, each_kind
from processes import Processes
from torch import nn

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; make test-deepspeed does")
pytestmark = pytest.mark.slow

STEPS, RATE = 5, 20.0


@each_kind
def test_partitioned_training_is_that_of_one_process(kind: str, two: Processes) -> None:
    model = build(kind, torch.float32)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    x, target = batch(torch.float32)
    expected = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert expected[-1] < expected[0] - 0.01
    for losses, left in two.run(zero3, kind):
        assert left == 0  # between steps a process holds no elements of W0 except its own part
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def zero3(kind: str) -> tuple[list[float], int]:
    """Losses over both halves of the batch, and the number of elements of W0 left in the parameters."""
    rank = dist.get_rank()
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2"}
    os.environ |= {"WORLD_SIZE": "2"}
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = build(kind, torch.float32)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    frozen = [p for p in model.parameters() if not p.requires_grad and p.ds_numel > 100]
    assert frozen
    half = slice(2 * rank, 2 * rank + 2)
    x, target = (part[half] for part in batch(torch.float32))
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(engine(x), target)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / 2)
    return losses, sum(p.numel() for p in frozen)
