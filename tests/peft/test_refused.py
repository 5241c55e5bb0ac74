"""Adapters, folders, names and models that the tuner refuses: the error names the cause and nothing changes."""

from contextlib import contextmanager
from functools import partial

import pytest
from adapted import adapt, config, unchanged
from peft import get_peft_model

from smoa_kernels.peft import SMoALayer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 33, "r": 64}, "num_blocks must be at most .* = 32 .*, got 33; num_blocks_pattern"),
        ({"granule": 16}, "q_proj: granule must leave at least num_blocks=3 granules .* a layer"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, "is not supported"),
        # PEFT wraps the embedding and the norms before it reaches a layer with an adapter.
        ({"modules_to_save": ["embed_tokens", "norm", "j"]}, "modules_to_save cannot be applied to modules"),
    ],
)
def test_failed_injection_leaves_the_model_alone(llama, settings, message):
    model = llama()
    with unchanged(model), pytest.raises((TypeError, ValueError), match=message):
        get_peft_model(model, config(**settings))
    assert not hasattr(model, "peft_config")
    adapted = adapt(llama(), modules_to_save=["lm_head"])
    trained = adapted.active_adapters
    with unchanged(adapted), pytest.raises((TypeError, ValueError), match=message):
        adapted.add_adapter("other", config(**settings))
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
    with unchanged(model), ctrl_c_at("update_layer", 2, monkeypatch):
        get_peft_model(model, config())
    assert not hasattr(model, "peft_config")
    adapted = get_peft_model(model, config())
    for add in (
        lambda name: adapted.add_adapter(name, config()),
        lambda name: adapted.add_weighted_adapter(["default"], [0.5], name),
    ):
        with unchanged(adapted), ctrl_c_at("update_layer", 2, monkeypatch):
            add("other")
        add("other")  # the name is free
        adapted.delete_adapter("other")


@pytest.mark.parametrize("name", ["", "a.b", "../elsewhere", "/elsewhere", "a\\b"])
def test_an_adapters_name_is_no_path(llama, name):
    model = llama()
    refused = partial(
        pytest.raises, ValueError, match="adapter_name must be a name without dots and slashes, got"
    )
    with unchanged(model), refused():
        get_peft_model(model, config(), adapter_name=name)
    model = adapt(llama())
    with unchanged(model), refused():
        model.add_adapter(name, config())
