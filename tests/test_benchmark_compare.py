"""`make bench-compare`: what counts as a change between two runs, and what does not."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.compare import difference, report
from benchmarks.results import Result, Run, compact

TITLE = "layer: made up"


def made_up(
    ratios: dict[str, list[float]], title: str = TITLE, frozen: tuple[float, ...] = (1.0, 1.01, 0.99)
):
    """A layer whose providers take these times over frozen, round by round."""
    seconds = {"frozen": list(frozen)} | {
        name: [r * base for r, base in zip(found, frozen, strict=True)] for name, found in ratios.items()
    }
    return Result("layer", title, {}, "frozen", [1.0, 1.0], {"both": seconds})


def run(*results: Result, device: str = "AMD EPYC") -> Run:
    machine = {
        "device": device,
        "measured_on": "CPU",
        "cores": 2,
        "threads": 1,
        "system": "Linux",
        "smoke": False,
    }
    return Run(machine | {"python": "3.11", "versions": {}}, "abcdef0123", "2026-01-02", results)


OLD = [1.00, 1.02, 1.04]  # quartiles 1.01 and 1.03


@pytest.mark.parametrize(
    ("new", "changed"),
    [
        ([1.00, 1.02, 1.04], ""),
        ([1.05, 1.06, 1.07], ""),  # apart, by 4 %
        ([0.90, 1.12, 1.14], ""),  # 10 %, ranges that overlap
        ([1.11, 1.12, 1.13], "slower"),
        ([0.90, 0.91, 0.92], "faster"),
    ],
)
def test_a_ratio_changed_where_ranges_are_apart_and_medians_more_than_five_percent(new, changed):
    found = difference(run(made_up({"SMoA": OLD})), run(made_up({"SMoA": new})))
    name = (TITLE, "both", "SMoA")
    assert list(found.slower) == [name] * (changed == "slower")
    assert list(found.faster) == [name] * (changed == "faster")
    assert found.same == (not changed)


def test_a_slower_machine_changes_no_ratio():
    old = run(made_up({"SMoA": OLD}))
    new = run(made_up({"SMoA": OLD}, frozen=(3.0, 3.01, 2.99)))
    assert (difference(old, new).slower, difference(old, new).same) == ({}, 1)


@pytest.mark.parametrize("frozen", [(1.0, 2.0, 3.0), (1.0,)])
def test_what_is_in_doubt_is_counted_and_not_compared(frozen):
    doubtful = made_up({"SMoA": [9.0] * len(frozen)}, frozen=frozen)
    for old, new in (
        (run(made_up({"SMoA": OLD})), run(doubtful)),
        (run(doubtful), run(made_up({"SMoA": OLD}))),
    ):
        found = difference(old, new)
        assert (found.slower, found.faster, found.same, found.doubtful) == ({}, {}, 0, 1)


def test_the_largest_change_comes_first_and_what_only_one_run_has_is_named():
    old = run(made_up({"a": OLD, "b": OLD, "gone": OLD}), made_up({}, "layer: old"))
    new = run(made_up({"a": [1.2] * 3, "b": [1.5] * 3}), made_up({}, "layer: new"))
    found = difference(old, new)
    assert [name for _, _, name in found.slower] == ["b", "a"]
    assert found.missing == ("layer: new", "layer: old")


def test_sizes_are_counted_to_the_byte_so_one_percent_is_a_change():
    old, same, more = (
        run(replace(made_up({}), bytes={"SMoA": {"saved": size, "peak": 0}})) for size in (1000, 1010, 1011)
    )
    assert (difference(old, same).sizes, difference(old, same).same) == ({}, 2)
    assert difference(old, more).sizes == {(TITLE, "saved", "SMoA"): (1000, 1011)}


def test_the_report_says_the_rule_the_changes_and_whether_machines_differ():
    old, new = run(made_up({"SMoA": OLD})), run(made_up({"SMoA": [1.5] * 3}), device="Intel Xeon")
    text = report(old, new)
    assert f"| {TITLE} | both | SMoA | 1.02 [1.01, 1.03] | 1.50 [1.50, 1.50] | 1.47 |" in text
    assert "The machines differ" in text
    assert "apart and the medians differ by more than 5%" in text
    assert "Changed: 1 (1 slower, 0 faster, 0 sizes). The same: 0." in text
    assert "The machines differ" not in report(old, old)


def test_the_command_reads_kept_runs(tmp_path: Path):
    import typer

    from benchmarks.compare import main

    app = typer.Typer()
    app.command()(main)
    for name, ratios in (("old", OLD), ("new", [0.5, 0.5, 0.5])):
        (tmp_path / f"{name}.json").write_text(compact(run(made_up({"SMoA": ratios}))))
    done = CliRunner().invoke(app, [str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert done.exit_code == 0
    assert "(0 slower, 1 faster, 0 sizes)" in done.output
