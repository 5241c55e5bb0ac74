"""Adapters to serve."""

import pytest
from served import CONFIGS, save_adapter, save_model


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(base, config(), folder / name) for name, config in CONFIGS.items()}
