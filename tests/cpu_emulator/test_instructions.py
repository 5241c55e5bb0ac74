"""The emulated instructions: known results (check.c), and misuse that the emulator must detect."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .build import compile_program, unsupported_reason

pytestmark = pytest.mark.skipif(unsupported_reason() is not None, reason=str(unsupported_reason()))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("check") / "check"
    compile_program(str(Path(__file__).parent / "check.c"), "-o", str(output))
    return output


def test_known_results(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout == "right\n", done.stderr


@pytest.mark.parametrize(
    ("misuse", "found"),
    [
        ("a", "a line does not begin at a multiple of 64 bytes"),
        ("l", "a line does not begin at a multiple of 64 bytes"),
        ("t", "a tile that has no size"),
        ("r", "a tile that has no size"),  # after the tiles' release
        ("f", "tiles whose sizes do not fit"),
        ("s", "one tile twice in a product"),
        ("c", "a size that no tile has"),
    ],
)
def test_misuse_is_found(program: Path, misuse: str, found: str) -> None:
    done = subprocess.run([program, misuse], capture_output=True, text=True)
    assert done.returncode < 0
    assert done.stderr == f"emulated processor: {found}\n"
