"""pytest plugin that runs PEFT's own test modules with `SMoAConfig` in place of PEFT's methods.

PEFT's `@parametrize` marks refer to lists in the test modules, so these lists are refilled in place before a
module's tests are generated. SMoAConfig also replaces `HiraConfig`, which some tests use to choose a learning rate
that suits the Hadamard product: HiRA is SMoA with one block. Tests without a configuration, or with another
method's, are deselected. Tests in `test_target_parameters` that build LoRA configurations are skipped. Models come from
folders below the working directory that have the hub's names (see `models.py`).
"""

import importlib.machinery
import importlib.util
import sys
import types

import pytest

from smoa_kernels.peft import SMoAConfig

MODULES = (
    "test_custom_models",
    "test_decoder_models",
    "test_config",
    "test_seq_classifier",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_target_parameters",
)

MLP = [
    {"target_modules": "lin0"},
    {"target_modules": ["lin0"]},
    {"target_modules": ["lin1"]},
    {"target_modules": ["lin0", "lin1"]},
    {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    {"target_modules": ["lin0"], "smoa_dropout": 0.1},
    {"target_modules": ["lin0"], "smoa_alpha": 4},
    {"target_modules": ["lin0"], "num_blocks": 1},
    {"target_modules": ["lin0"], "num_blocks": 4, "r": 6},
    {"target_modules": ["lin0"], "num_blocks": 3, "r": 6, "block_ranks": [4, 0, 2]},
    {"use_rslora": True, "rank_pattern": {"lin1": 4}, "num_blocks_pattern": {"lin0": 5}},
]
MLP[-1]["target_modules"] = ["lin0", "lin1"]
CUSTOM_MODELS = [
    *((f"Vanilla MLP {i} SMoA", "MLP", SMoAConfig, settings) for i, settings in enumerate(MLP, 1)),
    # EmbConv1D's Conv1D has a single output, so it can have only one block, as the linear layers after convolutions.
    *(
        (f"{model} {i} SMoA", model, SMoAConfig, {"target_modules": targets, "num_blocks": num_blocks})
        for i, (model, num_blocks, targets) in enumerate(
            [
                ("EmbConv1D", 1, ["conv1d"]),
                ("EmbConv1D", 2, ["emb"]),
                ("EmbConv1D", 1, ["emb", "conv1d"]),
                ("Conv1d", 1, ["conv1d"]),
                ("Conv1dBigger", 2, ["conv1d"]),
                ("Conv1dGroups", 2, ["conv1d"]),
                ("Conv2d", 2, ["conv2d"]),
                ("Conv2d", 2, ["conv2d", "lin0"]),
                ("Conv2dGroups2", 2, ["conv2d"]),
                ("Conv2d1x1", 1, ["conv2d"]),
                ("Conv3d", 2, ["conv3d"]),
                ("Conv3d", 2, ["conv3d", "lin0"]),
                ("MHA", 2, ["mha"]),
                ("MHA", 2, ["mha", "lin0"]),
            ]
        )
    ),
]

ACTIVE_ADAPTERS = [
    ("SMoA Same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("SMoA Different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("SMoA Other Blocks", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "num_blocks": 5}),
]

# PEFT's own choices of parameters. Llama 4's experts are refused, so Qwen3-MoE replaces them.
EXPERTS = [
    (f"trl-internal-testing/tiny-{name}ForCausalLM", SMoAConfig, {"task_type": "CAUSAL_LM", **settings})
    for name in ("GptOss", "Qwen3Moe")
    for settings in (
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        {
            "target_modules": [],
            "target_parameters": ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"],
        },
        {
            "target_modules": None,
            "r": 8,
            "smoa_alpha": 32,
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        },
        {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    )
]
# These tests expect LoRA's error messages; tests/peft/test_refused.py tests ours.
IN_LORAS_WORDS = ("mixed_adapter_batches", "weighted_combination")
# PEFT's helpers import these for tests of other methods and of image models.
STAND_INS = {"datasets": "load_dataset", "diffusers": "StableDiffusionPipeline"}

TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_seq_classifier": "SEQ_CLS",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
}


def pytest_configure(config):
    """Replace modules that PEFT's helpers import and our tests do not use."""
    for line in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{line}: PEFT's")
    for name, attribute in STAND_INS.items():
        if importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            setattr(module, attribute, type(attribute, (), {"__init__": _skip}))
            sys.modules[name] = module


def _skip(*_, **__):
    pytest.skip("needs a package that is not installed")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Refill a module's lists before its first test is generated."""
    module = metafunc.module
    name = module.__name__.rsplit(".", 1)[-1]
    if name not in MODULES or hasattr(module, "_smoa"):
        return
    module._smoa = True
    package = module.__name__.rpartition(".")[0]
    for holder in (module, sys.modules.get(f"{package}.testing_common")):
        if hasattr(holder, "HiraConfig"):
            holder.HiraConfig = SMoAConfig
    if name == "test_custom_models":
        module.TEST_CASES[:] = CUSTOM_MODELS
        module.ALL_PEFT_CONFIG_CLASSES[:] = [SMoAConfig]
        random = {"init_weights": False}
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
            (case, "smoa", SMoAConfig, {**first, **random}, {**second, **random})
            for case, first, second in ACTIVE_ADAPTERS
        ]
    elif name == "test_target_parameters":
        module.ALL_CONFIGS[:] = EXPERTS
    elif name != "test_config":
        settings = {"task_type": TASKS[name], "target_modules": None}
        module.ALL_CONFIGS[:] = [(SMoAConfig, settings)]
    else:
        module.LAYER_INDEXING_CONFIG_CLASSES[:] = [(SMoAConfig, {})]
    _replace_tuple(metafunc, module)


def _replace_tuple(metafunc, module):
    """`test_config` keeps its classes in a tuple that the marks hold, so point the marks to ours."""
    if not hasattr(module, "ALL_CONFIG_CLASSES"):
        return
    every_config = module.ALL_CONFIG_CLASSES
    for test in vars(metafunc.cls).values():
        marks = getattr(test, "pytestmark", [])
        for i, mark in enumerate(marks):
            if len(mark.args) == 2 and mark.args[1] is every_config:
                marks[i] = pytest.mark.parametrize(mark.args[0], [(SMoAConfig, {})]).mark


def pytest_collection_modifyitems(config, items):
    """Keep the tests that use `SMoAConfig`; skip those that expect a pickle to be written."""
    kept, dropped = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        of_loras = "test_target_parameters" in item.nodeid and "LoraConfig" in item.function.__code__.co_names
        (kept if SMoAConfig in [*parameters.values()] or of_loras else dropped).append(item)
        if of_loras:
            ours = "tests/peft/test_expert_adapters.py and test_refused.py"
            item.add_marker(pytest.mark.skip(reason=f"it makes a LoraConfig; ours are in {ours}"))
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    for item in kept:
        if "save_pretrained" in item.name and "pickle" in item.name:
            item.add_marker(pytest.mark.skip(reason="SMoA adapters are safetensors only"))
        if "-MHA-" in item.name and "merge_layers_is_deterministic" in item.name:
            item.add_marker(pytest.mark.skip(reason="nn.MultiheadAttention takes no smoa_dropout"))
        if "-MHA-" in item.name and "get_base_model_state_dict" in item.name:
            item.add_marker(pytest.mark.skip(reason="PEFT finds base_layer in its own kind of layer only"))
        if "test_target_parameters" in item.nodeid and any(words in item.name for words in IN_LORAS_WORDS):
            item.add_marker(pytest.mark.skip(reason="it expects the words of LoRA's error; SMoA has its own"))
