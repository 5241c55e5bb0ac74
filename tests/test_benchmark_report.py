"""The benchmarks' report from small made-up runs: what it judges, marks, refuses and keeps."""

from __future__ import annotations

import csv
import io
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
from benchmarks.profiles import BETWEEN, EIGH, GEMM, KINDS, REST
from benchmarks.protocol import Quartiles
from benchmarks.readme import END, README, RESULTS, START, section, with_section
from benchmarks.report import generate, main, page
from benchmarks.results import Result, Run, compact, read, read_all, spreadsheet

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
SMOA_OVER_FROZEN = GOALS[0]


def layer_result(frozen: list[float] | None = None, **params: Any) -> Result:
    """A layer at 1.3 of frozen, LoRA at 1.1, on a steady machine unless frozen's seconds say otherwise."""
    base = frozen or [1.0, 1.01, 0.99]
    ways = {"frozen": 1.0, "PEFT LoRA": 1.1, "SMoA": 1.3, "SMoA split": 1.4}
    seconds = {name: [factor * s for s in base] for name, factor in ways.items()}
    phases = dict.fromkeys(("forward", "backward", "both"), seconds)
    return Result("layer", "layer: made up", LAYER | params, "frozen", [1.0, 1.0], phases)


def make_run(*results: Result, device: str = "AMD EPYC", on: str = "CPU", smoke: bool = False) -> Run:
    machine = {
        "device": device,
        "measured_on": on,
        "cpu": "AMD EPYC",
        "cores": 2,
        "threads": 1,
        "system": "Linux x86_64",
        "python": "3.11",
        "versions": {"torch": "2.13.0"},
        "smoke": smoke,
    }
    return Run(machine, "abcdef0123", "2026-01-02", results)


def everything() -> Run:
    """A run with one small result of each kind."""
    step = {"step": {name: [1.0, 1.0] for name in ("PEFT LoRA", "PEFT HiRA", "SMoA")}}
    sizes = {"saved": 1 << 20, "peak": 2 << 20, "forward_workspace": 0, "backward_workspace": 3 << 20}
    names = ("frozen", "PEFT LoRA", "PEFT HiRA", "paper, dense", "SMoA")
    at = {f"{name} @ {v}": [float(v)] * 2 for name in ("frozen", "PEFT LoRA", "SMoA") for v in (1, 2)}
    return make_run(
        layer_result(),
        layer_result(num_blocks=8),
        Result(
            "few tokens",
            "",
            LAYER | {"tokens": 1},
            "frozen",
            (),
            {"forward": {"frozen": [1.0], "SMoA": [4.0]}},
        ),
        Result("memory", "", LAYER, bytes=dict.fromkeys(names, sizes)),
        Result(
            "step",
            "",
            {"batch": 16, "length": 32, "num_blocks": 4},
            "PEFT LoRA",
            (),
            step,
            bytes={name: {"peak": 1 << 20} for name in step["step"]},
        ),
        *(
            Result(
                "partition",
                "",
                {"out_features": rows, "in_features": columns},
                "SVD",
                (),
                {"partition": {"SVD": [2.0], "partition": [1.0]}},
            )
            for rows, columns in ((2048, 2048), (512, 2048), (8192, 2048))
        ),
        Result(
            "adapter",
            "",
            {"model": "a model"},
            "SMoA",
            (),
            {
                phase: {"PEFT LoRA": [0.1, 0.1], "SMoA": [1.0, 1.0], "SMoA, 8 threads": [0.25, 0.25]}
                for phase in ("inject", "save", "load")
            },
            bytes={"SMoA": {"files": 1 << 20}},
        ),
        Result(
            "scaling",
            "",
            {"axis": "tokens", "values": [1, 2]},
            "frozen @ 1",
            (),
            {"both": at},
            theory={name: s[0] ** 2 for name, s in at.items()},
        ),
    )


def write_benchmark_json(path: Path, run: Run) -> Path:
    """As pytest-benchmark writes it."""
    data = {
        "machine_info": run.machine,
        "commit_info": {"id": "abcdef0123456789", "dirty": True},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [
            {"name": "x", "stats": {"data": [0.0] * 99}, "extra_info": vars(r)} for r in run.results
        ],
    }
    path.write_text(json.dumps(data))
    return path


def test_a_goal_is_met_or_missed_by_how_much() -> None:
    figure = SMOA_OVER_FROZEN.measure(make_run(layer_result()))
    assert figure is not None
    assert figure.ratio.median == pytest.approx(1.3)
    assert SMOA_OVER_FROZEN.verdict(figure) == "missed by 0.10 (8%): forward 1.30, backward 1.30"
    assert SMOA_OVER_FROZEN.verdict(Figure(Quartiles(1.1, 1.2, 1.3))) == "met"


@pytest.mark.parametrize(
    ("frozen", "figure", "doubt"),
    [([1.0, 2.0, 3.0], "1.30 [1.30, 1.30]", "noisy"), ([1.0], "1.30", "one round")],
)
def test_a_doubtful_run_is_marked_and_not_judged(frozen: list[float], figure: str, doubt: str) -> None:
    run = make_run(layer_result(frozen))
    assert SMOA_OVER_FROZEN.verdict(SMOA_OVER_FROZEN.measure(run)) == f"{doubt}, not judged"
    assert f"{figure}, {doubt}, not judged" in tables.ratios(run, run.results, "both")
    assert f"the others are not to be quoted: layer: made up ({doubt})" in page([run])


def test_a_noisy_phase_of_the_life_cycle_is_marked_in_its_table() -> None:
    steady, cold = [1.0, 1.0, 1.0], [9.0, 1.0, 1.0]
    seconds = {"inject": cold, "save": steady, "load": steady}
    phases = {phase: {"PEFT LoRA": s} for phase, s in seconds.items()}
    result = Result("adapter", "", {}, "PEFT LoRA", (), phases, bytes={"PEFT LoRA": {"files": 1 << 20}})
    row = tables.life_cycle(make_run(result)).splitlines()[2]
    assert row == "| PEFT LoRA | 1, noisy, not judged | 1 | 1 | 1.00 |"


def test_what_was_not_measured_is_said() -> None:
    run = make_run(layer_result())
    goals = tables.goals(run).splitlines()
    assert len(goals) == 2 + len(GOALS)
    assert goals[3] == "| the same, K=8 | ≤ 1.14 | – | not measured |"
    assert "PEFT HiRA" not in tables.ratios(run, run.results, "both")


def test_a_provider_that_one_case_lacks_leaves_a_dash() -> None:
    with_paper = layer_result()
    seconds = {phase: s | {"paper, dense": [2.7] * 3} for phase, s in with_paper.seconds.items()}
    run = make_run(layer_result(), Result("layer", "", LAYER, "frozen", (), seconds))
    rows = tables.ratios(run, run.results, "both").splitlines()
    assert rows[0].endswith("the paper's dense way |")
    assert rows[2].endswith("| – |")
    assert rows[3].endswith("| 2.70 [2.69, 2.71] |")


def test_the_worst_shape_of_contiguous_blocks_is_judged_and_one_block_is_none() -> None:
    goal = next(goal for goal in GOALS if "the worst shape" in goal.text)

    def result(ratio: float, kind: str = "layer", **params: Any) -> Result:
        phase = "both" if kind == "layer" else "forward"
        seconds = {"frozen": [1.0, 1.0], "SMoA": [2.0, 2.0], "SMoA, contiguous": [2 * ratio] * 2}
        return Result(kind, "", LAYER | params, "frozen", (), {phase: seconds})

    others = result(3.0, num_blocks=1), result(4.0, dtype="bfloat16"), layer_result()
    figures = [
        goal.measure(make_run(*others, *some))
        for some in ([], [result(0.9), result(0.7, "few tokens")], [result(0.9), result(1.1, "few tokens")])
    ]
    assert figures[0] is None
    assert [goal.verdict(figure) for figure in figures] == ["not measured", "met", "missed by 0.10 (10%)"]


def test_goals_over_a_peer_are_pairs_of_the_same_rounds() -> None:
    over_lora = next(goal for goal in GOALS if goal.text.startswith("over PEFT LoRA"))
    figure = over_lora.measure(make_run(layer_result()))
    assert figure is not None
    assert figure.ratio.median == pytest.approx(1.3 / 1.1)


def test_a_whole_model_is_extrapolated_from_its_shapes() -> None:
    assert tables.one_billion(everything(), "SVD") == 2.0 * (32 + 32 + 48)
    assert (
        "| all 112 layers of Llama-3.2-1B's shape, extrapolated | 224 | 112 | 0.50 | – |"
        in tables.partitions(everything())
    )
    assert tables.one_billion(make_run(), "SVD") is None


def test_what_a_partition_takes_is_named_or_left_open() -> None:
    def row(**profile: float) -> str:
        seconds = {"partition": {"SVD": [2.0, 2.0], "partition": [1.0, 1.0]}}
        found = {"partition": profile} if profile else {}
        shape = {"out_features": 64, "in_features": 64}
        result = Result("partition", "", shape, "SVD", (), seconds, profile=found)
        return tables.partitions(make_run(result)).splitlines()[2]

    named = row(**{EIGH: 0.5, GEMM: 0.3, REST: 0.1, BETWEEN: 0.1})
    assert named == "| 64×64 | 2 | 1 | 0.50 [0.50, 0.50] | 0.25 | 0.15 | 0.10 | 2 |"
    assert row() == "| 64×64 | 2 | 1 | 0.50 [0.50, 0.50] | – | – | – | 2 |"


def test_the_profile_is_the_runs_own_or_is_left_out() -> None:
    assert "profile" not in page([make_run(layer_result())])
    kinds = dict.fromkeys(KINDS, 0.25)
    result = replace(layer_result(dropout=0.05), profile={"frozen": kinds, "SMoA": kinds | {GEMM: 1.75}})
    found = tables.profile(make_run(result)).splitlines()
    # 1 + 3/(2K) with dropout, and 4 r/K² of thin products over 2T, 0.001; over 5 · 0.25 seconds of frozen's.
    assert found[2].endswith("dropout 0.05 | 1.38 | 1.40 | 0.20 | 0.20 | 0.20 | 0.20 |")
    assert "this run's profile says" in page([make_run(result)])


def test_two_machines_have_a_part_each() -> None:
    card = make_run(layer_result(dtype="bfloat16"), device="NVIDIA H100 80GB HBM3", on="GPU")
    text = page([make_run(layer_result()), card])
    assert "measured on CPU: AMD EPYC" in text
    assert "measured on GPU NVIDIA H100 80GB HBM3" in text
    assert text.count("### Goals") == 1  # which were set for a CPU
    assert "predicted for H100" in text
    assert card.slug == "gpu-nvidia-h100-80gb-hbm3"


def test_every_figure_is_drawn_and_the_same_twice() -> None:
    drawn = plots.figures(everything())
    assert set(drawn) == {"ratio", "few-tokens", "memory", "scaling"}
    assert drawn == plots.figures(everything())
    assert "measured on CPU: AMD EPYC" in drawn["ratio"]
    assert plots.figures(make_run()) == {}


def test_the_compact_form_reads_back_and_drops_the_rest(tmp_path: Path) -> None:
    raw = write_benchmark_json(tmp_path / "raw.json", everything())
    kept = tmp_path / "kept.json"
    kept.write_text(compact(read(raw)))
    assert kept.stat().st_size < raw.stat().st_size / 2
    assert "stats" not in kept.read_text()
    assert read(raw).commit == "abcdef0123+"
    assert page([read(kept)]) == page([read(raw)])


def test_another_json_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match=r"other\.json is not a run of this benchmark suite"):
        read(other)


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\nstepping\t: 1\n" * 2,
            "AMD EPYC, family 26, model 2",
        ),
        ("model name\t: Some CPU \n", "Some CPU"),
    ],
)
def test_a_processor_is_named_with_its_numbers(
    cpuinfo: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual machines call processors "AMD EPYC" of which one is twice as fast as another."""
    monkeypatch.delenv(LIMIT, raising=False)
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert cpu_name(tmp_path / "cpuinfo") == name
    monkeypatch.setenv(LIMIT, "AVX512_CORE_BF16")
    assert cpu_name(tmp_path / "cpuinfo") == f"{name}, ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"


def test_runs_are_added_and_everything_is_written(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    raw = write_benchmark_json(tmp_path / "raw.json", everything())
    out = tmp_path / "out"
    assert run_report([str(raw), "--out", str(out), "--readme", str(readme)]).exit_code == 0
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "cpu-amd-epyc.json",
        "cpu-amd-epyc.csv",
        *(f"cpu-amd-epyc-{name}.svg" for name in ("ratio", "few-tokens", "memory", "scaling")),
    }
    assert readme.read_text() == f"before\n{START}\n\n{section(read_all(out)).strip()}\n\n{END}\nafter\n"
    before = {path: path.read_bytes() for path in out.iterdir()}
    generate(out, readme)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_smoke_run_is_kept_out_of_the_results(tmp_path: Path) -> None:
    raw = write_benchmark_json(tmp_path / "raw.json", make_run(smoke=True))
    refused = run_report([str(raw)])
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
    for run in runs:
        kept = (RESULTS / f"{run.slug}.csv").read_text(encoding="utf-8")
        assert kept == spreadsheet(run), "run `python -m benchmarks.report`"


def test_a_spreadsheet_has_a_row_for_each_time_and_size() -> None:
    run = make_run(layer_result(), everything().select("memory")[0])
    rows = list(csv.DictReader(io.StringIO(spreadsheet(run))))
    (lora,) = (row for row in rows if row["phase"] == "both" and row["provider"] == "PEFT LoRA")
    assert lora["title"] == "layer: made up"
    assert (lora["ratio"], lora["rounds"], lora["seconds"], lora["bytes"]) == ("1.1", "3", "1.1", "")
    sizes = {row["provider"]: row["bytes"] for row in rows if row["phase"] == "saved"}
    assert sizes == {name: str(size["saved"]) for name, size in run.results[1].bytes.items()}


def test_the_overview_shows_the_largest_layer_in_each_dtype_that_nothing_speaks_against() -> None:
    def layer(both: float, frozen: list[float] | None = None, **params: Any) -> Result:
        base = frozen or [1.0, 1.01, 0.99]
        ways = {"frozen": 1.0, "PEFT LoRA": 1.1, "PEFT HiRA": 2.5, "paper, dense": 2.6, "SMoA": both}
        seconds = {name: [factor * s for s in base] for name, factor in ways.items()}
        return replace(layer_result(**params), seconds={"both": seconds})

    run = make_run(
        layer(1.9, tokens=512),
        layer(1.3),
        layer(1.8, num_blocks=8),
        layer(1.7, dtype="bfloat16", dropout=0.05),
        layer(1.6, [1.0, 2.0, 3.0], dtype="bfloat16"),
        layer(1.5, dtype="bfloat16", tokens=512),
    )
    figure = plots.overview([run])
    assert figure is not None
    text = plots.svg(figure)
    assert all(f">{ratio}<" in text for ratio in ("1.30", "1.50", "1.10", "2.60"))
    assert not any(f">{ratio}<" in text for ratio in ("1.90", "1.80", "1.70", "1.60"))
    assert plots.overview([make_run(layer_result())]) is None  # lacks HiRA


@pytest.mark.parametrize(
    ("status", "options", "words"),
    [
        ("interrupted", {}, "its status is 'interrupted'"),
        ("complete", {"lr": 0.1}, "not run as `make finetune` runs it"),
        ("complete", {"eval_split": "validation"}, "not run as `make finetune` runs it"),
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


def run_report(arguments: list[str]) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments)
