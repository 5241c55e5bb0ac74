"""transformers' own `add_adapter` and `load_adapter`, which bypass PEFT's tuner."""

import pytest
import torch
from adapted import gentle, logits

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
