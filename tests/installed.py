"""Checks a wheel or an sdist: installed into a fresh environment, it trains a step and its command runs.

    python tests/installed.py dist/*

The environment holds the archive, its requirements and those of its command, so no numpy. Requirements are links
into the running environment: torch is gigabytes to download, and is not under test.

A wheel is used where PATH leads to no compiler. One for x86-64 must then compute with its own compiled code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, PackagePath, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

TRAINS = """
import shutil
import sys
from importlib.util import find_spec
import torch
from torch import nn
import smoa_kernels

archive = sys.argv[1]
assert smoa_kernels.__file__.startswith(sys.prefix), smoa_kernels.__file__
assert find_spec("numpy") is None
assert not archive.endswith(".whl") or not any(map(shutil.which, ("cc", "gcc", "clang")))
backend = "native" if archive.endswith("x86_64.whl") else "auto"  # which raises where it cannot run
layer = smoa_kernels.FusedSMoALinear.from_linear(nn.Linear(80, 96), r=4, num_blocks=2, backend=backend)
optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
x = torch.randn(64, 80)
before = layer(x)
before.square().mean().backward()
optimizer.step()
y = layer(x)
assert not torch.equal(y, before)
layer.backend = "reference"
torch.testing.assert_close(y, layer(x))
print(f"smoa_kernels {smoa_kernels.__version__}, torch {torch.__version__}: backend {backend!r} trained a step")
"""


def use(archive: Path) -> str:
    """Install an archive, train with it and run its command; returns their output.

    Raises:
        RuntimeError: one of these failed; the message has the output.
    """
    with tempfile.TemporaryDirectory() as name:
        environment = Path(name).resolve()
        venv.create(environment, symlinks=True)
        (packages,) = environment.glob("lib/python*/site-packages")
        programs = environment / "bin"
        install = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC")}
        if archive.suffix == ".whl":
            variables["PATH"] = str(programs)
        link(packages, needed(["pip"] if archive.suffix == ".whl" else ["pip", "hatchling"]))
        run(environment, variables, programs / "python", "-m", "pip", *install, archive.resolve())
        (ours,) = distributions(name="smoa-kernels", path=[str(packages)])
        core, torch = needed(asked_for(ours)), needed(["torch"])
        link(packages, core | needed(asked_for(ours, "cli")))
        trained = run(environment, variables, programs / "python", "-c", TRAINS, archive.name)
        size = sum(path.stat().st_size for path in (packages / "smoa_kernels").rglob("*"))
        size += sum(
            file.locate().stat().st_size for name in core.keys() - torch for file in files(core[name])
        )
        trained += f"{size / 1e6:.1f} MB on disk beside torch and what torch asks for\n"
        return trained + run(environment, variables, programs / "smoa-kernels", "info")


def asked_for(package: Distribution, *extras: str) -> list[str]:
    """The requirements of an installed package and of some of its extras."""
    found = [Requirement(text) for text in package.requires or []]
    where = [{"extra": extra} for extra in ("", *extras)]
    return [str(r) for r in found if r.marker is None or any(map(r.marker.evaluate, where))]


def needed(requirements: Iterable[str]) -> dict[str, Distribution]:
    """Installed distributions that satisfy the requirements, and everything they need in turn, by name."""
    found: dict[str, Distribution] = {}
    waiting = list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name not in found:
            found[requirement.name] = distribution(requirement.name)
            waiting += asked_for(found[requirement.name], *requirement.extras)
    return found


def link(packages: Path, wanted: dict[str, Distribution]) -> None:
    """Link distributions into the environment; a folder shared by several (NVIDIA's) is linked once."""
    for package in wanted.values():
        for top in {file.parts[0] for file in files(package)}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(package.locate_file(top))))


def files(package: Distribution) -> list[PackagePath]:
    """The files of a distribution in site-packages, without shared folders of bytecode."""
    return [file for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")]


def run(folder: Path, variables: dict[str, str], *command: str | Path) -> str:
    """Runs a command outside the checkout."""
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}:\n{use(Path(argument))}")
