"""Adapter folders whose configuration cannot be read, and bad arguments of what reads a layer's blocks.

Damaged weights are in tests/peft.
"""

from typing import Any

import pytest
import torch

from smoa_kernels import BlockPartition

from .harness import Call, Row, World, check, one, rows

pytest.importorskip("transformers", reason="needs the peft extra")

from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft.inspection import inspect_adapter
from smoa_kernels.peft.layout import (
    blocks_size,
    pack_blocks,
    read_blocks,
    unpack_blocks,
)
from smoa_kernels.peft.settings import layer_settings
from smoa_kernels.spectrum.model import layer_kind, model_spectrum


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
    ("[" * 16_000, "adapter_config.json is no JSON: .*recursion"),
    (" " * 1_048_577, r"adapter_config.json has 1048577 bytes, more than any such file \(1048576\)"),
    (
        f"[{'0,' * 40_000}0]",
        r"adapter_config.json has 40001 values, more than any such file \(16384\)",
    ),
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
    words = "adapter_config.json: it is an adapter of the method 'LORA', not SMOA"
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


PARTITION = BlockPartition.from_labels(one(0, 1), one(0, 1, 1), 2)
RANKS, SKETCH = one(1, 2), torch.zeros(33)
PACKED = pack_blocks(PARTITION, RANKS, SKETCH)
LAYER: dict[str, Any] = {"smoa_A": torch.zeros(2, 3), "smoa_B": torch.zeros(2, 2), "smoa_blocks": PACKED}

LAYOUT: list[Row] = [
    (lambda _: blocks_size("6", 8, 2), TypeError, "out_features must be an int, got '6'"),  # type: ignore[arg-type]
    (lambda _: blocks_size(6, 0, 2), ValueError, "in_features must be at least 1, got 0"),
    (lambda _: blocks_size(6, 8, 10**9), ValueError, "num_blocks must be at most 65536, got 1000000000"),
    (lambda _: pack_blocks(None, RANKS, SKETCH), TypeError, "partition must be a BlockPartition, got None"),  # type: ignore[arg-type]
    (lambda _: pack_blocks(PARTITION, [1, 2], SKETCH), TypeError, "ranks must be a torch.Tensor, got list"),  # type: ignore[arg-type]
    (lambda _: pack_blocks(PARTITION, one(1), SKETCH), ValueError, r"ranks must be 2 ints, got .* \(1,\)"),
    (
        lambda _: pack_blocks(PARTITION, RANKS / 1, SKETCH),
        ValueError,
        "ranks must be 2 ints, got torch.float32",
    ),
    (
        lambda _: pack_blocks(PARTITION, RANKS, one(3)),
        ValueError,
        "sketch must be 33 floating-point numbers, got torch.int64",
    ),
    (
        lambda _: pack_blocks(PARTITION, RANKS, SKETCH.to("meta")),
        ValueError,
        "sketch must hold numbers, got a meta",
    ),
    (lambda _: unpack_blocks(None, 6, 8), TypeError, "smoa_blocks must be a torch.Tensor, got NoneType"),  # type: ignore[arg-type]
    (
        lambda _: unpack_blocks(PACKED.to_sparse(), 2, 3),
        TypeError,
        "smoa_blocks must be a dense tensor, got layout torch.sparse_coo",
    ),
    (
        lambda _: unpack_blocks(PACKED.to("meta"), 2, 3),
        ValueError,
        "smoa_blocks must hold numbers, got a meta",
    ),
    (lambda _: unpack_blocks(PACKED, "2", 3), TypeError, "out_features must be an int, got '2'"),  # type: ignore[arg-type]
    (
        lambda _: unpack_blocks(PACKED, 2, 10**4),
        ValueError,
        "smoa_blocks must hold the block labels of 2 rows and 10000 columns",
    ),
    (lambda _: read_blocks("proj", None), TypeError, "given must be a Mapping, got NoneType"),  # type: ignore[arg-type]
    (lambda _: read_blocks("proj", {}), ValueError, "proj: the adapter lacks smoa_A, smoa_B, smoa_blocks"),
    (
        lambda _: read_blocks("proj", LAYER | {"smoa_A": [1.0]}),
        TypeError,
        "proj: smoa_A must be a torch.Tensor, got list",
    ),
    (
        lambda _: read_blocks("proj", LAYER | {"smoa_blocks": "x"}),
        TypeError,
        "proj: smoa_blocks must be a torch.Tensor, got str",
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
