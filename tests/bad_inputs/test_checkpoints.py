"""Adapter folders with unreadable configurations, and blocks that do not fit a layer.

Damaged weights are in tests/peft.
"""

from typing import Any

import pytest
import torch

from smoa_kernels import BlockPartition

from .harness import Call, Row, World, check, one, rows

pytest.importorskip("transformers", reason="needs the peft extra")

from peft import PeftModel

from smoa_kernels.adapter_folder.format import pack_blocks, read_blocks, unpack_blocks
from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.adapter_folder.reading import MOST_JSON_BYTES
from smoa_kernels.peft import SMoAConfig

# Texts of adapter_config.json. Both readers must name the file.
FILES = [
    ("[]", "adapter_config.json must hold a JSON object, got list"),
    ("null", "adapter_config.json must hold a JSON object, got NoneType"),
    ("5", "adapter_config.json must hold a JSON object, got int"),
    ("", "adapter_config.json is no JSON: Expecting value"),
    ("{", "adapter_config.json is no JSON: Expecting property name"),
    ("[" * 16_000, "adapter_config.json is no JSON: .*recursion"),
    ('{"peft_type": 5}', "adapter_config.json: "),
    ('{"peft_type": "SMOA", "r": "x"}', "adapter_config.json: r must be an int, got 'x'"),
    ('{"peft_type": "SMOA", "r": 1000000000000}', "adapter_config.json: r must be at most 65536"),
    ('{"peft_type": "SMOA", "format_version": 99}', "adapter_config.json: format_version 99 .* is newer"),
]


@pytest.mark.parametrize("text", ["[]", "5", "{", "[" * 100_000, b'{"peft_type": "SMOA\xff"}'], ids=repr)
def test_a_damaged_configuration_in_pefts_hands(text: str | bytes, world: World) -> None:
    """PEFT reads the file before it knows the method; the error must still name the file."""
    data = text if isinstance(text, bytes) else text.encode()
    (world.folder / "adapter_config.json").write_bytes(data)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    words = f"^{world.folder}/adapter_config.json (is no JSON|must hold a JSON object)"
    check(world, lambda w: PeftModel.from_pretrained(model, str(w.folder)), ValueError, words)


@pytest.mark.parametrize("reader", [inspect_adapter, SMoAConfig.from_pretrained])
@pytest.mark.parametrize(("text", "words"), FILES, ids=[text[:50] for text, _ in FILES])
def test_configuration_file(reader: Any, text: str, words: str, world: World) -> None:
    (world.folder / "adapter_config.json").write_text(text)
    wrong_type = "must be an int" in words and reader is not inspect_adapter
    error = TypeError if wrong_type else ValueError
    check(world, lambda w: reader(str(w.folder)), error, f"^{world.folder}/{words}")


def test_a_task_that_peft_does_not_know(world: World) -> None:
    (world.folder / "adapter_config.json").write_text('{"peft_type": "SMOA", "task_type": 7}')
    words = "adapter_config.json: Invalid task type"
    check(world, lambda w: SMoAConfig.from_pretrained(str(w.folder)), ValueError, words)


@pytest.mark.parametrize("reader", [inspect_adapter, SMoAConfig.from_pretrained])
def test_a_huge_configuration_is_not_read(reader: Any, world: World) -> None:
    with (world.folder / "adapter_config.json").open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)  # a sparse file, which takes no room
    words = rf"adapter_config.json has {MOST_JSON_BYTES + 1} bytes; at most {MOST_JSON_BYTES} are read"
    check(world, lambda w: reader(str(w.folder)), ValueError, words)


def test_another_methods_adapter_is_not_inspected(world: World) -> None:
    words = "adapter_config.json: it is an adapter of the method 'LORA', not SMOA"
    check(world, lambda w: inspect_adapter(w.folder), ValueError, words)


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
        "strict_base must be True or False, got 'no'",
    ),
]


@rows("call", READING)
def test_reading_and_saving(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)


PACKED = pack_blocks(BlockPartition.from_labels(one(0, 1), one(0, 1, 1), 2), one(1, 2), torch.zeros(33))
LAYER: dict[str, Any] = {"smoa_A": torch.zeros(2, 3), "smoa_B": torch.zeros(2, 2), "smoa_blocks": PACKED}

LAYOUT: list[Row] = [
    (
        lambda _: unpack_blocks(PACKED, 2, 10**4),
        ValueError,
        "smoa_blocks must hold the block labels of 2 rows and 10000 columns",
    ),
    (
        lambda _: read_blocks("proj", {}, r=2),
        ValueError,
        "proj: the adapter lacks smoa_A, smoa_B, smoa_blocks",
    ),
    (
        lambda _: read_blocks("proj", LAYER, r=7),
        ValueError,
        "proj: ranks must sum to r=7 with a largest rank",
    ),
]


@rows("call", LAYOUT)
def test_blocks_of_a_layer(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)
