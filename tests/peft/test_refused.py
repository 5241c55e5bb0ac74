"""Adapters, folders, names and models that the tuner refuses: the error names the cause and nothing changes."""

from contextlib import contextmanager

import pytest
import torch
from adapted import WEIGHTS, adapt, config, edit_weights, layers, logits, snapshot
from peft import PeftModel, get_peft_model

from smoa_kernels.adapter_folder.format import STATE_KEYS, pack_blocks, unpack_blocks
from smoa_kernels.peft import SMoALayer


def assert_unchanged(model, before):
    names, state = snapshot(model)
    assert names == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in state.items())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 33, "r": 64}, "num_blocks must be at most .* = 32 .*, got 33; num_blocks_pattern"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, "is not supported"),
        # PEFT wraps the embedding and the norms before it reaches a layer with an adapter.
        ({"modules_to_save": ["embed_tokens", "norm", "j"]}, "modules_to_save cannot be applied to modules"),
    ],
)
def test_failed_injection_leaves_the_model_alone(llama, settings, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match=message):
        get_peft_model(model, config(**settings))
    assert_unchanged(model, before)
    adapted = adapt(llama(), modules_to_save=["lm_head"])
    before, trained = snapshot(adapted)[0], adapted.active_adapters
    with pytest.raises((TypeError, ValueError), match=message):
        adapted.add_adapter("other", config(**settings))
    assert snapshot(adapted)[0] == before
    assert adapted.active_adapters == trained


@contextmanager
def ctrl_c_at(name, call, monkeypatch):
    """A KeyboardInterrupt at a certain call of a layer's method."""
    count, method = iter(range(call + 1)), getattr(SMoALayer, name)

    def interrupted(self, *args, **kwargs):
        if next(count) == call:
            raise KeyboardInterrupt
        return method(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SMoALayer, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield
    assert next(count, None) is None


def test_an_interrupted_injection_leaves_the_model_alone(llama, monkeypatch):
    model = llama()
    before = snapshot(model)
    with ctrl_c_at("update_layer", 2, monkeypatch):
        get_peft_model(model, config())
    assert_unchanged(model, before)
    adapted = get_peft_model(model, config())
    before = snapshot(adapted)[0]
    for add in (
        lambda name: adapted.add_adapter(name, config()),
        lambda name: adapted.add_weighted_adapter(["default"], [0.5], name),
    ):
        with ctrl_c_at("update_layer", 2, monkeypatch):
            add("other")
        assert snapshot(adapted)[0] == before
        add("other")  # the name is free
        adapted.delete_adapter("other")


@pytest.mark.parametrize("name", ["", "a.b", "../elsewhere", "/elsewhere", "a\\b"])
def test_an_adapters_name_is_no_path(llama, name):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_name must be a name without dots and slashes, got"):
        get_peft_model(model, config(), adapter_name=name)
    assert_unchanged(model, before)
    model = adapt(llama())
    with pytest.raises(ValueError, match="adapter_name must be a name without dots and slashes, got"):
        model.add_adapter(name, config())
    assert list(model.peft_config) == ["default"]


def test_weight_with_nan_is_named_and_nothing_is_wrapped(llama):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj: weight must be finite"):
        get_peft_model(model, config())
    assert not layers(model)


SPOILED = {
    "empty": lambda data: b"",
    "cut in its header": lambda data: data[:100],
    "cut in its tensors": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "immense header": lambda data: b"\xff" * 8 + data[8:],
}


@pytest.mark.parametrize("case", SPOILED)
def test_truncated_or_corrupt_file(folder, make_model, case):
    path, _ = folder
    file = path / WEIGHTS
    file.write_bytes(SPOILED[case](file.read_bytes()))
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated or corrupt"):
        PeftModel.from_pretrained(model, path)
    assert_unchanged(model, before)


def edit_one_layer(path, edit):
    """Change the first layer's tensors in a saved adapter; returns the layer's name."""
    names = []

    def first(state):
        names.append(sorted(key for key in state if key.endswith(".smoa_A"))[0].removesuffix("smoa_A"))
        edit(state, names[0])

    edit_weights(path, first)
    return names[0].removesuffix(".").removeprefix("base_model.model.")


def repacked(edit):
    """Edit a layer's unpacked labels and ranks, and correct the checksum."""

    def apply(state, prefix):
        key = prefix + "smoa_blocks"
        shape = state[prefix + "smoa_B"].shape[0], state[prefix + "smoa_A"].shape[1]
        blocks = unpack_blocks(state[key], *shape)
        edit(blocks)
        state[key] = pack_blocks(*blocks)

    return apply


BROKEN = {
    "missing": (lambda s, p: s.pop(p + "smoa_blocks"), "the adapter lacks smoa_blocks"),
    "corrupt": (lambda s, p: s[p + "smoa_blocks"][-1:].bitwise_xor_(1), "smoa_blocks is corrupt"),
    "zero": (lambda s, p: s[p + "smoa_blocks"].zero_(), "bytes that say num_blocks=0"),
    "range": (
        repacked(lambda b: b.partition.col_block.__setitem__(2, 3)),
        "must have labels below num_blocks=3",
    ),
    "rank": (repacked(lambda b: b.ranks.__setitem__(0, -1)), "ranks must sum to r=5"),
    "sum": (repacked(lambda b: b.ranks.__setitem__(2, 0)), "ranks must sum to r=5"),
    "dtype": (
        lambda s, p: s.update({p + "smoa_blocks": s[p + "smoa_blocks"].float()}),
        "smoa_blocks must be a vector of uint8",
    ),
    "layer": (
        lambda s, p: [s.pop(p + key) for key in STATE_KEYS],
        "the adapter lacks smoa_A, smoa_B, smoa_blocks",
    ),
    "unknown": (lambda s, p: s.update({p + "smoa_C": torch.ones(2)}), "the model has no place for 1 tensors"),
    "other layer": (
        lambda s, p: s.update({p.replace("0", "9") + key: s[p + key].clone() for key in STATE_KEYS}),
        "the model has no place for 3 tensors",
    ),
    "integers": (
        lambda s, p: s.update({p + "smoa_B": s[p + "smoa_B"].int()}),
        "smoa_B must be a matrix of floating-point numbers, got torch.int32",
    ),
    "shape": (
        lambda s, p: s.update({p + "smoa_A": s[p + "smoa_A"][:, 1:].contiguous()}),
        "size mismatch for .*smoa_A|smoa_blocks must hold the block labels",
    ),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapter_is_named_and_nothing_is_half_loaded(
    folder, make_model, tokens, case, low_cpu_mem_usage
):
    path, expected = folder
    edit, message = BROKEN[case]
    good = PeftModel.from_pretrained(make_model(), path).eval()
    layer = edit_one_layer(path, edit)
    layer = layer.replace("0", "9") if case == "other layer" else layer
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        PeftModel.from_pretrained(model, path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert layer in str(error.value)
    assert_unchanged(model, before)
    # Not as a second adapter, and not over an existing one.
    with pytest.raises(ValueError, match=message):
        good.load_adapter(path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert "other" not in good.peft_config
    assert all(set(layer.smoa_A) == {"default"} for layer in layers(good).values())
    with pytest.raises(ValueError, match=message):
        good.load_adapter(path, "default")
    assert torch.equal(logits(good, tokens), expected)


def test_a_base_with_fewer_or_more_layers_is_refused(llama, tmp_path):
    adapt(llama(), target_modules=["q_proj", "up_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no place for 6 tensors of the adapter, for one .*layers\.1\."):
        PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path)
    with pytest.raises(ValueError, match=r"layers\.2\..*: the adapter lacks smoa_A, smoa_B, smoa_blocks"):
        PeftModel.from_pretrained(llama(num_hidden_layers=3), tmp_path)


def test_another_base_weight_is_noticed(folder, make_model, tokens):
    path, expected = folder
    with pytest.warns(UserWarning, match="trained over another base weight in"):
        PeftModel.from_pretrained(make_model(seed=1), path)
    model = make_model(seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"another base weight .* strict_base=True refuses it"):
        PeftModel.from_pretrained(model, path, strict_base=True)
    assert_unchanged(model, before)
    same = PeftModel.from_pretrained(make_model().bfloat16(), path, strict_base=True).eval()
    close = logits(same, tokens).float()
    assert (close - expected).norm() < 0.03 * expected.norm()
