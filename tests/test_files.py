"""A file is always the old one or the new one, even if writing fails."""

import os
import stat
from pathlib import Path

import pytest
from places import file_limit

from smoa_kernels.files import replace_file


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for data in (b"old", b"new"):
        replace_file(path, data)
        assert path.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # mkstemp's mode would hide the file from others
    assert os.listdir(tmp_path) == ["table.json"]


@pytest.mark.parametrize("step", ["open", "fsync", "chmod", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"old")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'$") as caught:
            replace_file(path, b"new")
    assert (caught.value.errno, caught.value.filename) == (28, str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["table.json"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none" / "table.json"
    with pytest.raises(FileNotFoundError, match=f"'{path}'$"):
        replace_file(path, b"")


def test_a_disk_that_fills_up_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"old")
    with file_limit(2000), pytest.raises(OSError, match=f"File too large: '{path}'"):
        replace_file(path, b"x" * 8000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["table.json"]
