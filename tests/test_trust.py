"""The trust report, and the budget it goes by, are not blind."""

from pathlib import Path

import pytest
import torch
import trust
from problems import Case, error_over_budget

from smoa_kernels.backends import eager

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize("spoilt", [1.0, 1.01, float("nan")])
def test_a_wrong_result_shows(
    spoilt: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the last of several problems, too, and by its name."""
    backward, calls = eager.backward, []

    def wrong(*arguments: object, **options: object) -> tuple[torch.Tensor, ...]:
        dx, dA, dB = backward(*arguments, **options)  # type: ignore[arg-type]
        calls.append(dA)
        return dx, dA * (spoilt if len(calls) == 3 else 1), dB

    monkeypatch.setattr(eager, "backward", wrong)
    monkeypatch.setattr(trust, "all_cases", lambda: [Case("eager", "merged", torch.float32)])
    path = tmp_path / "reports" / "trust.md"
    assert trust.main(["--out", str(path)]) == (spoilt != 1)
    captured = capsys.readouterr()
    assert captured.out == path.read_text(encoding="utf-8")
    assert captured.err == ("" if spoilt == 1 else "eager-merged-float32 dA\n")


def test_one_wrong_element_shows() -> None:
    """Of thirty thousand, by which their norm hardly moves."""
    truth = torch.randn(160, 192, dtype=torch.float64)
    theirs = truth.bfloat16()
    ours = theirs.clone()
    assert error_over_budget(ours, theirs, truth) <= 1
    ours[3, 4] += 0.1
    assert error_over_budget(ours, theirs, truth) > 1
