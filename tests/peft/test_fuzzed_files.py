"""Randomly damaged weights of an adapter: an error that names the file, or the file's contents, correctly loaded.

    make nightly     # 10,000 folders instead of 300

Nothing is half-loaded, and nothing outside the folder is written.
"""

import json
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from adapted import CONFIG, WEIGHTS
from draws import share
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.peft import SMoAConfig, SMoALayer

pytest.importorskip("hypothesis", reason="hypothesis draws the damage")
from hypothesis import given
from hypothesis import strategies as st

# The warning for weights whose digest does not match the configuration; it comes before all other checks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is not the file that adapter_config.json:UserWarning"),
    pytest.mark.slow,
]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(one=nn.Linear(12, 9), two=nn.Linear(9, 14)))


def adapter_files():
    """The bytes of a valid adapter's two files."""
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
        get_peft_model(make_model(), config).save_pretrained(folder)
        return tuple(Path(folder, name).read_bytes() for name in (WEIGHTS, CONFIG))


GOOD_WEIGHTS, GOOD_CONFIG = adapter_files()
HEADER = int.from_bytes(GOOD_WEIGHTS[:8], "little")


# Damage


@st.composite
def spliced(draw, data):
    """Cut, or with other bytes in place of some; half of the time in the first kilobyte, which holds the header.

    In one of three draws the file keeps its length, because another length alone is enough to refuse it.
    """
    start = draw(st.integers(0, min(len(data), 1024) if draw(st.booleans()) else len(data)))
    how = draw(st.sampled_from(["cut", "in place", "in place", *["splice"] * 3]))
    if how == "cut":
        return data[:start]
    if how == "in place":
        new = draw(st.binary(max_size=min(64, len(data) - start)))
        return data[:start] + new + data[start + len(new) :]
    return data[:start] + draw(st.binary(max_size=64)) + data[start + draw(st.integers(0, 64)) :]


PATHS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "C:\\x",
    "a/../b",
    "~",
    "\0",
    "",
    "." * 300,
    "x" * 5000,
]
INTS = [0, -1, 1, 2, 5, 2**16, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**63)]
SCALARS = st.none() | st.sampled_from([*INTS, *PATHS, True, 0.5, float("nan")]) | st.text(max_size=8)


@st.composite
def other_header(draw):
    """The header's JSON with a changed dtype, shape, offset, name or entry, and its length corrected."""
    header = json.loads(GOOD_WEIGHTS[8 : 8 + HEADER])
    key = draw(st.sampled_from(sorted(header)))
    what = draw(st.sampled_from(["name", "drop", "entry", "dtype", "shape", "data_offsets"]))
    if what == "name":
        names = st.sampled_from([path + end for path in PATHS for end in ("", ".smoa_A", ".smoa_blocks")])
        header[draw(names)] = header.pop(key)
    elif what == "drop":
        del header[key]
    elif what == "entry":
        header[key] = draw(SCALARS)
    elif what == "dtype":
        header[key]["dtype"] = draw(
            st.sampled_from(["F64", "F16", "BF16", "I8", "I64", "U8", "BOOL", "F8_E4M3", "X"])
        )
    else:
        header[key][what] = draw(st.lists(st.sampled_from(INTS), max_size=4))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + GOOD_WEIGHTS[8 + HEADER :]


weights = spliced(GOOD_WEIGHTS) | other_header()


# Accepted outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to write damaged adapters to."""
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(GOOD_WEIGHTS)
    (folder / CONFIG).write_bytes(GOOD_CONFIG)
    assert isinstance(attempt(make_model(), folder), PeftModel)
    return folder


def attempt(model, folder):
    """The adapted model, or the error; any other exception is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another base, unknown keys
        try:
            return PeftModel.from_pretrained(model, folder)
        except (TypeError, ValueError) as error:
            return error


def inspected(folder):
    try:
        return inspect_adapter(folder)
    except ValueError as error:
        return error


@share(1.0)
@given(damaged=weights)
def test_damaged_weights(folder, damaged):
    (folder / WEIGHTS).write_bytes(damaged)
    report = inspected(folder)
    assert not isinstance(report, ValueError) or WEIGHTS in str(report)
    before, model = make_model().state_dict(), make_model()
    outcome = attempt(model, folder)
    if isinstance(outcome, Exception):
        # An undamaged folder may still belong to another model.
        assert WEIGHTS in str(outcome) or not isinstance(report, ValueError)
        assert not any(isinstance(module, SMoALayer) for module in model.modules())
    else:
        assert not isinstance(report, ValueError)
        loaded = outcome.state_dict()
        for key, tensor in load_file(folder / WEIGHTS).items():
            torch.testing.assert_close(
                loaded[f"{key}.default"], tensor, rtol=0, atol=0, equal_nan=True, check_dtype=False
            )
    state = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert sorted(path.name for path in folder.parent.rglob("*")) == ["adapter", CONFIG, WEIGHTS]
