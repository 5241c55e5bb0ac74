"""Adapter folders with unreadable configurations. Damaged weights are in tests/peft."""

from typing import Any

import pytest

from .harness import Call, Row, World, check, rows

pytest.importorskip("transformers", reason="needs the peft extra")


from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.adapter_folder.reading import MOST_JSON_BYTES
from smoa_kernels.peft import SMoAConfig

# Texts of adapter_config.json. Both readers must name the file.
FILES = [
    ('{"peft_type": 5}', "adapter_config.json: "),
    ('{"peft_type": "SMOA", "r": "x"}', "adapter_config.json: r must be an int, got 'x'"),
    ('{"peft_type": "SMOA", "r": 1000000000000}', "adapter_config.json: r must be at most 65536"),
    ("[]", "adapter_config.json must hold a JSON object, got list"),
    ("", "adapter_config.json is no JSON: Expecting value"),
    ("[" * 16_000, "adapter_config.json is no JSON: .*recursion"),
]


@pytest.mark.parametrize("reader", [inspect_adapter, SMoAConfig.from_pretrained])
@pytest.mark.parametrize(("text", "words"), FILES, ids=[text[:50] for text, _ in FILES])
def test_configuration_file(reader: Any, text: str, words: str, world: World) -> None:
    (world.folder / "adapter_config.json").write_text(text)
    wrong_type = "must be an int" in words and reader is not inspect_adapter
    error = TypeError if wrong_type else ValueError
    check(world, lambda w: reader(str(w.folder)), error, f"^{world.folder}/{words}")


@pytest.mark.parametrize("reader", [inspect_adapter, SMoAConfig.from_pretrained])
def test_a_huge_configuration_is_not_read(reader: Any, world: World) -> None:
    with (world.folder / "adapter_config.json").open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)  # a sparse file, which takes no room
    words = rf"adapter_config.json has {MOST_JSON_BYTES + 1} bytes; at most {MOST_JSON_BYTES} are read"
    check(world, lambda w: reader(str(w.folder)), ValueError, words)


READING: list[Row] = [
    (lambda w: inspect_adapter(w.folder / "none"), FileNotFoundError, "there is no adapter_config.json in"),
    (
        lambda w: SMoAConfig().save_pretrained(str(w.folder / "config.json")),
        ValueError,
        "save_directory must be a folder, got the file",
    ),
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
        "strict_base must be a bool, got str",
    ),
]


@rows("call", READING)
def test_reading_and_saving(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)
