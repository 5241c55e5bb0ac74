"""Adapter folders that are damaged at random: an error that names the file, or what the file holds, correctly loaded.

    make nightly     # 10,000 folders instead of 300

Nothing is half-loaded, nothing but the folder is written, every call ends and takes no more memory than twice the file
beyond what the undamaged one takes, of tensors and of Python's objects, and 8 MiB where a configuration is a thousand
times as long as any. A configuration that does not name this method is left to PEFT's words and limits.
"""

import gc
import json
import os
import pickle
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from bounds import measured, within
from draws import share
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smoa_kernels.peft import SMoAConfig, SMoALayer
from smoa_kernels.peft.folders import MOST_BYTES
from smoa_kernels.peft.inspection import inspect_adapter

pytest.importorskip("hypothesis", reason="hypothesis draws the damage")
from hypothesis import given
from hypothesis import strategies as st

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# What is said of weights whose digest is not the configuration's, before anything else is found or not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is not the file that adapter_config.json:UserWarning"),
    pytest.mark.slow,
]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(12, 9), nn.Linear(9, 14)

    def forward(self, x):
        return self.two(self.one(x))


def adapter_files():
    """Bytes of a good adapter's two files."""
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

# What an error takes, its words and the frames that it came through, and libraries' caches.
OWN = 2**18


class Asked(TorchDispatchMode):
    """Adds up the bytes of every tensor that is made: no less than what lives at any time."""

    def __init__(self):
        super().__init__()
        self.bytes, self.known = 0, {}  # storages, kept so that no address is given out again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {self.storage(tensor) for tensor in self.tensors(args)}
        for tensor in self.tensors(result):
            if self.storage(tensor) not in self.known and self.storage(tensor) not in given:
                self.bytes += tensor.untyped_storage().nbytes()
        self.known |= {self.storage(t): t.untyped_storage() for t in self.tensors((args, result))}
        return result

    @staticmethod
    def tensors(tree):
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]

    @staticmethod
    def storage(tensor):
        return tensor.untyped_storage()._cdata


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to write damaged adapters to; the bytes of the good one's tensors, and to inspect and to load it."""
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    folder.mkdir()
    write(folder, GOOD_WEIGHTS, GOOD_CONFIG)
    for _ in range(2):  # the first time libraries fill their caches
        with measured() as read:
            assert not isinstance(inspected(folder), ValueError)
        model = Model()
        with Asked() as asked, measured() as loaded:
            assert isinstance(attempt(model, folder), PeftModel)
    assert asked.bytes > len(GOOD_WEIGHTS) / 2
    return folder, asked.bytes, read.bytes, loaded.bytes


def write(folder, weights, config):
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CONFIG).write_bytes(config)


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


def belongs_to_smoa(config):
    """Whether PEFT can tell that the configuration is this method's."""
    try:
        return json.loads(config)["peft_type"] == "SMOA"
    except (KeyError, TypeError, ValueError):
        return False


def names_a_file(outcome):
    return isinstance(outcome, Exception) and (WEIGHTS in str(outcome) or CONFIG in str(outcome))


def check(place, weights, config):
    folder, tensors, to_inspect, to_load = place
    size = 2 * (len(weights) + len(config))
    write(folder, weights, config)
    report = within(to_inspect + size + OWN, lambda: inspected(folder))
    assert not isinstance(report, ValueError) or names_a_file(report)
    if belongs_to_smoa(config):
        before = Model().state_dict()

        def load():
            model = Model()
            with Asked() as asked:
                return model, asked, attempt(model, folder)

        model, asked, outcome = within(to_load + size + OWN, load)
        assert asked.bytes <= tensors + size
        if isinstance(outcome, Exception):
            # A sound folder may still be another model's.
            assert names_a_file(outcome) or not isinstance(report, ValueError)
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
    else:
        assert names_a_file(report)
    assert sorted(path.name for path in folder.parent.rglob("*")) == ["adapter", CONFIG, WEIGHTS]


@share(0.6)
@given(damaged=weights)
def test_damaged_weights(place, damaged):
    check(place, damaged, GOOD_CONFIG)


@share(0.3)
@given(damaged=configs)
def test_damaged_configurations(place, damaged):
    check(place, GOOD_WEIGHTS, damaged)


# What a reader makes much of: empty and small containers, boxed numbers, one wide character that widens all of a text.
UNITS = [
    '{"":{}},',
    "[[]],",
    '{"a":1},',
    "300,",
    '"ab",',
    f'"{"x" * 70}",',
    f'"{"x" * 66}😀",',
    f'"{"x" * 60}\\ud83d\\ude00",',
]


@st.composite
def large_config(draw):
    """The configuration with a list of very many values, or a pattern for each of very many modules."""
    key = draw(
        st.sampled_from(["target_modules", "layers_to_transform", "rank_pattern", "r", "peft_version", "x"])
    )
    size = int(MOST_BYTES * draw(st.floats(0, 1.1)))
    if draw(st.booleans()):
        unit = draw(st.sampled_from(UNITS))
        text = f"[{unit * (size // len(unit.encode()))}0]"
    else:
        width = draw(st.sampled_from([1, 40, 100]))
        most = 1000 if key == "rank_pattern" else size  # PEFT compiles each for each layer
        names = (f'"{i:0{width}}": 3, ' for i in range(min(size // (width + 6), most)))
        text = "{" + "".join(names) + '"last": 3}'
    config = json.dumps({**json.loads(GOOD_CONFIG), key: None})
    return config.replace(f'"{key}": null', f'"{key}": {text}').encode()


READERS = (
    inspect_adapter,
    SMoAConfig.from_pretrained,
    PeftConfig.from_pretrained,
    lambda folder: PeftModel.from_pretrained(Model(), folder),
)


def words_of(reader, folder):
    """Of the error, "" where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown keys
        try:
            reader(folder)
        except (TypeError, ValueError) as error:
            return str(error)
    return ""


@share(0.1)
@given(config=large_config())
def test_large_configurations(place, config):
    folder, _, to_inspect, to_load = place
    write(folder, GOOD_WEIGHTS, config)
    most = max(to_inspect, to_load) + 2 * len(config) + 8 * MOST_BYTES
    for reader in READERS:
        words = within(most, lambda reader=reader: words_of(reader, folder))
        # A sound folder may still be another model's: PEFT shows all the modules that it looked for.
        others = "in the base model. Please check" in words
        assert others or len(words) < 2000
        if reader != PeftConfig.from_pretrained:  # which makes our class without asking its own reader
            assert not words or others or CONFIG in words or WEIGHTS in words


@pytest.mark.parametrize("spelled", ['"peft_type": "SMOA"', r'"\u0070eft_type"' + ' \n :"SM\\u004FA"'])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_a_huge_configuration(tmp_path, reader, last, spelled):
    """Wherever it names the method, and however: PEFT would make 200 MB of objects of this to see it."""
    values = '"x": [' + "[]," * 2**21 + "0]"
    text = ", ".join([values, spelled] if last else [spelled, values])
    write(tmp_path, GOOD_WEIGHTS, f"{{{text}}}".encode())
    words = within(2 * len(text) + 8 * MOST_BYTES, lambda: words_of(reader, tmp_path))
    assert "bytes, more than any" in words


@pytest.mark.parametrize("reader", [LoraConfig.from_pretrained, PeftConfig.from_pretrained])
def test_a_long_configuration_of_another_method(tmp_path, reader):
    """It has the limits of its own method, which are none."""
    ranks = {f"layer{i:090}": 4 for i in range(20000)}
    LoraConfig(target_modules=["one"], rank_pattern=ranks).save_pretrained(tmp_path)
    assert (tmp_path / CONFIG).stat().st_size > MOST_BYTES
    assert reader(tmp_path).rank_pattern == ranks


def test_what_pefts_reader_opens_it_still_does(tmp_path):
    """A path in bytes, a descriptor, and a pipe, which can be read once only."""
    path = tmp_path / CONFIG
    path.write_bytes(GOOD_CONFIG)
    values = json.loads(GOOD_CONFIG)
    assert PeftConfig.from_json_file(os.fsencode(path)) == values
    with path.open() as file:
        assert PeftConfig.from_json_file(os.dup(file.fileno())) == values
    if not Path("/dev/fd").is_dir():
        return
    reader, writer = os.pipe()
    os.write(writer, GOOD_CONFIG)
    os.close(writer)
    assert PeftConfig.from_json_file(f"/dev/fd/{reader}") == values
    os.close(reader)


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_folder_is_run(tmp_path):
    write(tmp_path, GOOD_WEIGHTS, GOOD_CONFIG)
    payload = pickle.dumps(Payload(tmp_path / "was run"))
    for name in ("adapter_model.bin", WEIGHTS):
        (tmp_path / WEIGHTS).unlink(missing_ok=True)
        (tmp_path / name).write_bytes(payload)
        assert names_a_file(attempt(Model(), tmp_path)) or "adapter_model.bin" in str(
            attempt(Model(), tmp_path)
        )
    assert not (tmp_path / "was run").exists()


def resident(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@pytest.mark.parametrize(
    "damage", ["none", "a bit of a factor", "a bit of the labels", "cut", "another rank"]
)
def test_memory_of_a_large_file(tmp_path, damage):
    """The process' own high-water mark, which sees what libraries allocate and map."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("the high-water mark can be reset on Linux only")
    base = nn.ModuleDict({f"lin{i}": nn.Linear(1024, 1024, bias=False) for i in range(4)})
    config = SMoAConfig(
        r=2048, num_blocks=2, target_modules=["lin0", "lin1", "lin2", "lin3"], init_weights=False
    )
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    base = model.unload()
    del model
    path = tmp_path / WEIGHTS
    size = path.stat().st_size
    assert size > 4 * 4 * 1024 * 2048
    if damage.startswith("a bit"):
        state = load_file(path)
        name = "lin2.smoa_A" if damage.endswith("factor") else "lin2.smoa_blocks"
        next(t for key, t in state.items() if key.endswith(name)).view(torch.uint8).view(-1)[-1] ^= 1
        save_file(state, path)
        del state
    elif damage == "cut":
        with path.open("rb+") as file:
            file.truncate(size - 1)
    elif damage == "another rank":
        values = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps({**values, "r": 65536}))
    gc.collect()
    try:
        reset.write_text("5")
    except OSError as error:
        pytest.skip(f"the high-water mark cannot be reset here: {error}")
    before = resident("VmRSS")
    outcome = attempt(base, tmp_path)
    assert isinstance(outcome, PeftModel) == (damage in ("none", "a bit of a factor"))
    assert resident("VmHWM") - before < 2 * size + (8 << 20)
