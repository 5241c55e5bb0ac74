"""The trust report: complete, within its budgets, and not blind."""

from pathlib import Path

import pytest
import torch
import trust

from smoa_kernels import eager

pytestmark = pytest.mark.numerical


def test_every_result_is_within_its_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "reports" / "trust.md"
    assert trust.main(["--quick", "--out", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    rows = [line.split(" | ") for line in text.splitlines()[4:]]
    assert len(rows) == len(list(trust.cases())) >= 12
    for row in rows:
        found = [float(cell.strip("| ")) for cell in row[3:]]
        assert len(found) == len(trust.QUANTITIES)
        assert 0 <= min(found) <= max(found) <= 1


@pytest.mark.parametrize("spoilt", [1.01, float("nan")])
def test_a_wrong_result_shows(
    spoilt: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block_grad = eager._block_grad

    def wrong(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        dA, dB = block_grad(*arguments)  # type: ignore[arg-type]
        return dA * spoilt, dB

    monkeypatch.setattr(eager, "_block_grad", wrong)
    monkeypatch.setattr(trust, "cases", lambda: [trust.Case("eager", "merged", torch.float32)])
    assert trust.main(["--quick"]) == 1
