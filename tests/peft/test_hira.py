"""PEFT's HiRA layers on our operator: the same results, files and parameters as PEFT's in every use of a model."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from adapted import WEIGHTS, close, hira_config
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners import hira as peft_hira
from peft.utils.quantization_utils import resolve_quantization_backend
from problems import relative_error
from torch import nn

from smoa_kernels.backends.native.library import has, unsupported_reason
from smoa_kernels.peft import accelerate_hira, decelerate_hira
from smoa_kernels.peft.hira import accelerate as module
from smoa_kernels.peft.hira.accelerate import AcceleratedLinear


@torch.no_grad()
def adapt(model, dtype=torch.float64, **settings):
    """A HiRA model with random factors of moderate size."""
    model = get_peft_model(model, hira_config(model, **settings)).to(dtype)
    shrink(model)
    return model


@torch.no_grad()
def shrink(model):
    for name, parameter in model.named_parameters():
        if "hira_" in name:
            parameter.mul_(0.3)


def hira_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, peft_hira.HiraLayer)]


def single(base, **settings):
    """A single HiRA layer, inside a model."""
    return get_peft_model(nn.Sequential(base), HiraConfig(r=3, target_modules=["0"], **settings))


@contextmanager
def counted(monkeypatch):
    """Counts the calls of our operator."""
    calls = []
    operator = module.adapted_linear
    with monkeypatch.context() as patch:
        patch.setattr(module, "adapted_linear", lambda *a, **k: calls.append(a) or operator(*a, **k))
        yield calls


def step(model, tokens):
    """The loss and all gradients."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(tokens, labels=tokens).loss
    if loss.requires_grad:
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def with_second(*active, training=False):
    """A second adapter, of another rank; some of the adapters are active."""

    def prepare(model):
        dropout = model.peft_config["default"].hira_dropout
        model.add_adapter("second", hira_config(model.get_base_model(), r=7, hira_dropout=dropout))
        shrink(model.double())
        model.base_model.set_adapter(list(active))
        model.train(training)

    return prepare


def of_each_layer(change):
    return lambda model: [change(layer) for layer in hira_layers(model)] and model.train()


# Settings, a change of the model, and the number of products that each accelerated layer computes.
CASES = {
    "one adapter": ({}, lambda model: model.train(), 1),
    "the second": ({}, with_second("second"), 1),
    "their sum": ({}, with_second("default", "second"), 1),
    "two masks, which PEFT draws": (
        {"hira_dropout": 0.5},
        with_second("default", "second", training=True),
        0,
    ),
    "two masks in evaluation": ({"hira_dropout": 0.5}, with_second("default", "second"), 1),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers(), 0),
    "merged": ({}, lambda model: model.merge_adapter(), 0),
    "trained base": ({}, of_each_layer(lambda layer: layer.get_base_layer().weight.requires_grad_()), 0),
    "hook": (
        {},
        of_each_layer(lambda layer: layer.get_base_layer().register_forward_hook(lambda *_: None)),
        0,
    ),
    "other dropout": (
        {},
        of_each_layer(lambda layer: layer.hira_dropout.update({"default": nn.Dropout1d(0.3)})),
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_results_are_pefts_and_it_can_be_undone(case, make_model, tokens, monkeypatch):
    settings, prepare, products = CASES[case]
    model = adapt(make_model(), **settings)
    prepare(model)
    before = {name: vars(layer).keys() for name, layer in model.named_modules()}
    state = {key: value.data_ptr() for key, value in model.state_dict().items()}
    expected = step(model, tokens)
    report = accelerate_hira(model)
    assert accelerate_hira(model) == report  # calling it twice changes nothing
    assert len(report.taken) == len(hira_layers(model))
    assert report.left == {}
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == state
    with counted(monkeypatch) as calls:
        found = step(model, tokens)
    assert len(calls) == products * len(report.taken)
    for actual, wanted in zip(found, expected, strict=True):
        close(actual, wanted, 1e-9)
    for _ in range(2):
        decelerate_hira(model)
    assert all(type(layer) is peft_hira.Linear for layer in hira_layers(model))
    assert {name: vars(layer).keys() for name, layer in model.named_modules()} == before
    assert all(map(torch.equal, step(model, tokens), expected))


def test_each_loads_the_files_of_the_other(make_model, tokens, tmp_path):
    model = adapt(make_model(), torch.float32)
    model.save_pretrained(tmp_path / "plain")
    expected = model(tokens).logits
    accelerate_hira(model)
    computed = model(tokens).logits
    model.save_pretrained(tmp_path / "fast")
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (tmp_path / "fast" / WEIGHTS).read_bytes()
    for saved in ("plain", "fast"):
        loaded = PeftModel.from_pretrained(make_model(), tmp_path / saved)
        assert torch.equal(loaded(tokens).logits, expected)
        accelerate_hira(loaded)
        assert torch.equal(loaded(tokens).logits, computed)
        # Loading into layers that are already accelerated.
        loaded.load_adapter(tmp_path / saved, "second")
        loaded.set_adapter("second")
        assert torch.equal(loaded(tokens).logits, computed)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_against_float64(dtype, bias):
    """y and dX are about as close to float64 as PEFT's, whose factors and their products are float32 by default.

    PEFT rounds the base layer's output and then the sum; we round W_eff by thresholds, and y once. If the compiled code
    widens half types, y is closer; if it multiplies bfloat16, the factors' gradients are.
    """
    torch.manual_seed(0)
    model = single(nn.Linear(256, 192, bias=bias).to(dtype))
    layer = hira_layers(model)[0]
    with torch.no_grad():
        for factor in (layer.hira_A["default"], layer.hira_B["default"]):
            factor.copy_((torch.randn(factor.shape) / 5).to(dtype))
    x, dy = torch.randn(64, 256).to(dtype), torch.randn(64, 192).to(dtype)

    def results(model, dtype):
        given = x.detach().clone().to(dtype).requires_grad_()
        y = model(given)
        assert y.dtype == dtype
        factors = [p for p in model.parameters() if p.requires_grad]
        return y, *torch.autograd.grad(y, [given, *factors], dy.to(dtype))

    def errors(model):
        return list(map(relative_error, results(model, dtype), truth))

    truth = results(copy.deepcopy(model).double(), torch.float64)
    default, peft = errors(model), errors(copy.deepcopy(model).to(dtype))
    accelerate_hira(model)
    assert layer.hira_A["default"].dtype == torch.float32
    found = errors(model)
    compiled, widened = dtype == torch.bfloat16 and has("bf16"), unsupported_reason() is None
    more = 1.0 if widened and not compiled else 1.25  # of y and dX, where W_eff is rounded
    of_y = more if widened else 1.45  # torch's operators round before they add a bias
    assert found[0] < (of_y if compiled or not widened else 1.1 if bias else 0.8) * default[0]
    assert found[1] < max(more, 1.05) * default[1]
    for mine, allowed in zip(found[2:], default[2:], strict=True):
        assert mine < (allowed if compiled else torch.finfo(dtype).eps / 4)
    for ours in (found, errors(model.to(dtype))):
        for mine, allowed, times in zip(ours, peft, [of_y, more, *[1] * (len(peft) - 2)], strict=True):
            assert mine < times * allowed


def test_autocast_is_as_with_peft(llama, tokens, monkeypatch):
    model = adapt(llama(), torch.float32)
    truth = copy.deepcopy(model).double()(tokens).logits
    errors = []
    for change in (decelerate_hira, accelerate_hira):
        change(model)
        with counted(monkeypatch) as calls, torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens).logits
        assert len(calls) == len(hira_layers(model)) * (change is accelerate_hira)
        assert logits.dtype == torch.bfloat16
        errors.append((logits.double() - truth).norm())
    assert errors[1] < 2 * errors[0]


def test_layers_that_are_left_are_named_with_the_reason(monkeypatch):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    renormed = nn.Embedding(9, 6, max_norm=9.0)
    model = nn.Sequential(renormed, nn.Linear(6, 5), Scaled(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model.add_module("conv", nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular"))
    targets = ["0", "1", "2", "3", "conv"]
    model = get_peft_model(model, HiraConfig(r=2, target_modules=targets, init_weights=False))
    layers = model.base_model.model
    layers[3].forward = layers[3].forward  # like accelerate's hooks
    expected = model(torch.tensor([[1, 2, 3]]))
    report = accelerate_hira(model)
    assert report.taken == ("base_model.model.1",)
    left = {name.rpartition(".")[2]: reason for name, reason in report.left.items()}
    assert left.keys() == {"0", "2", "3", "conv"}
    assert left["0"] == "its base layer renormalises its weight (max_norm=9.0)"
    assert "Scaled" in left["2"]
    assert "replaced" in left["3"]
    assert left["conv"] == "PEFT pads what HiRA adds with zeros, its base layer by padding_mode='circular'"
    with counted(monkeypatch) as calls:
        close(model(torch.tensor([[1, 2, 3]])), expected, 1e-5)
    assert len(calls) == 1


NOT_LINEAR = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, bias=False), (2, 4, 9, 8)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (1, 4, 5, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 6, padding_idx=1, scale_grad_by_freq=True), None),
    "sparse embedding": (lambda: nn.Embedding(9, 6, sparse=True), None),
}


@pytest.mark.parametrize("active", [["default"], ["default", "second"]])
@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_convolutions_and_embeddings_are_pefts(kind, active, monkeypatch):
    torch.manual_seed(0)
    make, shape = NOT_LINEAR[kind]
    model = single(make(), init_weights=False).double()
    model.add_adapter("second", HiraConfig(r=2, target_modules=["0"], init_weights=False))
    model.double().base_model.set_adapter(active)
    shrink(model)
    layer = hira_layers(model)[0]
    x = torch.tensor([[1, 2, 2], [0, 8, 1]]) if shape is None else torch.randn(shape, dtype=torch.float64)
    x.requires_grad_(shape is not None)
    factors = [p for p in model.parameters() if p.requires_grad]

    def results():
        y = model(x)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return y, *torch.autograd.grad(y, [x] * x.requires_grad + factors, dy)

    expected, pefts = results(), type(layer)
    assert accelerate_hira(model).taken == ("base_model.model.0",)
    with monkeypatch.context() as patch:
        patch.setattr(pefts, "forward", None)
        assert len(factors) == 2 * len(active)
        for found, wanted in zip(results(), expected, strict=True):
            close(found, wanted, 1e-9)
        copied = pickle.loads(pickle.dumps(model))
        close(copied(x), expected[0], 1e-9)
    with model.disable_adapter():
        close(model(x), layer.base_layer(x), 0)
    model.merge_adapter()
    close(model(x), expected[0], 1e-9)
    model.unmerge_adapter()
    decelerate_hira(model)
    assert type(layer) is pefts
    assert all(map(torch.equal, results(), expected))


def test_pefts_layer_computes_a_convolution_under_dropout():
    model = single(nn.Conv2d(3, 4, 3), init_weights=False, hira_dropout=0.5)
    x, found = torch.randn(1, 3, 5, 5), []
    for change in (decelerate_hira, accelerate_hira):
        change(model)
        torch.manual_seed(1)
        found.append(model(x))
    assert torch.equal(*found)


def test_copies_and_pickles_stay_accelerated(make_model, tokens, monkeypatch):
    model = adapt(make_model())
    accelerate_hira(model)
    expected = model(tokens).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with counted(monkeypatch) as calls:
            assert torch.equal(other(tokens).logits, expected)
        assert calls
        decelerate_hira(other)
    assert all(type(layer) is AcceleratedLinear for layer in hira_layers(model))


def test_a_compiled_layer_is_one_operator(make_model, tokens):
    model = adapt(make_model())
    accelerate_hira(model)
    layer = hira_layers(model)[0]
    x = torch.randn(3, layer.in_features).double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(x), layer(x), 1e-12)
    targets = [str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes]
    assert [target for target in targets if "smoa" in target] == ["smoa.linear.default"]


def test_second_derivatives_and_forward_mode_are_pefts():
    torch.manual_seed(0)
    model = single(nn.Linear(8, 6), init_weights=False).double()
    x = torch.randn(3, 8, requires_grad=True).double()
    factors = [p for p in model.parameters() if p.requires_grad]

    def derivatives():
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        _, tangent = torch.func.jvp(model, (x.detach(),), (torch.ones_like(x),))
        return *torch.autograd.grad(dx.square().sum(), factors), tangent

    expected = derivatives()
    accelerate_hira(model)
    for found, wanted in zip(derivatives(), expected, strict=True):
        close(found, wanted, 1e-12)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_may_be_called_in_inference_mode_and_before_the_weights_are_there(device, monkeypatch):
    with torch.device(device):
        model = single(nn.Linear(11, 7))
    with torch.inference_mode():
        assert len(accelerate_hira(model).taken) == 1
    if device == "meta":
        model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    x = torch.randn(2, 11)
    with counted(monkeypatch) as calls:
        y = model(x)
    assert calls
    y.sum().backward()
    decelerate_hira(model)
    close(y, model(x), 1e-5)


def test_a_model_without_hira_is_refused():
    lora = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    for call in (accelerate_hira, decelerate_hira):
        with pytest.raises(ValueError, match="no HiRA layers"):
            call(lora)
        with pytest.raises(TypeError, match="model must be"):
            call(lora.state_dict())


@pytest.fixture(params=["nf4", "nf4, double", "fp4", "int8"])
def quantized(request, quantizable):
    """A HiRA model over a quantised base, with random factors."""
    from quantized_bases import load  # skips if the extra is not installed

    model = load(quantizable, request.param)
    return adapt(model, torch.float32, target_modules=["q_proj", "up_proj"])


def test_over_a_quantised_base(quantized, tokens):
    model = quantized.train()

    def anatomy():
        bases = [(layer, layer.get_base_layer()) for layer in hira_layers(model)]
        packs = [getattr(base, "support_avx512bf16_for_cpu", None) for _, base in bases]
        return packs, [(type(layer), list(vars(base))) for layer, base in bases]

    before = anatomy()
    # The definition, with W0 as PEFT reads it.
    layer = hira_layers(model)[0]
    x = torch.randn(6, 64)
    base = layer.get_base_layer()
    weight = resolve_quantization_backend(base).get_base_weight(base).double()
    expected = x.double() @ (weight * (1 + layer.get_delta_weight("default").double())).T
    kind, peft = type(layer).__name__, step(model, tokens)
    report = accelerate_hira(model)
    assert len(report.taken) == len(hira_layers(model))
    assert report.left == {}
    assert pickle.loads(pickle.dumps(type(layer))) is type(layer)
    # bitsandbytes' own GEMM over an int8 base rounds x to int8.
    tolerance = 5e-2 if "8bit" in kind else 1e-4
    for ours, wanted in zip(step(model, tokens), peft, strict=True):
        assert (ours - wanted).norm() <= tolerance * wanted.norm()
    for training in (True, False, False):  # the first evaluation repacks weights; PEFT then misreads them
        close(model.train(training) and layer(x).double(), expected, 1e-5)
    decelerate_hira(model)
    assert anatomy() == before
