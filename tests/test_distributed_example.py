"""The fine-tuning example on several processes: it gives the losses of one process; it is killed and resumed."""

# ruff: noqa: F811  fixtures are imported by name

import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import psutil  # PEFT's own requirement
import pytest
import torch
import torch.distributed as dist
import training
from adapters import adapter_config
from checkpoints import Checkpoints
from parallel import Team
from peft import get_peft_model
from processes import Processes, two  # noqa: F401
from questions import Encoder, read_jsonl, split
from test_finetune_example import animals, finish, refused, start, tiny_llama  # noqa: F401
from training import StopRequest, shuffled_batches, train
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

STEPS = 6
training.LINE_EVERY = 1
BIN = Path(sys.executable).parent


class KilledError(Exception):
    """Stands for the death of a process after a step."""


def losses(
    kind: str | None, model: Path, data: Path, folder: Path, *, dropout: float = 0.0, how: str = ""
) -> list[float]:
    """Train a tiny model in float64 on all processes of the group, or on one; return the loss of each step.

    `how` is "resume", or "die" after the fifth step.
    """
    team = Team() if kind is None else Team(kind, dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    with team.injecting():
        adapted = get_peft_model(base, adapter_config("smoa", 4, targets, dropout=dropout))
    questions = read_jsonl(data)
    encoder = Encoder(AutoTokenizer.from_pretrained(model), {q.answer for q in questions}, 64)
    checkpoints = Checkpoints(folder, {"lr": 0.1}, team, every=2, resume=how == "resume")
    checkpoints.prepare()

    def say(words: str) -> None:
        if how == "die" and words.startswith("step 5 of"):
            raise KilledError

    batches = shuffled_batches(split(questions).train, encoder, 8, 0, team)
    settings = {"steps": STEPS, "lr": 0.1, "device": torch.device("cpu"), "stop": StopRequest()}
    try:
        trained = team.spread(adapted)
        return train(trained, batches, say=say, team=team, checkpoints=checkpoints, **settings).loss
    except KilledError:
        return []


def test_a_resumed_run_is_the_uninterrupted_one(tiny_llama: Path, animals: Path, tmp_path: Path) -> None:
    job, cut = (tiny_llama, animals), tmp_path / "cut"
    whole = losses(None, *job, tmp_path / "whole", dropout=0.2)
    assert len(set(whole)) == STEPS
    assert losses(None, *job, cut, dropout=0.2, how="die") == []
    assert [path.name for path in cut.iterdir()] == ["step-4"]
    shutil.copytree(cut / "step-4", cut / "step-5.partial")  # killed while it was written
    assert losses(None, *job, cut, dropout=0.2, how="resume") == whole  # every bit
    assert [path.name for path in cut.iterdir()] == ["step-6"]


# Dropout masks depend on the tokens of a process. They differ from those of one process if the batch is shared.
@pytest.mark.parametrize(
    ("before", "after", "dropout"),
    [("fsdp", "tp", 0.0), ("tp", "ddp", 0.0), ("ddp", "fsdp", 0.0), ("tp", None, 0.2)],
)
def test_losses_are_those_of_one_process_however_the_work_is_shared(
    before: str,
    after: str | None,
    dropout: float,
    two: Processes,
    tiny_llama: Path,
    animals: Path,
    tmp_path: Path,
) -> None:
    """The losses before the cut come from the checkpoint, those after it from the resumed run."""
    run, job = partial(losses, dropout=dropout), (tiny_llama, animals)
    alone = run(None, *job, tmp_path / "alone")
    two.run(partial(run, how="die"), before, *job, tmp_path / "cut")
    again, given = partial(run, how="resume"), (after, *job, tmp_path / "cut")
    for ours in [again(*given)] if after is None else two.run(again, *given):
        assert ours == pytest.approx(alone, rel=1e-10)


# The command, launched


TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc-per-node", 1]
ACCELERATE = [
    *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0),
]


@pytest.mark.long
def test_a_killed_process_ends_the_run_which_resumes_on_another_number(
    tiny_llama: Path, animals: Path, tmp_path: Path
) -> None:
    job = ("--model", tiny_llama, "--data", animals, "--output", tmp_path, "--rank", 4, "--steps", 150)
    job = (*job, "--batch-size", 8, "--dtype", "float64", "--checkpoint-every", 5)
    process = start(*job, "--distributed", "fsdp", "--device", "cpu", launcher=ACCELERATE)
    checkpoints = tmp_path / "checkpoints"
    while not any(path.suffix != ".partial" for path in checkpoints.glob("step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    (victim,) = (one for one in psutil.Process(process.pid).children() if one.environ().get("RANK") == "1")
    victim.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "SIGKILL" in err  # the launcher names the killed process
    assert out.count("step 1 of") == 1  # only the first process reports progress
    (last,) = (path for path in checkpoints.iterdir() if path.suffix != ".partial")
    before = json.loads((last / "run.json").read_text())["figures"]["loss"]
    assert len(before) == int(last.name.removeprefix("step-"))
    finish(start(*job, "--distributed", "ddp", "--device", "cpu", "--resume", launcher=TORCHRUN))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert len(summary["loss"]) == 150
    assert summary["loss"][: len(before)] == before


def test_bad_runs_are_refused_in_one_line(
    refused: object, tiny_llama: Path, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ("--model", tiny_llama, "--data", animals, "--output", tmp_path / "run")
    assert "torchrun --nproc-per-node 2" in refused(*job, "--distributed", "ddp")
    assert "holds no checkpoint to resume from" in refused(*job, "--resume")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were launched: say ddp, fsdp or tp" in refused(*job)
    assert not (tmp_path / "run").exists()


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "step-3"
    place.mkdir()
    (place / "run.json").write_text(json.dumps({"options": {"lr": 0.1}, "figures": {"loss": []}}))
    Checkpoints(tmp_path, {"lr": 0.1, "device": "cpu"}, Team(), resume=True).prepare()
    with pytest.raises(ValueError, match=r"had lr=0.1, this one has 0.2"):
        Checkpoints(tmp_path, {"lr": 0.2}, Team(), resume=True).prepare()
