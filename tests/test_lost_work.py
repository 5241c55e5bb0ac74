"""Faults around a save: processes are killed, files cannot grow, the cache is not writable. No saved work is lost."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from places import adapted, base, contents, file_limit, ran
from processes import killed

from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.kernels import table

WEIGHTS = "adapter_model.safetensors"


# Saving an adapter


def save_until_killed(folder: Path, name: str, count: int) -> None:
    """Save an adapter; SIGKILL comes when `count` files have been moved into the folder."""
    moved, replace = [], os.replace

    def move(source: Path, place: Path) -> None:
        if place.parent in (folder, folder / name):
            if len(moved) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            moved.append(place)
        replace(source, place)

    os.replace = move
    model = adapted(4, name, smoa_alpha=3.0)
    model.base_model.model[0].smoa[name].B.data.mul_(2)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_kill_between_the_files_of_an_adapter(
    count: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes cannot tell the old and new files apart. A mixed pair is refused, and the error names the file to move.

    An adapter that is not named "default" has a subfolder of its own.
    """
    top = tmp_path / "adapter"
    folder = top / name if name == "other" else top
    adapted(4, name).save_pretrained(top)
    before = contents(folder)
    killed(save_until_killed, top, name, count)
    after = {file: data for file, data in contents(folder).items() if not file.startswith(".saving-")}
    assert after.keys() == before.keys()
    new = sorted(file for file in after if after[file] != before[file])
    assert "adapter_config.json" not in new  # it is moved last
    (left,) = top.glob(".saving-*/**/adapter_config.json")
    monkeypatch.chdir(folder)
    for place in (folder, Path()):
        if WEIGHTS in new:
            with pytest.raises(ValueError, match=f"{folder}/{WEIGHTS} is not .* killed: move {left} here"):
                PeftModel.from_pretrained(base(), place)
        else:
            assert PeftModel.from_pretrained(base(), place).peft_config["default"].smoa_alpha is None
    if WEIGHTS not in new:
        os.replace(left.parent / WEIGHTS, folder / WEIGHTS)
    os.replace(left, folder / "adapter_config.json")
    loaded = PeftModel.from_pretrained(base(), folder)
    assert loaded.peft_config["default"].smoa_alpha == 3.0
    assert loaded.base_model.model[0].scaling["default"] == 3.0 / 4


@pytest.mark.parametrize("exists", [False, True])
def test_files_are_on_the_disk_before_they_are_moved(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power failure may leave the new names and none of the data."""
    flushed, moved = set(), []
    if exists:
        adapted(2).save_pretrained(tmp_path / "adapter")

    def checked(move: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
        def moving(source: Path, place: Path) -> None:
            files = {file.stat().st_ino for file in (source, *source.rglob("*")) if file.is_file()}
            assert files <= flushed
            moved.append(place.name)
            move(source, place)

        return moving

    monkeypatch.setattr(os, "fsync", lambda file: flushed.add(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "replace", checked(os.replace))
    monkeypatch.setattr(Path, "rename", checked(Path.rename))
    adapted(4).save_pretrained(tmp_path / "adapter")
    assert ("adapter" in moved) is not exists
    assert (WEIGHTS in moved) is exists


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


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.write_text("mine")
    monkeypatch.setenv("SMOA_CACHE", str(cache))
    assert not table.read(table.user_table("cpu")).machines
    with pytest.raises(OSError, match=str(cache)):
        table.keep(torch.device("cpu"), "choices", {"forward bf16": {"choice": "split"}})
    done = ran("-c", "from smoa_kernels.cli import main; main(['info'])", SMOA_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert "eager" in done.stdout
    assert cache.read_text() == "mine"
