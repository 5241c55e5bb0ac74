"""transformers' Trainer on two processes, by the files with which accelerate and DeepSpeed are configured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import trained
from peft import PeftModel
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

FSDP2 = """
distributed_type: FSDP
num_machines: 1
num_processes: 2
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: true
  fsdp_activation_checkpointing: true
"""
OPTIMIZER = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "optimizer": OPTIMIZER,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed; make test-deepspeed does"
)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["FSDP", pytest.param("DEEPSPEED", marks=needs_deepspeed)])
def test_a_sharded_run_is_that_of_one_process(engine: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny_llama().save_pretrained(tmp_path / name / "base")
    if engine == "FSDP":
        settings = tmp_path / "fsdp2.yaml"
        settings.write_text(FSDP2, encoding="utf-8")
        launch, further = ["accelerate.commands.launch", "--config_file", settings], []
        launch += ["--main_process_port", "0"]
    else:
        settings = tmp_path / "zero3.json"
        settings.write_text(json.dumps(ZERO3), encoding="utf-8")
        launch, further = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], [settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", *launch, trained.__file__, tmp_path / "two", *further]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    ours = torch.load(tmp_path / "two" / "results.pt")
    assert ours["kind"] == f"DistributedType.{engine}"
    assert ours["runs"]["resumed"] == pytest.approx(ours["runs"]["first"][trained.KEPT :], abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "base")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tmp_path / "two" / "adapter")(trained.TOKENS).logits
    torch.testing.assert_close(loaded, ours["logits"], rtol=0, atol=1e-6)
    alone = trained.run(tmp_path / "one")
    for name, losses in alone["runs"].items():
        assert ours["runs"][name] == pytest.approx(losses, abs=1e-5), name
