"""No public function or class is forgotten: each is called in a table of this folder, or says here why in none."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_doctests import MODULES, is_public, public_names

FOLDER = Path(__file__).parent

# Public names that take what a user gives, yet have no row, each with its reason. Whole modules that nobody need import
# are in test_doctests.INTERNAL.
A_RESULT = "a result: made by the library, read by the user"
BY_PEFT = "made by PEFT from a configuration, which has its rows, for a layer of the base model"
WITHOUT_ROW = {
    "counts.Part": A_RESULT,
    "cost.Estimate": A_RESULT,
    "grad_share.GradShare": A_RESULT,
    "packed.PackedAdapter": "made in every forward, by the layer and the operator, of what they have checked",
    "peft.inspection.AdapterReport": A_RESULT,
    "peft.inspection.LayerReport": A_RESULT,
    "peft.layer.SMoALayer": BY_PEFT,
    "peft.layout.LayerBlocks": A_RESULT,
    "peft.linear.Linear": BY_PEFT,
    "peft.model.SMoAModel": BY_PEFT,
    "peft.model_spectrum.ModelSpectrum": A_RESULT,
    "peft.model_spectrum.Source": A_RESULT,
    "peft.settings.LayerSettings": A_RESULT,
    "peft.sorting.Sorting": "made by the tuner for an injection",
    "scaling.Plan": A_RESULT,
    "spectrum.BlockEnergies": A_RESULT,
    "spectrum.LayerSpectrum": A_RESULT,
    "spectrum.UpdateSpectrum": A_RESULT,
    "tuning.limits.Architecture": "an entry of ARCHITECTURES",
    "tuning.models.Decoder": "an entry of MODELS, or what read_config made of a file",
}


def called(file: Path) -> Iterator[object]:
    """What of the package the functions of a table name: its rows and tests, not what it builds for them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smoa_kernels"):
            with suppress(ImportError):  # of an extra that is not installed
                exec(compile(ast.Module([node], []), str(file), "exec"), names)
    for function in ast.walk(tree):
        if not isinstance(function, (ast.Lambda, ast.FunctionDef)):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Name):
                yield names.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                yield getattr(names.get(node.value.id), node.attr, None)


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("path", [path for path in MODULES if is_public(path)])
def test_every_public_name_has_a_row(path: str) -> None:
    """Where it takes arguments."""
    known = {id(it) for file in FOLDER.glob("test_*.py") for it in called(file)}
    lacking = {
        f"{module_of(path)}.{name}"
        for name, it in public_names(path)
        if id(it) not in known and inspect.signature(it).parameters
    }
    assert lacking == {name for name in WITHOUT_ROW if name.rpartition(".")[0] == module_of(path)}


def test_what_has_no_row_is_of_a_public_module() -> None:
    modules = {module_of(path) for path in MODULES if is_public(path)}
    assert {name.rpartition(".")[0] for name in WITHOUT_ROW} <= modules


def test_a_name_without_a_row_would_show(tmp_path: Path) -> None:
    table = tmp_path / "test_table.py"
    table.write_text(
        "from smoa_kernels.definition.ranks import resolve_ranks, split_rank\n"
        "GOOD = resolve_ranks(8, 3)\n"
        "ROWS = [(lambda _: split_rank(0, 3), ValueError, 'r must be')]\n"
    )
    from smoa_kernels.definition.ranks import resolve_ranks, split_rank

    found = list(called(table))
    assert any(it is split_rank for it in found)
    assert not any(it is resolve_ranks for it in found)
