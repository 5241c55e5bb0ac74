"""The benchmarks' report from small made-up runs: what it judges, marks, refuses and keeps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import main_job, plots, tables
from benchmarks.goals import GOALS, Figure
from benchmarks.machine import LIMIT, cpu_name
from benchmarks.protocol import Quartiles
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
WAYS = {"frozen": 1.0, "PEFT LoRA": 1.1, "SMoA": 1.3, "SMoA split": 1.4}


def layer_result(
    frozen: list[float] | None = None, ways: dict[str, float] | None = None, **params: Any
) -> Result:
    """A layer at 1.3 of frozen, LoRA at 1.1, on a steady machine unless frozen's seconds say otherwise."""
    base = frozen or [1.0, 1.01, 0.99]
    seconds = {name: [factor * s for s in base] for name, factor in (ways or WAYS).items()}
    phases = dict.fromkeys(("forward", "backward", "both"), seconds)
    return Result("layer", "layer: made up", LAYER | params, "frozen", [1.0, 1.0], phases)


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


def partition(rows: int, columns: int) -> Result:
    shape = {"out_features": rows, "in_features": columns}
    return Result("partition", "", shape, "SVD", (), {"partition": {"SVD": [2.0], "partition": [1.0]}})


def everything() -> Run:
    """A run with one small result of each kind."""
    names = ("frozen", "PEFT LoRA", "PEFT HiRA", "paper, dense", "SMoA")
    sizes = {"saved": 1 << 20, "peak": 2 << 20, "forward_workspace": 0, "backward_workspace": 3 << 20}
    step = {"step": {name: [1.0, 1.0] for name in ("PEFT LoRA", "PEFT HiRA", "SMoA")}}
    cycle = {phase: {"SMoA": [1.0, 1.0]} for phase in ("inject", "save", "load")}
    at = {f"{name} @ {v}": [float(v) ** 2] * 2 for name in ("frozen", "PEFT LoRA", "SMoA") for v in (1, 2)}
    token = {"forward": {"frozen": [1.0], "SMoA": [4.0]}}
    shape, model = {"batch": 16, "length": 32, "num_blocks": 4}, {"model": "a model"}
    return make_run(
        layer_result(),
        Result("few tokens", "", LAYER | {"tokens": 1}, "frozen", (), token),
        Result("memory", "", LAYER, bytes=dict.fromkeys(names, sizes)),
        Result("step", "", shape, "PEFT LoRA", (), step, dict.fromkeys(names, sizes)),
        *(partition(*shape) for shape in ((2048, 2048), (512, 2048), (8192, 2048))),
        Result("adapter", "", model, "SMoA", (), cycle, {"SMoA": {"files": 1 << 20}}),
        Result("scaling", "", {"axis": "tokens", "values": [1, 2]}, "frozen @ 1", (), {"both": at}),
    )


def write_benchmark_json(path: Path, run: Run) -> Path:
    """As pytest-benchmark writes it, with what older runs recorded besides."""
    results = [
        {"name": "x", "stats": {"data": [0.0] * 99}, "extra_info": vars(r) | {"profile": {"SMoA": {}}}}
        for r in run.results
    ]
    data = {"machine_info": run.machine, "datetime": "2026-01-02T03:04:05", "benchmarks": results}
    path.write_text(json.dumps(data | {"commit_info": {"id": "abcdef0123456789", "dirty": True}}))
    return path


def test_a_goal_is_met_or_missed_by_how_much() -> None:
    run, goal = make_run(layer_result()), GOALS[0]
    assert goal.verdict(goal.measure(run)) == "missed by 0.10 (8%): forward 1.30, backward 1.30"
    assert goal.verdict(Figure(Quartiles(1.1, 1.2, 1.3))) == "met"
    over_lora = next(goal for goal in GOALS if goal.text.startswith("over PEFT LoRA"))
    figure = over_lora.measure(run)
    assert figure is not None
    assert figure.ratio.median == pytest.approx(1.3 / 1.1)  # pairs of the same rounds
    saved = next(goal for goal in GOALS if goal.text.startswith("saved for backward"))
    assert saved.verdict(saved.measure(everything())) == "met"
    assert tables.goals(run).splitlines()[3] == "| the same, K=8 | ≤ 1.14 | – | not measured |"


@pytest.mark.parametrize(
    ("frozen", "figure", "doubt"),
    [([1.0, 2.0, 3.0], "1.30 [1.30, 1.30]", "noisy"), ([1.0], "1.30", "one round")],
)
def test_a_doubtful_run_is_marked_and_not_judged(frozen: list[float], figure: str, doubt: str) -> None:
    run = make_run(layer_result(frozen))
    assert GOALS[0].verdict(GOALS[0].measure(run)) == f"{doubt}, not judged"
    assert f"{figure}, {doubt}, not judged" in tables.ratios(run, run.results, "both")
    assert f"the others are not to be quoted: layer: made up ({doubt})" in page([run])


def test_the_worst_shape_of_contiguous_blocks_is_judged_and_one_block_is_none() -> None:
    goal = next(goal for goal in GOALS if "the worst shape" in goal.text)

    def result(ratio: float, **params: Any) -> Result:
        return layer_result(ways={"frozen": 1.0, "SMoA": 2.0, "SMoA, contiguous": 2 * ratio}, **params)

    others = result(3.0, num_blocks=1), result(4.0, dtype="bfloat16"), layer_result()
    few = replace(result(1.1), kind="few tokens")
    assert goal.measure(make_run(*others)) is None
    assert goal.verdict(goal.measure(make_run(*others, result(0.9)))) == "met"
    assert goal.verdict(goal.measure(make_run(*others, result(0.9), few))) == "missed by 0.10 (10%)"


def test_a_whole_model_is_extrapolated_from_its_shapes() -> None:
    assert tables.one_billion(everything(), "SVD") == 2.0 * (32 + 32 + 48)
    extrapolated = "| all 112 layers of Llama-3.2-1B's shape, extrapolated | 224 | 112 | 0.50 | – |"
    assert extrapolated in tables.partitions(everything())
    assert tables.one_billion(make_run(), "SVD") is None


def test_a_slope_is_the_power() -> None:
    assert tables.log_log_slope([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert "| tokens, 1 to 2 | SMoA | +2.00 | – |" in tables.scaling(everything())


def test_the_compact_form_reads_back_and_another_json_is_refused(tmp_path: Path) -> None:
    raw, kept = write_benchmark_json(tmp_path / "raw.json", everything()), tmp_path / "kept.json"
    kept.write_text(compact(read(raw)))
    assert "stats" not in kept.read_text()
    assert read(raw).commit == "abcdef0123+"
    assert page([read(kept)]) == page([read(raw)])
    kept.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match=r"kept\.json is not a run of this benchmark suite"):
        read(kept)


def test_a_processor_is_named_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual machines call processors "AMD EPYC" of which one is twice as fast as another."""
    monkeypatch.delenv(LIMIT, raising=False)
    (tmp_path / "cpuinfo").write_text(
        "model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\nstepping\t: 1\n"
    )
    assert cpu_name(tmp_path / "cpuinfo") == "AMD EPYC, family 26, model 2"
    monkeypatch.setenv(LIMIT, "AVX2")
    assert cpu_name(tmp_path / "cpuinfo") == "AMD EPYC, family 26, model 2, ONEDNN_MAX_CPU_ISA=AVX2"


def run_report(arguments: list[str]) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments)


def test_runs_are_added_and_everything_is_written(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    raw = write_benchmark_json(tmp_path / "raw.json", everything())
    out = tmp_path / "out"
    assert run_report([str(raw), "--out", str(out), "--readme", str(readme)]).exit_code == 0
    assert {path.name for path in out.iterdir()} == {"README.md", "cpu-amd-epyc.json"}
    assert readme.read_text() == f"before\n{START}\n\n{section(read_all(out)).strip()}\n\n{END}\nafter\n"


def test_a_smoke_run_is_kept_out_of_the_results(tmp_path: Path) -> None:
    refused = run_report([str(write_benchmark_json(tmp_path / "raw.json", make_run(smoke=True)))])
    assert refused.exit_code == 2
    assert "a --smoke run measures nothing" in refused.output
    assert "its figures mean nothing" in page([make_run(smoke=True)])


def test_the_readme_has_a_row_of_each_case_and_cpu_and_a_table_of_each_gpu() -> None:
    one = make_run(layer_result([1.0, 2.0, 3.0]), device="AMD EPYC, family 26, model 2")
    other = make_run(layer_result(), layer_result(num_blocks=1), device="Some CPU")
    limited = make_run(layer_result(), device=f"AMD EPYC, {LIMIT}=AVX2")
    text = section([limited, other, one, make_run(layer_result(), device="H100", on="GPU")])
    doubtful = "1.30, noisy, not judged | 1.10, noisy, not judged | – |"
    assert f"| AMD (AVX-512), 1 thread | one layer, float32, over frozen | {doubtful}\n" in text
    assert "| Some CPU, 1 thread | one layer, float32, over frozen | 1.30 | 1.10 | – |\n" in text
    assert text.count("| one layer, ") == 2  # a case that a run does not have is no row
    assert text.count("| forward + backward over frozen, measured on GPU H100 |") == 1
    assert "(benchmarks/results/README.md#amd-epyc-family-26-model-2)" in text


@pytest.mark.parametrize("text", ["", START, END + START, START + END + END])
def test_a_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        with_section(text, "new")


def test_readme_and_results_are_what_the_kept_runs_say() -> None:
    runs = read_all(RESULTS)
    readme = README.read_text(encoding="utf-8")
    assert readme == with_section(readme, section(runs)), "run `python -m benchmarks.report`"
    results = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert results == page(runs), "run `python -m benchmarks.report`"


def test_the_overview_shows_the_largest_layer_in_each_dtype_that_nothing_speaks_against() -> None:
    def layer(both: float, frozen: list[float] | None = None, **params: Any) -> Result:
        ways = {"frozen": 1.0, "PEFT LoRA": 1.1, "PEFT HiRA": 2.5, "paper, dense": 2.6, "SMoA": both}
        return layer_result(frozen, ways, **params)

    run = make_run(
        layer(1.9, tokens=512),
        layer(1.3),
        layer(1.8, num_blocks=8),
        layer(1.6, [1.0, 2.0, 3.0], dtype="bfloat16"),
        layer(1.5, dtype="bfloat16", tokens=512),
    )
    figure = plots.overview([run])
    assert figure is not None
    text = plots.svg(figure)
    assert all(f">{ratio}<" in text for ratio in ("1.30", "1.50", "1.10", "2.60"))
    assert not any(f">{ratio}<" in text for ratio in ("1.90", "1.80", "1.60"))
    assert plots.overview([make_run(layer_result())]) is None  # lacks HiRA


@pytest.mark.parametrize(
    ("status", "options", "words"),
    [
        ("interrupted", {}, "its status is 'interrupted'"),
        ("complete", {"lr": 0.1}, "not run as `make finetune` runs it"),
    ],
)
def test_only_a_finished_run_at_the_defaults_is_kept(
    status: str, options: dict[str, object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_job, "MAIN_JOB", tmp_path / "kept")
    summary = json.loads((RESULTS / "main-job" / "smoa.json").read_text(encoding="utf-8"))["summary"]
    changed = summary | {"status": status, "options": summary["options"] | options}
    (tmp_path / "summary.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=re.escape(words)):
        main_job.keep(tmp_path)
    assert not (tmp_path / "kept").exists()
