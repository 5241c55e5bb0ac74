"""A release has the same version everywhere; one that is not ready is refused with a reason and changes no file."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import release

ROOT = Path(__file__).resolve().parent.parent
FILES = ("smoa_kernels/_version.py", "CITATION.cff", "CHANGELOG.md", "pyproject.toml", "release.py")
# Archives named as by `make dist`. Their contents are checked by test_packaging.py and `make dist`.
DIST = """dist:
\tmkdir -p dist && for name in .tar.gz -py3-none-any.whl \\
\t$(foreach m,x86_64 aarch64,-py3-none-manylinux2014_$m.manylinux_2_17_$m.whl); do \\
\ttouch dist/smoa_kernels-$$(sed -n 's/^__version__ = "\\(.*\\)"/\\1/p' smoa_kernels/_version.py)$$name; done
"""


def test_the_version_is_the_same_everywhere() -> None:
    assert release.inconsistency() is None


class Checkout:
    """A repository with an address and the files that a release reads and writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / ".gitignore").write_text("dist/\n")
        (folder / "Makefile").write_text(DIST)
        self.replace("pyproject.toml", "smoa-kernels.invalid/", "example.org/")
        self.git("init", "--quiet")
        self.git("config", "user.name", "A tester")
        self.git("config", "user.email", "tester@example.org")
        self.commit()

    def git(self, *arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=self.folder, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "as it is")

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new))

    def release(self, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
        """Run a command of release.py; return its reason for refusing, or nothing."""
        code = release.main([*arguments])
        said = capfd.readouterr().err
        refused = said.partition("release refused: ")[2]
        assert code == bool(refused)
        return refused


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    found = Checkout(tmp_path)
    for name in ("ROOT", "VERSION", "CITATION", "CHANGELOG", "DIST"):
        moved = tmp_path / getattr(release, name).relative_to(ROOT)
        monkeypatch.setattr(release, name, moved)
    return found


def test_a_release(checkout: Checkout, capfd: pytest.CaptureFixture[str]) -> None:
    assert not checkout.release(capfd, "make", "7.0.1")
    assert checkout.git("describe", "--exact-match") == "v7.0.1"
    assert not checkout.git("status", "--porcelain")
    assert release.version() == release.releases()[0][0] == "7.0.1"
    assert f"version: 7.0.1\ndate-released: {release.releases()[0][1]}\n" in release.CITATION.read_text()
    assert not checkout.release(capfd, "check")
    for given, said in (
        ("7.0.1", "the tag v7.0.1 exists"),
        ("7.0.0", "released 7.0.1, which 7.0.0 does not follow"),
        ("7.1.0", "no entries below '## Unreleased'"),
        ("7.1.0; true", "three numbers with points between them, not '7.1.0; true'"),
    ):
        assert said in checkout.release(capfd, "make", given)
    (checkout.folder / "left").touch()
    assert "the tree is not clean:\n?? left" in checkout.release(capfd, "make", "7.1.0")
    checkout.replace("CITATION.cff", "7.0.1", "7.0.2")
    assert "CITATION.cff cites" in checkout.release(capfd, "check")


@pytest.mark.parametrize(
    ("name", "old", "new", "named"),
    [
        ("pyproject.toml", "example.org/", "smoa-kernels.invalid/", "Repository is a placeholder"),
        ("CITATION.cff", "title:", "version: 3.0.0\ntitle:", "CITATION.cff cites ('3.0.0', None)"),
        ("Makefile", "touch", "false", "make dist failed"),
        ("Makefile", "-py3-none-any.whl", "", "make dist, with cc and aarch64-linux-gnu-gcc"),
    ],
)
def test_a_release_that_is_not_ready(
    checkout: Checkout, capfd: pytest.CaptureFixture[str], name: str, old: str, new: str, named: str
) -> None:
    checkout.replace(name, old, new)
    checkout.commit()
    assert named in checkout.release(capfd, "make", "7.0.1")
    assert not checkout.git("status", "--porcelain")
    assert not checkout.git("tag")


def test_workflows_run_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    workflows = [path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    asked = {name for text in workflows for name in re.findall(r"run: make (\S+)", text)}
    assert {"test", "docs", "dist", "dist-oldest", "gpu"} <= asked <= targets
