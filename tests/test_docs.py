"""The documentation: every link leads somewhere, every file and function that it names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "csrc_ref" / "README.md"])
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)[^)]*\)")
CODE = re.compile(r"`([^`\n]+)`")
SUFFIXES = (".py", ".c", ".h", ".md", ".svg")
# Names for what a reader will make.
EXAMPLES = {"kernels/name.py", "tests/kernels/test_name.py"}


def names(source: str) -> set[str]:
    """What a module defines: functions, classes, methods, assigned names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_names(page: Path) -> None:
    for text, target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path = page.parent / target
        assert path.exists(), f"[{text}]({target})"
        name = text.strip("`")
        if path.suffix == ".py" and text.startswith("`") and name != path.name:
            assert name in names(path.read_text(encoding="utf-8")), f"{name} is not in {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_in_backticks(page: Path) -> None:
    """Paths from the root of the repository, from the package, or beside the page."""
    for text in CODE.findall(page.read_text(encoding="utf-8")):
        if (
            "/" not in text
            or text.startswith(".")
            or not text.endswith(SUFFIXES)
            or set(text) & set("<>*$ ")
            or text in EXAMPLES
        ):
            continue
        places = [root / text for root in (ROOT, ROOT / "smoa_kernels", page.parent)]
        assert any(place.exists() for place in places), text


def test_a_name_that_is_gone_would_show() -> None:
    assert "block_grad_kernel" in names((ROOT / "smoa_kernels/kernels/block_grad.py").read_text())
    assert "block_grad_kernels" not in names((ROOT / "smoa_kernels/kernels/block_grad.py").read_text())
