"""Imports go one way: the order of CONTRIBUTING, read from the source, and no module needs itself."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "smoa_kernels"

# A module imports from its own line or those above. A folder stands for what it holds and no other line names.
ORDER = (
    ("checks",),
    ("_version", "backends", "files", "dropout", "gpus", "native", "precision", "problem", "spectral_order"),
    ("partition",),
    ("arguments", "counts", "grad_tiling", "packed", "ranks", "sketch", "spectrum"),
    ("layer_checks",),
    ("cost", "grad_share", "workspace"),
    ("reference",),
    ("kernels",),
    (
        *("tuning.identity", "tuning.entries", "tuning.json_reader"),
        *("tuning.store", "tuning.lookup", "tuning.status"),
    ),
    ("block_order", "eager", "native_backend", "triton_backend"),
    ("operator",),
    ("functional",),
    ("layers",),
    ("",),  # smoa_kernels itself
    ("distributed",),
    ("peft",),
    ("tuning",),
    ("scaling",),
    ("cli",),
)

# Imports that do not run when their module is imported, each for a reason.
TYPES = "for the type checker only"
LATE = {
    ("cli", "cli.app"): "typer and rich are an extra",
    ("cli.info", "tuning.identity"): "imports Triton",
    ("cli.info", "tuning.status"): "imports Triton",
    ("cli.info", "tuning.store"): "imports Triton",
    ("cli.info", "tuning.words"): "imports Triton",
    ("cli.inspect", "peft.inspection"): "PEFT is an extra",
    ("cli.spectrum", "cli.spectrum_figure"): "matplotlib is an extra",
    ("cli.spectrum", "peft.model_spectrum"): "PEFT is an extra",
    ("cli.tune", "cli.tune_run"): "imports Triton",
    ("layer_checks", "layers"): TYPES,
    ("layers", "distributed.shard"): TYPES,
    ("peft.settings", "peft.config"): TYPES,
    ("tuning.audit", "tuning.compile"): "imports Triton, which a worker sets up before",
    ("tuning.audit", "tuning.registry"): TYPES,
    (
        "tuning.lookup",
        "tuning.autotune",
    ): "measuring runs the backend, which asks lookup; SMOA_AUTOTUNE=1 only",
}


def modules() -> list[str]:
    """Names below smoa_kernels; a package is named by its folder."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(path.as_posix().replace("/", ".").removesuffix("__init__").rstrip(".") for path in paths)


def file_of(module: str) -> Path:
    path = PACKAGE / module.replace(".", "/")
    single = path.with_suffix(".py") if module else path
    return single if single.is_file() else path / "__init__.py"


@cache
def imports(module: str) -> dict[str, bool]:
    """Modules of the package that `module` imports; whether while it is itself imported."""
    file = file_of(module)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = file.parent.relative_to(PACKAGE).parts
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                name = ".".join(filter(None, [*base, alias.name]))
                if not file_of(name).exists():
                    name = name.rpartition(".")[0]
                found[name] = found.get(name, False) or node in tree.body
    return found


def line(module: str) -> int:
    """Of `ORDER`: the longest name that is the module's or its folder's."""
    names = {name: i for i, line in enumerate(ORDER) for name in line}
    while module not in names:
        module, _, _ = module.rpartition(".")
        if not module:
            return -1
    return names[module]


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str) -> None:
    assert line(module) >= 0, f"{module} has no place in the order of imports"
    for other, always in imports(module).items():
        if always or (module, other) not in LATE:
            assert line(other) <= line(module), f"{module} imports {other}, which stands after it"


def test_no_module_imports_itself() -> None:
    """By what runs on import; on one line of the order, too."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other, always in imports(module).items():
                if always:
                    visit(other, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_late_imports_have_a_reason() -> None:
    late = {
        (module, other) for module in modules() for other, always in imports(module).items() if not always
    }
    assert late == set(LATE)


def test_contributing_tells_this_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = [
        *("partition", "arguments", "packed", "reference", "kernels", "lookup", "eager", "triton_backend"),
        *("operator", "functional", "layers", "distributed", "peft", "measuring", "cli"),
    ]
    places = [text.index(name, text.index("imports go one way")) for name in told]
    assert places == sorted(places)
