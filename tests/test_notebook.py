"""The committed notebook, read as text, with the outputs of one complete run. `make notebook` runs it."""

import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"
MOST_BYTES = 400_000  # pictures of 300 kB, as text
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_its_outputs_are_those_of_one_run_from_top_to_bottom() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }  # no error
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]


def test_it_shows_two_pictures_and_a_table_and_is_small() -> None:
    shown = [kind for cell in CODE for output in cell["outputs"] for kind in output.get("data", {})]
    assert shown.count("image/png") == 2
    assert shown.count("text/markdown") == 1
    assert NOTEBOOK.stat().st_size < MOST_BYTES
