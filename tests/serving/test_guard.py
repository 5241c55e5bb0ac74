"""The plugin wraps all the methods it knows, or none. The tests use fake classes instead of vLLM."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from smoa_kernels.serving import vllm as plugin

# The plugin's own list, as methods that return their arguments.
METHODS = {path: parameters for path, parameters, _ in plugin._hooks}


@pytest.fixture
def made_up(monkeypatch):
    """Put fake classes with these methods in vLLM's place; the result returns the methods' current state."""

    def make(methods):
        classes = {}
        for path, parameters in methods.items():
            module, kind, name = path.rsplit(".", 2)
            owner = classes.setdefault((module, kind), type(kind, (), {}))
            names = parameters.split()
            scope = {}
            exec(f"def {name}({', '.join(names)}): return ({', '.join(names)},)", scope)
            setattr(owner, name, scope[name])
        for module in {module for module, _ in classes}:
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        for (module, kind), owner in classes.items():
            setattr(sys.modules[module], kind, owner)
        return lambda: {path: getattr(*plugin._find(path)) for path in methods}

    return make


@pytest.mark.parametrize("change", ["none", "missing", "another signature"])
def test_all_are_wrapped_once_and_one_that_only_saves_time_may_differ(change, made_up):
    methods, left = dict(METHODS), {path for path, _, function in plugin._hooks if function is None}
    if change == "missing":
        del methods[plugin._OPTIONAL]
    if change == "another signature":
        methods[plugin._OPTIONAL] = "self y"
        left.add(plugin._OPTIONAL)
    now = made_up(methods)
    before = now()
    assert plugin.obstacle() is None
    plugin.register()
    wrapped = now()
    assert {path for path in methods if wrapped[path] is before[path]} == left
    plugin.register()
    assert now() == wrapped
    assert plugin.obstacle() is None


@pytest.mark.parametrize("path", [path for path in METHODS if path != plugin._OPTIONAL])
@pytest.mark.parametrize("change", ["missing", "another signature"])
def test_none_is_wrapped_where_one_differs(path, change, made_up, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    methods = METHODS | {path: f"{METHODS[path]} further"}
    if change == "missing":
        del methods[path]
        methods[path + "_of_old"] = METHODS[path]
    now = made_up(methods)
    before = now()
    plugin.register()
    assert now() == before
    for words in (path, plugin.TESTED_VERSION, "smoa-kernels merge"):
        assert words in caplog.text


def test_w0_is_never_taken_from_a_quantised_layer(monkeypatch):
    linear = ModuleType("vllm.model_executor.layers.linear")
    linear.UnquantizedLinearMethod = type("UnquantizedLinearMethod", (), {"apply": None})
    monkeypatch.setitem(sys.modules, linear.__name__, linear)
    weight = torch.ones(6, 4, dtype=torch.int8)
    for method, plain in ((linear.UnquantizedLinearMethod(), True), (SimpleNamespace(apply=None), False)):
        module = SimpleNamespace(
            base_layer=SimpleNamespace(weight=weight), output_slices=(6,),
            _get_quant_method=lambda method=method: method,
            lora_a_stacked=[torch.zeros(1, 1, 8, 4)], lora_b_stacked=[torch.zeros(1, 1, 6, 8)],
        )  # fmt: skip
        slots = plugin._layer_slots(module)
        assert (slots.weight is weight, slots.keep) == (plain, plain)
