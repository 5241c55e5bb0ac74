"""Whether a wheel or an sdist is whole: installed into a fresh environment, it trains a step and its command runs.

    python tests/installed.py dist/*

The environment holds the archive alone. What the package depends on comes from the environment that this runs in,
through a .pth file: torch is gigabytes to download, and says nothing of our archive. (Whether every dependency is
declared, test_packaging.py asks.) An editable install of the checkout is not among it: of a folder that a .pth file
names, Python reads no further .pth files.
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
import sys
import torch
from torch import nn
import smoa_kernels

assert smoa_kernels.__file__.startswith(sys.prefix), smoa_kernels.__file__
layer = smoa_kernels.FusedSMoALinear.from_linear(nn.Linear(8, 6), r=4, num_blocks=2)
optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
x = torch.randn(3, 8)
before = layer(x)
before.square().mean().backward()
optimizer.step()
assert not torch.equal(layer(x), before)
print(f"smoa_kernels {smoa_kernels.__version__} from {smoa_kernels.__file__}: a step of training was done")
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
        run(environment, programs / "python", "-m", "pip", *install, archive.resolve())
        trained = run(environment, programs / "python", "-c", TRAINS)
        return trained + run(environment, programs / "smoa-kernels", "info")


def run(folder: Path, *command: str | Path) -> str:
    """Away from the checkout, which PYTHONPATH may name too."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}:\n{use(Path(argument))}")
