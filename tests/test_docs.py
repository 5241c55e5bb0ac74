"""The documentation: links, files, names and commands exist, examples run, and exported names are documented."""

import ast
import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
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
# A script with its options, in a command or between backticks.
SCRIPT = re.compile(
    r"(?:python|-per-node 2|launch --multi_gpu --num_processes 2) (?:-m )?([\w/.]+)((?: [^`\n#]*)?)"
)
SUFFIXES = (".py", ".c", ".h", ".md", ".svg")
# A name that the reader will create.
TO_BE_MADE = {"kernels/name.py"}

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
    "README.md": 1_150,
    "CHANGELOG.md": 500,
    "docs/choosing.md": 1_450,
    "docs/cpu.md": 1_000,
    "docs/experts.md": 1_000,
    "docs/four_bits.md": 500,
    "docs/gpu.md": 1_500,
    "docs/numerics.md": 1_300,
    "docs/peft.md": 1_000,
    "docs/scaling.md": 700,
}


@pytest.mark.parametrize("page", MOST_WORDS)
def test_a_page_is_read_in_one_sitting(page: str) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").split()) <= MOST_WORDS[page]


def test_the_pages_are_read_in_a_day() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 105
    guides, internals = (
        sum(len(page.read_text("utf-8").split()) for page in pages) for pages in (GUIDES, INTERNALS)
    )
    assert guides <= 16_750
    assert internals <= 3_000


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


@every_page
def test_scripts_exist(page: Path) -> None:
    """Scripts that commands name exist, and have the options that pages mention."""
    for script, options in SCRIPT.findall(page.read_text(encoding="utf-8")):
        paths = [ROOT / script, ROOT / f"{script.replace('.', '/')}.py", ROOT / script.replace(".", "/")]
        if not script.startswith(("examples/", "benchmarks.")):
            continue
        path = next((path for path in paths if path.exists()), None)
        assert path is not None, script
        files = [path] if path.is_file() else sorted(path.glob("*.py"))
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        for option in re.findall(r"--([a-z][\w-]*)", options):
            assert re.search(rf"\b{re.sub('-', '[-_]', option)}\b", source), f"{script} --{option}"


# Examples on pages


def run(code: str, **given: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(compile(code, "example", "exec"), given)
    return given


@pytest.fixture
def group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapts(model: Any, where: str = "") -> bool:
    return any("smoa" in name and where in name for name, _ in model.named_parameters())


def first_adapter(*codes: str) -> None:
    """The example with PEFT, and on some pages one without PEFT."""
    for code in codes:
        found = run(code)
        if "peft" in code:
            assert adapts(found["model"])
            assert Path("adapter/adapter_model.safetensors").exists()


def small_model(code: str) -> None:
    """The README's model, tiny, with a tokenizer of one word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    os.renames("path/to/model", folder := "HuggingFaceTB/SmolLM2-135M")
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    first_adapter(code)


def several_adapters(train: str, several: str, swap: str, _apply: str) -> None:
    """The last one is run in tests/peft/test_checkpoints.py."""
    run(swap, **run(several, **run(train)))


def four_bit_base(code: str) -> None:
    pytest.importorskip("bitsandbytes", reason="a 4-bit base needs bitsandbytes")
    assert adapts(run(code)["model"])


def experts(code: str) -> None:
    from tiny_experts import tiny_experts

    tiny_experts().save_pretrained("path/to/moe-model")
    assert adapts(run(code)["model"], "experts")


def four_bits(code: str) -> None:
    pytest.importorskip("bitsandbytes", reason="a 4-bit base needs bitsandbytes")
    from tiny_models import tiny_llama

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained("model")
    run(code)
    from smoa_kernels.cli import main

    assert main(["merge", "base", "adapter", "merged"]) == 0


def hira(code: str) -> None:
    from smoa_kernels.peft.hira.accelerate import AcceleratedLinear

    assert isinstance(run(code)["model"].get_submodule("base_model.model.0"), AcceleratedLinear)


def merge(code: str) -> None:
    import peft
    from tiny_models import tiny_llama

    from smoa_kernels.peft import SMoAConfig

    base = tiny_llama()
    base.save_pretrained("base")
    peft.get_peft_model(base, SMoAConfig(target_modules="all-linear")).save_pretrained("adapter")
    run(code)
    assert Path("merged/config.json").exists()


def several_devices(spectra: str, ddp: str, sharded: str, tensor: str) -> None:
    import peft
    from tiny_models import tiny_llama
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel
    from torch.nn.parallel import DistributedDataParallel

    from smoa_kernels.peft import SMoAConfig

    def adapted() -> Any:
        return peft.get_peft_model(tiny_llama(), SMoAConfig(r=4, target_modules=["up_proj", "down_proj"]))

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


EXAMPLES: dict[str, Callable[..., object]] = {
    "README.md": small_model,
    "docs/distributed.md": several_devices,
    "docs/experts.md": experts,
    "docs/four_bits.md": four_bits,
    "docs/hira.md": hira,
    "docs/merging.md": merge,
    "docs/peft.md": several_adapters,
    "docs/quantised.md": four_bit_base,
    "docs/tour.md": run,
}


def test_every_page_with_an_example_is_run() -> None:
    found = {page.relative_to(ROOT).as_posix() for page in PAGES if FENCED.search(page.read_text("utf-8"))}
    assert found == {*EXAMPLES, "docs/trl.md"}  # in tests/trl/test_sft.py


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_of_pages_run(
    page: str, group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = FENCED.findall((ROOT / page).read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    if page != "docs/tour.md":
        pytest.importorskip("peft", reason="the examples with PEFT need the peft extra")
        from tiny_models import tiny_llama

        tiny_llama().save_pretrained("path/to/model")
    EXAMPLES[page](*codes)


NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_notebooks_outputs_are_those_of_one_run_from_top_to_bottom() -> None:
    """`make notebook` runs it. It shows two pictures and a table, no error and no warning, and is small."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert (shown.count("image/png"), shown.count("text/markdown")) == (2, 1)
    assert NOTEBOOK.stat().st_size < 400_000  # pictures of 300 kB, as text


# Docstrings

PACKAGE = ROOT / "smoa_kernels"
DOORS = ("smoa_kernels", "smoa_kernels.peft", "smoa_kernels.distributed")
NEEDS = {"peft": "peft", "cli": "typer", "kernels": "triton", "tuning": "triton"}
KERNELS = ("kernels", "backends.triton", "tuning")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def load(name: str) -> ModuleType:
    """Import a module of the package; skip, with the reason, if a requirement is not installed."""
    needed = NEEDS.get(name.partition(".")[2].partition(".")[0], "torch")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{name} needs {needed}, which is not installed")
    return importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(name)
    if name.partition(".")[2].startswith(KERNELS) and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the examples run kernels on the CPU, in Triton's interpreter")
    if "distributed" in name:
        request.getfixturevalue("group")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("door", DOORS)
def test_exported_names_are_documented(door: str) -> None:
    """Each function and class has an example in its or its module's docstring, and describes its arguments."""
    module = load(door)
    for it in filter(callable, (getattr(module, name) for name in module.__all__)):
        words = f"{inspect.getdoc(it)} {inspect.getdoc(inspect.getmodule(it))} {module.__doc__}"
        assert ">>>" in words, f"{it.__name__} has no example"
        missing = [name for name in arguments(it) if not re.search(rf"(?<!\w){name}(?!\w)", words)]
        assert not missing, f"{it.__name__} does not say what {missing} are"


def arguments(it: Any) -> list[str]:
    """The arguments of a function or a class, without those inherited from another package."""
    made: Any = it
    if inspect.isclass(it):
        made = vars(it).get("__init__", object)
    found: Iterable[str] = inspect.signature(made).parameters
    if dataclasses.is_dataclass(it):
        fields: dict[bool, list[str]] = {True: [], False: []}  # True: ours; False: another package's
        for base in inspect.getmro(it):
            fields[base.__module__.startswith("smoa_kernels")] += vars(base).get("__annotations__", ())
        found = [name for name in fields[True] if name not in fields[False]]
    return [name for name in found if name not in ("self", "args", "kwargs") and not name.startswith("_")]
