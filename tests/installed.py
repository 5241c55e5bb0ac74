"""Checks a wheel or an sdist: installed into a fresh environment, it trains a step and its command runs.

    python tests/installed.py dist/*

The environment holds the archive, its requirements and those of its command, so no numpy. Requirements are links
into the running environment, because torch takes gigabytes to download and is not under test.

A wheel runs with a PATH without a compiler. A wheel for one kind of processor must then compute with its own compiled
code; if this machine has another, the wheel is not installed.
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
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

FROM_ARCHIVE = """
import shutil
import sys
from importlib.util import find_spec
import torch
import smoa_kernels
from smoa_kernels.backends import native_unsupported_reason

archive = sys.argv[1]
assert smoa_kernels.__file__.startswith(sys.prefix), smoa_kernels.__file__
assert find_spec("numpy") is None
assert not archive.endswith(".whl") or not any(map(shutil.which, ("cc", "gcc", "clang")))
reason = native_unsupported_reason(torch.device("cpu"))
assert not archive.endswith(("x86_64.whl", "aarch64.whl")) or reason is None, reason
print(f"smoa_kernels {smoa_kernels.__version__}, torch {torch.__version__}; compiled code: {reason or 'used'}")
"""
CORE = """
import io
import torch
from smoa_kernels import FusedSMoALinear
from smoa_kernels.backends import native_unsupported_reason
from smoa_kernels.definition.experts import ExpertBlocks, ExpertsAdapter, reference_experts_linear
from smoa_kernels.operators.experts import experts_linear

x, ends = torch.randn(64, 40), torch.tensor([40, 64]).int()
for backend in ["eager"] + ["native"] * (native_unsupported_reason(torch.device("cpu")) is None):
    for order in ("spectral", "contiguous", "random"):
        options = dict(r=4, num_blocks=2, block_order=order, backend=backend)
        layer, loaded = (FusedSMoALinear(40, 48, **options) for _ in range(2))
        optimizer = torch.optim.AdamW([layer.smoa.A, layer.smoa.B], lr=0.1)
        layer(x).square().mean().backward()
        optimizer.step()
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file))
        y = loaded(x)
        assert torch.equal(y, layer(x)) and layer.smoa.B.any()
        loaded.backend = "reference"
        torch.testing.assert_close(y, loaded(x))
        layer.merge()
        torch.testing.assert_close(y, layer(x))
    labels = [torch.stack([torch.arange(n) % 2, torch.arange(n) // (n // 2)]) for n in (48, 40)]
    blocks = ExpertBlocks.from_labels(*labels, num_blocks=2)
    factors = torch.randn(2, 48, 40), torch.randn(2, 3, 40), torch.randn(2, 48, 3)
    adapter = ExpertsAdapter(*factors, blocks, torch.tensor([3, 1]).int(), torch.tensor(0.5))
    experts = experts_linear(x, ends, adapter, backend), reference_experts_linear(x, ends, adapter)
    torch.testing.assert_close(*experts, rtol=1e-4, atol=1e-4)
"""
"""A program: layers of each order and backend train, save, load and merge; experts run too."""


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
        trained = run(environment, variables, programs / "python", "-c", FROM_ARCHIVE + CORE, archive.name)
        size = sum(path.stat().st_size for path in (packages / "smoa_kernels").rglob("*"))
        beside = [file for name in core.keys() - torch for file in files(core[name])]
        size += sum(file.locate().stat().st_size for file in beside)
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


def for_this_machine(archive: Path) -> bool:
    """Whether pip would install it here: a wheel may be for another processor."""
    return archive.suffix != ".whl" or not parse_wheel_filename(archive.name)[3].isdisjoint(sys_tags())


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        print(f"{path}:\n{use(path) if for_this_machine(path) else 'for another processor: not installed'}")
