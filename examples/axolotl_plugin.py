"""A plugin of Axolotl: `adapter: smoa` trains an SMoA adapter where its YAML trains LoRA.

    plugins: [axolotl_plugin.SMoAPlugin]    # with this file's folder on PYTHONPATH
    adapter: smoa
    lora_r: 16                              # r, alpha, dropout, modules and learning_rate of your LoRA run
    lora_alpha: 32
    lora_target_linear: true
    smoa: {num_blocks: 2}                   # further arguments of SMoAConfig

Tested with the hooks of Axolotl 0.19 and tiny models on a CPU; no whole Axolotl has run it. It pins PEFT 0.20, and this
library needs 0.21 or newer. It quantises a base on loading for `adapter: qlora` alone: name a base whose files are
quantised.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel

from smoa_kernels.peft import SMoAConfig

# Axolotl's names of what both methods have.
SAME = {
    "lora_r": "r",
    "lora_alpha": "smoa_alpha",
    "lora_dropout": "smoa_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_exclude_modules": "exclude_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_use_rslora": "use_rslora",
}


class SMoAArgs(BaseModel):
    """The key that the plugin adds to Axolotl's YAML."""

    smoa: dict[str, Any] = {}


class SMoAPlugin(BasePlugin):
    """Adds `adapter: smoa`."""

    def get_input_args(self) -> str:
        """The place of the plugin's keys."""
        return f"{__name__}.SMoAArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The adapter's name; it is no LoRA, so Axolotl's LoRA kernels and ReLoRA stay away."""
        return [AdapterCapabilities(name="smoa")]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """The model with a new adapter, or with that of `lora_model_dir`; None if YAML asks for another adapter."""
        if cfg.adapter != "smoa":
            return None
        given = {ours: value for key, ours in SAME.items() if (value := cfg.get(key)) is not None}
        if cfg.get("lora_target_linear"):
            given["target_modules"] = "all-linear"
        options = {"use_lora_rate": True, "task_type": "CAUSAL_LM"} | given | (cfg.get("smoa") or {})
        config = SMoAConfig(**options)
        if config_only:
            return None, config
        if folder := cfg.get("lora_model_dir"):
            model = PeftModel.from_pretrained(model, folder, is_trainable=not inference)
            return model, model.active_peft_config
        return get_peft_model(model, config), config
