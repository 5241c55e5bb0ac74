"""The trust report: complete, within its budgets, and not blind."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import trust
from problems import DEVICE

from smoa_kernels.backends import eager, native_obstacle, triton_obstacle

pytestmark = pytest.mark.numerical

FLOAT32 = trust.Case("eager", "merged", torch.float32)


def test_every_result_is_within_its_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "reports" / "trust.md"
    assert trust.main(["--quick", "--out", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    captured = capsys.readouterr()
    assert captured.out == text
    assert not captured.err
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[4:]]
    assert len(rows) == len(list(trust.cases()))
    for row in rows:
        found = [float(cell) for cell in row[3:]]
        assert len(found) == len(trust.QUANTITIES)
        assert 0 <= min(found) <= max(found) <= 1


def test_every_backend_has_its_dtypes_and_dropout() -> None:
    found = list(trust.cases())
    dtypes = {"reference": 4, "eager": 4}
    if triton_obstacle(DEVICE) is None:
        dtypes["triton"] = 3  # it takes no float64
    if native_obstacle(DEVICE) is None:
        dtypes["native"] = 1  # float32
    assert Counter(case.backend for case in found if case.algorithm == "dropout") == dtypes
    for backend, count in dtypes.items():
        assert len({case.dtype for case in found if case.backend == backend}) == count


@pytest.mark.parametrize("spoilt", [1.01, float("nan")])
def test_a_wrong_result_shows(
    spoilt: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the last of several problems, too, and by its name."""
    gradients, calls = eager.factor_gradients, []

    def wrong(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        dA, dB = gradients(*arguments)  # type: ignore[arg-type]
        calls.append(dA)
        return dA * (spoilt if len(calls) == 3 else 1), dB

    monkeypatch.setattr(eager, "factor_gradients", wrong)
    monkeypatch.setattr(trust, "cases", lambda: [FLOAT32])
    assert trust.main([]) == 1
    (complaint,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("eager"))
    assert complaint.startswith("eager, merged, torch.float32, dA: Tensor-likes are not close")


def test_one_wrong_element_shows() -> None:
    """Of thirty thousand, by which their norm hardly moves."""
    truth = torch.randn(160, 192, dtype=torch.float64)
    theirs = truth.bfloat16()
    ours = theirs.clone()
    assert trust.judge(ours, theirs, truth).complaint is None
    ours[3, 4] += 0.1
    found = trust.judge(ours, theirs, truth)
    assert found.share > 1
    assert "at index (3, 4)" in str(found.complaint)
    assert trust.judge(theirs.float(), theirs, truth).complaint is not None  # another dtype
