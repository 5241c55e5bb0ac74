"""Faults around a run of the fine-tuning example: killed processes, two at once. Nothing is ever lost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel
from places import PATHS, adapted, kill_at, python
from test_distributed_example import losses
from test_finetune_example import RunFolder, animals, refused, tiny_llama  # noqa: F401
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

FINETUNING = """
import os, time, test_distributed_example
from pathlib import Path
import torch.distributed.checkpoint as dcp
save = dcp.save
def slow(state, checkpoint_id):
    save(state, checkpoint_id=checkpoint_id)
    if checkpoint_id.name == "step-4.partial":
        next(p for p in checkpoint_id.iterdir() if p.suffix == ".distcp").write_bytes(b"half")
        print("saving", flush=True)
        time.sleep(60)
dcp.save = slow
test_distributed_example.losses(None, Path({model!r}), Path({data!r}), Path({folder!r}))
"""


def test_kill_while_a_checkpoint_is_written(tiny_llama: Path, animals: Path, tmp_path: Path) -> None:  # noqa: F811
    job = (tiny_llama, animals)
    whole = losses(None, *job, tmp_path / "whole")
    program = FINETUNING.format(model=str(tiny_llama), data=str(animals), folder=str(tmp_path / "cut"))
    kill_at(python(program), "saving")
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"step-2", "step-4.partial"}
    assert losses(None, *job, tmp_path / "cut", "resume") == whole  # every bit
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["step-6"]


CONVERTING = """
import os, sys, time, smollm2
from pathlib import Path
def convert(gguf, folder):
    (folder / "config.json").write_text(sys.argv[0] * 2)
    print("converting", flush=True)
    sys.stdin.readline()
    (folder / "weights").write_text("all")
smollm2.locate = lambda: (Path("model.gguf"), "1.0")
smollm2.convert = convert
print(smollm2.cached_model())
"""


def test_two_processes_convert_one_model(tmp_path: Path) -> None:
    path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "SMOA_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERTING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "converting\n"  # both are at it
    places = {process.communicate("go\n", timeout=60)[0] for process in processes}
    (folder,) = tmp_path.iterdir()
    assert places == {f"{folder}\n"}
    assert (folder / "weights").read_text() == "all"


# The adapter that a run leaves behind


FINISHING = """
import signal, sys, finetune
from pathlib import Path
rename, moved = Path.rename, []
def slow(path, place):
    if path.name.startswith("adapter"):
        if len(moved) == {count}:
            print("moving", flush=True)
            signal.pause()
        moved.append(path)
    return rename(path, place)
Path.rename = slow
sys.exit(finetune.main())
"""


@pytest.mark.parametrize(("count", "earlier"), [(0, False), (1, True), (2, True)])
def test_kill_between_the_moves_of_a_runs_adapter(
    count: int,
    earlier: bool,
    tiny_llama: Path,  # noqa: F811
    animals: Path,  # noqa: F811
    tmp_path: Path,
    refused: Callable[..., str],  # noqa: F811
) -> None:
    """Of the command itself: the next one in the folder, be it refused, puts in place what is whole."""
    output = tmp_path / "run"
    if earlier:
        RunFolder(output).save_adapter(adapted(2))
    job = ("--model", tiny_llama, "--data", animals, "--output", output, "--steps", 1, "--r", 4)
    kill_at(python(FINISHING.format(count=count), *job), "moving")
    assert "--data" in refused("--output", output, "--data", tmp_path / "nowhere.jsonl")
    folder = RunFolder(output)
    if not earlier:
        assert not folder.adapter.exists()
        return
    assert json.loads((folder.previous_adapter / "adapter_config.json").read_text())["r"] == 2
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder.adapter)
    assert loaded.peft_config["default"].r == 4
