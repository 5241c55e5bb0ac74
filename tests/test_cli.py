"""The command line (smoa_kernels/cli): output, exit codes, errors of one line."""

import json
import re

import pytest
import torch
from places import ran
from typer.main import get_command

from smoa_kernels.cli import info, main
from smoa_kernels.cli.app import app


def test_without_arguments_every_command_is_shown_in_its_group_with_an_example_that_parses(
    capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "110")
    assert main([]) == 0
    out = capsys.readouterr().out
    commands = get_command(app).commands
    examples = re.findall(r"^│ +smoa-kernels (.*?) *│$", out, re.MULTILINE)
    assert sorted(example.split()[0] for example in examples) == sorted(commands)
    for example in examples:
        name, *arguments = example.split()
        commands[name].make_context(name, arguments)  # raises for an unknown option
    places = [out.index(each) for each in ("A model or an adapter", "│ inspect ", "A GPU", "│ tune ")]
    assert places == sorted(places)


def test_a_usage_error_names_the_help_that_answers_it(capsys):
    for arguments, said in (
        (["inspec"], "No such command 'inspec'. Did you mean 'inspect'? See smoa-kernels --help"),
        (["info", "--foo"], "No such option: --foo. See smoa-kernels info --help"),
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"smoa-kernels: error: {said}\n"


def test_info(tmp_path, capsys):
    path = tmp_path / "info.json"
    assert main(["info", "--json", str(path)]) == 0
    assert "backends" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["backends"]["eager"] == "works"
    assert set(found["backends"]) == {"eager", "native", "reference", "triton"}
    assert found["tuning tables"]
    assert found["versions"]["torch"].startswith("2.")
    assert found["versions"].keys() >= {"torch is built for", "GPU driver"}


@pytest.mark.parametrize(
    ("cuda", "hip", "words"),
    [("13.0", None, "CUDA 13.0"), (None, "7.1", "ROCm 7.1"), (None, None, "the CPU only")],
)
def test_info_says_what_torch_is_built_for(cuda, hip, words, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert info._runtime() == words


def test_info_names_the_instructions_of_arm(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "instructions: NEON" in info._devices()["cpu"]


def test_info_shows_another_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert info._devices()["xpu"] == "2 devices, on which torch's operators run"


def test_info_shows_the_environment_but_no_secrets(tmp_path, monkeypatch):
    shown = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUDA_LAUNCH_BLOCKING": "1",
        "HSA_OVERRIDE_GFX_VERSION": "11.0.0",
        "ROCR_VISIBLE_DEVICES": "0",
        "HIP_VISIBLE_DEVICES": "1",
    }
    for name, value in (shown | {"CUDA_API_TOKEN": "s3cret", "AWS_REGION": "elsewhere"}).items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "info.json"
    assert main(["info", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["environment"]
    assert found.items() >= shown.items()
    assert found["CUDA_API_TOKEN"] == "set, not shown"
    assert "s3cret" not in path.read_text()
    assert "AWS_REGION" not in found


def test_info_asks_the_drivers_files_then_their_command(tmp_path, monkeypatch):
    nvidia, amd = tmp_path / "nvidia" / "version", tmp_path / "amdgpu" / "version"
    monkeypatch.setattr(info, "_DRIVERS", (nvidia, amd))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert info._driver() == "not found"
    command = tmp_path / "nvidia-smi"
    for script, words in (
        ("echo 580.65.06", "nvidia: 580.65.06"),
        ("exit 9", "not found"),
        ("true", "not found"),
    ):
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
        assert info._driver() == words
    for path, text in ((nvidia, "NVRM version: x86_64  580.65.06\nGCC version: 12\n"), (amd, "6.14.14\n")):
        path.parent.mkdir()
        path.write_text(text)
    assert info._driver() == "nvidia: NVRM version: x86_64  580.65.06; amdgpu: 6.14.14"


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing):
    """One clear line if the package of the extra cannot be imported."""
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from smoa_kernels.cli import main; sys.exit(main())"
    )
    done = ran("-c", program)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'smoa-kernels[cli]'" in done.stderr


def test_as_a_module_where_the_script_is_not_installed():
    done = ran("-m", "smoa_kernels.cli", "info", "extra")
    assert done.returncode == 2
    assert done.stderr.startswith("smoa-kernels: error: Got unexpected extra argument")
