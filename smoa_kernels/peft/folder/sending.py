"""Reinforcement learning without merging: TRL sends vLLM the trained adapter, not a merged model (docs/trl.md)."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from peft import LoraConfig


class SMoATrainerMixin:
    """Lets TRL's `AsyncGRPOTrainer` send SMoA and HiRA adapters to a vLLM server, as it sends LoRA's.

    TRL 1.16 takes LoRA's configuration only there, and writes only tensors with "lora_" in their names. If the server
    gets no adapter, a RuntimeError ends the training, and the server answers with the last one.

    Example:
        >>> class Trainer(SMoATrainerMixin, object): ...  # with AsyncGRPOTrainer in place of object
    """

    def _init_lora_sync(self, model: Any) -> bool:
        # TRL compares the configuration with the server's: the plugin puts our adapters where LoRA's are.
        configs = {name: _as_lora(config) for name, config in model.peft_config.items()}
        stand_in = SimpleNamespace(active_adapters=model.active_adapters, peft_config=configs)
        return bool(super()._init_lora_sync(stand_in))  # type: ignore[misc]  # TRL's trainer

    def _sync_weight_lora(self: Any, t0: float) -> Any:
        try:
            with patch("trl.experimental.async_grpo.async_grpo_trainer.save_lora_adapter", save_adapter):
                return super()._sync_weight_lora(t0)  # type: ignore[misc]
        except BaseException as error:  # Ctrl-C too
            if self.accelerator.is_main_process:
                with contextlib.suppress(Exception):  # of a server that is gone
                    self.vllm_client.resume()
            if not isinstance(error, Exception):
                raise
            raise RuntimeError(
                f"the trained adapter did not reach vLLM, which goes on with the last that it loaded: {error}"
            ) from error


def _as_lora(config: Any) -> LoraConfig:
    fields = ("r", "rank_pattern", "target_modules", "target_parameters", "modules_to_save", "bias")
    given = {key: value for key in fields if (value := getattr(config, key, None)) is not None}
    return config if isinstance(config, LoraConfig) else LoraConfig(**given)


def save_adapter(model: Any, accelerator: Any, adapter_name: str, folder: str | os.PathLike[str]) -> None:
    """Write one adapter of a PEFT model to a folder, which is there whole or not at all. All processes call it."""
    state = {}
    for key, tensor in model.state_dict().items():
        if model.prefix in key and f".{adapter_name}." in f"{key}.":
            tensor = tensor.to(accelerator.device)  # where FSDP2 gathers a shard
            state[key] = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()
    if accelerator.is_main_process:
        parent = Path(folder).parent
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=parent) as scratch:
            model.save_pretrained(f"{scratch}/saved", selected_adapters=[adapter_name], state_dict=state)
            shutil.rmtree(folder, ignore_errors=True)
            # PEFT gives each adapter but "default" a folder of its own.
            Path(scratch, "saved", adapter_name if adapter_name != "default" else "").rename(folder)
