"""The quality slice on experts, two steps per run: finished runs are not repeated, and the table has every method."""

import pytest
from typer.testing import CliRunner

from benchmarks import quality_moe

pytestmark = pytest.mark.slow


def test_a_slice(tmp_path, monkeypatch):
    page = tmp_path / "experts.md"
    page.write_text(f"before\n{quality_moe.START}\n<!-- :written -->\nafter\n")
    for name, value in {"RECORDS": tmp_path / "runs.jsonl", "PAGE": page, "STEPS": 2, "SEEDS": 2}.items():
        monkeypatch.setattr(quality_moe, name, value)
    monkeypatch.setattr(quality_moe, "LADDER", quality_moe.FIRST)
    first = CliRunner().invoke(quality_moe.app, ["--method", quality_moe.LORA])
    assert first.exit_code == 0, first.output
    assert "after" in page.read_text()
    assert quality_moe.LORA not in page.read_text()
    assert len(quality_moe.RECORDS.read_text().splitlines()) == 5
    second = CliRunner().invoke(quality_moe.app)
    assert second.exit_code == 0, second.output
    assert quality_moe.LORA not in second.output
    for name in quality_moe.METHODS:
        assert f"| {name} |" in page.read_text()
    assert CliRunner().invoke(quality_moe.app, ["--method", "other"]).exit_code == 2
