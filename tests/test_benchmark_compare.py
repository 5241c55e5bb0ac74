"""`make bench-compare`: the differences between two runs that count as a change."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compare import LEAST, Differences, differences, main, ratios
from benchmarks.results import Result, Run, compact

TITLE = "layer: made up"
OLD = [1.00, 1.02, 1.04]  # quartiles 1.01 and 1.03


def made_up(ratios: dict[str, list[float]], frozen: tuple[float, ...] = (1.0, 1.01, 0.99)) -> Result:
    """A layer whose providers take these times relative to frozen, round by round."""
    seconds = {
        name: [r * base for r, base in zip(found, frozen, strict=True)] for name, found in ratios.items()
    }
    return Result("layer", TITLE, {}, "frozen", [1.0, 1.0], {"both": {"frozen": list(frozen), **seconds}})


def run(*results: Result) -> Run:
    machine = {"device": "AMD EPYC", "measured_on": "CPU", "cores": 2, "threads": 1, "system": "Linux"}
    machine |= {"smoke": False, "python": "3.11", "versions": {}}
    return Run(machine, "abcdef0123", "2026-01-02", results)


def compared(old: Result, new: Result) -> Differences:
    return differences(ratios(run(old)), ratios(run(new)), LEAST)


@pytest.mark.parametrize(
    ("new", "changed"),
    [
        ([1.00, 1.02, 1.04], False),
        ([1.05, 1.06, 1.07], False),  # no overlap, but only 4 %
        ([0.90, 1.12, 1.14], False),  # 10 %, but the ranges overlap
        ([1.11, 1.12, 1.13], True),
        ([0.90, 0.91, 0.92], True),
    ],
)
def test_a_ratio_changed_where_ranges_are_apart_and_medians_more_than_five_percent(new, changed):
    found = compared(made_up({"SMoA": OLD}), made_up({"SMoA": new}, frozen=(3.0, 3.01, 2.99)))
    assert [name for name, *_ in found.changed] == [(TITLE, "both", "SMoA")] * changed
    assert found.same == (not changed)


@pytest.mark.parametrize("frozen", [(1.0, 2.0, 3.0), (1.0,)])
def test_what_is_in_doubt_is_counted_and_not_compared(frozen):
    found = compared(made_up({"SMoA": [9.0] * len(frozen)}, frozen=frozen), made_up({"SMoA": OLD}))
    assert found == ([], 0, 1)


def test_the_command_reads_kept_runs_and_says_the_largest_change_first(tmp_path: Path, capsys):
    sizes = {"old": {"saved": 1000, "peak": 1000}, "new": {"saved": 1010, "peak": 1011}}
    for name, a, b in (("old", OLD, OLD), ("new", [0.9] * 3, [0.5] * 3)):
        result = replace(made_up({"a": a, "b": b}), bytes={"SMoA": sizes[name]})
        others = [replace(result, title="layer: gone")] if name == "old" else []
        (tmp_path / f"{name}.json").write_text(compact(run(result, *others)))
    main(tmp_path / "old.json", tmp_path / "new.json")
    said = capsys.readouterr().out
    first, second = (f"| {TITLE} | both | {name} | 1.02 [1.01, 1.03] | 0." for name in "ba")
    assert 0 < said.index(first) < said.index(second)
    assert f"| {TITLE} | peak | SMoA |" in said
    assert "Only in one of the runs: layer: gone." in said
    assert "Changed: 0 slower, 2 faster, 1 sizes." in said
