"""transformers' own `add_adapter` and `load_adapter`, which bypass PEFT's tuner."""

import pytest
import torch
from adapted import WEIGHTS, edit_weights, gentle, layers, logits
from peft import get_peft_model
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("transformers_adapters")


@pytest.mark.numerical
def test_adapter_methods(make_model, tokens, tmp_path, monkeypatch):
    model = make_model()
    model.add_adapter(gentle(model))
    model.eval()
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = make_model()
    with monkeypatch.context() as loading:  # no spectral order is computed
        loading.delattr("smoa_kernels.definition.spectral_order.spectral_centroids")
        loaded.load_adapter(tmp_path)
        logits(loaded, tokens)
    assert torch.equal(logits(loaded.eval(), tokens), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded, tokens), logits(make_model(), tokens))


def blocks(edit):
    """An edit of the first layer's blocks that makes a saved adapter invalid."""
    return lambda folder: edit_weights(
        folder, lambda state: edit(state, next(key for key in state if key.endswith("smoa_blocks")))
    )


def to_layer_7(state, key):
    """A copy of the first layer's tensors under another name."""
    for name in [name for name in state if name.startswith(key.removesuffix("blocks"))]:
        state[name.replace("0", "7")] = state[name].clone()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (blocks(lambda s, k: s[k][-1:].bitwise_xor_(1)), r"layers\..*smoa_blocks is corrupt"),
        (blocks(lambda s, k: s.pop(k)), r"layers\..*: the adapter lacks smoa_blocks"),
        (blocks(to_layer_7), r"no place for 3 tensors of the adapter, for one .*layers\.7"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "truncated or corrupt"),
    ],
)
def test_nothing_of_a_broken_adapter_is_loaded(llama, tokens, tmp_path, spoil, message):
    get_peft_model(llama(), gentle(llama())).save_pretrained(tmp_path)
    good = llama()
    good.load_adapter(tmp_path)
    expected = logits(good, tokens)
    spoil(tmp_path)
    model = llama()
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path)
    assert not layers(model)
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, tokens), logits(llama(), tokens))
    with pytest.raises(ValueError, match=message):
        good.load_adapter(tmp_path, adapter_name="second")
    assert list(good.peft_config) == ["default"]
    assert torch.equal(logits(good, tokens), expected)


def test_another_base_is_noticed(llama, tmp_path):
    get_peft_model(llama(), gentle(llama(), strict_base=True)).save_pretrained(tmp_path)
    llama().load_adapter(tmp_path)
    with pytest.raises(ValueError, match="another base weight in 14 layers"):
        llama(seed=1).load_adapter(tmp_path)


def test_no_pickle_is_read(llama, tmp_path):
    get_peft_model(llama(), gentle(llama())).save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="is a pickle"):
        llama().load_adapter(tmp_path)
