"""Adapter folders that are damaged at random: an error that names the file, or what the file holds, correctly loaded.

    HYPOTHESIS_PROFILE=nightly pytest tests/peft/test_fuzzed_files.py     # 10,000 folders instead of 300

Nothing is half-loaded, nothing but the folder is written, no call takes more memory than twice the file beyond what the
undamaged one takes. What PEFT itself reads before it knows whose adapter it is (a configuration without this method's
name) is left to PEFT's words.
"""

import copy
import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.memory import allocated
from smoa_kernels.peft import SMoAConfig, SMoALayer
from smoa_kernels.peft.inspection import inspect_adapter

pytest.importorskip("hypothesis", reason="hypothesis draws the damage")
from hypothesis import given, settings
from hypothesis import strategies as st

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(12, 9), nn.Linear(9, 14)

    def forward(self, x):
        return self.two(self.one(x))


def adapter_files():
    """Bytes of a good adapter's two files."""
    import tempfile

    config = SMoAConfig(
        r=5,
        num_blocks=3,
        target_modules=["one", "two"],
        init_weights=False,
        rank_pattern={"two": 4},
        alpha_pattern={"one": 2.0},
        exclude_modules=["three"],
    )
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(Model(), config).save_pretrained(folder)
        return tuple(Path(folder, name).read_bytes() for name in (WEIGHTS, CONFIG))


GOOD_WEIGHTS, GOOD_CONFIG = adapter_files()
HEADER = int.from_bytes(GOOD_WEIGHTS[:8], "little")


# Damage


@st.composite
def flipped(draw, data):
    """A few bits, half of the time in the first kilobyte, where the header is."""
    damaged = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(data), 1024) if draw(st.booleans()) else len(data)
        damaged[draw(st.integers(0, end - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(damaged)


@st.composite
def cut_or_stuffed(draw, data):
    at = draw(st.integers(0, len(data)))
    how = draw(st.sampled_from(["cut", "remove", "insert", "zeros"]))
    if how == "cut":
        return data[:at]
    size = draw(st.integers(1, 64))
    if how == "remove":
        return data[:at] + data[at + size :]
    return data[:at] + (draw(st.binary(max_size=64)) if how == "insert" else bytes(size)) + data[at:]


PATHS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "C:\\x",
    "a/../../b",
    "~",
    "\0",
    "",
    "." * 300,
    "x" * 5000,
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    5,
    2**16,
    2**31,
    2**32,
    2**63,
    2**64,
    10**30,
    -(2**63),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
]
scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(PATHS)
    | st.integers()
    | st.text(max_size=8)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def other_header(draw):
    """The header's JSON with another dtype, shape, offset, name or entry, and its length right again."""
    header = json.loads(GOOD_WEIGHTS[8 : 8 + HEADER])
    key = draw(st.sampled_from(sorted(header)))
    what = draw(st.sampled_from(["name", "drop", "entry", "dtype", "shape", "data_offsets"]))
    if what == "name":
        names = st.sampled_from([path + end for path in PATHS for end in ("", ".smoa_A", ".smoa_blocks")])
        header[draw(names)] = header.pop(key)
    elif what == "drop":
        del header[key]
    elif what == "entry":
        header[key] = draw(anything)
    elif what == "dtype":
        header[key]["dtype"] = draw(
            st.sampled_from(["F64", "F16", "BF16", "I8", "I64", "U8", "BOOL", "F8_E4M3", "X"])
        )
    else:
        header[key][what] = draw(st.lists(st.sampled_from(NUMBERS[:12]), max_size=4) | anything)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + GOOD_WEIGHTS[8 + HEADER :]


@st.composite
def other_config(draw):
    """The configuration with another value, or further or fewer keys."""
    config = json.loads(GOOD_CONFIG)
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(set(config) - {"peft_type"})) | st.text(max_size=6))
        if draw(st.integers(0, 4)) == 0:
            config.pop(key, None)
        else:
            config[key] = draw(anything)
    config["peft_type"] = "SMOA"
    return json.dumps(config).encode()


weights = flipped(GOOD_WEIGHTS) | cut_or_stuffed(GOOD_WEIGHTS) | other_header()
configs = flipped(GOOD_CONFIG) | cut_or_stuffed(GOOD_CONFIG) | other_config()


# What must come of it


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to write damaged adapters to, and the bytes that loading the good one takes."""
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    folder.mkdir()
    write(folder, GOOD_WEIGHTS, GOOD_CONFIG)
    model = Model()
    load(model, folder)
    return folder, allocated(lambda: load(Model(), folder))[0]


def write(folder, weights, config):
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CONFIG).write_bytes(config)


def load(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another base, unknown keys
        return PeftModel.from_pretrained(model, folder)


def belongs_to_smoa(config):
    """Whether PEFT can tell that the configuration is this method's."""
    try:
        return json.loads(config)["peft_type"] == "SMOA"
    except (KeyError, TypeError, ValueError):
        return False


def check(place, weights, config):
    folder, usual = place
    write(folder, weights, config)
    model = Model()
    before = copy.deepcopy(model.state_dict())
    outcome = []

    def attempt():
        try:
            outcome.append(load(model, folder))
        except ValueError as error:
            outcome.append(error)

    inspected = False
    try:
        inspect_adapter(folder)
        inspected = True
    except ValueError as error:
        assert WEIGHTS in str(error) or CONFIG in str(error)
    if not belongs_to_smoa(config):
        assert not inspected
        with pytest.raises((KeyError, TypeError, ValueError)):
            load(model, folder)
        return
    peak, _ = allocated(attempt)
    assert peak <= usual + 2 * (len(weights) + len(config))
    if isinstance(outcome[0], ValueError):
        assert not any(isinstance(module, SMoALayer) for module in model.modules())
        assert model.state_dict().keys() == before.keys()
        named = WEIGHTS in str(outcome[0]) or CONFIG in str(outcome[0])
        assert named or inspected  # a sound folder, but not this model's
    else:
        assert inspected
        stored, loaded = load_file(folder / WEIGHTS), outcome[0].state_dict()
        for key, tensor in stored.items():
            assert (
                tensor.to(torch.float32).equal(loaded[f"{key}.default"].to(torch.float32))
                or tensor.isnan().any()
            )
    assert sorted(path.name for path in folder.parent.rglob("*")) == ["adapter", CONFIG, WEIGHTS]
    for name, value in before.items():
        assert (
            torch.equal(model.get_parameter(name.replace(".", ".base_layer.")), value)
            if outcome and not isinstance(outcome[0], ValueError)
            else True
        )


def share(part):
    """So much of all folders that the profile draws."""
    return settings(max_examples=round(part * settings().max_examples))


@share(0.6)
@given(damaged=weights)
def test_damaged_weights(place, damaged):
    check(place, damaged, GOOD_CONFIG)


@share(0.4)
@given(damaged=configs)
def test_damaged_configurations(place, damaged):
    check(place, GOOD_WEIGHTS, damaged)
