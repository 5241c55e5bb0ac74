"""Fixtures of the tests with TRL."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from chat_models import save_base
from datasets import disable_progress_bars

disable_progress_bars()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("trl") / "base")
