"""`FusedSMoALinear`: an nn.Linear to its users; its state dict holds labels and ranks."""

import copy
import hashlib
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import DEVICE, relative_error
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from smoa_kernels import (
    BlockPartition,
    FusedSMoAConv1d,
    FusedSMoAConv2d,
    FusedSMoAConv3d,
    FusedSMoAEmbedding,
    FusedSMoALinear,
)
from smoa_kernels.definition import spectral_order
from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.definition.sketch import TOLERANCE, _signs, sketch_distance, sketch_weight

pytestmark = pytest.mark.numerical


def trained(**kwargs: object) -> FusedSMoALinear:
    """A layer with a nonzero update."""
    torch.manual_seed(0)
    settings: dict[str, object] = {"r": 7, "num_blocks": 3, "alpha": 14, **kwargs}
    layer = FusedSMoALinear.from_linear(nn.Linear(40, 33), **settings)
    nn.init.normal_(layer.smoa.B, std=0.3)
    return layer


def test_starts_as_its_base_and_trains_only_its_factors() -> None:
    linear = nn.Linear(40, 33)
    layer = FusedSMoALinear.from_linear(linear, r=6, num_blocks=2)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    x = torch.randn(2, 5, 40)
    torch.testing.assert_close(layer(x), linear(x))
    assert isinstance(layer, nn.Linear)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["smoa.A", "smoa.B"]
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = F.mse_loss(layer(x), torch.zeros(2, 5, 33))
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(layer(x), torch.zeros(2, 5, 33)).backward()
        optimizer.step()
    assert F.mse_loss(layer(x), torch.zeros(2, 5, 33)) < before


def test_from_conv1d_views_its_weight() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="needs the peft extra").Conv1D(33, 40)
    layer = FusedSMoALinear.from_linear(conv1d, r=4)
    assert layer.weight.data_ptr() == conv1d.weight.data_ptr()
    nn.init.normal_(layer.smoa.B)
    x = torch.randn(5, 40, requires_grad=True)
    expected = conv1d(x) + x @ layer.delta_weight().T
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(conv1d(x), expected)


def test_initial_factors() -> None:
    """A_k uniform in ±1/√C_k, B zero, padding zero."""
    layer = FusedSMoALinear(3000, 60, r=7, num_blocks=3, block_ranks=[4, 1, 2])
    assert (layer.smoa.B == 0).all()
    for k, rank in enumerate((4, 1, 2)):
        A_k = layer.smoa.A.detach()[:, layer.partition.cols(k)]
        bound = A_k.shape[1] ** -0.5
        assert float(A_k[:rank].abs().max()) <= bound
        assert float(A_k[:rank].abs().max()) > 0.98 * bound
        assert (A_k[rank:] == 0).all()


def forbid_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a spectrum was computed")

    monkeypatch.setattr(spectral_order, "spectral_centroids", never)


def test_ranks_on_the_host_follow_the_state_dict() -> None:
    """The layer holds its ranks twice, as a buffer and as numbers; on the CPU the operator compares the two."""
    layer = trained()
    other = FusedSMoALinear.from_linear(nn.Linear(40, 33), r=7, num_blocks=3, block_ranks=[2, 2, 3], alpha=14)
    x = torch.randn(5, 40)
    for assign in (False, True):
        taken = copy.deepcopy(layer)
        taken.load_state_dict(other.state_dict(), assign=assign)
        assert taken.block_ranks == other.block_ranks != layer.block_ranks
        assert torch.equal(taken(x), other(x))
        assert torch.equal(copy.deepcopy(taken)(x), other(x))
    layer.smoa.ranks = other.smoa.ranks
    assert layer(x).shape == (5, 33)
    assert layer.block_ranks == other.block_ranks


@pytest.mark.parametrize("alone", [False, True])
def test_a_state_dict_and_an_adapter_alone_load_bit_for_bit(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, base, buffer = trained(), nn.Linear(40, 33), io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    if alone:
        base.load_state_dict({name: state.pop(name) for name in ("weight", "bias")})
    settings = {"r": 7, "num_blocks": 3}
    fresh = FusedSMoALinear.from_linear(base, **settings) if alone else FusedSMoALinear(40, 33, **settings)
    forbid_spectra(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fresh.load_state_dict(state, strict=not alone)
    assert result.missing_keys == ["weight", "bias"] * alone
    assert not result.unexpected_keys
    assert fresh.partition == layer.partition
    x = torch.randn(5, 40)
    assert torch.equal(fresh(x), layer(x))


def test_plain_linear_state_dict_recomputes_the_partition_and_says_so() -> None:
    layer, linear = trained(), nn.Linear(40, 33)
    with pytest.warns(UserWarning, match="without block labels.*spectral partition was recomputed"):
        result = layer.load_state_dict(linear.state_dict())
    assert not result.missing_keys
    assert layer.partition == BlockPartition.from_weight(linear.weight, 3)
    assert sketch_distance(layer.smoa.sketch, sketch_weight(linear.weight)) < 1e-5


def test_a_merged_layer_saves_its_base_and_holds_no_second_weight_on_its_device() -> None:
    layer = trained()
    expected = copy.deepcopy(layer.state_dict())
    W0 = expected["weight"]
    layer.merge()
    state = layer.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    held = {name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]}
    assert held == state.keys()
    layer.half()
    assert torch.equal(layer.state_dict()["weight"], W0.half())
    layer.unmerge()
    assert torch.equal(layer.weight, W0.half())


def test_another_base_is_noticed() -> None:
    adapter = {n: v for n, v in trained().state_dict().items() if n.startswith("smoa.")}
    torch.manual_seed(99)
    other = FusedSMoALinear(40, 33, r=7, num_blocks=3)
    with pytest.warns(UserWarning, match="trained on another base weight"):
        other.load_state_dict(adapter, strict=False)
    strict = FusedSMoALinear(40, 33, r=7, num_blocks=3, strict_base=True)
    for wrong in (adapter, strict.state_dict() | {"smoa.sketch": torch.full((33,), torch.nan)}):
        with pytest.raises(ValueError, match=r"another base weight.*strict_base=True refuses"):
            strict.load_state_dict(wrong, strict=False)


def four_bit(weight: Tensor) -> Tensor:
    """Round-to-nearest in blocks of 64 with 16 levels, coarser than NF4."""
    blocks = weight.reshape(-1, 64)
    step = blocks.abs().amax(1, keepdim=True) / 7.5
    return ((blocks / step - 0.5).round() + 0.5).mul(step).reshape(weight.shape)


def test_the_sketch_recognises_a_base_through_its_precision() -> None:
    torch.manual_seed(1)
    weight = torch.randn(96, 128)
    sketch = sketch_weight(weight)
    assert sketch.shape == (33,)
    for same in (weight.bfloat16(), weight.half(), four_bit(weight), weight.T.contiguous().T):
        assert sketch_distance(sketch, sketch_weight(same)) < TOLERANCE
    for other in (torch.randn(96, 128), weight * 1.5, weight.roll(1, 0), -weight, torch.zeros(96, 128)):
        assert sketch_distance(sketch, sketch_weight(other)) > TOLERANCE
    assert sketch_distance(sketch_weight(torch.zeros(5, 4)), sketch_weight(torch.zeros(5, 4))) == 0


@pytest.mark.parametrize("side", [0, 1])
def test_the_sketchs_signs_are_a_stream_that_other_programs_can_draw(side: int) -> None:
    for size in (1, 7, 576, 50_000):
        stream = hashlib.shake_128((b"rows", b"columns")[side]).digest(4 * size)
        words = torch.from_numpy(np.frombuffer(stream, "<u4").astype(np.int64))
        expected = 1.0 - 2.0 * (words[:, None] >> torch.arange(32) & 1)
        assert torch.equal(_signs(size, side, torch.device("cpu")), expected)


def test_a_sketch_made_of_fake_tensors_leaves_none_behind() -> None:
    weight = torch.randn(13, 11, device="cpu")  # no other test uses this shape: signs are cached by size
    with FakeTensorMode():
        assert sketch_weight(torch.empty(13, 11)).shape == (33,)
    assert sketch_distance(sketch_weight(weight), sketch_weight(weight)) == 0


def test_the_sketch_never_changes() -> None:
    """Checkpoints store sketches, so these values stay fixed as long as the format does."""
    sketch = sketch_weight(torch.arange(12.0).reshape(3, 4))
    expected = torch.tensor([2.4005928040, -1.6003952026, 2.9340579510, -0.1778216958, 4.4914965630])
    torch.testing.assert_close(sketch[[2, 3, 4, 31, 32]], expected)


def test_casts_copies_and_pickles() -> None:
    layer = trained(alpha=7 / 3)
    x = torch.randn(5, 40)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)  # it refuses tensors of several dtypes in one memory
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    half = copy.deepcopy(layer).half()
    assert half.scaling == layer.scaling == pytest.approx(1 / 3, rel=1e-12)
    assert half.smoa.ranks.dtype == torch.int32
    assert half.smoa.row_block.dtype == torch.uint8
    assert relative_error(half(x.half()), y.detach()) < 5e-3
    assert relative_error(layer.double()(x.double()), y.detach()) < 1e-6


def test_parameters_are_drawn_after_construction_on_meta() -> None:
    with torch.device("meta"):
        empty = FusedSMoALinear(40, 33, r=7, num_blocks=3, alpha=14)
    assert empty.smoa.A.is_meta
    layer, x = trained(), torch.randn(5, 40)
    loaded = copy.deepcopy(empty).to_empty(device=DEVICE)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x), layer(x))
    drawn = empty.to_empty(device=DEVICE)
    assert drawn.scaling == 2
    drawn.reset_parameters()
    torch.testing.assert_close(drawn(x), F.linear(x, drawn.weight, drawn.bias))
    assert not drawn.weight.requires_grad


def test_scaling_can_be_changed() -> None:
    layer = trained()
    x = torch.randn(5, 40)
    base = F.linear(x, layer.weight, layer.bias)
    update = layer(x) - base
    layer.scaling = 1.0
    torch.testing.assert_close(layer(x) - base, update / 2, rtol=1e-3, atol=1e-5)
    assert layer.alpha == 7
    layer.alpha = 28
    assert layer.scaling == 4
    torch.testing.assert_close(layer(x) - base, update * 2, rtol=1e-3, atol=1e-5)


def test_autocast_rounds_no_update_of_a_weight() -> None:
    layer = trained()
    expected = layer.delta_weight()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(layer.delta_weight(), expected)


def test_each_training_call_draws_a_mask_from_torchs_seed() -> None:
    layer, x = trained(dropout=0.5).train(), torch.randn(64, 40)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(first, layer(x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("order", ["contiguous", "random"])
def test_gradients_are_sums_over_more_tokens_than_float16_can_hold(order: str, dropout: float) -> None:
    x, dy = (
        torch.randn(8192, 16, dtype=torch.float16) / 4 + 4,
        torch.randn(8192, 12, dtype=torch.float16) / 4 + 4,
    )
    settings = {"r": 4, "num_blocks": 2, "block_order": order, "dropout": dropout, "backend": "eager"}
    base, found = nn.Linear(16, 12, dtype=torch.float16), []
    for dtype in (torch.float16, torch.float64):
        layer = FusedSMoALinear.from_linear(copy.deepcopy(base).to(dtype), **settings)
        torch.manual_seed(1)
        for factor in (layer.smoa.A, layer.smoa.B):
            factor.data = torch.randn(factor.shape).to(torch.promote_types(dtype, torch.float32))
        layer.train()(x.to(dtype)).backward(dy.to(dtype))
        found.append((layer.smoa.A.grad.double(), layer.smoa.B.grad.double()))
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 1e-3


def test_a_backward_uses_the_scale_of_its_forward() -> None:
    layer, x, gradients = trained(), torch.randn(3, 40), []
    for scaled_between in (False, True):
        layer.scaling = 0.5
        y = layer(x)
        if scaled_between:
            layer.scaling = 2.0
        layer.smoa.A.grad = None
        y.sum().backward()
        gradients.append(layer.smoa.A.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("order", ["contiguous", "random"])
def test_no_spectrum_is_computed_for_other_orders(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a plain state dict, a new base or labels computes none either; random blocks then come from the file."""
    forbid_spectra(monkeypatch)
    settings = {"block_order": order, "granule": 4, "block_seed": 1}
    layer = trained(**settings)
    assert layer.partition == BlockRule(3, order, 4, 1).build(layer.weight)
    assert layer.partition.granularity == 4
    other = FusedSMoALinear(40, 33, r=7, num_blocks=3, alpha=14, **settings | {"block_seed": 2})
    other.load_state_dict(layer.state_dict())
    assert other.partition == layer.partition
    x = torch.randn(5, 40)
    assert torch.equal(other(x), layer(x))
    other.reset_parameters()
    assert (other.partition == layer.partition) == (order == "contiguous")
    with pytest.warns(UserWarning, match=f"without block labels.*{order} partition was recomputed"):
        other.load_state_dict(nn.Linear(40, 33).state_dict())
    meta = FusedSMoALinear(40, 33, r=7, num_blocks=3, alpha=14, device="meta", **settings)
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), layer(x))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_activations(layout: torch.layout) -> None:
    """A residual is added to them, which takes a nested tensor of the same shape."""
    layer, parts = FusedSMoALinear.from_linear(nn.Linear(8, 8), r=4), [torch.randn(n, 8) for n in (3, 5)]
    nn.init.normal_(layer.smoa.B)
    x = torch.nested.as_nested_tensor(parts, layout=layout)
    for ours, part in zip((x + layer(x)).unbind(), parts, strict=True):
        torch.testing.assert_close(ours, part + layer(part))


@torch.no_grad()
def test_torchs_encoder_calls_it_in_evaluation() -> None:
    """Its fast path reads weights. A stack of layers makes a nested tensor of a padded batch."""
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for layer in stack.layers:
        for name in ("linear1", "linear2"):
            setattr(layer, name, FusedSMoALinear.from_linear(getattr(layer, name), block_order="contiguous"))
            nn.init.normal_(getattr(layer, name).smoa.B)
    found = stack.eval()(x), stack(x, src_key_padding_mask=padding)
    for layer in stack.layers:
        layer.linear1.merge()
        layer.linear2.merge()
    torch.testing.assert_close(found, (stack(x), stack(x, src_key_padding_mask=padding)))


def test_loading_into_a_layer_leaves_others_with_the_same_partition() -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 9)
    partition = BlockPartition.from_weight(base.weight, 2)
    copies, given = (copy.deepcopy(base) for _ in range(2)), {"num_blocks": 2, "partition": partition}
    one, two = (FusedSMoALinear.from_linear(plain, **given) for plain in copies)
    other = FusedSMoALinear(12, 9, num_blocks=2, block_order="random", block_seed=3)
    nn.init.normal_(two.smoa.B)
    before = two(torch.ones(2, 12)), partition.row_block.clone()
    one.load_state_dict(other.state_dict())
    assert one.partition == other.partition
    assert not torch.equal(one.smoa.row_block, two.smoa.row_block)
    assert torch.equal(partition.row_block, before[1])
    assert torch.equal(two(torch.ones(2, 12)), before[0])


def test_a_layer_keeps_its_adapter_but_no_weight_that_is_made_for_a_call() -> None:
    """Tensors that are replaced or changed in place are followed; a computed weight is freed after the call."""
    layer, x = trained(), torch.ones(3, 40)
    y, kept = layer(x), layer.smoa._kept
    assert kept is not None
    assert torch.equal(layer(x), y)
    assert layer.smoa._kept is kept
    layer.weight.data = 2 * layer.weight.data
    assert not torch.equal(layer(x), y)
    layer.smoa.A = nn.Parameter(layer.smoa.A.detach() * 0)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    copied = pickle.loads(pickle.dumps(layer))
    assert torch.equal(copied(x), layer(x))
    layer.smoa._kept = None
    for owner, name in ((layer.smoa, "A"), (layer, "weight")):  # their graph and memory are not kept either
        torch.nn.utils.parametrize.register_parametrization(owner, name, Doubled())
        layer(x)
        assert layer.smoa._kept is None
        torch.nn.utils.parametrize.remove_parametrizations(owner, name, leave_parametrized=False)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@torch.no_grad()
def test_accelerate_offloads_all_of_a_layer() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs the peft extra")
    model, x = nn.Sequential(trained()), torch.ones(3, 40)
    expected = model(x)
    accelerate.cpu_offload(model, DEVICE)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(model(x), expected)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


KINDS = {
    "linear": (FusedSMoALinear.from_linear, lambda: nn.Linear(4, 6), (2, 5, 4)),
    "conv1d": (FusedSMoAConv1d.from_conv, lambda: nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 9)),
    "conv2d": (FusedSMoAConv2d.from_conv, lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 9, 9)),
    "pointwise": (FusedSMoAConv2d.from_conv, lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "conv3d": (
        FusedSMoAConv3d.from_conv,
        lambda: nn.Conv3d(4, 6, 2, padding=1, padding_mode="circular"),
        (2, 4, 5, 5, 5),
    ),
    "embedding": (FusedSMoAEmbedding.from_embedding, lambda: nn.Embedding(9, 6, padding_idx=1), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind(kind: str) -> None:
    """They compute what a plain layer of the weight W0 + ΔW does, and they are saved, loaded, copied and merged."""
    make, plain, shape = KINDS[kind]
    torch.manual_seed(0)
    base = plain().double()
    x = torch.randint(9, (3, 4)) if shape is None else torch.randn(shape).double()
    layer = make(base, r=5, num_blocks=2, alpha=10, dropout=0.5)
    assert isinstance(layer, type(base))
    assert layer.weight is base.weight
    assert layer.training
    assert not make(plain().eval()).training
    assert torch.equal(layer.eval()(x), base(x))
    nn.init.normal_(layer.smoa.B)
    y, expected = layer(x), copy.deepcopy(base)
    with torch.no_grad():
        expected.weight += layer.delta_weight()
    torch.testing.assert_close(y, expected(x), rtol=0, atol=1e-9)
    y.sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is not None] == ["smoa.A", "smoa.B"]
    other = make(copy.deepcopy(base), r=5, num_blocks=2, block_order="random", dropout=0.5)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.eval()(x), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), y, rtol=0, atol=1e-12)
    adapter = {key: value for key, value in layer.state_dict().items() if key.startswith("smoa.")}
    with pytest.raises(ValueError, match="strict_base=True refuses"):
        make(plain().double(), r=5, strict_base=True).load_state_dict(adapter, strict=False)
    with torch.no_grad():
        layer.merge()
        torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-9)
        layer.unmerge()
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.train()(x), y) == (kind == "embedding")
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    with torch.device("meta"):
        meta = make(plain(), r=5, num_blocks=2, dropout=0.5).double()
    loaded = meta.to_empty(device=DEVICE)
    loaded.load_state_dict(other.state_dict())
    torch.testing.assert_close(loaded.eval()(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_of_a_base_that_trains_is_refused(groups: int) -> None:
    layer = FusedSMoAConv2d(4, 6, 3, groups=groups, r=4)
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight must be frozen"):
        layer(torch.randn(2, 4, 5, 5))


def test_constructors_and_refusals_of_other_layers() -> None:
    layer = FusedSMoAConv2d(4, 6, 3, padding=1, r=4, num_blocks=3, alpha=8, dtype=torch.float64)
    assert (layer.padding, layer.block_ranks, layer.scaling) == ((1, 1), (2, 1, 1), 2)
    for given, message in (
        (layer, "without an adapter, got FusedSMoAConv2d"),
        (nn.Conv1d(4, 6, 3), "an nn.Conv2d .* got Conv1d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), "initialised parameter"),
    ):
        with pytest.raises(TypeError, match=message):
            FusedSMoAConv2d.from_conv(given)
    with pytest.raises(ValueError, match="num_blocks must be at most"):
        FusedSMoAEmbedding(9, 4, num_blocks=5, r=5)
    channels_last = nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
    layer = FusedSMoAConv2d.from_conv(channels_last, r=4)
    nn.init.normal_(layer.smoa.B)
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(channels_last(x), y)
