"""Each test gets its own cache folder, and no table has been read yet."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from smoa_kernels.kernels import table


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    table.forget()
    yield tmp_path / "cache"
    table.forget()
