"""Makes a release: a version in all its places, packages, a commit and a tag. Pushes and uploads nothing.

    python release.py make 0.2.0    # what `make release VERSION=0.2.0` runs
    python release.py check         # whether the checkout and the archives in dist/ may be published

RELEASING.md is the checklist around it.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VERSION = ROOT / "smoa_kernels" / "_version.py"  # which the build reads; the other two repeat it
CITATION = ROOT / "CITATION.cff"
CHANGELOG = ROOT / "CHANGELOG.md"
DIST = ROOT / "dist"
UNRELEASED = "## Unreleased\n"
ARCHIVES = (
    "py3-none-any.whl",
    *(f"py3-none-manylinux2014_{name}.manylinux_2_17_{name}.whl" for name in ("x86_64", "aarch64")),
)


class Refused(Exception):
    """Why there is no release."""


def declared(path: Path, pattern: str) -> str | None:
    """The text after a pattern on a line of a file, without quotes."""
    found = re.search(rf"^{pattern}(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found and found[1].strip('"')


def version() -> str:
    """The version that the build reads."""
    return declared(VERSION, "__version__ = ") or ""


def releases() -> list[tuple[str, str]]:
    """Versions and dates of the changelog's released sections, newest first."""
    return re.findall(r"^## (\d+\.\d+\.\d+) \((.*)\)$", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)


def inconsistency() -> str | None:
    """How the places of the version disagree, or None."""
    cited = declared(CITATION, "version: "), declared(CITATION, "date-released: ")
    newest = next(iter(releases()), (None, None))
    if cited != newest:
        return f"CITATION.cff cites {cited}, the newest release in CHANGELOG.md is {newest}"
    if newest[0] not in (None, version()):
        return f"smoa_kernels/_version.py has {version()}, the newest release in CHANGELOG.md is {newest[0]}"
    return None


def check() -> None:
    """Refuse unless the checkout and the archives in dist/ may be published.

    Raises:
        Refused: the address is a placeholder, the version's places disagree, or an archive is missing.
    """
    check_address()
    if wrong := inconsistency():
        raise Refused(wrong)
    if not releases():
        raise Refused("CHANGELOG.md has no released section: make release makes one")
    prefix = f"smoa_kernels-{version()}"
    expected = {f"{prefix}.tar.gz", *(f"{prefix}-{name}" for name in ARCHIVES)}
    found = {path.name for path in DIST.glob("*")}
    if found != expected:
        raise Refused(
            f"dist/ has {sorted(found)}, not {sorted(expected)}: make dist, with cc and aarch64-linux-gnu-gcc"
        )


def check_address() -> None:
    """Refuse pyproject.toml's placeholder for the address, of which PyPI's links are made."""
    address = declared(ROOT / "pyproject.toml", "Repository = ") or ""
    if ".invalid/" in address:
        raise Refused(
            f"pyproject.toml's project.urls.Repository is a placeholder, {address}: set the real one"
        )


def make(new: str) -> None:
    """Write version and date into their places, build and check the packages, commit, tag.

    Raises:
        Refused: with the reason. Files are as they were.
    """
    parts = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", new)
    if parts is None:
        raise Refused(f"VERSION is three numbers with points between them, not {new!r}")
    if changed := git("status", "--porcelain"):
        raise Refused(f"the tree is not clean:\n{changed}")
    if git("tag", "--list", f"v{new}"):
        raise Refused(f"the tag v{new} exists")
    if older := [one for one, _ in releases() if [*map(int, one.split("."))] >= [*map(int, parts.groups())]]:
        raise Refused(f"CHANGELOG.md has released {older[0]}, which {new} does not follow")
    changes = CHANGELOG.read_text(encoding="utf-8")
    entries = changes.partition(UNRELEASED)[2].partition("\n## ")[0]
    if not re.search(r"^- ", entries, re.MULTILINE):
        raise Refused(f"CHANGELOG.md has no entries below {UNRELEASED.strip()!r}")
    if wrong := inconsistency():
        raise Refused(wrong)
    check_address()

    today = datetime.date.today().isoformat()
    before = {path: path.read_text(encoding="utf-8") for path in (VERSION, CITATION, CHANGELOG)}
    citation = re.sub(r"^(version|date-released): .*\n", "", before[CITATION], flags=re.MULTILINE)
    try:
        VERSION.write_text(before[VERSION].replace(f'"{version()}"', f'"{new}"'), encoding="utf-8")
        CITATION.write_text(f"{citation}version: {new}\ndate-released: {today}\n", encoding="utf-8")
        CHANGELOG.write_text(changes.replace(UNRELEASED, f"## {new} ({today})\n", 1), encoding="utf-8")
        try:
            subprocess.run(["make", "dist"], cwd=ROOT, check=True)
        except subprocess.CalledProcessError as error:
            raise Refused("make dist failed, above") from error
        check()
    except BaseException:
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")
        raise
    git("commit", "--quiet", "--message", f"Release {new}", *map(str, before))
    git("tag", "--annotate", f"v{new}", "--message", f"smoa-kernels {new}")
    print(f"v{new} is committed and tagged; nothing was pushed. Next: git push --follow-tags (RELEASING.md)")


def git(*arguments: str) -> str:
    """The output of a git command."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.rstrip()


def main(arguments: list[str]) -> int:
    """Run a command; 1 where it is refused."""
    try:
        match arguments:
            case ["make", new]:
                make(new)
            case ["check"]:
                check()
            case _:
                raise Refused(
                    "usage: release.py make X.Y.Z, or release.py check (make release VERSION=X.Y.Z)"
                )
    except Refused as error:
        print(f"release refused: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
