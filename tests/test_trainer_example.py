"""The examples with transformers' Trainer: one learns and resumes on the same curve, one adapts experts."""

import json
import re
import shutil

import classify
import finetune_moe
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SMALL = ["--steps", "6", "--save-every", "3", "--batch-size", "8", "--eval-questions", "40"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("classify") / "whole"
    assert classify.main(["--output", str(folder), *SMALL]) == 0
    return folder


def losses(folder):
    history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_it_learns_and_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, capsys):
    folder = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-3", folder / "checkpoint-3")
    (folder / "checkpoint-5").mkdir()  # an interrupted save, without state
    assert classify.main(["--output", str(folder), "--resume", *SMALL]) == 0
    curve = losses(whole)
    assert losses(folder) == curve
    assert sum(curve[step] for step in (4, 5, 6)) < sum(curve[step] for step in (1, 2, 3))
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert any("classifier" in key for key in ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "Accuracy on 40 test questions" in capsys.readouterr().out


def test_bad_options_are_refused_in_one_line(whole, tmp_path, capsys):
    for arguments, message in (
        (["--output", str(whole)], "is not a new or empty folder; --resume"),
        (["--output", str(tmp_path), "--resume"], "--resume: there is no checkpoint in"),
        (
            ["--output", str(tmp_path / "new"), "--num-blocks", "500", "--r", "500"],
            "num_blocks must be at most",
        ),
    ):
        capsys.readouterr()
        assert classify.main(arguments) != 0
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        assert message in line


def test_saved_and_merged_experts_answer_alike(tmp_path, capsys):
    small = ["--steps", "4", "--batch-size", "8", "--eval-questions", "40"]
    assert finetune_moe.main(["--output", str(tmp_path / "run"), *small]) == 0
    out = capsys.readouterr().out
    assert "random weights" in out
    scores = re.findall(r"(\d+\.\d %)", out)
    assert len(scores) == 3
    assert len(set(scores)) == 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
