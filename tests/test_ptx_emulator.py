"""A session in the PTX emulator: how findings are reported, and what happens without g++.

The emulator's own tests run with `make emulate`.
"""

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

from places import ran
from ptx_emulator.library import unsupported_reason

SESSION = """
import torch
from ptx_emulator.samples import add, add_unmasked

def test_inside():
    x, out = torch.randn(1000), torch.empty(1000)
    add[(4,)](x, x, out, 1000, BLOCK=256)
    assert torch.equal(out, x + x)

def test_past_the_end():
    x, out = torch.randn(1000), torch.empty(1000)
    add_unmasked[(4,)](x, x, out, 1000, BLOCK=256)
"""


def session(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `SESSION` in the emulator, in another process, because this one may interpret kernels."""
    (folder / "test_session.py").write_text(SESSION)
    options = ["-p", "ptx_emulator.plugin", "-p", "no:cacheprovider", "-q", "--rootdir", str(folder)]
    emulated = {"PTX_EMULATOR": "sm_80", "TRITON_INTERPRET": "0", **environment}
    return ran("-m", "pytest", *options, folder, **emulated)


@pytest.mark.slow
@pytest.mark.skipif(unsupported_reason() is not None, reason=str(unsupported_reason()))
def test_a_finding_fails_its_test(tmp_path: Path) -> None:
    """Both tests compute right numbers; the unmasked load past the end fails the second test and the session."""
    ran = session(tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 failed, 1 passed" in ran.stdout
    assert "ERROR outside_storage" in ran.stdout
    assert "add_unmasked at samples.py" in ran.stdout


@pytest.mark.slow
def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    ran = session(tmp_path, PATH="", PYTEST_ADDOPTS="-rs")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 skipped" in ran.stdout
    assert "there is no g++" in ran.stdout
