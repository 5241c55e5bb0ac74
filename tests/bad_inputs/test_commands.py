"""Bad commands: one line on stderr, exit code 2, no traceback, and nothing written."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import World

pytestmark = pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="needs the cli extra")
IS_PEFT_HERE = importlib.util.find_spec("transformers") is not None
needs_peft = pytest.mark.skipif(not IS_PEFT_HERE, reason="needs the peft extra")

# FOLDER stands for the world's folder.
COMMANDS: list[tuple[str, str]] = [
    ("tun", "No such command 'tun'"),
    ("--version", "No such option: --version"),
    ("info extra", "unexpected extra argument"),
    ("info --json", "--json"),
    ("tune", "nothing to tune: give --model FOLDER or --shape OUTxIN"),
    ("tune --shape 4096", "--shape must be OUTxIN"),
    ("tune --shape 64x8 --dtype int8", "--dtype must be one of bf16"),
    ("tune --shape 64x8 --factors tf32", "--factors must be one of bf16"),
    ("tune --shape 64x8 --tokens 0", "--tokens"),
    ("tune --shape 64x8 --rank 0", "--rank"),
    ("tune --shape 64x8 --experts -1", "--experts"),
    ("tune --shape 64x8 --blocks 9", "--blocks must be at most 8, the least features of a layer, got 9"),
    ("tune --shape 64x8 --rank 99999999999", "--rank must be at most 512 in 2 blocks"),
    ("tune --model /nowhere", "--model must be the folder of a model with its config.json, got '/nowhere'"),
    ("tune --model FOLDER/deep.json", "--model must be the folder of a model with its config.json"),
    ("tune --model FOLDER/noise", "--model .*/noise"),
    ("--json", "No such option"),
]
ADAPTERS = [
    ("inspect", "Missing argument"),
    ("inspect /nowhere", "there is no adapter_config.json in /nowhere"),
    ("inspect FOLDER", "an adapter of the method 'LORA', not SMOA"),
    ("merge FOLDER FOLDER", "Missing argument"),
    ("merge FOLDER FOLDER FOLDER", "out must be a new or an empty folder, got"),
    ("merge /nowhere FOLDER FOLDER/out", "there are no safetensors files in /nowhere"),
    ("merge FOLDER FOLDER FOLDER/out --dtype int8", "--dtype must be one of bfloat16"),
]


def run(command: str, world: World, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Run a failing command; return its output."""
    from smoa_kernels.cli import main

    before = world.bits()
    capsys.readouterr()
    assert main(command.replace("FOLDER", str(world.folder)).split()) == 2
    assert world.bits() == before
    captured = capsys.readouterr()
    return captured.out, captured.err


OF_ADAPTERS = (pytest.param(*row, marks=needs_peft) for row in ADAPTERS)


@pytest.mark.parametrize(("command", "words"), [*COMMANDS, *OF_ADAPTERS])
def test_command(command: str, words: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    if command.startswith("inspect") and importlib.util.find_spec("peft") is not None:
        import smoa_kernels.peft  # noqa: F401  # its dependencies print at their first import
    out, err = run(command, world, capsys)
    assert out == ""
    assert err.startswith("smoa-kernels: error: ")
    assert err.count("\n") == 1
    assert words in err or re.search(words, err)
    _, debug = run(f"--debug {command}", world, capsys)
    assert debug.endswith(err)
    parsed = not command.startswith(("--", "tun "))
    assert ("Traceback" in debug) == (parsed and command != "tun")


@pytest.mark.parametrize("place", ["/nowhere/at/all.json", "FOLDER", "/dev/full"])
def test_results_that_cannot_be_written(place: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """The table is printed first, no scratch file stays, and a device file is not replaced."""
    out, err = run(f"info --json {place}", world, capsys)
    assert place != "/dev/full" or Path(place).is_char_device()
    assert out
    assert err.startswith("smoa-kernels: error: cannot write ")
    assert err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full here")
@pytest.mark.slow
def test_a_real_command_on_a_full_disk() -> None:
    """Standard output is full: exit code 2 and one line, even when the failure comes at exit."""
    program = [sys.executable, "-m", "smoa_kernels.cli", "info"]
    with Path("/dev/full").open("w") as stdout:
        done = subprocess.run(program, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("smoa-kernels: error: ")
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


def test_an_error_that_nobody_foresaw_is_one_line_too(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoa_kernels.cli.info._environment", lambda *_: {}["key"])
    _, err = run("info", world, capsys)
    expected = "KeyError: 'key' (unexpected; smoa-kernels --debug shows where, info what to report)"
    assert err == f"smoa-kernels: error: {expected}\n"
