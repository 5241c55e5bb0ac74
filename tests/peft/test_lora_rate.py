"""`use_lora_rate`: each layer's scale follows W0 as LoRA's learning rate requires, and is stored as a number."""

import json

import pytest
import torch
from adapted import CONFIG, adapt, config, layers, logits
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_experts import BOTH, tiny_experts
from torch import nn

from smoa_kernels import FusedSMoALinear
from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft.experts.experts import ExpertsWeight


def rms(weight):
    return weight.double().square().mean().sqrt().item()


def scales(model, adapter_name="default"):
    return {name: layer.scaling[adapter_name] for name, layer in layers(model).items()}


def expected(model, alpha_over_r, num_blocks):
    return {
        name: pytest.approx(alpha_over_r * 3 * num_blocks / rms(layer.base_weight()), rel=1e-5)
        for name, layer in layers(model).items()
    }


ALL = r".*"
PATTERNS = {"alpha_pattern": {ALL: 10}, "rank_pattern": {ALL: 4}, "num_blocks_pattern": {ALL: 2}}


@pytest.mark.parametrize(
    ("settings", "alpha_over_r", "num_blocks"),
    [
        ({}, 1.0, 3),
        ({"smoa_alpha": 10}, 2.0, 3),
        ({"smoa_alpha": 10, "use_rslora": True}, 10 / 5**0.5, 3),
        (PATTERNS, 10 / 4, 2),
    ],
)
def test_the_scale_is_loras_times_three_blocks_over_the_weights_size(
    make_model, settings, alpha_over_r, num_blocks
):
    model = adapt(make_model(), use_lora_rate=True, **settings)
    assert scales(model) == expected(model, alpha_over_r, num_blocks)


def test_experts_of_a_weight_share_one_scale():
    settings = SMoAConfig(r=4, target_parameters=BOTH, use_lora_rate=True)
    model = get_peft_model(tiny_experts(), settings)
    weights = [layer for layer in layers(model).values() if isinstance(layer, ExpertsWeight)]
    assert weights
    assert scales(model) == expected(model, 1.0, 2)
    pattern = model.peft_config["default"].alpha_pattern
    assert len(pattern) == len(weights)


def trained(smoa, base, settings, loss_of, steps, rate):
    """A model with an adapter, after some steps of Adam, and the losses of these steps."""
    alpha = settings.pop("alpha")
    given = {"smoa_alpha": alpha, "use_lora_rate": True} if smoa else {"lora_alpha": alpha}
    torch.manual_seed(1)
    kind = SMoAConfig if smoa else LoraConfig
    model = get_peft_model(base, kind(target_modules=["0"], **settings, **given))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def curve(smoa, factor, alpha):
    """Training losses of a small model with W0 scaled by `factor` and the input scaled by its inverse."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Tanh(), nn.Linear(16, 4))
    x, labels = torch.randn(64, 24), torch.randint(0, 4, (64,))
    with torch.no_grad():
        base[0].weight *= factor

    def loss(model):
        return nn.functional.cross_entropy(model(x / factor), labels)

    return trained(smoa, base, {"r": 4, "alpha": alpha}, loss, steps=30, rate=0.02)[1]


@pytest.mark.numerical
@pytest.mark.parametrize("smoa", [True, False], ids=["smoa", "lora"])
def test_it_follows_lora_to_a_smaller_weight_and_a_larger_input(smoa):
    """The layer computes the same function, but LoRA's update becomes eight times as large. So must ours."""
    first, scaled = curve(smoa, 1.0, 4.0), curve(smoa, 0.125, 0.5)
    assert first[-1] < 0.8 * first[0]
    assert scaled == pytest.approx(first, rel=1e-3)
    assert curve(smoa, 0.125, 4.0) == pytest.approx(curve(smoa, 1.0, 32.0), rel=1e-3)
    assert curve(smoa, 0.125, 4.0) != pytest.approx(first, rel=0.05)


def update(smoa, alpha, steps):
    """‖ΔW‖ of a layer after some steps of Adam."""
    torch.manual_seed(0)
    base, x, target = nn.Linear(576, 576), torch.randn(64, 576), torch.randn(64, 576)
    before, settings = base.weight.detach().clone(), {"r": 16, "alpha": alpha}

    def loss(model):
        return nn.functional.mse_loss(model(x), target)

    model, _ = trained(smoa, nn.Sequential(base), settings, loss, steps, rate=2e-4)
    return float((model.merge_and_unload()[0].weight - before).norm())


@pytest.mark.numerical
@pytest.mark.parametrize("steps", [1, 20])
def test_the_update_stays_in_proportion_to_loras_if_alpha_is_twice_r(steps):
    """The first step's ‖ΔW‖ is 3 √K times LoRA's at either alpha (docs/internals/learning_rate.md)."""
    times = {alpha: update(True, alpha, steps) / update(False, alpha, steps) for alpha in (16, 32)}
    assert times[16] == pytest.approx(3 * 2**0.5, rel=0.03)
    assert times[32] == pytest.approx(times[16], rel=0.03)


@pytest.mark.numerical
def test_the_folder_holds_numbers(make_model, tokens, tmp_path):
    """The numbers are exact, and a later change of W0 does not alter them."""
    given = config(make_model(), use_lora_rate=True)
    model = get_peft_model(make_model(), given).eval()
    model.save_pretrained(tmp_path)
    assert given.use_lora_rate
    assert not given.alpha_pattern
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert saved["use_lora_rate"] is False
    assert len(saved["alpha_pattern"]) == len(layers(model))
    loaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert scales(loaded) == scales(model)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    larger = make_model()
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            if name.endswith("proj.weight"):
                parameter *= 1.1
    assert scales(PeftModel.from_pretrained(larger, tmp_path)) == scales(model)
    again = get_peft_model(make_model(), given)
    assert scales(again) == scales(model)


def test_a_layer_whose_name_ends_anothers_has_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)))
    with torch.no_grad():
        model[1][0].weight *= 4
    model = get_peft_model(model, SMoAConfig(r=4, target_modules=["0", "1.0"], use_lora_rate=True))
    config = model.peft_config["default"]
    found = {name: config.for_layer(name.removeprefix("base_model.model.")).scaling for name in layers(model)}
    assert found == scales(model)
    assert len(set(found.values())) == 2


def test_refused_where_there_is_no_weight_to_measure(llama):
    model = adapt(llama())
    with pytest.raises(ValueError, match="use_lora_rate reads W0 when an adapter is added"):
        model.add_adapter("other", config(use_lora_rate=True), low_cpu_mem_usage=True)
    assert list(model.peft_config) == ["default"]
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(ValueError, match="use_lora_rate reads W0 when an adapter is added"):
        get_peft_model(empty, SMoAConfig(target_modules=["0"], use_lora_rate=True))
    zero = nn.Sequential(nn.Linear(8, 6))
    nn.init.zeros_(zero[0].weight)
    zero_config = SMoAConfig(target_modules=["0"], use_lora_rate=True, block_order="contiguous")
    with pytest.raises(ValueError, match="0: use_lora_rate needs a base weight that is finite and not zero"):
        get_peft_model(zero, zero_config)


def test_a_single_layer():
    linear = nn.Linear(40, 33)
    layer = FusedSMoALinear.from_linear(linear, r=6, num_blocks=3, alpha=12, use_lora_rate=True)
    assert layer.scaling == pytest.approx(2 * 9 / rms(linear.weight), rel=1e-5)
    nn.init.normal_(layer.smoa.B, std=0.01)
    other = FusedSMoALinear.from_linear(nn.Linear(40, 33), r=6, num_blocks=3, alpha=layer.alpha)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 40)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ValueError, match="use_lora_rate reads the base weight, which is on the meta device"):
        FusedSMoALinear.from_linear(nn.Linear(8, 6, device="meta"), r=4, use_lora_rate=True)
