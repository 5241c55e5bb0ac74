"""The documentation: every link leads somewhere, every file and function that it names exists, every example runs."""

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


PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples(page: str) -> list[str]:
    return PYTHON.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture
def tiny_llama(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    pytest.importorskip("peft", reason="the examples with PEFT need the peft extra")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "peft"))
    from tiny_models import tiny_llama

    return tiny_llama


def test_the_readmes_layer_runs() -> None:
    (code,) = (code for code in examples("README.md") if "peft" not in code)
    exec(compile(code, "README.md", "exec"), {})


def test_the_tour_ends_at_dB() -> None:
    (code,) = examples("docs/tour.md")
    exec(compile(code, "tour.md", "exec"), {})


def test_the_readmes_peft_runs(
    tiny_llama: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands there, a model in the folder that it names."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("path/to/model")
    (code,) = (code for code in examples("README.md") if "peft" in code)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(compile(code, "README.md", "exec"), names := {})
    assert not any("smoa" in name for name, _ in names["model"].named_parameters())


@pytest.fixture
def group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_examples_of_several_devices_run(tiny_llama: Callable[[], Any], group: None) -> None:
    """Each with what the page's text says is there."""
    from peft import get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    from smoa_kernels.peft import SMoAConfig

    spectra, ddp, fsdp, tp = examples("docs/distributed.md")
    tools = {"SMoAConfig": SMoAConfig, "get_peft_model": get_peft_model, "fully_shard": fully_shard}
    tools |= {"DistributedDataParallel": DistributedDataParallel, "parallelize_module": parallelize_module}

    def adapted() -> Any:
        return get_peft_model(tiny_llama(), SMoAConfig(r=4, target_modules=["up_proj", "down_proj"]))

    config = "SMoAConfig(r=8, num_blocks=2"
    assert config in spectra  # the tiny model is no architecture whose targets PEFT knows
    exec(
        spectra.replace(config, f"{config}, target_modules=['up_proj']"),
        names := {**tools, "base": tiny_llama()},
    )
    assert names["model"].peft_config
    exec(ddp, names := {**tools, "model": adapted()})
    assert isinstance(names["model"], DistributedDataParallel)
    model = adapted().get_base_model().model
    exec(fsdp, {**tools, "model": model})
    assert all(parameter.device_mesh.size() == 1 for parameter in model.parameters())
    model, mesh = adapted().get_base_model(), init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    exec(tp, {**tools, "model": model, "mesh": mesh})
    assert model.model.layers[0].mlp.up_proj._shard is not None


def test_no_example_is_left_out() -> None:
    found = [
        page.relative_to(ROOT).as_posix() for page in PAGES if PYTHON.search(page.read_text(encoding="utf-8"))
    ]
    assert found == ["README.md", "docs/distributed.md", "docs/tour.md"]


# In an indented block or between backticks; what follows a # is for the reader.
COMMAND = re.compile(r"(?:^ {4}|`)((?:make|smoa-kernels) [^`\n#]*)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    """A target of the Makefile; a command with options that it has."""
    pytest.importorskip("typer", reason="needs the cli extra")
    from typer.main import get_command

    from smoa_kernels.cli.app import app

    commands: Any = get_command(app)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for text in COMMAND.findall(page.read_text(encoding="utf-8")):
        program, name, *arguments = shlex.split(text)
        if program == "make":
            assert name in targets, text
        else:
            known = commands.commands[name].make_context(name, arguments)  # raises for an option that is none
            assert known.params, text


def test_contributing_says_what_ci_runs() -> None:
    script = ROOT / ".ci" / "run"
    if not script.is_file():
        pytest.skip("not a checkout: an sdist has no .ci")
    called = re.findall(r"^make ([a-z-]+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"^`\.ci/run`,[^`]* calls ([^.]*)\.$", page, re.MULTILINE)
    assert CODE.findall(told) == called


def test_the_readmes_picture_shows_what_it_says() -> None:
    pytest.importorskip("matplotlib", reason="the figures need matplotlib")
    import torch

    from benchmarks.blocks_figure import BLOCKS, RANK, ROWS, example, figure
    from benchmarks.plots import svg

    partition, smoa, lora = example()
    assert partition.num_blocks == BLOCKS
    assert [int(torch.linalg.matrix_rank(update.double(), rtol=1e-9)) for update in (smoa, lora)] == [
        ROWS,
        RANK,
    ]
    words = f"SMoA trains {RANK // BLOCKS * sum(partition.shape)} numbers"
    for text in (svg(figure()), (ROOT / "docs" / "blocks.svg").read_text(encoding="utf-8")):
        assert words in text
