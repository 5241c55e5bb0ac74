"""The quality study: searching, running, resuming, and the record of a run."""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quality_cases import SPLITS, TINY
from questions import Splits

from benchmarks import machine
from benchmarks.quality import store
from benchmarks.quality.methods import BY_NAME, LADDER, LEARNING_RATES
from benchmarks.quality.study import Slice
from benchmarks.quality.tasks import Task

pytestmark = pytest.mark.slow


def test_a_search_goes_on_while_the_best_rate_is_at_an_end(tmp_path: Path) -> None:
    def search(best: float, first: tuple[float, ...]) -> list[float]:
        path = tmp_path / f"{best}.jsonl"
        part = Slice(TINY, path, str, SPLITS, first)

        def once(method: Any, stage: str, lr: float, *rest: Any) -> None:
            accuracy = -abs(math.log(lr / best))
            judged = {"accuracy": accuracy, "evaluation_loss": 0.0}
            store.append(path, part.key(method, stage, lr, 1000) | judged)

        part._once = once  # type: ignore[method-assign]
        part.search(BY_NAME["LoRA"])
        return sorted(record["lr"] for record in store.read(path))

    assert search(2e-2, (1e-2, 2e-2, 5e-2)) == [1e-2, 2e-2, 5e-2]
    assert search(5e-3, (2e-2, 5e-2)) == [2e-3, 5e-3, 1e-2, 2e-2, 5e-2]
    assert search(1e3, (5e-1,)) == [5e-1, 1.0, LADDER[-1]]


def test_runs_that_are_there_are_skipped(tmp_path: Path) -> None:
    path, told = tmp_path / "runs.jsonl", []
    methods = [BY_NAME[name] for name in ("none", "LoRA", "SMoA K=2")]

    def go(seeds: int) -> None:
        Slice(TINY, path, told.append, SPLITS, LEARNING_RATES[:2], further=False).run(seeds, methods)

    go(1)
    assert len(told) == 3 * (2 + 1)
    go(1)
    assert len(told) == 9
    with path.open("a") as file:
        file.write('{"task": "trec50", "meth')  # a crash leaves half a line
    go(2)
    assert len(told) == 9 + 3
    records = store.read(path)
    assert len(records) == 12
    assert len({str(store.key_of(record)) for record in records}) == 12
    assert {r["stage"]: r["questions"] for r in records} == {"search": 6, "final": 6}
    for field in ("commit", "machine", "data", "loss_end", "effective_rank", "r"):
        assert all(field in r for r in records)


def test_a_run_is_made_anew_where_its_name_means_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = tmp_path / "runs.jsonl", []

    def go(task: Task = TINY, splits: Splits = SPLITS, **fields: Any) -> int:
        method = replace(BY_NAME["LoRA"], **fields)
        monkeypatch.setitem(BY_NAME, "LoRA", method)
        Slice(task, path, told.append, splits, LEARNING_RATES[:1], further=False).run(1, [method])
        return len(told)

    assert (go(), go(r=2), go(r=8)) == (2, 4, 4)
    assert go(splits=SPLITS._replace(train=SPLITS.train[1:])) == 6
    assert go(task=replace(TINY, head_lr=0.5)) == 8
    with pytest.raises(ValueError, match="a report is of one setting"):
        store.check_one_setting(store.read(path))


def test_a_commit_says_whether_code_was_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run extends a committed file of records, so larger records do not count as a change of code."""
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    code, records = folder / "code.py", folder / "results" / "runs.jsonl"
    code.write_text("1\n")
    records.write_text("1\n")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=b commit -q -m c"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(machine, "__file__", str(code))
    commit = machine.commit()
    records.write_text("2\n")
    assert machine.commit() == commit
    code.write_text("2\n")
    assert machine.commit() == commit + machine.EDITED
