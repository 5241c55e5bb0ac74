"""Faults around a save: processes are killed, files cannot grow, the cache is not writable. No saved work is lost."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from places import adapted, base, contents, file_limit, kill_at, python, ran

sys.path.insert(0, str(Path(__file__).resolve().parent / "tuning"))
from tuning_cases import entry, kept, put

from smoa_kernels.adapter_folder.inspecting import inspect_adapter

SLOW = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"


# Saving an adapter


MOVING = """
import os, time, places
from pathlib import Path
folder, moved, replace = Path({folder!r}), [], os.replace
def slow(source, place):
    if Path(place).parent == folder:
        if len(moved) == {count}:
            print("moving", flush=True)
            time.sleep(60)
        moved.append(place)
    replace(source, place)
os.replace = slow
model = places.adapted(4, smoa_alpha=3.0)
model.base_model.model[0].smoa_B["default"].data.mul_(2)
model.save_pretrained({folder!r})
"""


@SLOW
@pytest.mark.parametrize("count", [0, 1, 2])
def test_kill_between_the_files_of_an_adapter(count: int, tmp_path: Path) -> None:
    """Shapes cannot tell the old and new files apart. A mixed pair is refused, and the error names the file to move."""
    folder = tmp_path / "adapter"
    adapted(4).save_pretrained(folder)
    before = contents(folder)
    kill_at(python(MOVING.format(folder=str(folder), count=count)), "moving")
    after = {name: data for name, data in contents(folder).items() if not name.startswith(".saving-")}
    assert after.keys() == before.keys()
    new = sorted(name for name in after if after[name] != before[name])
    assert "adapter_config.json" not in new  # it is moved last
    (left,) = folder.glob(".saving-*/adapter_config.json")
    if WEIGHTS in new:
        with pytest.raises(ValueError, match=f"{folder}/{WEIGHTS} is not .* killed: move {left} here"):
            PeftModel.from_pretrained(base(), folder)
    else:
        assert PeftModel.from_pretrained(base(), folder).peft_config["default"].smoa_alpha is None
        os.replace(left.parent / WEIGHTS, folder / WEIGHTS)
    os.replace(left, folder / "adapter_config.json")
    loaded = PeftModel.from_pretrained(base(), folder)
    assert loaded.peft_config["default"].smoa_alpha == 3.0
    assert loaded.base_model.model[0].scaling["default"] == 3.0 / 4


def test_weights_that_are_not_the_configurations(tmp_path: Path) -> None:
    """Weights from another tool, or damage that keeps the shape: they load with a warning."""
    for name in ("one", "two"):
        adapted(4).save_pretrained(tmp_path / name)
    weights, config = tmp_path / "one" / WEIGHTS, tmp_path / "one" / "adapter_config.json"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads(config.read_text())["weights_sha256"] == digest
    data = bytearray(weights.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first bit of the first factor
    weights.write_bytes(data)
    for read in (lambda folder: PeftModel.from_pretrained(base(), folder), inspect_adapter):
        with pytest.warns(UserWarning, match=f"{weights} is not the file .*Another tool wrote it"):
            read(tmp_path / "one")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "two")
    loaded.save_pretrained(tmp_path / "one")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads(config.read_text())["weights_sha256"] == digest


@SLOW
def test_no_room_for_an_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted(2).save_pretrained(folder)
    before = contents(folder)
    with file_limit(2000), pytest.raises(OSError, match=f"cannot save to {folder}, which is as it was: "):
        adapted(64).save_pretrained(folder)
    assert contents(folder) == before
    adapted(4).save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base(), folder)
    assert loaded.peft_config["default"].r == 4


# The cache folder


@SLOW
def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.write_text("mine")
    monkeypatch.setenv("SMOA_CACHE", str(cache))
    assert not kept()
    with pytest.raises(OSError, match=str(cache)):
        put(entry())
    done = ran("-c", "from smoa_kernels.cli import main; main(['info'])", SMOA_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert "eager" in done.stdout
    assert cache.read_text() == "mine"
