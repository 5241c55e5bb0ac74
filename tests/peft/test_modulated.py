"""Convolutions, embeddings and `nn.MultiheadAttention` with adapters, beside PEFT's HiRA and merged weights."""

import copy
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from adapted import close, layer_list, logits
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny_models import tiny_llama
from torch import nn

from smoa_kernels import FusedSMoAConv2d, FusedSMoAEmbedding
from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.peft import SMoAConfig, convert_adapter, hotswap, merge_to_folder, merged_weights


class Same(nn.Conv2d):
    """A convolution with a forward of its own, as those of image models that pad by themselves."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class Standardised(nn.Conv2d):
    """A convolution whose forward is torch's and calls this."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Positions(nn.Embedding):
    """An embedding that computes its indices."""

    def forward(self, x):
        return super().forward((x + 3) % self.num_embeddings)


class Scaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, x):
        return super().forward(x) * self.embed_scale


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)

    def forward(self, x):
        return self.attention(x, x[..., : self.attention.kdim], x[..., : self.attention.vdim])[0]


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, bias=False), (3, 4, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (3, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2), (3, 4, 5, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 6, padding_idx=2), None),
}
OTHERS = {
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="reflect"), (3, 4, 9, 9)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), (3, 4, 9)),
    "own forward": (lambda: Same(4, 6, 2), (3, 4, 5, 5)),
    "own convolution": (lambda: Standardised(4, 6, 3, padding=1), (2, 4, 4, 4)),
    "positions": (lambda: Positions(9, 6), None),
    "scaled": (lambda: Scaled(9, 6), None),
    "attention": (Attention, (3, 5, 8)),
    "three projections": (lambda: Attention(kdim=6, vdim=4), (3, 5, 8)),
}
every_layer = pytest.mark.parametrize("kind", [*LAYERS, *OTHERS])


def made(kind, dtype=torch.float64):
    torch.manual_seed(0)
    make, shape = {**LAYERS, **OTHERS}[kind]
    x = torch.randint(9, (3, 5)) if shape is None else torch.randn(shape, dtype=dtype)
    return nn.Sequential(make()).to(dtype).eval(), x


def stored(base, folder):
    """A folder of a base, as transformers would write it."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(base.state_dict(), folder / "model.safetensors")
    return folder


def adapt(base, name="default", **settings):
    target = ["attention"] if isinstance(base[0], Attention) else ["0"]
    given = {"r": 5, "init_weights": False, "target_modules": target, **settings}
    return get_peft_model(base, SMoAConfig(**given), adapter_name=name).eval()


@pytest.mark.parametrize("kind", LAYERS)
def test_with_one_block_it_is_and_is_written_as_pefts_hira(kind, tmp_path):
    """HiRA has no scale: s is multiplied into B. Of an embedding it counts W0 transposed."""
    base, x = made(kind)
    with torch.no_grad():
        base[0].weight[2] = 0  # the row that padding_idx keeps
    ours = adapt(copy.deepcopy(base), num_blocks=1, smoa_alpha=10)
    ours.save_pretrained(tmp_path / "smoa")
    with pytest.raises(
        ValueError, match=r"base must be given: .* 0 is not linear: HiRA's factors have shapes"
    ):
        convert_adapter(tmp_path / "smoa", tmp_path / "hira")
    assert not (tmp_path / "hira").exists()
    stored(base, tmp_path / "base")
    assert convert_adapter(tmp_path / "smoa", tmp_path / "hira", tmp_path / "base") == "HiRA"
    pefts = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "hira", is_trainable=True)
    assert not torch.equal(pefts(x), base(x))
    found = []
    for model in (ours, pefts):
        given = x.clone().requires_grad_(x.is_floating_point())
        y = model(given)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        factors = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append([y, given.grad, *(factors[name] for name in sorted(factors))])
    if kind == "embedding":
        found[1][2:] = found[1][3].T, found[1][2].T
    scale = layer_list(ours)[0].scaling["default"]
    assert (found[0][1] is None) == (kind == "embedding")
    for gradient, s, theirs in zip(found[0], (1, 1, 1, scale), found[1], strict=True):
        if theirs is not None:
            torch.testing.assert_close(gradient, s * theirs.view_as(gradient), rtol=0, atol=1e-9)


@every_layer
@torch.no_grad()
def test_train_save_load_merge(kind, tmp_path):
    base, x = made(kind)
    model = adapt(copy.deepcopy(base))
    with torch.enable_grad():
        model.train()(x).square().mean().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    y = model.eval()(x)
    assert not torch.allclose(y, base(x))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(x), y)
    with model.disable_adapter():
        close(model(x), base(x), 1e-12)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for layer in layer_list(model):
        assert layer.get_delta_weight("default").shape == layer._stored_weight().shape
    model.merge_adapter(safe_merge=True)
    close(model(x), y, 1e-12)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    hotswap(model, tmp_path)
    assert torch.equal(model(x), y)
    merged = loaded.merge_and_unload()
    assert {name: p.shape for name, p in merged.named_parameters()} == {
        name: p.shape for name, p in base.named_parameters()
    }
    close(merged(x), y, 1e-12)
    close(model.unload()(x), base(x), 1e-12)


@every_layer
@torch.no_grad()
def test_several_adapters_add_up(kind):
    """Their blocks differ."""
    base, x = made(kind)
    model = adapt(copy.deepcopy(base), num_blocks=2)
    targets = model.peft_config["default"].target_modules
    model.add_adapter("other", SMoAConfig(r=3, num_blocks=3, init_weights=False, target_modules=targets))
    model.base_model.set_adapter(["default", "other"])
    y = model.eval()(x)
    close(model.merge_and_unload()(x), y, 1e-12)


@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
@torch.no_grad()
def test_weighted_sums(kind, tmp_path):
    base, x = made(kind)
    model = adapt(copy.deepcopy(base))
    model.base_model.add_weighted_adapter(["default"], [2.0], "twice")
    model.set_adapter("twice")
    y = model.eval()(x)
    if kind == "conv2d":  # linear in the weight
        model.set_adapter("default")
        close(y - base(x), 2 * (model(x) - base(x)), 1e-9)
    model.save_pretrained(tmp_path, selected_adapters=["twice"])
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "twice").eval()(x), y)


@pytest.mark.parametrize("kind", ["conv2d", "own forward", "embedding"])
@torch.no_grad()
def test_a_batch_takes_an_adapter_for_each_sample(kind):
    base, x = made(kind)
    model = adapt(copy.deepcopy(base))
    y = model(x, adapter_names=["default", "__base__", "default"])
    close(y, torch.stack([model(x)[0], base(x)[1], model(x)[2]]), 1e-12)


@pytest.mark.parametrize("kind", ["conv1d", "pointwise", "groups", "own forward"])
def test_dropout_is_of_the_adapters_input_alone(kind):
    base, x = made(kind)
    model = adapt(copy.deepcopy(base), smoa_dropout=0.5).train()
    layer = layer_list(model)[0]
    seed = torch.get_rng_state()
    y = model(x)
    y.sum().backward()
    assert layer.smoa["default"].A.grad.abs().max() > 0
    torch.set_rng_state(seed)
    dropped = F.dropout(x, 0.5)
    with torch.no_grad():
        update = model.eval()(dropped) - base(dropped)
        close(y, base(x) + update, 1e-9)


def test_an_embedding_reads_no_padding_of_the_factors_and_keeps_its_options():
    """Ranks differ, so A and B have rows that belong to no block's rank."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(12, 8, padding_idx=1, sparse=True))
    model = adapt(copy.deepcopy(base), num_blocks=3, block_ranks=[4, 0, 1])
    adapter, x = layer_list(model)[0].smoa["default"], torch.tensor([[1, 3, 3, 7], [0, 1, 11, 4]])
    y = model(x)
    with torch.no_grad():
        outside = torch.arange(4)[:, None] >= adapter.ranks[adapter.col_block.long()]
        adapter.A.masked_fill_(outside, torch.nan)
        adapter.B.masked_fill_(torch.arange(4) >= adapter.ranks[adapter.row_block.long()][:, None], torch.nan)
    assert torch.equal(model(x), y)
    model(x).sum().backward()
    grad = adapter.B.grad
    assert grad.is_sparse
    assert grad.to_dense()[1].abs().sum() == 0  # padding_idx
    assert torch.isfinite(adapter.A.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rows_of_a_half_type_are_rounded_as_the_merged_weight(dtype):
    base = nn.Sequential(nn.Embedding(300, 64)).to(dtype)
    model, x = adapt(base, num_blocks=4), torch.randint(300, (50, 7))
    y = model(x)
    model.merge_adapter()
    assert (model(x) == y).double().mean() > 0.999  # a sum near its threshold may fall on either side


@torch.no_grad()
def test_an_attentions_weights_have_settings_of_their_own(tmp_path):
    """In a file they are layers, whose settings are found by their names."""
    base, x = made("attention")
    patterns = {"rank_pattern": {"out_proj": 2}, "num_blocks_pattern": {"attention.in_proj": 3}}
    model = adapt(copy.deepcopy(base), use_lora_rate=True, smoa_alpha=3, **patterns)
    in_proj, out_proj = (layer.smoa["default"] for layer in layer_list(model))
    assert (in_proj.block_ranks, out_proj.block_ranks) == ((2, 2, 1), (1, 1))
    assert float(in_proj.scaling) != float(out_proj.scaling)
    y = model(x)
    for folder in (tmp_path / "first", tmp_path / "second"):  # what was loaded is saved as it was
        model.save_pretrained(folder)
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        assert torch.equal(model(x), y)
    with pytest.warns(RuntimeWarning, match=r"alpha_pattern keys did not match .* \['attention'\]"):
        adapt(copy.deepcopy(base), alpha_pattern={"attention": 9})


def test_an_attention_takes_neither_sums_nor_an_adapter_for_each_sample():
    base, x = made("attention")
    model = adapt(base)
    with pytest.raises(ValueError, match=r"adapters of nn\.MultiheadAttention cannot be combined"):
        model.base_model.add_weighted_adapter(["default"], [2.0], "twice")
    assert [*model.peft_config] == ["default"]
    with pytest.raises(ValueError, match=r"adapted, or an nn\.MultiheadAttention"):
        model(x, adapter_names=["default"] * 3)


def test_a_vision_transformer(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16
    )
    config.patch_size = 4
    torch.manual_seed(0)
    base, pixels = transformers.ViTModel(config, add_pooling_layer=False), torch.randn(2, 3, 16, 16)
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    attention = ["query", "value"] if "query" in names else ["q_proj", "v_proj"]
    base.save_pretrained(tmp_path / "base")

    def call(model):
        return model(pixels).last_hidden_state

    config = SMoAConfig(r=4, target_modules=["patch_embeddings.projection", *attention])
    model = get_peft_model(copy.deepcopy(base), config).train()
    call(model).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    torch.optim.AdamW(trained, 1e-2).step()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        y = call(model.eval())
        assert not torch.allclose(y, call(base.eval()))
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
        assert torch.equal(call(loaded), y)
        close(call(loaded.merge_and_unload()), y, 1e-4)
    report = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert report.fits
    assert report.layers[0].shape == (32, 48)
    assert merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged").changed == 5
    merged = transformers.ViTModel.from_pretrained(tmp_path / "merged", add_pooling_layer=False).eval()
    with torch.no_grad():
        close(call(merged), y, 1e-4)


def test_a_merged_folder_of_an_attention(tmp_path):
    """`in_proj_weight` is a parameter of the attention itself."""
    base = made("attention")[0]
    model = adapt(copy.deepcopy(base))
    model.save_pretrained(tmp_path / "adapter")
    folder = stored(base, tmp_path / "base")
    assert inspect_adapter(tmp_path / "adapter", folder).fits
    merged = dict(merged_weights(folder, tmp_path / "adapter"))
    expected = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_diffusion_example(kind, tmp_path):
    pytest.importorskip("diffusers", reason="the example needs it: pip install diffusers")
    import diffusion

    losses, error = diffusion.main(kind, tmp_path, steps=12)
    assert losses[-1] < 0.9 * losses[0]
    assert error < 1e-5
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head", "q_proj"]])
def test_a_tied_weight_is_not_merged_in_place(targets, tokens, tmp_path):
    """The other module would compute with W_eff too, and unmerging could not give both back.

    As over PEFT's HiRA a module without an adapter multiplies by W0; unloading gives merged ones memory of their own.
    """

    def base():
        return tiny_llama(tie_word_embeddings=True)

    config = SMoAConfig(r=4, target_modules=targets, init_weights=False)
    model = get_peft_model(base(), config).eval()
    embedding, head = model.get_input_embeddings(), model.base_model.model.lm_head
    weight = getattr(head, "base_layer", head).weight
    assert weight is getattr(embedding, "base_layer", embedding).weight
    before, expected = weight.clone(), logits(model, tokens)
    message = rf"{targets[0]}: the adapted weight is tied.*merge_and_unload\(\) unties them"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter()
    assert not any(layer.merged for layer in layer_list(model))
    assert torch.equal(weight, before)
    assert torch.equal(logits(model, tokens), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, strict_base=True).eval()
    assert torch.equal(logits(loaded, tokens), expected)
    unloaded = model.merge_and_unload()
    close(logits(unloaded, tokens), expected)
    for name, module in (("embed_tokens", unloaded.model.embed_tokens), ("lm_head", unloaded.lm_head)):
        assert torch.equal(module.weight, before) == (name not in targets)


@pytest.mark.parametrize("targets", [["emb", "head"], ["emb"]])
def test_a_tied_weight_of_any_module_is_not_merged_in_place(targets):
    base = nn.Sequential(OrderedDict(emb=nn.Embedding(20, 8), head=nn.Linear(8, 20, bias=False)))
    base.head.weight = base.emb.weight
    model, x = adapt(base, target_modules=targets, granule=4), torch.arange(5)
    before, expected = base.head.weight.clone(), model(x)
    with pytest.raises(ValueError, match=r"emb: the adapted weight is tied"):
        model.merge_adapter()
    assert torch.equal(model(x), expected)
    assert torch.equal(base.head.weight, before)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_a_layer_with_a_second_name_is_not_merged():
    base = nn.Sequential(OrderedDict(a=nn.Linear(8, 8), twice=nn.Identity()))
    base.twice = base.a  # PEFT adapts the first alone
    model, x = adapt(base, target_modules=["a"]), torch.randn(3, 8)
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"a: its base layer has a second name"):
            merge()
        assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.unload()(x), base.twice(base.twice(x)))


STATES = ["trained", "no_grad", "merged", "disabled", "frozen"]  # of linear layers torch refuses the first


@pytest.mark.parametrize(
    ("targets", "state"),
    [
        *((targets, state) for targets in (["self_attn"], ["self_attn", "linear1"]) for state in STATES),
        *(pytest.param(["linear1", "linear2"], s, marks=pytest.mark.numerical) for s in STATES[1:]),
    ],
)
def test_torchs_encoder_computes_with_what_is_adapted(targets, state):
    """Its fast path reads weights. Without gradients it makes a nested tensor of a padded batch."""
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def outputs(model):
        with torch.set_grad_enabled(state != "no_grad"):
            padded = model(x, src_key_padding_mask=padding)
            return model(x), padded[0], padded[1, :3]

    plain = outputs(stack)
    config = SMoAConfig(r=4, target_modules=targets, init_weights=False)
    model = get_peft_model(stack, config).eval()
    if state in ("merged", "disabled", "frozen"):  # then nothing trains
        model.requires_grad_(False)
    merged = outputs(copy.deepcopy(model).merge_and_unload())
    assert not torch.allclose(merged[0], plain[0], atol=1e-2)
    if state == "merged":
        model.merge_adapter()
    with model.disable_adapter() if state == "disabled" else nullcontext():
        torch.testing.assert_close(outputs(model), plain if state == "disabled" else merged)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_computed_weight_is_not_merged(norm):
    """The next forward would compute it from the old parameters."""
    base = nn.Sequential(OrderedDict(conv=norm(nn.Conv1d(4, 6, 3))))
    model = get_peft_model(base, SMoAConfig(target_modules=["conv"]))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="the base weight is computed anew in each forward"):
            merge()


def test_gradients_through_a_convolution_of_a_class_of_its_own():
    base, x = made("own convolution")
    assert torch.autograd.gradcheck(adapt(base), x.requires_grad_())
    with pytest.raises(
        TypeError, match=r"conv must be an nn\.Conv2d with the forward of that class .* Standardised"
    ):
        FusedSMoAConv2d.from_conv(made("own convolution")[0][0])


def test_a_small_update_survives_dropout_in_a_convolution_with_its_own_forward():
    torch.manual_seed(0)
    (layer,) = layer_list(adapt(nn.Sequential(Same(4, 6, 2).bfloat16()), smoa_dropout=0.2))
    layer.scaling["default"] = 1e-3
    y = layer.train()._adapter_output(torch.ones(1, 4, 9, 9, dtype=torch.bfloat16), "default")
    assert y.norm() > 0


def test_an_embedding_that_renorms_its_weight_is_refused_and_one_index_is_taken():
    for build in (FusedSMoAEmbedding.from_embedding, lambda plain: FusedSMoAEmbedding(9, 6, max_norm=0.5)):
        with pytest.raises(ValueError, match=r"must have max_norm=None, got 0\.5"):
            build(nn.Embedding(9, 6, max_norm=0.5))
    assert FusedSMoAEmbedding(9, 6)(torch.tensor(3)).shape == (6,)
    assert adapt(nn.Sequential(nn.Embedding(9, 6)))(torch.tensor(3)).shape == (6,)


def test_an_attention_is_not_written_as_hira(tmp_path):
    base, _ = made("attention")
    adapt(copy.deepcopy(base), num_blocks=1).save_pretrained(tmp_path / "smoa")
    stored(base, tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"lacks 0\.attention\.in_proj\.weight of .* HiRA adapts convolutions and embeddings"
    ):
        convert_adapter(tmp_path / "smoa", tmp_path / "hira", tmp_path / "base")
    assert not (tmp_path / "hira").exists()


def test_a_configuration_that_is_handed_over_in_loading_stays_that_object(tmp_path):
    base, x = made("conv2d")
    model = adapt(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    config = SMoAConfig(r=5, target_modules=["0"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert config.not_linear == ["0"]
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2e-4), (torch.float16, 3e-5)])
@pytest.mark.parametrize("kind", ["plain", "groups", "own forward, dropout", "attention"])
def test_a_small_update_survives_autocast(kind, dtype, size):
    """W0 in float32 may lie on the half type's grid, where rounding W_eff to nearest would undo it."""
    torch.manual_seed(0)
    make, settings = {
        "plain": (lambda: nn.Conv2d(32, 64, 3, bias=False), {}),
        "groups": (lambda: nn.Conv2d(64, 64, 3, groups=2, bias=False), {}),
        "own forward, dropout": (lambda: Same(32, 64, 2, bias=False), {"smoa_dropout": 1e-6}),
        "attention": (lambda: nn.MultiheadAttention(64, 1, batch_first=True), {}),
    }[kind]
    base = nn.Sequential(make())
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype).float()
    layer = get_peft_model(base, SMoAConfig(r=4, target_modules=["0"], init_weights=False, **settings))
    layer = layer.train().base_model.model[0]
    for adapted in layer.weights.values() if kind == "attention" else [layer]:
        W0, delta = adapted._stored_weight(), adapted.get_delta_weight("default")
        adapted.scaling["default"] *= size * float(W0.norm() / delta.norm())
    shape = (16, 100, 64) if kind == "attention" else (8, layer.base_layer.in_channels, 16, 16)
    x = torch.randn(shape).to(dtype).float()

    def update(call, x):
        if kind == "own forward, dropout":
            return call._adapter_output(x, "default")
        adapted = call(*[x] * 3)[0] if kind == "attention" else call(x)
        plain = call.base_layer(*[x] * 3)[0] if kind == "attention" else call.base_layer(x)
        return adapted - plain

    with torch.no_grad():
        expected = update(copy.deepcopy(layer).double(), x.double())
        with torch.autocast("cpu", dtype):
            found = update(layer, x).double()
    assert (found * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.3)
    with torch.autocast("cpu", dtype):
        y = layer(*[x] * 3)[0] if kind == "attention" else layer(x)
    y.float().square().mean().backward()
    assert all(p.grad.dtype == p.dtype for p in layer.parameters() if p.requires_grad)
