"""The fine-tuning example: its data, its files, and the real script on a tiny model and on SmolLM2."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import finetune
import finetune_moe
import four_bits
import pytest
import smollm2
import tiny_models
import torch
import trec
from options import checkpoint_of
from packages import file_of
from peft import PeftModel
from places import started
from questions import Encoder, Question, read_jsonl, split
from tokenizers import Tokenizer, models, pre_tokenizers
from training import next_token_scores
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

pytestmark = pytest.mark.slow

SCRIPT = Path(finetune.__file__)
KINDS = {"robin": "bird", "carp": "fish", "flint": "stone"}
AGES, SIZES = ("old", "young"), ("big", "small", "old", "young")
WORDS = ("<pad>", "<unk>", *KINDS.values(), *KINDS, "old", "young", "big", "small", "a", "is", "what", ":")


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tokenizer().save_pretrained(folder)
    tiny_models.tiny_llama(vocab_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of questions that a tiny model can learn."""
    lines = [
        {"prompt": f"what is a {age} {size} {word} :", "answer": kind}
        for word, kind in KINDS.items()
        for age in AGES
        for size in SIZES
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
    # The documents' figures hold for this split only.
    assert splits.test[1] == Question("Who invented volleyball ?\nType:", "human")


def test_jsonl_is_read_once_per_question(tmp_path: Path) -> None:
    lines = [{"prompt": "Why? ", "answer": " so "}, {"prompt": "why?", "answer": "so", "id": 3}]
    path = write_lines(tmp_path / "q.jsonl", lines)
    assert read_jsonl(path) == [Question("Why?", "so")]
    for bad in ("{", "[1]", '{"prompt": "p"}', '{"prompt": 7, "answer": "a"}'):
        path.write_text(f'{{"prompt": "good", "answer": "a"}}\n\n{bad}\n')
        with pytest.raises(ValueError, match=r"q\.jsonl, line 3 is no"):
            read_jsonl(path)
    write_lines(path, [*lines, {"prompt": "why? ", "answer": "because"}])
    with pytest.raises(ValueError, match=r"line 3: a prompt from above again, but not its answer 'so'"):
        read_jsonl(path)


@pytest.mark.parametrize("make", [tiny_models.tiny_llama, tiny_models.tiny_gpt2])
def test_padding_does_not_change_the_scores(make: Any) -> None:
    """GPT-2 has learned positions."""
    network, encoder = make(vocab_size=32).eval(), Encoder(tokenizer(), set(KINDS.values()), 64)
    short = Question("what is a robin :", "bird")
    long = Question("what is a big old small young carp :", "fish")
    both, alone = encoder.batch([short, long]), encoder.batch([short])
    assert both.tokens == 5 + 9
    assert both.targets.tolist() == encoder.tokenizer.convert_tokens_to_ids(["bird", "fish"])
    with torch.no_grad():
        padded = next_token_scores(network, both.input_ids, both.attention_mask)
        plain = network(input_ids=alone.input_ids).logits[:, -1]
    torch.testing.assert_close(padded[:1], plain)


def test_encoder_refuses_labels_that_it_cannot_tell_apart() -> None:
    with pytest.raises(ValueError, match="'bird carp' and 'bird robin' begin with the same token"):
        Encoder(tokenizer(), {"bird robin", "bird carp", "fish"}, 64)
    with pytest.raises(ValueError, match="'what is a robin :' has 5 tokens, the model takes 1 to 4"):
        Encoder(tokenizer(), set(KINDS.values()), 4).check([Question("what is a robin :", "bird")])


# Files


def test_cached_model_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "locate", lambda: (tmp_path / "model.gguf", "1.0"))

    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    def complete(gguf: Path, folder: Path) -> None:
        assert not any(path.name[0] != "." for path in folder.parent.iterdir())  # no final folder yet
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


def test_a_run_never_mixes_with_an_earlier_ones_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--resume: there is no checkpoint in"):
        checkpoint_of(tmp_path, resume=True)
    for step in (3, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (3, 20):  # the last one was cut short
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert checkpoint_of(tmp_path, resume=True) == str(tmp_path / "checkpoint-20")
    with pytest.raises(ValueError, match="is not a new or empty folder; --resume goes on"):
        checkpoint_of(tmp_path, resume=False)
    assert checkpoint_of(tmp_path / "new", resume=False) is None


def test_a_missing_package_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps no-such-data==1\.2, or give --data"):
        file_of("no-such-data", "1.2", "a/file", ", or give --data")


# The command


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    """Run the command with bad options in this process; return the one line that it prints."""
    before = signal.getsignal(signal.SIGTERM)
    logging.disable_progress_bar()  # the script's own way requires that tqdm is not yet imported

    def run(*options: object) -> str:
        assert finetune.main([str(option) for option in options]) != 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    yield run
    signal.signal(signal.SIGTERM, before)


def test_bad_input_is_refused_in_one_line(
    refused: object, tiny_llama: Path, animals: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    job = ("--model", tiny_llama, "--data", animals, "--output", output)
    for options, words in (
        (("--method", "dora"), "dora"),
        (("--steps", 0), "--steps"),
        (("--method", "lora", "--num-blocks", 2), "only --method smoa has blocks"),
        (("--method", "hira", "--alpha", 4), "--method hira has no scaling"),
        (("--target-modules", "c_attn"), "c_attn"),
        (("--num-blocks", 99), "num_blocks"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model", "nowhere"), "nowhere"),
        (("--lr", 1e38, "--steps", 50), "the loss became"),
    ):
        assert words in refused(*job, *options)
        assert not output.exists()


def start(
    *options: object, launcher: Sequence[object] = (sys.executable,), **environment: str
) -> subprocess.Popen[str]:
    return started(*launcher, SCRIPT, *options, PYTHONUNBUFFERED="1", **environment)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    # Other packages may write to stderr (torchao does at import); ours must not.
    assert not [line for line in err.splitlines() if "Traceback" in line or "smoa_kernels/" in line], err
    return out


@pytest.mark.parametrize(
    "method", ["smoa", *(pytest.param(name, marks=pytest.mark.long) for name in ("lora", "hira"))]
)
def test_whole_run_on_a_tiny_model(method: str, tiny_llama: Path, animals: Path, tmp_path: Path) -> None:
    job = ("--model", tiny_llama, "--data", animals, "--output", tmp_path / "run", "--method", method)
    out = finish(start(*job, "--r", 4, "--steps", 20, "--lr", 0.1))
    for part in ("Accuracy before", "tokens/s", "a step (median)", "Peak memory", "measured on CPU"):
        assert part in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert len(summary["loss"]) == summary["steps"] == 20
    assert summary["loss"][-1] < summary["loss"][0]
    assert summary["accuracy_after"]["questions"] == 2
    # 2 layers of q (32, 32), k and v (16, 32), up and down (48, 32), rank 4
    assert summary["lora_parameters"] == 2 * 4 * (64 + 48 + 48 + 80 + 80)
    assert summary["trainable_parameters"] == summary["lora_parameters"] // (2 if method == "smoa" else 1)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "run" / "adapter")


def test_interruption_saves_the_trained_adapter(tiny_llama: Path, animals: Path, tmp_path: Path) -> None:
    process = start("--model", tiny_llama, "--data", animals, "--output", tmp_path, "--steps", 10**6)
    assert process.stdout is not None
    assert any("step 1 of" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # `timeout` repeats the signal too; training must not be lost
    out = finish(process, code=128 + signal.SIGTERM)
    assert "Stopped by SIGTERM" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert 1 <= len(summary["loss"]) < 10**6
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")


def test_smollm2_from_the_packages(tmp_path: Path) -> None:
    options = ("--steps", 2, "--eval-questions", 16, "--output", tmp_path / "run")
    out = finish(start(*options, SMOA_CACHE=str(tmp_path / "cache")))
    assert "dequantised Q4_1" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["trainable_parameters"] * 2 == summary["lora_parameters"] == 1_658_880


def test_the_minimal_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs from another folder and imports none of our files."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "minimal.py"
    script.write_text((SCRIPT.parent / "minimal.py").read_text().replace("range(20)", "range(2)"))
    said = finish(started(sys.executable, script, HF_HUB_OFFLINE="1", PYTHONPATH=str(SCRIPT.parents[1])))
    assert "step 2: loss" in said
    assert "Which colour has snow?" in said
    assert (tmp_path / "runs" / "minimal" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_an_adapter_answers_alike_beside_four_bits_and_merged_into_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="a 4-bit base needs bitsandbytes")
    few = ["--steps", "2", "--batch-size", "4", "--eval-questions", "12"]
    assert four_bits.main(["--output", str(tmp_path), *few]) == 0
    out = capsys.readouterr().out
    beside, merged = re.findall(r"SMoA: .*? (\d+\.\d) % .* (\d+\.\d) % ", out)[0]
    # bitsandbytes' product for CPUs rounds to bfloat16.
    assert abs(float(beside) - float(merged)) <= 100 / 12 + 0.1
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_saved_and_merged_experts_answer_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "4", "--batch-size", "8", "--eval-questions", "40"]
    assert finetune_moe.main(["--output", str(tmp_path / "run"), *small]) == 0
    out = capsys.readouterr().out
    assert "random weights" in out
    scores = re.findall(r"(\d+\.\d %)", out)
    assert len(scores) == 3
    assert len(set(scores)) == 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
