"""The plugin wraps all the methods it knows, or none. The tests use fake classes instead of vLLM."""

import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from smoa_kernels.serving import vllm as plugin
from smoa_kernels.serving.factors import Labels
from smoa_kernels.serving.products import LayerSlots, Step

# The plugin's own list, as methods that return their arguments.
METHODS = {path: parameters for path, (parameters, _) in plugin._METHODS.items()}
# By version: the same of vLLM's wheels, as signatures.py reads them.
SIGNATURES = json.loads(Path(__file__).with_name("signatures.json").read_text())


@pytest.fixture
def made_up(monkeypatch):
    """Put fake classes with these methods in vLLM's place; the result returns the methods' current state."""

    def make(methods):
        plugin.register.cache_clear()
        for path, parameters in methods.items():
            module, kind, name = f"vllm.lora.{path}".rsplit(".", 2)
            if module not in made:
                made[module] = ModuleType(module)
                monkeypatch.setitem(sys.modules, module, made[module])
            names = ", ".join(parameters.split())
            owner = vars(made[module]).setdefault(kind, type(kind, (), {}))
            setattr(owner, name, eval(f"lambda {names}: ({names},)"))
        return lambda: {path: getattr(*plugin._find(path)) for path in methods}

    made = {}
    yield make
    plugin.register.cache_clear()


def test_all_are_wrapped_once(made_up):
    now = made_up(METHODS)
    before = now()
    plugin.register()
    wrapped = now()
    called = {path for path, (_, replacement) in plugin._METHODS.items() if replacement is None}
    assert {path for path in METHODS if wrapped[path] is before[path]} == called
    plugin.register()
    assert now() == wrapped
    assert plugin.unsupported_reason() is None


@pytest.mark.parametrize("version", plugin.VERSIONS)
def test_each_version_that_the_plugin_names_is_wrapped(version, made_up):
    now = made_up(SIGNATURES[version])
    before = now()
    plugin.register()
    assert sum(now()[path] is not before[path] for path in before) == 8  # of ten; two are called


@pytest.mark.parametrize("path", METHODS)
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
    for words in (path, *plugin.VERSIONS, "smoa-kernels merge"):
        assert words in caplog.text


def test_w0_is_never_taken_from_a_quantised_layer(monkeypatch):
    linear = ModuleType("vllm.model_executor.layers.linear")
    linear.UnquantizedLinearMethod = type("UnquantizedLinearMethod", (), {"apply": None})
    monkeypatch.setitem(sys.modules, linear.__name__, linear)
    weight = torch.ones(6, 4, dtype=torch.int8)
    for method, plain in ((linear.UnquantizedLinearMethod(), True), (SimpleNamespace(apply=None), False)):
        module = SimpleNamespace(
            base_layer=SimpleNamespace(weight=weight), _get_quant_method=lambda method=method: method,
            lora_a_stacked=[torch.zeros(1, 1, 8, 4)], lora_b_stacked=[torch.zeros(1, 1, 6, 8)],
        )  # fmt: skip
        slots = plugin._layer_slots(module)
        assert (slots.weight is weight, slots.keep) == (plain, plain)


@pytest.mark.parametrize("slot_of", [[0, 0], [0, -1]])
def test_a_layer_that_takes_no_bias_keeps_its_dtype_and_needs_no_forward_context(slot_of):
    """A router's output may be float32; an image tower runs outside vLLM's forward context."""
    weight, x = torch.randn(6, 4), torch.randn(2, 4)
    factors = [torch.ones(1, 1, 2, 4)], [torch.ones(1, 1, 6, 2)]
    slots = LayerSlots(*factors, lambda x: F.linear(x, weight), weight, keep=False)
    slots.slices[0].fill(0, Labels(torch.zeros(6, 1, dtype=int), torch.zeros(1, 4, dtype=int), (2,)))
    step = Step.of(torch.tensor(slot_of), torch.empty(2, dtype=torch.long))
    layer = SimpleNamespace(
        _smoa_slots=slots,
        base_layer=SimpleNamespace(skip_bias_add=True),
        punica_wrapper=SimpleNamespace(smoa_step=step),
    )
    y = plugin._apply(lambda self, x: F.linear(x, weight).double(), layer, x)
    expected = F.linear(x, weight) * torch.tensor([3.0 if slot == 0 else 1.0 for slot in slot_of])[:, None]
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), expected)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_labels_are_cut_as_the_engine_cuts_factors(parts):
    """Of a shard, too, the labels say which factors are a coordinate's: here rows 2 to 3 and columns 1 to 3."""
    cut = [lambda A: A[:, 1:4], lambda B: B[2:4]]
    if parts > 1:  # vLLM's packed layers take lists
        cut = [lambda given, one=one: [None if own is None else one(own) for own in given] for one in cut]
    module = SimpleNamespace(tp_size=2, slice_lora_a=cut[0], slice_lora_b=cut[1])
    labels = Labels(torch.arange(4)[:, None], torch.arange(6)[None], (1, 2))
    given = [labels] + [None] * (parts - 1)
    found, *others = plugin._cut(module, given)
    assert (found.rows.tolist(), found.cols.tolist(), found.ranks) == ([[2], [3]], [[1, 2, 3]], (1, 2))
    assert others == given[1:]
    assert plugin._cut(module, [None] * parts) == [None] * parts
    assert plugin._cut(SimpleNamespace(tp_size=1), given) is given
