"""Models whose shapes cannot be read, and bad questions about GPUs. Of tuning tables: tests/tuning/test_table.py."""

import pytest

from smoa_kernels.cost.architectures import ARCHITECTURES, occupancy
from smoa_kernels.cost.models import read_config

from .harness import Call, Row, World, check, rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "must give a positive num_attention_heads, got None"),
        ("{", "--from-model must be a config.json or its folder"),
        ('{"num_attention_heads": 0}', "must give a positive num_attention_heads, got 0"),
        ('{"num_attention_heads": "8"}', "must give a positive num_attention_heads, got '8'"),
        ('{"num_attention_heads": 8, "hidden_size": -1}', "must give a positive hidden_size, got -1"),
        ("[" * 100_000, "--from-model must be a config.json or its folder"),
    ],
    ids=range(6),
)
def test_models_whose_shapes_are_read(text: str, words: str, world: World) -> None:
    """The file is named."""
    (world.folder / "config.json").write_text(text)
    check(world, lambda w: read_config(w.folder), ValueError, words)


SM_90 = ARCHITECTURES["sm_90"]

TABLES: list[Row] = [
    (lambda _: read_config("config.json"), TypeError, "path must be a Path, got str"),  # type: ignore[arg-type]
    (lambda w: read_config(w.folder / "list.json"), ValueError, "must give a positive num_attention_heads"),
    (
        lambda _: occupancy("sm_90", registers=8, shared=8, warps=8),
        TypeError,
        "arch must be an Architecture, got str",
    ),  # type: ignore[arg-type]
    (
        lambda _: occupancy(SM_90, registers=8, shared=None, warps=8),
        TypeError,
        "shared must be an int, got None",
    ),  # type: ignore[arg-type]
    (
        lambda _: occupancy(SM_90, registers=8, shared=8, warps=0),
        ValueError,
        "warps must be at least 1, got 0",
    ),
]


@rows("call", TABLES)
def test_tables(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)
