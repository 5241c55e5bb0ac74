"""SMoA in others' programs: Axolotl's hooks (0.19; it is not installed), and PEFT's method comparison."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from tiny_models import tiny_llama

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Parameters of the hooks of axolotl.integrations.base.BasePlugin, in Axolotl 0.19.0.
HOOKS = {
    "get_input_args": ["self"],
    "get_adapter_capabilities": ["self"],
    "load_adapter": ["self", "model", "cfg", "inference", "config_only"],
}
YAML = {
    "adapter": "smoa",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
    "smoa": {"num_blocks": 2},
}


class Cfg(dict[str, Any]):
    """Like Axolotl's DictDefault: an attribute is a key, None if it is missing."""

    __getattr__ = dict.get


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin, over Axolotl if it is installed, else over an extract of its interface."""
    if importlib.util.find_spec("axolotl") is None:
        base = ModuleType("axolotl.integrations.base")
        vars(base).update(BasePlugin=type("BasePlugin", (), {}), AdapterCapabilities=AdapterCapabilities)
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("axolotl_plugin").SMoAPlugin()
    sys.modules.pop("axolotl_plugin")


def test_hooks_have_axolotls_parameters(plugin: Any) -> None:
    for name, parameters in HOOKS.items():
        assert list(inspect.signature(getattr(type(plugin), name)).parameters) == parameters
        if (original := getattr(type(plugin).__mro__[1], name, None)) is not None:
            assert list(inspect.signature(original).parameters) == parameters
    module, _, args = plugin.get_input_args().rpartition(".")
    assert getattr(sys.modules[module], args)(smoa=YAML["smoa"]).smoa == {"num_blocks": 2}
    assert [found.name for found in plugin.get_adapter_capabilities()] == ["smoa"]


def test_it_adapts_and_goes_on(plugin: Any, tmp_path: Path) -> None:
    assert plugin.load_adapter(tiny_llama(), Cfg(adapter="lora", lora_r=8)) is None
    nothing, config = plugin.load_adapter(tiny_llama(), Cfg(YAML), config_only=True)
    assert nothing is None
    assert (config.r, config.num_blocks, config.smoa_alpha, config.use_lora_rate) == (16, 2, 32, True)

    model, _ = plugin.load_adapter(tiny_llama(), Cfg(YAML))
    tokens = torch.randint(64, (2, 8))
    model(tokens, labels=tokens).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    model.save_pretrained(tmp_path)
    for inference in (False, True):
        given = Cfg(YAML, lora_model_dir=str(tmp_path))
        loaded, _ = plugin.load_adapter(tiny_llama(), given, inference=inference)
        assert any(p.requires_grad for p in loaded.parameters()) is not inference


COMPARISON = EXAMPLES.parent / "benchmarks" / "method_comparison"
# What PEFT's `utils.py` and `run.py` do with an experiment, on a tiny model.
UTILS = """
from peft import get_peft_model
from tiny_models import tiny_llama

def get_model(*, peft_config):
    return get_peft_model(tiny_llama(), peft_config)
"""
RUN = """
import sys
from peft import PeftConfig
from utils import get_model

for module in get_model(peft_config=PeftConfig.from_pretrained(sys.argv[-1])).modules():
    if type(module).__module__.startswith("smoa_kernels"):
        print(type(module).__name__)
"""


@pytest.mark.parametrize(("method", "layer"), [("smoa", "Linear"), ("hira", "AcceleratedLinear")])
def test_the_method_comparison_runs_ours(
    method: str,
    layer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from benchmarks.method_comparison import run

    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "run.py").write_text(RUN)
    peft.HiraConfig(r=4, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "hira")
    ours = COMPARISON / "experiments/smoa/llama-3.2-3B-rank32"
    experiment = ours if method == "smoa" else tmp_path / "hira"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [])
    run.main([*(["--accelerate"] if method == "hira" else []), "-v", str(experiment)])
    sys.modules.pop("utils")
    assert layer in capsys.readouterr().out.split()
