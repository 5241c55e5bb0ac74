"""Experts in PEFT: every kind of class against its own forward in float64, and their adapters' life cycle."""

import re

import pytest
import torch
from adapted import close, logits
from adapted_experts import assert_within_budget
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_experts import BOTH, KINDS, adapt, config, tiny_experts, weights
from torch_calls import saved_tensors
from transformers import AutoModelForCausalLM

from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.cli import main
from smoa_kernels.peft import Experts, SMoAConfig

# Comparison with the class's own forward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_within_their_budget(kind, dtype):
    model = adapt(tiny_experts(kind).to(dtype), block_order="random")
    assert_within_budget(next(module for module in model.modules() if isinstance(module, Experts)), dtype)


def test_the_sorted_x_is_the_only_wide_tensor_kept_for_backward():
    model = adapt(tiny_experts())
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    x = torch.randn(7, 32, requires_grad=True)
    index = torch.stack([torch.randperm(6)[:2] for _ in range(7)])
    with saved_tensors() as kept:
        experts(x, index, torch.rand(7, 2))
    wide = {t.data_ptr(): t for t in kept if t.shape == (14, 32)}
    assert len(wide) == 1
    assert torch.equal(next(iter(wide.values())), x[index.reshape(-1).sort()[1] // 2])


# Saving, loading, merging


def test_keys_are_the_parameters_paths_and_do_not_depend_on_the_order():
    states = []
    for targets in (BOTH, BOTH[::-1], ["layers.0.mlp.experts.down_proj", *BOTH]):
        model = get_peft_model(tiny_experts(), config(target_parameters=targets))
        states.append({key: tuple(t.shape) for key, t in get_peft_model_state_dict(model).items()})
    assert states[0] == states[1] == states[2]
    prefix = "base_model.model.model.layers.1.mlp.experts.gate_up_proj."
    assert states[0][f"{prefix}smoa.A"] == (6, 2, 32)
    assert states[0][f"{prefix}smoa.B"] == (6, 48, 2)
    assert states[0][f"{prefix}smoa.row_block"] == (6, 48)
    assert len(states[0]) == 2 * 2 * 7


def test_a_weight_that_would_get_no_gradient_is_refused(tokens):
    model = adapt(tiny_experts())
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="gate_up_proj must be frozen where it is adapted"):
        logits(model, tokens)


def test_two_adapters_of_different_weights(tokens, tmp_path):
    outputs = {}
    model = adapt(tiny_experts(), "down", target_parameters=["experts.down_proj"])
    outputs["down"] = logits(model, tokens)
    model.add_adapter("up", config(target_parameters=["experts.gate_up_proj"], num_blocks=2))
    assert torch.equal(logits(model, tokens), outputs["down"])
    model.set_adapter("up")
    outputs["up"] = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path)
    for first, second in (("up", "down"), ("down", "up")):
        loaded = PeftModel.from_pretrained(tiny_experts(), tmp_path / first, adapter_name=first).eval()
        loaded.load_adapter(tmp_path / second, second)
        for name in (first, second):
            loaded.set_adapter(name)
            assert torch.equal(logits(loaded, tokens), outputs[name])
    loaded.base_model.set_adapter(["up", "down"])  # each weight has one adapter
    assert not torch.equal(logits(loaded, tokens), outputs["up"])
    loaded.delete_adapter("up")
    loaded.set_adapter("down")
    assert torch.equal(logits(loaded, tokens), outputs["down"])


def test_beside_adapted_linear_layers_and_modules_that_are_saved(tokens, tmp_path):
    model = adapt(tiny_experts(), target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "gate"])
    trained = {".".join(name.split(".")[-2:]) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"default.A", "default.B", "default.weight"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    logits(model, tokens).square().mean().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_experts(), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_patterns_name_parameters(recwarn):
    of_weights = {"rank_pattern": {"experts.down_proj": 4}, "num_blocks_pattern": {"experts.down_proj": 2}}
    model = get_peft_model(tiny_experts(), config(**of_weights, alpha_pattern={"layers.1.*": 1.0}))
    found = weights(model)
    for name, weight in found.items():
        down = name.endswith("down_proj")
        assert weight.ranks("default").tolist() == ([2, 2] if down else [2, 2, 1]), name
        assert weight.scaling["default"] == (1 / (4 if down else 5) if ".1." in name else 1.0)
    assert not [w for w in recwarn if "pattern" in str(w.message)]
    parameters = sum(weight.smoa["default"].num_parameters for weight in found.values())
    up, down = 2 * (16 + 11) + 2 * (16 + 11) + (16 + 10), 2 * (32 + 24)
    assert parameters == 2 * 6 * (up + down)


@pytest.mark.parametrize(
    ("left", "settings"),
    [
        ({"1.gate_up_proj", "1.down_proj"}, {"layers_to_transform": 1}),
        ({"1.gate_up_proj", "1.down_proj"}, {"layers_to_transform": [1], "layers_pattern": "layers"}),
        ({"1.gate_up_proj", "1.down_proj"}, {"exclude_modules": ["layers.0.mlp.experts"]}),
        ({"0.gate_up_proj", "1.gate_up_proj"}, {"exclude_modules": r".*experts\.down_proj"}),
        (
            {"0.gate_up_proj", "1.gate_up_proj", "0.down_proj"},
            {"exclude_modules": ["1.mlp.experts.down_proj"]},
        ),
    ],
)
def test_layers_are_chosen_as_among_modules(left, settings, recwarn):
    found = weights(get_peft_model(tiny_experts(), config(**settings)))
    assert {".".join([name.split(".")[-4], name.split(".")[-1]]) for name in found} == left
    assert not [w for w in recwarn if "exclude_modules" in str(w.message)]


def test_patterns_that_match_nothing_are_named():
    ranks = {"experts.dwon_proj": 4, "experts.down_proj": 4}
    with pytest.warns(RuntimeWarning) as caught:
        get_peft_model(tiny_experts(), config(rank_pattern=ranks, granule_pattern={"q_proj": 2}))
    messages = [str(w.message) for w in caught if "did not match" in str(w.message)]
    assert ["rank_pattern" in messages[0], "granule_pattern" in messages[1], len(messages)] == [True, True, 2]
    assert "ignored: ['experts.dwon_proj']" in messages[0]


# Training


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_autocast_leaves_the_experts_dtype_as_it_is(backend):
    model = adapt(tiny_experts(), backend=backend)
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    given = torch.randn(9, 32), torch.randint(6, (9, 2)), torch.rand(9, 2)
    expected = experts(*given)
    with torch.autocast("cpu", torch.bfloat16):
        close(experts(*given), expected)


@pytest.mark.parametrize("order", ["contiguous", "spectral"])
def test_modules_of_another_adapter_are_not_taken_for_the_weights_of_the_same_name(order, tokens, tmp_path):
    def base():
        return tiny_experts(mlp_only_layers=[1])

    dense = {"r": 4, "target_modules": ["down_proj"], "block_order": order, "init_weights": False}
    alone = get_peft_model(base(), SMoAConfig(**dense)).eval()
    alone.save_pretrained(tmp_path)
    model = adapt(base())
    model.load_adapter(tmp_path, "dense")
    assert all(list(weight.smoa) == ["default"] for weight in weights(model).values())
    model.set_adapter("dense")
    assert torch.equal(logits(model, tokens), logits(alone, tokens))
    model.add_adapter("new", SMoAConfig(**dense))
    assert all(list(weight.smoa) == ["default"] for weight in weights(model).values())


@pytest.mark.slow
def test_compiled_whole(tokens):
    model = adapt(tiny_experts())
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    x = torch.randn(9, 32)
    index, routing = torch.randint(6, (9, 2)), torch.rand(9, 2)
    expected = experts(x, index, routing)
    close(torch.compile(experts, fullgraph=True)(x, index, routing), expected)


# Sorting


def test_spectral_blocks_are_each_experts_own():
    model = adapt(tiny_experts(), block_order="spectral")
    for weight in weights(model).values():
        own = weight.partition("default").partitions(range(6))
        for e, partition in enumerate(own):
            expected = type(partition).from_weight(weight.base_weight()[e].detach(), 3)
            assert partition == expected


def test_shared_blocks_are_those_of_the_mean_gram():
    """By the definition: U of Σ W Wᵀ, and energies summed over the experts."""
    model = adapt(tiny_experts(), block_order="shared")
    for weight in weights(model).values():
        W = weight.base_weight().detach().double()
        tall = W.shape[1] > W.shape[2]
        W = W.transpose(1, 2) if tall else W
        squared, u = torch.linalg.eigh((W @ W.transpose(1, 2)).mean(0))
        position = torch.arange(len(squared) - 1, -1, -1, dtype=W.dtype)
        energies = [u.square() * squared, (W.transpose(1, 2) @ u).square().mean(0)]
        orders = [(energy @ position / energy.sum(1)).argsort() for energy in energies]
        rows, cols = reversed(orders) if tall else orders
        (partition,) = weight.partition("default").partitions([0])
        for order, block in ((rows, partition.row_block), (cols, partition.col_block)):
            for k, part in enumerate(order.tensor_split(3)):
                assert (block[part] == k).all()


def test_many_weights_show_a_bar(monkeypatch, capsys):
    from smoa_kernels.peft import sorting

    matrices = 4 * tiny_experts().config.num_experts
    for many in (matrices, matrices + 1):
        monkeypatch.setattr(sorting, "MANY", many)
        adapt(tiny_experts(), block_order="spectral")
        shown = capsys.readouterr().err
        assert ("4/4" in shown) == ("block_order='contiguous' sorts none" in shown) == (many == matrices)


# On disk, and in bases as transformers stores them


@pytest.fixture
def adapter(tmp_path):
    adapt(tiny_experts(), block_order="random").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_commands_on_bases_as_transformers_saves_them(tmp_path, kind, capsys):
    """Stored expert by expert, or fused and transposed as gpt-oss."""
    model = tiny_experts(kind)
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model, block_order="random")
    adapted.save_pretrained(tmp_path / "adapter")
    shapes = [(6, weight.out_features, weight.in_features) for weight in weights(adapted).values()]
    report = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert sorted(layer.shape for layer in report.layers) == sorted(shapes)
    assert report.fits
    assert max(layer.base_distance for layer in report.layers) < 1e-3
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
    (changed,) = (
        key for key in state if re.search(r"1\.\w+\.experts\.(4\.)?(down_proj|w2)(\.weight)?$", key)
    )
    (state[changed] if kind != "gpt_oss" else state[changed][4]).normal_()
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    report = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert [layer.worst_expert for layer in report.layers if not layer.fits] == [4]
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 1
    assert "(expert 4)" in capsys.readouterr().out


def test_bases_that_are_stored_expert_by_expert(tokens, adapter, tmp_path, transformers_adapters):
    """transformers stores Qwen3-MoE's experts one by one and fuses them on loading; the adapter's names stay."""
    tiny_experts().save_pretrained(tmp_path / "v4")
    with safe_open(tmp_path / "v4" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.5.down_proj.weight" in file.keys()  # noqa: SIM118
    expected = logits(adapt(tiny_experts(), block_order="random"), tokens)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "v4").eval()
    model.load_adapter(str(adapter))
    close(logits(model, tokens), expected)
