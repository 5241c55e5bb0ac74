"""Merging into a quantised base changes its scales and nothing else."""

import json
import shutil

import numpy as np
import pytest
import torch
from adapted import assert_refused, close, logits
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_bases import FORMATS, LAYERS, edit_json, small_llama, write_adapter, write_base, write_gguf
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from smoa_kernels.adapter import Adapter
from smoa_kernels.adapter_folder import quantized, quantized_formats
from smoa_kernels.backends import eager
from smoa_kernels.cli import main
from smoa_kernels.definition.block_rule import BLOCK_ORDERS, BlockRule
from smoa_kernels.peft import merge_to_folder, merged_weights

every_format = pytest.mark.parametrize("kind", FORMATS)
ENDS = ("weight_scale", "scales", "weight.absmax")  # of the names of scales


def read(kind, tensors):
    method = FORMATS[kind][1]["quant_method"]
    return quantized_formats.FORMATS[method].read(tensors, FORMATS[kind][1])


def assert_rounded_once(actual, scales, multiplier):
    """By thresholds, which may round away from the nearest number. m itself is of float32."""
    scales, limits = scales.double(), torch.finfo(actual.dtype)
    exact = scales * multiplier.double()
    bound = limits.eps * (exact.abs() + limits.smallest_normal) + 2**-21 * scales.abs()
    assert ((actual.double() - exact).abs() <= bound).all()


@pytest.fixture
def folders(tmp_path):
    packed = write_base(tmp_path / "base", "compressed-tensors int4")
    write_adapter(tmp_path / "adapter", packed)
    return tmp_path / "base", tmp_path / "adapter"


@every_format
def test_only_scales_change(kind, tmp_path):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    packed = write_base(base, kind)
    multipliers = write_adapter(adapter, packed)
    report = merge_to_folder(base, adapter, out)
    before, after = (
        {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
        for folder in (base, out)
    )
    # Beside the scales a merge may only remove the scales of scales.
    nested = [name for name in before if ".nested_" in name]
    states = [name for name in before if ".quant_state." in name and nested]
    scales = [name for name in before if name.endswith(ENDS)]
    assert before.keys() - after.keys() == set(nested)
    assert {name for name in after if not equal(before[name], after[name])} == {*scales, *states}
    assert report.changed == len(scales) + len(states)
    for name in LAYERS:
        tensors = {
            key[len(name) + 1 :]: tensor for key, tensor in after.items() if key.startswith(f"{name}.")
        }
        weight, old = read(kind, tensors), packed[name]
        assert_rounded_once(weight.scales, old.scales, multipliers[name])
        assert torch.equal(weight.codes(), old.codes)
        assert torch.equal(weight.dequantize(), old.codes * weight.scales.float()[:, old.groups])
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as first, safe_open(out / file.name, "pt") as second:
            assert first.metadata() == second.metadata()
        assert nested or file.stat().st_size == (out / file.name).stat().st_size
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert all(equal(tensor, after[name]) for name, tensor in merged_weights(base, adapter))


def equal(first, second):
    return first.dtype == second.dtype and torch.equal(first, second)


@every_format
@settings(max_examples=15)
@given(data=st.data())
def test_a_weight_times_its_multiplier(kind, data):
    """Over shapes, groups, blocks, ranks, and adapters whose groups are several of the base's."""
    size = data.draw(st.sampled_from([8, 16, 64]))
    each = data.draw(st.integers(1, 2))  # groups of the base in one of the adapter
    rows, cols = 8 * data.draw(st.integers(1, 5)), size * each * data.draw(st.integers(1, 4))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    packed = FORMATS[kind][0](torch.randn(rows, cols) * 0.05, size)
    weight = read(kind, packed.tensors)
    assert torch.equal(weight.dequantize(), packed.weight)
    groups = packed.groups // each
    in_order = None if torch.equal(groups, groups.sort()[0]) else groups.int()
    blocks = data.draw(st.integers(1, min(3, int(groups.max()) + 1)))
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=blocks, max_size=blocks).filter(any))
    adapter = Adapter((rows, cols), ranks, 0.1, group_size=size * each)
    rule = BlockRule(blocks, data.draw(st.sampled_from(BLOCK_ORDERS)), group_size=size * each)
    adapter.set_groups(in_order)
    adapter.set_blocks(rule.build(packed.weight, in_order))
    adapter.reset(zero=False)
    adapter.requires_grad_(False).B[0] = 0
    multiplier = quantized.group_multiplier(adapter)
    found = quantized.rescale(weight, multiplier, groups)
    assert (found.flipped, found.outside) == (0, 0)
    tensors = packed.tensors | weight.store(found.scales)
    again = read(kind, {key: tensor for key, tensor in tensors.items() if tensor is not None})
    assert torch.equal(again.codes(), packed.codes)
    of_scales = multiplier[:, torch.arange(found.scales.shape[1]) // each]
    assert_rounded_once(again.scales, packed.scales, of_scales)
    assert torch.equal(again.scales[0], packed.scales[0])
    wanted = eager.modulated_weight(adapter.packed(packed.weight)).double()
    error = (again.dequantize() - wanted).abs()
    eps = torch.finfo(found.scales.dtype).eps
    assert (error <= eps * wanted.abs() + 2**-20 * packed.weight.abs()).all()
    with pytest.raises(ValueError, match="the adapter's groups are not the base's, which has"):
        quantized.rescale(weight, multiplier, torch.arange(cols) % (groups.max() + 2))


def test_small_updates_survive_in_half_precision():
    """Below half of a last bit: the mean of many scales moves as far as it should."""
    packed = FORMATS["compressed-tensors int4"][0](torch.ones(64, 512), 8)
    weight = read("compressed-tensors int4", packed.tensors)
    found = quantized.rescale(weight, torch.full([64, 1], 1.0005), packed.groups * 0)
    assert not torch.equal(found.scales, packed.scales)
    assert found.scales.double().mean() / packed.scales.double().mean() == pytest.approx(1.0005, abs=2e-5)


def test_scales_that_leave_their_range_are_counted():
    """What is too large becomes the type's largest number."""
    packed = FORMATS["GPTQ"][0](torch.ones(8, 16), 8)
    multiplier = torch.ones(8, 2)
    multiplier[:2] = torch.tensor([[-1.0, 1e9], [-1e9, 1e-9]])
    found = quantized.rescale(read("GPTQ", packed.tensors), multiplier, packed.groups)
    assert (found.flipped, found.outside) == (2, 3)
    assert found.scales[0, 1] == -found.scales[1, 0] == torch.finfo(torch.float16).max


@pytest.mark.parametrize("kind", ["GPTQ", "Q4_0"])
def test_scales_that_change_their_sign_are_counted(kind, tmp_path):
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter"
    weights = write_gguf(base) if kind == "Q4_0" else write_base(base := tmp_path / "base", kind)
    multipliers = write_adapter(adapter, weights, scale=1.0)
    flipped = sum(int((each < 0).sum()) for each in multipliers.values())
    with pytest.warns(UserWarning, match=f"{flipped} of the base's scales changed their sign") as caught:
        assert merge_to_folder(base, adapter, tmp_path / "out").flipped == flipped
    assert caught[0].filename == __file__


def edited(**values):
    """The base in another format."""
    return lambda base, adapter: edit_json(base / "config.json", quantization_config=values)


def scheme(name="pack-quantized", bits=4):
    group = {"weights": {"num_bits": bits}, "format": name}
    return edited(quant_method="compressed-tensors", config_groups={"group_0": group})


def changed(**tensors):
    """Tensors of the first layer are replaced, or removed where None."""

    def prepare(base, adapter):
        index = base / "model.safetensors.index.json"
        files = json.loads(index.read_text())["weight_map"]
        for end, tensor in tensors.items():
            name = f"{LAYERS[0]}.{end}"
            path = base / files[name]
            state = load_file(path) | {name: tensor}
            if tensor is None:
                del state[name], files[name]
                edit_json(index, weight_map=files)
            save_file(state, path)

    return prepare


def cut(base, adapter):
    path = base / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def factor_of_nan(base, adapter):
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    state[f"base_model.model.{LAYERS[0]}.smoa.B"][1, 0] = torch.nan
    save_file(state, path)


def other_groups(base, adapter):
    shutil.rmtree(adapter)
    write_adapter(adapter, {name: small_llama().get_submodule(name).weight.data for name in LAYERS}, size=16)


def other_base(base, adapter):
    shutil.rmtree(base)
    write_base(base, "compressed-tensors int4", seed=1)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (other_groups, "the adapter's groups are not the base's, which has 4 scales for the 128 columns"),
        (other_base, "the adapter was trained on another base weight"),
        (
            edited(quant_method="mxfp4"),
            "is quantised (mxfp4): its scales are powers of two. Merge into the model",
        ),
        (edited(quant_method="fp8"), "its scales are of rows and columns together"),
        (edited(quant_method="aqlm"), "the format 'aqlm' is not read"),
        (edited(quant_method="bitsandbytes"), "weights of 8 bits are not read, only of 4"),
        (edited(quant_method="gptq", bits=3), "weights of 3 bits are not read"),
        (edited(quant_method="gptq", bits=4, checkpoint_format="marlin"), "the format 'marlin' is not read"),
        (edited(quant_method="gptq"), "its quantization_config cannot be read: KeyError('bits')"),
        (edited(quant_method="awq", bits=4, format="gemv"), "the format 'gemv' is not read"),
        (edited(quant_method="awq", bits=8, version="GEMM"), "weights of 8 bits are not read"),
        (scheme("nvfp4-pack-quantized"), "its scales have three bits"),
        (scheme("int-quantized"), "the format 'int-quantized' is not read"),
        (scheme(bits=3), "weights of 3 bits are not read"),
        (
            changed(weight_shape=None),
            "q_proj.weight: the tensors of a quantised layer do not fit each other: weight_",
        ),
        (changed(weight_shape=torch.tensor([64, 72])), "it has shape (64, 72) in the base, and (64, 64) in"),
        (changed(weight_packed=torch.zeros(64, 7, dtype=torch.int32)), "do not hold 64 integers of 4 bits"),
        (changed(weight_scale=torch.zeros(63, 2)), "it has shape (63, 64) in the base"),
        (changed(weight_scale=torch.zeros(64, 2).int()), "scales are torch.int32 (64, 2)"),
        (changed(weight_scale=None), "q_proj.weight, which the adapter changes"),
        (cut, "b.safetensors is truncated or corrupt"),
        (factor_of_nan, "the merged scales hold NaN or Inf"),
    ],
)
def test_refused_and_nothing_is_left(prepare, message, folders, tmp_path, capsys):
    prepare(*folders)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(capsys, merge_command, message, *folders, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def merge_command(*given):
    return main(["merge", *map(str, given)])


def test_inspecting_over_a_quantised_base(folders, capsys):
    base, adapter = map(str, folders)
    assert main(["inspect", adapter, "--base", base]) == 0
    assert "✓ every layer fits" in capsys.readouterr().out
    other_base(*folders)
    assert main(["inspect", adapter, "--base", base]) == 1
    assert f"✗ {len(LAYERS)} of {len(LAYERS)} layers do not fit" in capsys.readouterr().out


def test_refused_dtype(folders, tmp_path):
    with pytest.raises(ValueError, match="dtype must be None for a quantised base"):
        merge_to_folder(*folders, tmp_path / "out", dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_gguf(kind, tmp_path, tokens):
    """The file differs in its scales only; the rows of queries and keys, which its converter moves, are found."""
    gguf = pytest.importorskip("gguf", reason="not installed")
    base, adapter, out = tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out"
    weights = write_gguf(base, kind)
    multipliers = write_adapter(adapter, weights)
    report = merge_to_folder(base, adapter, out)
    assert (report.files, report.changed) == (("base.gguf",), len(weights))
    before, after = gguf.GGUFReader(base), gguf.GGUFReader(out / "base.gguf")
    scales = np.zeros(len(before.data), bool)
    for old in before.tensors:
        first, size = old.data_offset, gguf.GGML_QUANT_SIZES[old.tensor_type][1]
        if old.tensor_type.name == kind:
            scales[first : first + old.n_bytes].reshape(-1, size)[:, :2] = True
    changed = before.data != after.data
    assert changed.any()
    assert not (changed & ~scales).any()
    merged = AutoModelForCausalLM.from_pretrained(out, gguf_file="base.gguf").eval()
    assert_is_modulated(merged, weights, multipliers, adapter, tokens, torch.finfo(torch.float16).eps)


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("Q4_1", bytes, "base.gguf is Q4_1, whose scales cannot be multiplied: only Q4_0 and Q8_0 are read"),
        ("Q4_0", lambda data: data[:-64], "is truncated or no GGUF file of a known model"),
        ("Q4_0", lambda data: data[:64], "is truncated or no GGUF file of a known model"),
        (
            "Q4_0",
            lambda data: data.replace(b"llama", b"lamma"),
            "is truncated or no GGUF file of a known model",
        ),
        (
            "Q4_0",
            lambda data: data.replace(b"blk.1.attn_q", b"blk.7.attn_q"),
            "has no tensor of it: blk.1.attn_q",
        ),
        (
            "Q8_0",
            lambda data: data[: len(data) // 2] + bytes(-(-len(data) // 2)),
            "trained on another base weight",
        ),
    ],
)
def test_refused_gguf(kind, edit, message, tmp_path, capsys):
    base = tmp_path / "base.gguf"
    write_adapter(tmp_path / "adapter", write_gguf(base, kind))
    base.write_bytes(edit(base.read_bytes()))
    before = sorted(tmp_path.rglob("*"))
    assert_refused(capsys, merge_command, message, base, tmp_path / "adapter", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def assert_is_modulated(merged, weights, multipliers, adapter, tokens, eps):
    """A merged model that transformers has dequantised: its weights against W0 ∘ m, its logits against the adapter's
    beside the base."""
    model, found = small_llama(), merged.state_dict()
    with torch.no_grad():
        for layer, W0 in weights.items():
            size = W0.shape[1] // multipliers[layer].shape[1]
            wanted = W0 * multipliers[layer].repeat_interleave(size, 1)
            assert ((found[f"{layer}.weight"] - wanted).abs() <= eps * wanted.abs() + 2**-21 * W0.abs()).all()
            model.get_submodule(layer).weight.copy_(W0)
        unmerged = PeftModel.from_pretrained(model, adapter).eval()
        close(logits(merged, tokens), logits(unmerged, tokens), 8 * eps + 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "nf4, double", "fp4"])
def test_bitsandbytes(kind, tmp_path, tokens):
    """Written by transformers and bitsandbytes, merged, and loaded by them."""
    from quantized_bases import bnb, load

    small_llama().save_pretrained(tmp_path / "plain")
    base = load(tmp_path / "plain", kind)
    base.save_pretrained(tmp_path / "base")
    layers = {name: each for name, each in base.named_modules() if isinstance(each, bnb.nn.Linear4bit)}
    weights = {
        name: bnb.functional.dequantize_4bit(each.weight.data, each.weight.quant_state).float()
        for name, each in layers.items()
    }
    multipliers = write_adapter(tmp_path / "adapter", weights, size=64)
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert isinstance(merged.get_submodule(LAYERS[0]), bnb.nn.Linear4bit)
    eps = torch.finfo(torch.float32).eps
    assert_is_modulated(merged.dequantize(), weights, multipliers, tmp_path / "adapter", tokens, eps)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind.startswith("compressed")])
def test_compressed_tensors(kind, tmp_path, tokens):
    """The tensors are those that the package makes of these scales, and transformers loads the merged model."""
    pytest.importorskip("compressed_tensors", reason="not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    packed = write_base(tmp_path / "base", kind)
    scheme = QuantizationScheme(**FORMATS[kind][1]["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, layer in packed.items():
        zeros = {} if layer.zeros is None else {"weight_zero_point": layer.zeros.to(torch.int8)}
        weight = small_llama().get_submodule(name).weight.data
        made = compressor.compress({"weight": weight, "weight_scale": layer.scales, **zeros}, scheme)
        assert made.keys() == layer.tensors.keys()
        assert all(equal(made[end], layer.tensors[end]) for end in made)
    multipliers = write_adapter(tmp_path / "adapter", packed)
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    weights = {name: each.weight for name, each in packed.items()}
    eps = 2 * torch.finfo(torch.bfloat16).eps
    assert_is_modulated(merged.eval(), weights, multipliers, tmp_path / "adapter", tokens, eps)
