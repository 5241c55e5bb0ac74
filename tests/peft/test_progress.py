"""Long commands on folders show a progress bar on a terminal and none in a pipe."""

import re

import pytest
from adapted import adapt, nudge
from peft import HiraConfig, get_peft_model
from tiny_models import tiny_llama

from smoa_kernels.cli import main

COMMANDS = {
    "merge": ("merging", ["base", "adapter", "out"]),
    "inspect": ("comparing", ["adapter", "--base", "base"]),
    "convert": ("converting", ["hira", "out", "--base", "base"]),
}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A base, an SMoA adapter and a HiRA adapter of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    model = adapt(tiny_llama())
    nudge(model)
    model.save_pretrained("adapter")
    get_peft_model(tiny_llama(), HiraConfig(r=4, target_modules=["q_proj"])).save_pretrained("hira")


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_long_command_says_how_much_is_left(command, terminal, monkeypatch, capsys):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    doing, arguments = COMMANDS[command]
    assert main([command, *arguments]) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    bar = re.search(rf"{doing} .*?(\d+)/(\d+) +(\d:\d\d:\d\d|-:--:--)", shown)
    assert (bar is not None) == terminal, shown
