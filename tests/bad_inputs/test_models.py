"""Models whose shapes cannot be read. Bad tuning tables are in tests/tuning/test_table.py."""

import pytest

from smoa_kernels.tuning.models import read_config

from .harness import World, check


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
    """The error names the file."""
    (world.folder / "config.json").write_text(text)
    check(world, lambda w: read_config(w.folder), ValueError, words)
