"""Whether a wheel or an sdist is whole: installed into a fresh environment, it trains a step and its command runs.

    python tests/installed.py dist/*

The environment holds the archive alone. What the package depends on comes from the environment that this runs in,
through a .pth file: torch is gigabytes to download, and says nothing of our archive. (Whether every dependency is
declared, test_packaging.py asks.) An editable install of the checkout is not among it: of a folder that a .pth file
names, Python reads no further .pth files.

A wheel is used where PATH leads to no compiler. One for x86-64 must then compute by the code that was compiled into it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

TRAINS = """
import shutil
import sys
import torch
from torch import nn
import smoa_kernels

archive = sys.argv[1]
assert smoa_kernels.__file__.startswith(sys.prefix), smoa_kernels.__file__
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
    """Install an archive, train with it and run its command: what both print.

    Raises:
        RuntimeError: one of these failed, with what it printed.
    """
    with tempfile.TemporaryDirectory() as name:
        environment = Path(name).resolve()
        venv.create(environment, symlinks=True)
        (packages,) = environment.glob("lib/python*/site-packages")
        here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (packages / "dependencies.pth").write_text("\n".join(here))
        programs = environment / "bin"
        # Of the checkout's editable install pip would say that this version is there already.
        install = [
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
            "--ignore-installed",
        ]
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC")}
        if archive.suffix == ".whl":
            variables["PATH"] = str(programs)
        run(environment, variables, programs / "python", "-m", "pip", *install, archive.resolve())
        trained = run(environment, variables, programs / "python", "-c", TRAINS, archive.name)
        return trained + run(environment, variables, programs / "smoa-kernels", "info")


def run(folder: Path, variables: dict[str, str], *command: str | Path) -> str:
    """Away from the checkout."""
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}:\n{use(Path(argument))}")
