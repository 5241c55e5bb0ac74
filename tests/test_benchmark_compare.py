"""`make bench-compare`: what counts as a change between two runs, and what does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.compare import difference, main
from benchmarks.results import Result, Run, compact

TITLE = "layer: made up"
OLD = [1.00, 1.02, 1.04]  # quartiles 1.01 and 1.03


def made_up(ratios: dict[str, list[float]], frozen: tuple[float, ...] = (1.0, 1.01, 0.99)) -> Result:
    """A layer whose providers take these times over frozen, round by round."""
    seconds = {"frozen": list(frozen)} | {
        name: [r * base for r, base in zip(found, frozen, strict=True)] for name, found in ratios.items()
    }
    return Result("layer", TITLE, {}, "frozen", [1.0, 1.0], {"both": seconds})


def run(*results: Result) -> Run:
    machine = {"device": "AMD EPYC", "measured_on": "CPU", "cores": 2, "threads": 1, "system": "Linux"}
    machine |= {"smoke": False, "python": "3.11", "versions": {}}
    return Run(machine, "abcdef0123", "2026-01-02", results)


@pytest.mark.parametrize(
    ("new", "changed"),
    [
        ([1.00, 1.02, 1.04], False),
        ([1.05, 1.06, 1.07], False),  # apart, by 4 %
        ([0.90, 1.12, 1.14], False),  # 10 %, ranges that overlap
        ([1.11, 1.12, 1.13], True),
        ([0.90, 0.91, 0.92], True),
    ],
)
def test_a_ratio_changed_where_ranges_are_apart_and_medians_more_than_five_percent(new, changed):
    found = difference(run(made_up({"SMoA": OLD})), run(made_up({"SMoA": new}, frozen=(3.0, 3.01, 2.99))))
    assert list(found.changed) == [(TITLE, "both", "SMoA")] * changed
    assert found.same == (not changed)


@pytest.mark.parametrize("frozen", [(1.0, 2.0, 3.0), (1.0,)])
def test_what_is_in_doubt_is_counted_and_not_compared(frozen):
    doubtful = run(made_up({"SMoA": [9.0] * len(frozen)}, frozen=frozen))
    found = difference(doubtful, run(made_up({"SMoA": OLD})))
    assert (found.changed, found.same, found.doubtful) == ({}, 0, 1)


def test_the_largest_change_comes_first_and_sizes_change_by_more_than_one_percent():
    old, new = made_up({"a": OLD, "b": OLD}), made_up({"a": [1.2] * 3, "b": [1.5] * 3})
    gone = replace(old, title="layer: gone")
    found = difference(
        run(replace(old, bytes={"SMoA": {"saved": 1000, "peak": 1000}}), gone),
        run(replace(new, bytes={"SMoA": {"saved": 1010, "peak": 1011}})),
    )
    assert [name for _, _, name in found.changed] == ["b", "a"]
    assert found.sizes == {(TITLE, "peak", "SMoA"): (1000, 1011)}
    assert found.missing == ["layer: gone"]


def test_the_command_reads_kept_runs(tmp_path: Path):
    app = typer.Typer()
    app.command()(main)
    for name, ratios in (("old", OLD), ("new", [0.5, 0.5, 0.5])):
        (tmp_path / f"{name}.json").write_text(compact(run(made_up({"SMoA": ratios}))))
    done = CliRunner().invoke(app, [str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert done.exit_code == 0
    assert f"| {TITLE} | both | SMoA | 1.02 [1.01, 1.03] | 0.50 [0.50, 0.50] | 0.49 |" in done.output
    assert "Changed: 0 slower, 1 faster, 0 sizes." in done.output
