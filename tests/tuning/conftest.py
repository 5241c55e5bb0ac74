"""A cache folder of its own for each test, and lookups that start from nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from smoa_kernels.kernels import lookup
from smoa_kernels.tuning import autotune


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SMOA_AUTOTUNE", raising=False)
    lookup.install()
    lookup.forget()
    autotune.measured.cache_clear()
    yield tmp_path / "cache"
    lookup.forget()
    autotune.measured.cache_clear()
