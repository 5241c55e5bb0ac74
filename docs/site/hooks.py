"""Hooks that MkDocs lacks: pages that lie outside docs/, links into the code, and the reference.

The pages are written to be read in the repository, where a link leads to a file. There is no host to link to, so a file
of the code that a page links to becomes a page of the site. `make docs` fails at a broken link, at a page that no menu
shows, and at a public name without a docstring.
"""

from __future__ import annotations

import json
import os.path
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
# Pages of the repository that lie outside docs/, and where they stand on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/results/README.md": "results/benchmarks.md",
    "benchmarks/results/quality.md": "results/quality.md",
    "benchmarks/results/forgetting.md": "results/forgetting.md",
    "benchmarks/results/scripts.md": "results/scripts.md",
    "tests/ptx_emulator/README.md": "ptx_emulator.md",
    "csrc_ref/README.md": "c_reference.md",
    "examples/quickstart.ipynb": "quickstart.md",
    "examples/README.md": "examples.md",
}
# Where members of public classes are defined that no public class has.
_BASES = (
    *("smoa_kernels.layer_state.", "smoa_kernels.layers._"),
    *("smoa_kernels.peft.layer.AdaptedLayer.", "smoa_kernels.peft.modulated.AdaptedModule."),
)
PICTURES = (".svg", ".png")
LANGUAGES = {".py": "python", ".c": "c", ".h": "c"}
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
MODULES = {
    "smoa_kernels": "The layer and the operator",
    "smoa_kernels.peft": "PEFT",
    "smoa_kernels.distributed": "Several devices",
}
FOOTER = """

---

Reference: [Python]({up}reference/python.md), [commands]({up}reference/commands.md). Something is wrong?
[Troubleshooting]({up}troubleshooting.md)
"""
# docs/site/screens.py draws them.
SCREENS = "screens"


def place(path: str) -> str:
    """Where a file of the repository stands on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in PAGES:
        return PAGES[path]
    return f"pictures/{Path(path).name}" if path.endswith(PICTURES) else f"source/{path}.md"


def linked(page: str, text: str) -> Iterator[str]:
    """The files of the repository that a page links to."""
    for target in LINK.findall(text):
        path = os.path.normpath(Path(page).parent / target)
        if (ROOT / path).is_file():
            yield path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, the files that pages link to, and the reference."""
    pages = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path, uri in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        pages[path] = _notebook(text) if path.endswith(".ipynb") else text
        files.append(File.generated(config, uri, content=pages[path]))
    outside = {path for page, text in pages.items() for path in linked(page, text)}
    for path in sorted(path for path in outside if path not in PAGES and not path.startswith("docs/")):
        files.append(_picture(config, path) if path.endswith(PICTURES) else _source(config, path))
    files.append(File.generated(config, "reference/python.md", content=_python()))
    files.append(File.generated(config, "reference/commands.md", content=_commands(files)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point a page's links to where the files stand on the site; below each page, lead to the reference."""
    here = next(
        (path for path, uri in PAGES.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}"
    )
    if page.file.src_uri.startswith(("source/", "reference/")):
        return markdown

    def moved(match: re.Match[str]) -> str:
        for path in linked(here, f"]({match[0]})"):
            return os.path.relpath(place(path), Path(page.file.src_uri).parent)
        return match[0]  # MkDocs warns of it

    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(moved, markdown) + FOOTER.format(up=up)


def on_page_content(html: str, **_: Any) -> str:
    """Make a picture a link to its file, where it is as large as the window; mark inline code that fits on a line."""
    html = re.sub(r"<code>([^<]{1,32})</code>", r'<code class="short">\1</code>', html)
    return re.sub(r'<img [^>]*?src="((?!data:)[^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', html)


def _picture(config: MkDocsConfig, path: str) -> File:
    return File.generated(config, place(path), abs_src_path=str(ROOT / path))


def _source(config: MkDocsConfig, path: str) -> File:
    """A page that shows a file of the code. No menu shows it and no search finds it."""
    code = (ROOT / path).read_text(encoding="utf-8")
    head = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n"
    text = f"{head}# {path}\n\n~~~~~~{LANGUAGES.get(Path(path).suffix, 'text')}\n{code}~~~~~~\n"
    return File.generated(config, place(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)


def _notebook(text: str) -> str:
    """A notebook as a page: its text, its code, and the outputs of its last run."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                about = cell["metadata"]["alt"]
                parts.append(f"![{about}](data:image/png;base64,{data['image/png'].replace(chr(10), '')})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            else:
                printed = "".join(output.get("text") or data["text/plain"])
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _python() -> str:
    """The page of every public name, in the order of `__all__`.

    Raises:
        PluginError: one has no docstring.
    """
    package = griffe.load("smoa_kernels", search_paths=[str(ROOT)], resolve_aliases=True)
    parts, undocumented = ["# Python", "What these three modules export is public."], []
    for path, title in MODULES.items():
        module = package if path == "smoa_kernels" else package[path.removeprefix("smoa_kernels.")]
        parts.append(f"## {title}")
        for name in module.exports or ():
            found = module[str(name)]
            found = found.final_target if isinstance(found, griffe.Alias) else found
            members = found.members.values() if found.is_class else ()
            undocumented += [item.path for item in (found, *members) if _lacks_docstring(item)]
            inherited = sorted(_inherited(found)) if found.is_class else []
            parts.append(
                f"::: {path}.{name}\n    options: {{heading_level: 3, inherited_members: {inherited}}}"
            )
    if undocumented:
        raise PluginError(f"public and without a docstring: {', '.join(undocumented)}")
    return "\n\n".join(parts) + "\n"


def _inherited(found: Any) -> Iterator[str]:
    """Public members that a class of ours has from another one of ours, which is not public itself."""
    for name, member in found.inherited_members.items():
        ours = member.target_path.startswith(_BASES)
        if ours and member.is_public and not name.startswith("smoa_"):
            yield name


def _lacks_docstring(item: griffe.Object | griffe.Alias) -> bool:
    """Whether a public function, class or module has no docstring. Values and special methods need none."""
    asked = item.is_public and not item.is_attribute and not item.is_alias and not item.name.startswith("__")
    return asked and item.docstring is None


def _commands(files: Files) -> str:
    """The page of the commands as typer writes it, with pictures of some commands' output."""
    command = [sys.executable, "-m", "typer", "smoa_kernels.cli.app", "utils", "docs"]
    done = subprocess.run(
        [*command, "--name", "smoa-kernels", "--title", "Command line"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PluginError(f"typer does not document the commands: {done.stderr}")
    text = done.stdout
    for file in files.media_files():
        path = Path(file.src_uri)
        if path.parent.name == SCREENS:
            alone = path.stem == "overview"
            heading = "# Command line\n" if alone else f"## `smoa-kernels {path.stem}`\n"
            words = (
                "what smoa-kernels prints without arguments"
                if alone
                else f"what smoa-kernels {path.stem} prints"
            )
            text = text.replace(heading, f"{heading}\n![{words}](../{file.src_uri})\n", 1)
    return text
