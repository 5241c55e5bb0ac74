"""Adapter folders whose configuration cannot be read; damaged weights are in tests/peft."""

from typing import Any

import pytest

from .harness import Call, Row, World, check, rows

pytest.importorskip("transformers", reason="needs the peft extra")

from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft.inspection import inspect_adapter
from smoa_kernels.peft.model_spectrum import layer_kind, model_spectrum
from smoa_kernels.peft.settings import layer_settings


def test_a_configuration_is_not_saved_over_a_file(world: World) -> None:
    file = str(world.folder / "config.json")
    words = "save_directory must be a folder, got the file"
    check(world, lambda _: SMoAConfig().save_pretrained(file), ValueError, words)


# What stands in an adapter_config.json: the file is named, by both who read it.
FILES = [
    ("[]", "adapter_config.json must hold a JSON object, got list"),
    ("null", "adapter_config.json must hold a JSON object, got NoneType"),
    ("5", "adapter_config.json must hold a JSON object, got int"),
    ("", "adapter_config.json is no JSON: Expecting value"),
    ("{", "adapter_config.json is no JSON: Expecting property name"),
    ("[" * 100_000, "adapter_config.json is no JSON: .*recursion"),
    ('{"peft_type": 5}', "adapter_config.json: "),
    ('{"peft_type": "SMOA", "r": "x"}', "adapter_config.json: r must be an int, got 'x'"),
    ('{"peft_type": "SMOA", "r": 1000000000000}', "adapter_config.json: r must be at most 65536"),
    ('{"peft_type": "SMOA", "format_version": 99}', "adapter_config.json: format_version 99 .* is newer"),
    ('{"peft_type": "SMOA", "task_type": 7}', "adapter_config.json: "),
]


@pytest.mark.parametrize("reader", [inspect_adapter, SMoAConfig.from_pretrained])
@pytest.mark.parametrize(("text", "words"), FILES, ids=[text[:50] for text, _ in FILES])
def test_configuration_file(reader: Any, text: str, words: str, world: World) -> None:
    (world.folder / "adapter_config.json").write_text(text)
    wrong_type = "must be an int" in words and reader is not inspect_adapter
    error = TypeError if wrong_type else ValueError
    check(world, lambda w: reader(str(w.folder)), error, f"^{world.folder}/{words}")


def test_another_methods_adapter_is_not_inspected(world: World) -> None:
    words = "adapter_config.json: it is an adapter of the method LORA, not SMOA"
    check(world, lambda w: inspect_adapter(w.folder), ValueError, words)


PATHS: list[Row] = [
    (lambda _: inspect_adapter(None), TypeError, "folder must be a path, got None"),  # type: ignore[arg-type]
    (lambda w: inspect_adapter(w.folder, 3), TypeError, "base must be a path, got 3"),  # type: ignore[arg-type]
    (lambda w: inspect_adapter(w.folder / "none"), FileNotFoundError, "there is no adapter_config.json in"),
    (lambda _: model_spectrum(None), TypeError, "model must be a path, got None"),  # type: ignore[arg-type]
    (lambda w: model_spectrum(w.folder, 3), TypeError, "adapter must be a path, got 3"),  # type: ignore[arg-type]
    (lambda w: model_spectrum(w.folder, compare=[]), TypeError, r"compare must be a path, got \[\]"),  # type: ignore[arg-type]
    (
        lambda w: model_spectrum(w.folder, targets="q_proj"),
        TypeError,
        "targets must be a list of names, got 'q_proj'",
    ),
    (lambda w: model_spectrum(w.folder, seed=2**70), ValueError, "seed must be at most 9223372036854775807"),
    (lambda w: model_spectrum(w.folder, seed=None), TypeError, "seed must be an int, got None"),  # type: ignore[arg-type]
    (lambda _: layer_kind(None), TypeError, "name must be a str, got NoneType"),  # type: ignore[arg-type]
    (lambda _: layer_settings(SMoAConfig(), []), TypeError, "name must be a str, got list"),  # type: ignore[arg-type]
    (lambda _: SMoAConfig().save_pretrained(3), TypeError, "save_directory must be a path, got 3"),  # type: ignore[arg-type]
    (
        lambda _: SMoAConfig.from_pretrained(None),  # type: ignore[arg-type]
        TypeError,
        "pretrained_model_name_or_path must be a path, got None",
    ),
    (
        lambda w: SMoAConfig.from_pretrained(str(w.folder), subfolder=0),  # type: ignore[arg-type]
        TypeError,
        "subfolder must be a path, got 0",
    ),
    (
        lambda w: SMoAConfig.from_pretrained(str(w.folder), strict_base="no"),
        TypeError,
        "strict_base must be True or False, got 'no'",
    ),
]


@rows("call", PATHS)
def test_paths(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)
