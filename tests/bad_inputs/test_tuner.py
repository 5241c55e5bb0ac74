"""Bad settings of the PEFT tuner."""

from typing import Any

import pytest
import torch
from torch import nn

from .harness import SETTINGS, Change, World, check, rows

pytest.importorskip("transformers", reason="needs the peft extra")

from peft import get_peft_model

from smoa_kernels.peft import SMoAConfig

NAN = float("nan")
HUGE = 10**12

CONFIGURATIONS: list[Change] = [
    ({"r": HUGE}, ValueError, "r must be at most 65536, got 1000000000000"),
    ({"block_ranks": [3, 2, 3]}, ValueError, "block_ranks must be num_blocks=2 numbers .* got 3 that"),
    ({"block_ranks": [9, -1]}, ValueError, "block_ranks must be .* of 0 or more"),
    ({"smoa_dropout": 1.0}, ValueError, r"smoa_dropout must lie in \[0, 1\), got 1.0"),
    ({"smoa_alpha": "1"}, TypeError, "smoa_alpha must be a number, got '1'"),
    ({"smoa_alpha": NAN}, ValueError, "smoa_alpha must be finite, got nan"),
    ({"rank_pattern": 4}, TypeError, "rank_pattern must be a dict"),
    ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\] must be at least 1, got 0"),
    ({"rank_pattern": {5: 1}}, ValueError, "a key of rank_pattern must be a regular expression, got 5"),
    ({"rank_pattern": {"(": 3}}, ValueError, r"a key of rank_pattern must be a regular expression, got '\('"),
    ({"alpha_pattern": {"q": "x"}}, TypeError, r"alpha_pattern\['q'\] must be a number, got 'x'"),
    ({"num_blocks_pattern": {"q": 1.5}}, TypeError, r"num_blocks_pattern\['q'\] must be an int"),
    ({"target_parameters": "down_proj"}, TypeError, "target_parameters must be .* names, got 'down_proj'"),
    (
        {"target_parameters": ["a"], "smoa_dropout": 0.1},
        ValueError,
        "smoa_dropout must be 0 where target_param",
    ),
    ({"block_order_pattern": {"q": "x"}}, ValueError, r"block_order_pattern\['q'\] must be one of spectral"),
    ({"granule_pattern": {"q": 0}}, ValueError, r"granule_pattern\['q'\] must be at least 1, got 0"),
    ({"target_modules": 5}, TypeError, "target_modules must be a list of names, or one, got 5"),
    ({"target_modules": "*_proj"}, ValueError, r"target_modules must be a regular expression, got '\*_proj'"),
    ({"exclude_modules": 5}, TypeError, "exclude_modules must be a list of names, or one, got 5"),
    ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list of names, got 'head'"),
    ({"modules_to_save": [""]}, ValueError, "modules_to_save must hold names of modules, got ''"),
    ({"layers_to_transform": "1"}, TypeError, "layers_to_transform must be .* indices, or one, got '1'"),
    ({"layers_pattern": 3}, TypeError, "layers_pattern must be a list of names, or one, got 3"),
    (
        {"layers_to_transform": [0], "target_modules": "q"},
        ValueError,
        "`layers_to_transform` cannot be used when `target_modules` is a str",
    ),
    ({"bias": "some"}, ValueError, "bias must be one of none, all, smoa_only, got 'some'"),
    ({"weights_sha256": 5}, TypeError, "weights_sha256 must be a str, got 5"),
    ({"init_weights": "gaussian"}, TypeError, "init_weights must be a bool, got str"),
    ({"use_rslora": 1}, TypeError, "use_rslora must be a bool, got int"),
    ({"use_lora_rate": "lora"}, TypeError, "use_lora_rate must be a bool, got str"),
    ({"use_lora_rate": True, "format_version": 3}, ValueError, "use_lora_rate must be false in an adapter"),
    ({"strict_base": 1}, TypeError, "strict_base must be a bool, got int"),
    ({"inference_mode": "no"}, TypeError, "inference_mode must be a bool, got str"),
    ({"fan_in_fan_out": None}, TypeError, "fan_in_fan_out must be a bool, got NoneType"),
    ({"format_version": 99}, ValueError, r"format_version 99 .* is newer than what this release reads \(3\)"),
    ({"format_version": 1}, ValueError, r"format_version 1 .* is older than what this release reads \(3\)"),
]


@rows("settings", [*SETTINGS, *CONFIGURATIONS])
def test_configuration(settings: dict[str, Any], error: type[Exception], words: str, world: World) -> None:
    check(world, lambda _: SMoAConfig(**settings), error, words)


COMBINE = {"adapters": ["default"], "weights": [1.0], "adapter_name": "new"}

COMBINATIONS: list[Change] = [
    ({"adapters": ["a"]}, ValueError, "adapters must name existing adapters, got 'a'"),
    ({"adapter_name": "default"}, ValueError, "adapter_name must be a new name, got 'default'"),
    ({"weights": [1, 1]}, ValueError, "weights must hold one number for each"),
    ({"weights": [NAN]}, ValueError, "weights must be finite, got nan"),
    ({"weights": ["1"]}, TypeError, "weights must be a number, got '1'"),
    (
        {"combination_type": ["cat"]},
        ValueError,
        r"combination_type must be one of cat, linear, got \['cat'\]",
    ),
]


@rows("changed", COMBINATIONS)
def test_combinations(changed: dict[str, Any], error: type[Exception], words: str, world: World) -> None:
    torch.manual_seed(0)
    config = SMoAConfig(r=4, num_blocks=2, target_modules=["0"], init_weights=False)
    adapted = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config).eval()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    check(world, lambda _: adapted.base_model.add_weighted_adapter(**COMBINE | changed), error, words)
    found = adapted.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], value) for name, value in before.items())
    assert list(adapted.peft_config) == ["default"]
