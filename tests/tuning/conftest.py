"""Each test gets its own cache folder, and no table has been read yet."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from smoa_kernels.kernels import table

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if torch.cuda.is_available():
        pytest.skip("runs kernels on CPU tensors, which needs Triton's interpreter")
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    table.clear_cache()
    yield tmp_path / "cache"
    table.clear_cache()
