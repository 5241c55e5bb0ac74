"""Adapters to serve. Tests that run vLLM are skipped if it is not installed."""

import importlib.util

import pytest
from served import CONFIGS, save_adapter, save_model


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(base, config(), folder / name) for name, config in CONFIGS.items()}


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="needs vLLM: make test-vllm")
        for item in items:
            if "vllm" in item.path.name:
                item.add_marker(skip)
