"""Damaged adapter folders at every door: the error names the file or the layer, and nothing has changed."""

import copy
import shutil

import pytest
import torch
from adapted import CONFIG, WEIGHTS, adapt, edit_config, edit_weights, logits, unchanged
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_llama
from torch import nn

from smoa_kernels.adapter import STATE_KEYS
from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.peft import SMoAConfig, hotswap
from smoa_kernels.serving.factors import read_served

pytestmark = pytest.mark.usefixtures("transformers_adapters")

LAYER = "model.layers.0.mlp.down_proj"
PREFIX = f"base_model.model.{LAYER}.smoa."
LARGEST = "ranks must sum to r=5 with a largest rank of"


def base():
    return tiny_llama(num_hidden_layers=1)


def weights(edit):
    """A damage of the file of weights, as bytes."""
    return lambda folder: (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes()))


def tensors(edit):
    """A damage of the tensors of one layer, given the state and the layer's prefix."""
    return lambda folder: edit_weights(folder, lambda state: edit(state, PREFIX))


def changed(key, change):
    """A damage of one tensor of the layer."""
    return tensors(lambda state, prefix: state.update({prefix + key: change(state[prefix + key])}))


def to_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def only_x(state, _):
    state.clear()
    state["x"] = torch.ones(1)


def doubled(state, prefix):
    state[prefix + "A"] = state[prefix + "A"].repeat(2, 1)
    state[prefix + "B"] = state[prefix + "B"].repeat(1, 2)


def of_another_base(folder):
    adapt(tiny_llama(num_hidden_layers=1, seed=1), strict_base=True).save_pretrained(folder)


def of_lora(folder):
    get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


# A damage of a folder, and the words of the error.
OF_FILES = {
    "empty": (weights(lambda data: b""), "is truncated or corrupt"),
    "cut in its header": (weights(lambda data: data[:100]), "is truncated or corrupt"),
    "cut in its tensors": (weights(lambda data: data[:-1]), "is truncated or corrupt"),
    "longer": (weights(lambda data: data + b"x"), "is truncated or corrupt"),
    "immense header": (weights(lambda data: b"\xff" * 8 + data[8:]), "is truncated or corrupt"),
    "pickle": (to_pickle, r"adapter_model\.bin is a pickle, and adapters are read"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG} is no JSON: Expecting property name"),
    "wrong value": (lambda f: edit_config(f, num_blocks="three"), "num_blocks must be an int, got 'three'"),
    "future": (lambda f: edit_config(f, format_version=9), "format_version 9 of the adapter is newer"),
    "other rank": (lambda f: edit_config(f, r=6), "ranks must sum to r=6"),
    "no layers": (tensors(only_x), "holds no layer of an SMoA adapter|the adapter lacks"),
    "no folder": (lambda f: f.rename(f.parent / "x"), "there is no adapter_config.json in|Can't find"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"there is no {WEIGHTS} in"),
    "other method": (of_lora, "an adapter of the method 'LORA', not SMOA"),
    "another base": (of_another_base, "another base weight in 7 layers, .* strict_base=True refuses"),
    "task": (lambda f: edit_config(f, task_type="7"), f"{CONFIG}: Invalid task type"),
}
OF_LAYERS = {
    "missing": (tensors(lambda s, p: s.pop(p + "row_block")), "the adapter lacks row_block"),
    "zero": (tensors(lambda s, p: s[p + "ranks"].zero_()), "ranks must sum to r=5"),
    "range": (tensors(lambda s, p: s[p + "col_block"][2].fill_(3)), r"col_block must lie in \[0, 3\)"),
    "rank": (tensors(lambda s, p: s[p + "ranks"].__setitem__(0, -1)), "ranks must sum to r=5"),
    "sum": (tensors(lambda s, p: s[p + "ranks"].__setitem__(2, 0)), "ranks must sum to r=5"),
    "dtype": (changed("row_block", torch.Tensor.float), "row_block must be an integer tensor"),
    "scale": (tensors(lambda s, p: s[p + "scaling"].fill_(torch.nan)), "scaling must be finite, got nan"),
    "other scale": (tensors(lambda s, p: s[p + "scaling"].fill_(3)), f"s is 3.0 and .*{CONFIG} says 1.0"),
    "layer": (
        tensors(lambda s, p: [s.pop(p + key) for key in STATE_KEYS]),
        "the adapter lacks A, B",
    ),
    "unknown": (
        tensors(lambda s, p: s.update({p + "C": torch.ones(2)})),
        "model has no place for 1 tensors",
    ),
    "other layer": (
        tensors(lambda s, p: s.update({p.replace("0", "9") + k: s[p + k].clone() for k in STATE_KEYS})),
        "the model has no place for 7 tensors",
    ),
    "integers": (changed("B", torch.Tensor.int), "B must be .*floating.*int32"),
    "vector": (changed("A", lambda A: A[0].clone()), "A and B must be matrices|size mismatch for .*A"),
    "shape": (changed("A", lambda A: A[:, 4:].contiguous()), "must have shape|size mismatch for .*A"),
    "experts": (
        changed("row_block", lambda labels: torch.stack([labels, labels])),
        "must have shape|size mismatch for .*row_block",
    ),
    "spare": (tensors(doubled), f"{LARGEST} 4|size mismatch for .*A"),
    "wide": (changed("B", lambda B: B.repeat(1, 2)), "must have shape|size mismatch for .*B"),
}
DOORS = {
    "from_pretrained": (False, PeftModel.from_pretrained),
    "low_cpu_mem_usage": (False, lambda m, f: PeftModel.from_pretrained(m, f, low_cpu_mem_usage=True)),
    "another adapter": (True, lambda m, f: m.load_adapter(f, "other")),
    "another, low": (True, lambda m, f: m.load_adapter(f, "other", low_cpu_mem_usage=True)),
    "over an adapter": (True, lambda m, f: m.load_adapter(f, "default")),
    "transformers": (False, lambda m, f: m.load_adapter(f)),
    "hotswap": (True, hotswap),
    "inspect": (False, lambda _, f: inspect_adapter(f)),
    "serve": (False, lambda _, f: read_served(f)),
}
CONSISTENT = {"another base", "layer", "unknown", "other layer", "task"}
# Damages that a door need not find: the file is consistent, or PEFT, transformers or vLLM refuse it in their words.
PASSES = {
    "inspect": CONSISTENT,
    "serve": CONSISTENT | {"no json", "no folder", "other method"},
    "hotswap": {"unknown"},
    "over an adapter": {*OF_FILES, "other scale"},  # only the tensors are read again
    "transformers": {"no folder", "no weights", "other method", "task"},
}
PEFTS_OWN = {"no folder", "no weights", "other method"}
ROWS = [
    (door, damage)
    for door in DOORS
    for damage in OF_FILES | OF_LAYERS
    if damage not in PASSES.get(door, PEFTS_OWN)
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder, a base, and one with the folder's adapter."""
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    adapt(base()).save_pretrained(folder)
    return folder, base(), PeftModel.from_pretrained(base(), folder).eval()


@pytest.mark.parametrize(("door", "damage"), ROWS)
def test_a_damaged_folder(door, damage, originals, tokens, tmp_path):
    folder, *models = originals
    is_adapted, load = DOORS[door]
    shutil.copytree(folder, tmp_path / "adapter")
    model = copy.deepcopy(models[is_adapted])
    expected = logits(model, tokens)
    spoil, message = (OF_FILES | OF_LAYERS)[damage]
    spoil(tmp_path / "adapter")
    refused = pytest.raises((TypeError, ValueError, FileNotFoundError), match=message)
    with unchanged(model), refused as error:
        load(model, tmp_path / "adapter")
    layer = LAYER.replace("0", "9") if damage == "other layer" else LAYER
    assert damage not in OF_LAYERS or layer in str(error.value)
    assert torch.equal(logits(model, tokens), expected)


def outcome(call, *arguments):
    """What a call returns, or its error; an error of another kind is a failure."""
    try:
        return call(*arguments)
    except (TypeError, ValueError) as error:
        return error


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # of another file than the configuration's, and of another base
def test_another_bit_anywhere_in_the_weights(tmp_path):
    """In each byte in turn: the error names the file, or what the file holds is loaded; nothing is half-loaded."""

    def linear():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 9))

    config = SMoAConfig(r=5, num_blocks=3, target_modules=["0"], init_weights=False)
    get_peft_model(linear(), config).save_pretrained(tmp_path)
    path, found = tmp_path / WEIGHTS, []
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        model = linear()
        report = outcome(inspect_adapter, tmp_path)
        loaded = outcome(PeftModel.from_pretrained, model, tmp_path)
        assert not isinstance(report, Exception) or WEIGHTS in str(report)
        found.append(isinstance(loaded, PeftModel))
        if found[-1]:
            assert not isinstance(report, Exception)
            state = loaded.state_dict()
            for key, tensor in load_file(path).items():
                close = {"rtol": 0, "atol": 0, "equal_nan": True, "check_dtype": False}
                torch.testing.assert_close(state[key.replace(".smoa.", ".smoa.default.")], tensor, **close)
        else:  # an undamaged folder may still be of another model
            assert WEIGHTS in str(loaded) or not isinstance(report, Exception)
            assert all(map(torch.equal, model.state_dict().values(), linear().state_dict().values()))
            assert type(model[0]) is nn.Linear
    assert {True, False} == set(found)
