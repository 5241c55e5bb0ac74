"""The documentation site (mkdocs.yml, docs/site): links lead to the right pages, and mistakes make `make docs` fail."""

import importlib.util
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="needs the docs extra")
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort, PluginError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "link", "leads_to"),
    [
        ("choosing.md", "definition.md#other-orders", "definition.md#other-orders"),
        ("choosing.md", "../benchmarks/results/README.md#goals", "results/benchmarks.md#goals"),
        ("choosing.md", "../benchmarks/results/quality-alpha.svg", "pictures/quality-alpha.svg"),
        ("results/benchmarks.md", "../../docs/cpu.md", "../cpu.md"),
        ("overview.md", "smoa_kernels/operator.py", "source/smoa_kernels/operator.py.md"),
        ("quickstart.md", "../docs/choosing.md", "choosing.md"),
        ("tour.md", "https://arxiv.org/abs/2605.21147", "https://arxiv.org/abs/2605.21147"),
        ("tour.md", "#before-the-first-step", "#before-the-first-step"),
        ("tour.md", "../no_such_file.py", "../no_such_file.py"),  # MkDocs warns of it
    ],
)
def test_links_lead_to_where_files_stand_on_the_site(hooks, page, link, leads_to):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    text, _, below = hooks.on_page_markdown(f"see [it]({link}).", page).partition("\n")
    assert text == f"see [it]({leads_to})."
    assert "reference/python.md" in below
    assert "reference/commands.md" in below


def test_the_notebook_is_a_page_with_what_it_drew(hooks):
    text = hooks._notebook((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert len(re.findall(r"!\[\w[^\]]+\]\(data:image/png;base64,[^)\s]+\)\n", text)) == 2
    assert text.startswith("# ")
    assert "\n```python\n" in text
    assert "\n```text\n" in text
    assert "\n| SMoA | 829,440 |" in text


def test_a_picture_leads_to_its_file(hooks):
    html = hooks.on_page_content('<p><img alt="blocks" src="blocks.svg" /> beside</p>')
    assert html == '<p><a href="blocks.svg"><img alt="blocks" src="blocks.svg" /></a> beside</p>'


def test_every_public_name_is_in_the_reference(hooks):
    text = hooks._python()
    for module in hooks.MODULES:
        exported = importlib.import_module(module).__all__
        assert exported
        assert all(f"::: {module}.{name}\n" in text for name in exported)


def test_a_public_name_without_docstring_fails(hooks, monkeypatch):
    load = hooks.griffe.load

    def loaded(*args, **options):
        package = load(*args, **options)
        package["layers"].members["FusedSMoALinear"].members["unmerge"].docstring = None
        return package

    monkeypatch.setattr(hooks.griffe, "load", loaded)
    with pytest.raises(PluginError, match=r"without a docstring: smoa_kernels\.\S*FusedSMoALinear\.unmerge$"):
        hooks._python()


@pytest.mark.slow
def test_strictly_built(tmp_path, caplog):
    """A page missing from the menu, a dead link and a dead anchor give three warnings, so the build fails."""
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (docs / "alone.md").write_text("# Alone\n\n[a](gone.md) [b](peft.md#gone)\n")
    config = load_config(
        str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(tmp_path / "site"), strict=True
    )
    caplog.set_level(logging.WARNING, logger="mkdocs")
    with pytest.raises(Abort):
        build(config)
    said = "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "alone.md" in said.partition("nav")[2]
    assert "'gone.md'" in said
    assert "'#gone'" in said
    assert len(said.splitlines()) == 4, said
    assert (tmp_path / "site" / "reference" / "commands.html").exists()
