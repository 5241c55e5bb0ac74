"""Imports between folders go one way, checked in the source."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "smoa_kernels"

# A folder or root module imports only from its own line and the lines above.
ORDER = (
    ("checks", "files", "_version"),
    ("definition",),
    ("kernels",),
    ("backends",),
    ("operators",),
    ("adapter",),
    ("functional",),
    ("layer_checks", "layer_state", "layers", ""),  # "": smoa_kernels itself
    ("tuning", "distributed"),
    ("adapter_folder",),
    ("peft",),
    ("serving", "cli"),
)

# Late imports do not run when their module is imported. Each has a reason.
LATE = {
    ("adapter_folder.base_model", "adapter_folder.architecture"): "imports transformers",
    ("adapter_folder.merging", "adapter_folder.gguf_file"): "gguf is optional",
    ("cli", "cli.app"): "typer and rich are an extra",
    ("cli.convert", "peft.hira.convert"): "PEFT is an extra",
    ("cli.info", "backends.verified"): "imports Triton",
    ("cli.inspect", "adapter_folder.inspecting"): "safetensors is an extra",
    ("cli.merge", "adapter_folder.merging"): "safetensors is an extra",
    ("cli.info", "kernels.registry"): "imports Triton",
    ("cli.tune", "tuning.tuner"): "imports Triton",
}


def modules() -> list[str]:
    """Names of modules below smoa_kernels; a package has the name of its folder."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(path.as_posix().replace("/", ".").removesuffix("__init__").rstrip(".") for path in paths)


def file_of(module: str) -> Path:
    path = PACKAGE / module.replace(".", "/")
    single = path.with_suffix(".py") if module else path
    return single if single.is_file() else path / "__init__.py"


@cache
def imports(module: str) -> dict[str, bool]:
    """The package's modules that `module` imports, each with whether the import runs when `module` is imported."""
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
    """The line of `ORDER` that lists a module's folder, or a module at the root."""
    folder = module.partition(".")[0]
    return next(i for i, names in enumerate(ORDER) if folder in names)


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str) -> None:
    for other in imports(module):
        if (module, other) not in LATE:
            assert line(other) <= line(module), f"{module} imports {other}, which stands after it"


def test_no_module_imports_itself() -> None:
    """Imports have no cycles, not even through late imports or imports for the type checker."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in imports(module):
                visit(other, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_late_imports_have_a_reason() -> None:
    late = {
        (module, other) for module in modules() for other, always in imports(module).items() if not always
    }
    assert late == set(LATE)


# Exceptions from the size limits: two functions.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS = {
    "smoa_linear",  # mostly the documentation of its arguments
    "tune",  # mostly the documentation of its options
}


def test_few_modules_stand_at_the_root() -> None:
    root = [path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "_version")]
    assert len(root) <= 8, root


def test_few_files_lie_side_by_side() -> None:
    for folder in filter(Path.is_dir, PACKAGE.rglob("*")):
        files = [path.name for path in folder.iterdir() if path.suffix in (".py", ".c", ".h")]
        assert len(files) <= 14, folder


def test_files_and_functions_are_short() -> None:
    """Kernels may be long: functions in compiled kernels would not help the reader."""
    files, functions = set(), set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if len(source.splitlines()) > 400:
            files.add(path.relative_to(PACKAGE).as_posix())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                if node.end_lineno - node.lineno >= 60 and not is_kernel:
                    functions.add(node.name)
    assert files <= LONG_FILES
    assert functions <= LONG_FUNCTIONS
