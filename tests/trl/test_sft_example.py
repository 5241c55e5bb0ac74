"""The example script on the tiny chat model: it learns, resumes on the same curve, and its adapter loads."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from chat_models import tokenizer
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import chats
import sft

SMALL = ["--steps", "40", "--max-length", "256"]  # checkpoints at 20 and 40


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, on the chats that a package ships."""
    folder = tmp_path_factory.mktemp("sft") / "whole"
    assert sft.main(["--model", str(base), "--output", str(folder), *SMALL]) == 0
    return folder


def curve(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "checkpoint-40" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_it_learns_and_its_adapter_loads(whole: Path) -> None:
    losses = curve(whole)
    assert losses[40] < losses[10]
    model = AutoPeftModelForCausalLM.from_pretrained(whole / "adapter").eval()
    tokens = tokenizer()("and then?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        adapted = model(tokens).logits
        with model.disable_adapter():
            assert not torch.allclose(model(tokens).logits, adapted, atol=1e-2)


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_used_folder_is_left_alone_and_a_resumed_run_is_the_uninterrupted_one(
    base: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(whole)
    assert sft.main(["--model", str(base), "--output", str(whole), *SMALL]) == 2
    assert f"--output {whole} is not a new or empty folder; --resume" in capsys.readouterr().err
    assert files(whole) == before
    folder = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-20", folder / "checkpoint-20")
    (folder / "checkpoint-30").mkdir()  # an interrupted save, without state
    assert sft.main(["--model", str(base), "--output", str(folder), "--resume", *SMALL]) == 0
    assert curve(folder) == curve(whole)
    ours, reference = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, whole))
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[key], reference[key]) for key in ours)


def test_chats_of_a_file(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer of a chat is trained once, with all earlier messages before it."""
    said = [("system", "be brief"), ("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in said]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    assert chats.turns(chats.read_jsonl(file)) == [
        {"prompt": messages[:2], "completion": messages[2:3]},
        {"prompt": messages[:4], "completion": messages[4:]},
    ]
    refusals = {
        "{}": "line 1 is no",
        '{"messages": [{"role": "user"}]}': "line 1 is no",
        '{"messages": [{"role": "user", "content": "a"}]}': "0 answers are too few",
    }
    for line, message in refusals.items():
        file.write_text(line)
        assert sft.main(["--model", str(base), "--data", str(file)]) == 2
        assert message in capsys.readouterr().err
