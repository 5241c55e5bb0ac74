"""The objects and files that bad calls must not change."""

from pathlib import Path

import pytest
import torch
from problems import make_problem
from torch import nn

from smoa_kernels import FusedSMoALinear

from .harness import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    torch.manual_seed(0)
    layer = FusedSMoALinear(40, 33, r=7, num_blocks=3)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "noise.json").write_bytes(b"\xff\x00\x9f")
    return World(make_problem(dtype=torch.float32), nn.Linear(40, 33), layer, tmp_path)
