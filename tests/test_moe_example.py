"""The example with experts, for real on TREC's questions: it runs, saves, loads and merges."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import finetune_moe

pytestmark = pytest.mark.slow

SMALL = ["--steps", "4", "--batch-size", "8", "--eval-questions", "40"]


@pytest.mark.parametrize("method", ["smoa", "lora"])
def test_the_saved_and_the_merged_model_answer_alike(method, tmp_path, capsys):
    assert finetune_moe.main(["--output", str(tmp_path / "run"), "--method", method, *SMALL]) == 0
    out = capsys.readouterr().out
    assert "random weights" in out
    scores = re.findall(r"(\d+\.\d %)", out)
    assert len(scores) == 3
    assert len(set(scores)) == 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_bad_input_is_told_in_one_line(capsys):
    assert finetune_moe.main(["--method", "other"]) == 2
    assert "--method must be smoa or lora" in capsys.readouterr().err
