"""`make gpu` (benchmarks/bringup): eight minutes, files after every stage, --resume. CI rehearses all of it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from places import ctrl_c  # noqa: F401

from benchmarks.bringup import __main__ as bringup
from benchmarks.bringup import stages
from benchmarks.results import read

pytestmark = pytest.mark.slow


def test_each_stage_fits_into_eight_minutes() -> None:
    assert list(bringup.SECONDS) == list(stages.STAGES)
    assert max(bringup.SECONDS.values()) + bringup.GRACE <= 480
    # Cold imports of torch, PEFT and transformers, too.
    assert list(bringup.SECONDS.values())[:2] == [300, 240]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command, each stage with the status that it is given; return the exit code and the stages that ran."""
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "before"))  # undone later: the command sets its own

    def command(*options: str, **answers: str) -> tuple[int, list[str]]:
        asked: list[str] = []

        def stage(command: Sequence[str], log: Path, seconds: float) -> dict[str, object]:
            asked.append(command[command.index("--stage") + 1])
            status = answers.get(asked[-1], "done")
            return {"status": status, "seconds": 1.0, "error": "" if status == "done" else "why"}

        monkeypatch.setattr(bringup, "run_stage", stage)
        return bringup.main(["--smoke", "--out", str(tmp_path), *options]), asked

    return command


def test_a_stage_that_fails_does_not_stop_the_others_and_resume_repeats_it(run, tmp_path: Path) -> None:
    everything = list(bringup.SECONDS)
    assert run(tests="failed", headline="out of time") == (1, everything)
    (path,) = tmp_path.glob("bringup-*.json")
    statuses = {name: found["status"] for name, found in read(path).stages.items()}
    assert statuses == {"operator": "done", "headline": "out of time", "tests": "failed", "tune": "done"}
    assert "| headline | out of time | 1 | why |" in path.with_suffix(".md").read_text()
    assert run("--resume", headline="interrupted") == (130, ["headline"])  # Ctrl-C
    assert run("--resume") == (0, ["headline", "tests"])
    assert run("--resume") == (0, [])
    assert run() == (0, everything)


def test_resume_refuses_another_commits_bring_up_and_keeps_it(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    (path,) = tmp_path.glob("bringup-*.json")
    others = json.dumps(json.loads(path.read_text()) | {"commit": "0123456789"})
    for text, words in ((others, "is of commit 0123456789, here is"), ("{", "is not a run")):
        path.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            run("--resume")
        assert f"{path} {words}" in capsys.readouterr().err
        assert path.read_text() == text  # a wrong option must not overwrite minutes of GPU time


@pytest.mark.parametrize(
    ("script", "status", "error"),
    [
        ("trap '' INT; sleep 60", "out of time", "stopped after 1 s"),
        ("echo first; echo; echo last >&2; exit 1", "failed", "last"),
        ("echo why; kill -9 $$", "failed", "ended by signal 9. why"),
        ("echo 3 of 9 are left; exit 3", "out of time", "3 of 9 are left"),
        ("echo noise", "done", ""),
    ],
)
@pytest.mark.usefixtures("ctrl_c")
def test_however_a_stages_process_ends(
    script: str, status: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringup, "GRACE", 1.0)
    log = tmp_path / "log"
    log.write_text("an earlier stage's words\n")
    found = bringup.run_stage(["sh", "-c", script], log, 1.0 if "sleep" in script else 60.0)
    assert (found["status"], found["error"]) == (status, error)
    assert log.read_text().startswith("an earlier stage's words\n")
