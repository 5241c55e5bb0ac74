"""The documentation: its links, files, names and commands exist, and its examples run."""

import ast
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted(ROOT.glob("docs/*.md"))
INTERNALS = sorted(ROOT.glob("docs/internals/*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *GUIDES, *INTERNALS, ROOT / "csrc_ref" / "README.md"])
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]*)#?([^)\s]*)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCED = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A command in an indented block or between backticks; a comment after # is not part of it.
COMMAND = re.compile(r"(?:^ {4}|`)((?:make|smoa-kernels) [^`\n#]*)", re.MULTILINE)
SUFFIXES = (".py", ".c", ".h", ".md", ".svg")
# Names that the reader will create.
TO_BE_MADE = {"kernels/name.py", "tests/kernels/test_name.py"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def names(source: str) -> set[str]:
    """The names that a module defines: functions, classes, methods, variables."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown viewer gives to a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        found.add(next(a for a in (anchor, *(f"{anchor}-{i}" for i in range(1, 99))) if a not in found))
    return found


@every_page
def test_links_and_names(page: Path) -> None:
    for text, target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"[{text}]({target})"
        assert not anchor or anchor in anchors(path), f"[{text}]({target}#{anchor})"
        name = text.strip("`")
        if path.suffix == ".py" and text.startswith("`") and not target.endswith(name):
            assert name in names(path.read_text(encoding="utf-8")), f"{name} is not in {target}"


@every_page
def test_files_in_backticks(page: Path) -> None:
    """A path starts at the repository's root, at the package, or beside the page."""
    for text in CODE.findall(page.read_text(encoding="utf-8")):
        is_path = "/" in text and text.endswith(SUFFIXES) and not text.startswith(".")
        if is_path and not set(text) & set("<>*$ ") and text not in TO_BE_MADE:
            assert any((root / text).exists() for root in (ROOT, ROOT / "smoa_kernels", page.parent)), text


MOST_WORDS = {
    "README.md": 900,
    "CHANGELOG.md": 500,
    "docs/choosing.md": 1_200,
    "docs/cpu.md": 1_000,
    "docs/experts.md": 1_000,
    "docs/gpu.md": 1_500,
    "docs/numerics.md": 1_300,
    "docs/peft.md": 1_000,
    "docs/scaling.md": 700,
}


@pytest.mark.parametrize("page", MOST_WORDS)
def test_a_page_is_read_in_one_sitting(page: str) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").split()) <= MOST_WORDS[page]


def test_the_pages_are_read_in_a_day() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
    guides, internals = (
        sum(len(page.read_text("utf-8").split()) for page in pages) for pages in (GUIDES, INTERNALS)
    )
    assert guides <= 15_000
    assert internals <= 3_000


# Laboratory notes belong in benchmarks/results and docs/internals, history in git.
NOTES = re.compile(
    r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*[0-9])[0-9a-f]{7,40}\b"  # a commit
    r"|EPYC|Xeon|Ryzen|\bfamily \d|\bmodel \d|Zen \d"  # a processor's model
    r"|[Ss]upersede|\b(?:the code|it was|than|as|measured) before\b|\| *before *\|"  # how a figure changed
    r"|\bgoals? (?:was |were |is |are )?(?:met|missed)|\b(?:met|missed) (?:by|the goal)"
)


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", *(f"docs/{page.name}" for page in GUIDES)])
def test_guides_are_no_laboratory_notes(page: str) -> None:
    found = NOTES.search((ROOT / page).read_text(encoding="utf-8"))
    assert not found, found[0]


def test_the_sites_menu_has_every_page() -> None:
    """Every page of the site stands in mkdocs.yml; `make docs` fails for a missing one."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    in_menu = set(re.findall(r"([\w/]+\.md)$", menu, re.MULTILINE))
    assert {page.relative_to(ROOT / "docs").as_posix() for page in GUIDES + INTERNALS} <= in_menu


@every_page
def test_commands_exist(page: Path) -> None:
    """Targets exist in the Makefile; commands have the options that pages mention."""
    pytest.importorskip("typer", reason="needs the cli extra")
    from typer.main import get_command

    from smoa_kernels.cli.app import app

    commands: Any = get_command(app)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for text in COMMAND.findall(page.read_text(encoding="utf-8")):
        program, name, *arguments = shlex.split(text)
        if program == "make":
            assert name in targets, text
            continue
        assert name in commands.commands, text
        if arguments:
            commands.commands[name].make_context(name, arguments)  # raises for an unknown option


def examples(page: str) -> list[str]:
    return FENCED.findall((ROOT / page).read_text(encoding="utf-8"))


def run(code: str, **given: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(compile(code, "example", "exec"), given)
    return given


@pytest.fixture
def tiny_llama() -> Callable[[], Any]:
    pytest.importorskip("peft", reason="the examples with PEFT need the peft extra")
    from tiny_models import tiny_llama

    return tiny_llama


@pytest.fixture
def group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_example_is_run_below() -> None:
    found = {page.relative_to(ROOT).as_posix() for page in PAGES if FENCED.search(page.read_text("utf-8"))}
    assert found == {
        "README.md",
        "docs/distributed.md",
        "docs/experts.md",
        "docs/hira.md",
        "docs/index.md",
        "docs/peft.md",
        "docs/tour.md",
        "docs/trl.md",  # in tests/trl/test_sft.py
    }


def test_the_first_layer_and_the_tour_run() -> None:
    (layer,) = (code for code in examples("docs/index.md") if "peft" not in code)
    run(layer)
    (tour,) = examples("docs/tour.md")
    run(tour)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_example_of_peft_runs(
    page: str, tiny_llama: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("path/to/model")
    (code,) = (code for code in examples(page) if "peft" in code)
    model = run(code)["model"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert any("smoa" in name for name, _ in model.named_parameters())


def test_the_examples_of_peft_run(
    tiny_llama: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("path/to/model")
    train, several, four_bit = examples("docs/peft.md")
    run(several, **run(train))
    pytest.importorskip("bitsandbytes", reason="a 4-bit base needs bitsandbytes")
    assert any("smoa" in name for name, _ in run(four_bit)["model"].named_parameters())


def test_the_example_of_experts_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="the examples with PEFT need the peft extra")
    from tiny_experts import tiny_experts

    monkeypatch.chdir(tmp_path)
    tiny_experts().save_pretrained("path/to/moe-model")
    (code,) = examples("docs/experts.md")
    assert any("experts" in name and "smoa" in name for name, _ in run(code)["model"].named_parameters())


def test_the_example_of_hira_runs() -> None:
    pytest.importorskip("peft", reason="the examples with PEFT need the peft extra")
    from smoa_kernels.peft.hira.layer import AcceleratedLinear

    (code,) = examples("docs/hira.md")
    assert isinstance(run(code)["model"].get_submodule("base_model.model.0"), AcceleratedLinear)


def test_the_examples_of_several_devices_run(tiny_llama: Callable[[], Any], group: None) -> None:
    import peft
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel
    from torch.nn.parallel import DistributedDataParallel

    from smoa_kernels.peft import SMoAConfig

    def adapted() -> Any:
        return peft.get_peft_model(tiny_llama(), SMoAConfig(r=4, target_modules=["up_proj", "down_proj"]))

    spectra, ddp, sharded, tensor = examples("docs/distributed.md")
    # PEFT knows no default targets for the tiny model.
    spectra = spectra.replace("num_blocks=2", "num_blocks=2, target_modules=['up_proj']")
    run(spectra, base=tiny_llama(), SMoAConfig=SMoAConfig, get_peft_model=peft.get_peft_model)
    run(ddp, model=adapted(), DistributedDataParallel=DistributedDataParallel)
    run(sharded, model=adapted().get_base_model().model, fully_shard=fsdp.fully_shard)
    run(
        tensor,
        model=adapted().get_base_model(),
        mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp")),
        fully_shard=fsdp.fully_shard,
        parallelize_module=parallel.parallelize_module,
    )
