"""The benchmarks' report: the page agrees with the kept runs, marks doubtful rows, and keeps nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import readme, tables
from benchmarks.goals import GOALS
from benchmarks.machine import LIMIT, cpu_name
from benchmarks.readme import END, README, RESULTS, START, section, with_section
from benchmarks.report import main, page
from benchmarks.results import Result, Run, compact, read, read_all

pytestmark = pytest.mark.slow

LAYER = {
    "tokens": 2048,
    "out_features": 2048,
    "in_features": 2048,
    "num_blocks": 4,
    "rank": 16,
    "dtype": "float32",
    "dropout": 0.0,
}
TITLE = "layer: T=2048 2048x2048 K=4 r=16 float32"


def layer_result(
    frozen: tuple[float, ...] = (1.0, 1.01, 0.99), smoa: float = 1.3, title: str = TITLE
) -> Result:
    """A layer at 1.3 of frozen, LoRA at 1.1, contiguous blocks at 1.2; the spread is that of frozen's seconds."""
    ways = {"frozen": 1.0, "PEFT LoRA": 1.1, "SMoA": smoa, "SMoA, contiguous": 1.2}
    seconds = {name: [factor * s for s in frozen] for name, factor in ways.items()}
    phases = dict.fromkeys(("forward", "backward", "both"), seconds)
    return Result("layer", title, LAYER, "frozen", [1.0, 1.0], phases)


def make_run(*results: Result, device: str = "AMD EPYC", on: str = "CPU", smoke: bool = False) -> Run:
    machine = {
        "device": device,
        "measured_on": on,
        "cpu": "AMD EPYC",
        "cores": 2,
        "threads": 1,
        "smoke": smoke,
    }
    machine |= {"system": "Linux x86_64", "python": "3.11", "versions": {"torch": "2.13.0"}}
    return Run(machine, "abcdef0123", "2026-01-02", results)


def write_benchmark_json(path: Path, run: Run) -> Path:
    """Writes a file of pytest-benchmark, with a field that older runs recorded."""
    extra = [vars(result) | {"profile": {"SMoA": {}}} for result in run.results]
    results = [{"name": "x", "stats": {"data": [0.0] * 99}, "extra_info": one} for one in extra]
    data = {"machine_info": run.machine, "datetime": "2026-01-02T03:04:05", "benchmarks": results}
    path.write_text(json.dumps(data | {"commit_info": {"id": "abcdef0123456789", "dirty": True}}))
    return path


def test_readme_and_results_are_what_the_kept_runs_say() -> None:
    runs = read_all(RESULTS)
    text = README.read_text(encoding="utf-8")
    assert text == with_section(text, section(runs)), "run `python -m benchmarks.report`"
    results = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert results == page(runs), "run `python -m benchmarks.report`"


def test_every_goal_names_benchmarks_that_were_run() -> None:
    runs = read_all(RESULTS)
    assert not [goal.text for goal in GOALS if not any(goal.measure(run) for run in runs)]


def test_a_goal_is_met_or_missed_by_how_much() -> None:
    over_frozen, over_lora = GOALS[0], next(g for g in GOALS if g.text.startswith("over PEFT LoRA"))
    run = make_run(layer_result())
    assert over_frozen.verdict(run) == "missed by 0.10 (8%): forward 1.30, backward 1.30"
    assert over_frozen.verdict(make_run(layer_result(smoa=1.2))) == "met"
    assert over_frozen.verdict(make_run()) == "not measured"
    found = over_lora.measure(run)
    assert found is not None
    assert found[0].median == pytest.approx(1.3 / 1.1)  # ratios of pairs in the same rounds
    worst = next(goal for goal in GOALS if "*" in goal.title)
    others = [
        layer_result(smoa=1.0, title=TITLE.replace(*pair))
        for pair in (("K=4", "K=1"), ("float32", "bfloat16"))
    ]
    assert worst.verdict(make_run(*others)) == "not measured"
    wide = layer_result(smoa=1.1, title=TITLE.replace("K=4", "K=8"))
    assert worst.verdict(make_run(layer_result(), wide, *others)).startswith("missed by 0.09 (9%)")


@pytest.mark.parametrize(
    ("frozen", "figure", "doubt"),
    [((1.0, 2.0, 3.0), "1.30 [1.30, 1.30]", "noisy"), ((1.0,), "1.30", "one round")],
)
def test_a_doubtful_run_is_marked_and_not_judged(frozen: tuple[float, ...], figure: str, doubt: str) -> None:
    run = make_run(layer_result(frozen), device="AMD EPYC, family 26, model 2")
    assert GOALS[0].verdict(run) == f"{doubt}, not judged"
    assert f"{figure}, {doubt}, not judged" in tables.ratios(run, run.results, "both")
    assert f"the others are not to be quoted: {TITLE} ({doubt})" in page([run])
    limited = make_run(layer_result(), device=f"AMD EPYC, {LIMIT}=AVX2")
    gpu = make_run(layer_result(), device="H100", on="GPU")
    text = section([limited, run, gpu])
    row = f"| AMD (AVX-512), 1 thread | one layer, float32, over frozen | 1.30, {doubt}, not judged | "
    assert row in text
    assert text.count("| one layer, ") == 1  # a missing case has no row, nor has a limited processor
    assert text.count("| forward + backward over frozen, measured on GPU H100 |") == 1


def test_the_compact_form_reads_back_and_another_json_is_refused(tmp_path: Path) -> None:
    raw, kept = write_benchmark_json(tmp_path / "raw.json", make_run(layer_result())), tmp_path / "kept.json"
    kept.write_text(compact(read(raw)))
    assert "stats" not in kept.read_text()
    assert read(raw).commit == "abcdef0123+"
    assert page([read(kept)]) == page([read(raw)])
    kept.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match=r"kept\.json is not a run of this benchmark suite"):
        read(kept)


def test_a_processor_is_named_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual machines call different processors "AMD EPYC", and one is twice as fast as another."""
    monkeypatch.delenv(LIMIT, raising=False)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\nstepping\t: 1\n")
    assert cpu_name(cpuinfo) == "AMD EPYC, family 26, model 2"
    monkeypatch.setenv(LIMIT, "AVX2")
    assert cpu_name(cpuinfo) == "AMD EPYC, family 26, model 2, ONEDNN_MAX_CPU_ISA=AVX2"


def test_runs_are_kept_but_for_those_of_smoke(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    page_text, out = tmp_path / "README.md", tmp_path / "out"
    page_text.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    raw = write_benchmark_json(tmp_path / "raw.json", make_run(layer_result()))
    done = CliRunner().invoke(app, [str(raw), "--out", str(out), "--readme", str(page_text)])
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"README.md", "cpu-amd-epyc.json"}
    assert page_text.read_text() == f"before\n{START}\n\n{section(read_all(out)).strip()}\n\n{END}\nafter\n"
    refused = CliRunner().invoke(app, [str(write_benchmark_json(raw, make_run(smoke=True)))])
    assert refused.exit_code == 2
    assert "a --smoke run measures nothing" in refused.output
    with pytest.raises(ValueError, match="once each"):
        with_section(END + START, "new")


@pytest.mark.parametrize(
    ("status", "options", "words"),
    [
        ("interrupted", {}, "its status is 'interrupted'"),
        ("complete", {"lr": 0.1}, "not run as `make finetune` runs it"),
    ],
)
def test_only_a_finished_job_at_the_defaults_is_kept(
    status: str, options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "MAIN_JOB", tmp_path / "kept")
    summary = json.loads((RESULTS / "main-job" / "smoa.json").read_text(encoding="utf-8"))["summary"]
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary | {"status": status, "options": summary["options"] | options}))
    with pytest.raises(ValueError, match=re.escape(words)):
        main([path], out=tmp_path)
    assert not (tmp_path / "kept").exists()


def test_a_slope_is_the_power() -> None:
    assert tables.log_log_slope([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)
