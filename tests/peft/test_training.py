"""The Trainer and its checkpoints, torch.compile, and memory kept for backward."""

import copy

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from problems import DEVICE
from tiny_models import STEPS_ALONE, tiny_llama
from torch import nn
from torch._dynamo.utils import counters
from torch_calls import saved_tensors
from transformers import Trainer, TrainingArguments

from smoa_kernels.peft import SMoAConfig, SMoALayer

pytestmark = pytest.mark.numerical

SETTINGS = {"r": 4, "target_modules": "all-linear"}


def adapt(model, **settings):
    return get_peft_model(model, SMoAConfig(**{**SETTINGS, **settings}))


def samples(count=24):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 64, (count, 6), generator=generator, device="cpu")
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, model, **settings):
    steps = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 3e-2}
    given = {**STEPS_ALONE, **steps, "use_cpu": DEVICE.type == "cpu", **settings}
    arguments = TrainingArguments(str(folder), **given)
    return Trainer(model=model, args=arguments, train_dataset=samples(), eval_dataset=samples(8))


def losses(run):
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


@pytest.fixture
def as_scripts_do():
    """Only the Trainer puts tensors on the GPU; its data loader draws on the CPU."""
    with torch.device("cpu"):
        yield


@pytest.mark.usefixtures("as_scripts_do")
def test_trainer_learns_and_resumes_on_the_same_curve(tmp_path):
    torch.manual_seed(0)
    whole = trainer(tmp_path, adapt(tiny_llama(), smoa_dropout=0.1), save_strategy="steps", save_steps=3)
    whole.train()
    assert losses(whole)[6] < losses(whole)[1]
    torch.manual_seed(0)
    resumed = trainer(tmp_path / "resumed", adapt(tiny_llama(), smoa_dropout=0.1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for step in (4, 5, 6):
        assert losses(resumed)[step] == pytest.approx(losses(whole)[step], rel=1e-5)
    for ours, reference in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def kept_for_backward(config, x):
    """The tensors that a linear layer with an adapter keeps beside its parameters; shared memory counts once."""
    model = get_peft_model(nn.Sequential(nn.Linear(96, 80)).to(x.dtype), config).train()
    parameters = {p.data_ptr() for p in model.parameters()}
    with saved_tensors() as saved:
        model(x)
    return {t.data_ptr(): t for t in saved if t.data_ptr() not in parameters}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_is_kept_for_backward_than_lora_keeps(dtype, dropout):
    x, settings = torch.randn(128, 96, dtype=dtype), {"r": 8, "target_modules": ["0"]}
    ours = kept_for_backward(SMoAConfig(smoa_dropout=dropout, **settings), x)
    lora = kept_for_backward(LoraConfig(lora_dropout=dropout, **settings), x)
    assert sum(t.nbytes for t in ours.values()) <= sum(t.nbytes for t in lora.values())
    assert ours.pop(x.data_ptr()).shape == x.shape
    # Beside x: the scaling, and the blocks' integers, at most one per row or column.
    assert all(t.numel() <= 1 if t.is_floating_point() else t.numel() <= 96 for t in ours.values())


def test_autocast_computes_in_half_precision_and_differentiates():
    config = SMoAConfig(target_modules=["0"], init_weights=False)
    layer = get_peft_model(nn.Sequential(nn.Linear(96, 64)), config)
    x = torch.randn(32, 96)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = layer(x)
    assert (y.float() - expected).norm() < 0.05 * expected.norm()
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [1, 2])  # two have different blocks and are summed
def test_a_whole_model_compiles_into_one_graph_for_all_lengths(adapters):
    torch._dynamo.reset()
    counters.clear()
    settings = {"smoa_dropout": 0.2, "init_weights": False, "target_modules": "all-linear"}
    model = adapt(tiny_llama(num_hidden_layers=1), **settings).train()
    if adapters == 2:
        model.add_adapter("other", SMoAConfig(r=3, num_blocks=3, **settings))
        model.base_model.set_adapter(["default", "other"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (7, 12):
        tokens = torch.randint(0, 64, (2, length))
        torch.manual_seed(length)
        ours = compiled(input_ids=tokens).logits
        ours.sum().backward()
        torch.manual_seed(length)
        torch.testing.assert_close(ours, model(input_ids=tokens).logits)
    assert counters["stats"]["unique_graphs"] == 1


def test_moving_and_casting_the_model(tokens):
    model = adapt(tiny_llama(), init_weights=False, smoa_alpha=0.5).eval()
    expected = model(tokens).logits
    half = model.to(torch.bfloat16)
    for layer in (module for module in half.modules() if isinstance(module, SMoALayer)):
        assert layer.smoa["default"].row_block.dtype == torch.uint8
        assert layer.ranks("default").dtype == torch.int32
        assert layer.smoa["default"].A.dtype == torch.bfloat16
        layer._apply(torch.clone)  # as a move to another device does
        adapter = layer.smoa["default"]
        assert adapter.is_current()  # already: the next forward may be compiled
        before = adapter.partition
        adapter.row_block = adapter.row_block.clone()  # as another process's labels come
        assert not adapter.is_current()
        assert layer.partition("default") == before
    assert (half(tokens).logits.float() - expected).norm() < 0.05 * expected.norm()
    source = adapt(tiny_llama(), init_weights=False, smoa_alpha=0.5).eval()
    state, expected = source.state_dict(), source(tokens).logits
    rotary = source.base_model.model.model.rotary_emb
    for empty in (copy.deepcopy(source).to("meta"), copy.deepcopy(source)):
        empty.to_empty(device=tokens.device)  # uninitialised until the state is loaded
        empty.load_state_dict(state)
        empty.base_model.model.model.rotary_emb = rotary  # a state dict does not hold its buffers
        assert torch.equal(empty(tokens).logits, expected)
    key = next(key for key in state if "row_block" in key)
    with pytest.raises(ValueError, match=rf"{key} must lie in \[0, "):
        source.load_state_dict({**state, key: state[key] + 100})


@pytest.mark.parametrize("order", ["spectral", "contiguous"])
def test_adapters_of_a_base_whose_weights_come_later(order, tokens):
    def model(base):
        model = adapt(base, block_order=order, init_weights=False).eval()
        model.add_adapter("second", SMoAConfig(**SETTINGS, block_order=order, num_blocks=4))
        return model

    source = model(tiny_llama())
    with init_empty_weights(include_buffers=False):
        base = tiny_llama()
    loaded = model(base)
    loaded.load_state_dict(source.state_dict(), assign=True)
    for name in ("default", "second"):
        source.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(loaded(tokens).logits, source(tokens).logits)
