"""Merging into a quantised base changes its scales and nothing else."""

import json
import os
import signal

import pytest
import torch
from adapted import assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_bases import FORMATS, LAYERS, edit_json, small_llama, write_adapter, write_base
from processes import killed
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smoa_kernels.adapter_folder import quantized
from smoa_kernels.cli import main
from smoa_kernels.peft import merge_to_folder, merged_weights

every_format = pytest.mark.parametrize("kind", FORMATS)
SCALES = {
    "compressed-tensors": "weight_scale",
    "gptq": "scales",
    "awq": "scales",
    "bitsandbytes": "weight.absmax",
}


def read(kind, tensors):
    method = FORMATS[kind][1]["quant_method"]
    return quantized.FORMATS[method].read(tensors, FORMATS[kind][1])


def assert_rounded_once(actual, exact):
    """By thresholds, which may round away from the nearest number."""
    limits = torch.finfo(actual.dtype)
    error = (actual.double() - exact.double()).abs()
    assert (error <= limits.eps * exact.double().abs() + limits.smallest_normal * limits.eps).all()


@pytest.fixture
def folders(tmp_path):
    packed = write_base(tmp_path / "base", "compressed-tensors int4")
    write_adapter(tmp_path / "adapter", {name: packed[name].weight for name in LAYERS})
    return tmp_path / "base", tmp_path / "adapter"


@every_format
def test_only_scales_change(kind, tmp_path):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    packed = write_base(base, kind)
    multipliers = write_adapter(adapter, {name: packed[name].weight for name in LAYERS})
    if "act-order" in kind:
        with pytest.raises(ValueError, match="the adapter's groups are not the base's.*group_size=\"base\""):
            merge_to_folder(base, adapter, out)
        return
    report = merge_to_folder(base, adapter, out)
    before, after = (
        {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
        for folder in (base, out)
    )
    # Beside the scales a merge may only remove the scales of scales.
    nested = [name for name in before if ".nested_" in name]
    states = [name for name in before if ".quant_state." in name and nested]
    end = SCALES[FORMATS[kind][1]["quant_method"]]
    scales = [f"{name}.{end}" for name in LAYERS]
    assert before.keys() - after.keys() == set(nested)
    assert {name for name in after if not equal(before[name], after[name])} == {*scales, *states}
    assert report.changed == len(scales) + len(states)
    for name in LAYERS:
        tensors = {
            key.removeprefix(f"{name}."): value for key, value in after.items() if key.startswith(f"{name}.")
        }
        weight, old = read(kind, tensors), packed[name]
        assert_rounded_once(weight.scales, old.scales.float() * multipliers[name])
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
    """Over shapes, groups, and adapters whose groups are several of the base's."""
    size = data.draw(st.sampled_from([8, 16, 64]))
    each = data.draw(st.integers(1, 2))  # groups of the base in one of the adapter
    rows, cols = 8 * data.draw(st.integers(1, 5)), size * each * data.draw(st.integers(1, 4))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    packed = FORMATS[kind][0](torch.randn(rows, cols) * 0.05, size)
    weight = read(kind, packed.tensors)
    assert torch.equal(weight.dequantize(), packed.weight)
    groups = packed.groups // each
    multiplier = 1 + 0.1 * torch.randn(rows, int(groups.max()) + 1)
    multiplier[0] = 1
    found = quantized.rescale(weight, multiplier, groups)
    assert (found.flipped, found.outside) == (0, 0)
    tensors = packed.tensors | weight.store(found.scales)
    again = read(kind, {key: tensor for key, tensor in tensors.items() if tensor is not None})
    assert torch.equal(again.codes(), packed.codes)
    assert_rounded_once(
        again.scales, packed.scales.float() * multiplier[:, torch.arange(len(found.scales[0])) // each]
    )
    assert torch.equal(again.scales[0], packed.scales[0])
    with pytest.raises(ValueError, match="the adapter's groups are not the base's, which has"):
        quantized.rescale(weight, multiplier, torch.arange(cols) % (groups.max() + 2))


@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_a_row(bits):
    """Channels: an adapter with one column of A."""
    packed = FORMATS[f"compressed-tensors int{bits}"][0](torch.randn(8, 40), None)
    weight = read(f"compressed-tensors int{bits}", packed.tensors)
    assert torch.equal(weight.dequantize(), packed.weight)
    found = quantized.rescale(weight, torch.full([8, 1], 1.25), torch.zeros(40, dtype=torch.long))
    assert_rounded_once(found.scales, packed.scales * 1.25)


def test_small_updates_survive_in_half_precision():
    """Below half of a last bit: the mean of many scales moves as far as it should."""
    packed = FORMATS["compressed-tensors int4"][0](torch.ones(64, 512), 8)
    found = quantized.rescale(
        read("compressed-tensors int4", packed.tensors), torch.full([64, 1], 1.0005), packed.groups * 0
    )
    assert not torch.equal(found.scales, packed.scales)
    assert found.scales.double().mean() / packed.scales.double().mean() == pytest.approx(1.0005, abs=2e-5)


def test_scales_that_leave_their_range_or_change_sign(tmp_path):
    """Counted and warned of; what is too large becomes the type's largest number."""
    packed = FORMATS["GPTQ"][0](torch.ones(8, 16), 8)
    multiplier = torch.ones(8, 2)
    multiplier[0] = torch.tensor([-1.0, 1e9])
    multiplier[1] = torch.tensor([-1e9, 1e-9])
    found = quantized.rescale(read("GPTQ", packed.tensors), multiplier, packed.groups)
    assert (found.flipped, found.outside) == (2, 3)
    assert found.scales[0, 1] == -found.scales[1, 0] == torch.finfo(torch.float16).max
    base = write_base(tmp_path / "base", "GPTQ")
    multipliers = write_adapter(tmp_path / "adapter", {name: base[name].weight for name in LAYERS}, scale=1.0)
    flipped = sum(int((each < 0).sum()) for each in multipliers.values())
    with pytest.warns(
        UserWarning, match=f"{flipped} of the base's scales changed their sign, and 0 left the range"
    ):
        assert merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").flipped == flipped


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
            state = load_file(base / files[name])
            state[name] = tensor
            if tensor is None:
                del state[name], files[name]
                edit_json(index, weight_map=files)
            save_file(state, base / files.get(name, "a.safetensors"))

    return prepare


def cut(base, adapter):
    path = base / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def other_groups(base, adapter):
    for path in adapter.iterdir():
        path.unlink()
    adapter.rmdir()
    write_adapter(adapter, {name: small_llama().get_submodule(name).weight.data for name in LAYERS}, size=16)


def other_base(base, adapter):
    for path in base.iterdir():
        path.unlink()
    write_base(base, "compressed-tensors int4", seed=1)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            other_groups,
            "k_proj.weight: the adapter's groups are not the base's, which has 2 scales for the 64 columns",
        ),
        (other_base, "the adapter was trained over another base weight"),
        (
            edited(quant_method="mxfp4"),
            "is quantised (mxfp4): its scales are powers of two. Merge into the model",
        ),
        (edited(quant_method="fp8"), "its scales are of rows and columns together"),
        (edited(quant_method="aqlm"), "'aqlm' is not a format whose scales can be multiplied"),
        (
            edited(quant_method="bitsandbytes", load_in_8bit=True),
            "only its formats of four bits, NF4 and FP4, are read",
        ),
        (edited(quant_method="gptq", bits=3), "integers of 3 bits are not read"),
        (edited(quant_method="gptq", bits=4, checkpoint_format="marlin"), "the layout 'marlin' is not read"),
        (edited(quant_method="gptq"), "its quantization_config cannot be read: KeyError('bits')"),
        (edited(quant_method="awq", bits=4, version="gemv"), "the layout 'gemv' is not read"),
        (edited(quant_method="awq", bits=8, version="GEMM"), "integers of 8 bits are not read"),
        (scheme("nvfp4-pack-quantized"), "its scales have three bits"),
        (scheme("int-quantized"), "'int-quantized' is not a format whose scales can be multiplied"),
        (scheme(bits=3), "integers of 3 bits are not read"),
        (
            changed(weight_shape=None),
            "k_proj.weight: the tensors of a quantised layer do not fit each other: weight_shape is",
        ),
        (changed(weight_shape=torch.tensor([32, 72])), "72 columns"),
        (changed(weight_packed=torch.zeros(32, 7, dtype=torch.int32)), "do not hold 64 integers of 4 bits"),
        (changed(weight_scale=torch.zeros(31, 2)), "do not fit each other"),
        (changed(weight_scale=torch.zeros(32, 2).int()), "scales are torch.int32 (32, 2)"),
        (changed(weight_scale=None), "k_proj.weight, which the adapter changes"),
        (cut, "b.safetensors is truncated or corrupt"),
    ],
)
def test_refused_and_nothing_is_left(prepare, message, folders, tmp_path, capsys):
    prepare(*folders)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(
        capsys, lambda *given: main(["merge", *map(str, given)]), message, *folders, tmp_path / "out"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_refused_dtype(folders, tmp_path):
    with pytest.raises(ValueError, match="dtype must be None for a quantised base"):
        merge_to_folder(*folders, tmp_path / "out", dtype=torch.bfloat16)


def merge_until_killed(base, adapter, out):
    kill = lambda done, total: done == 4 and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    merge_to_folder(base, adapter, out, progress=kill)


@pytest.mark.parametrize("kind", ["safetensors", "Q4_0"])
def test_killed(kind, folders, tmp_path):
    """Only a hidden folder is left, and the next merge ignores it."""
    base, adapter = folders
    if kind == "Q4_0":
        base = tmp_path / "base.gguf"
        write_gguf(base, kind)
    killed(merge_until_killed, base, adapter, tmp_path / "out")
    (left,) = (path for path in tmp_path.iterdir() if path not in (base, *folders))
    assert left.name.startswith(".out.saving-")
    assert list(left.iterdir())
    merge_to_folder(base, adapter, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) > 0
