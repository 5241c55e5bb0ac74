"""The README's table of measurements, written from the kept runs between two markers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .machine import LIMIT
from .providers import HIRA, LORA, SMOA
from .results import Result, Run, read_all, write
from .tables import marked, one_billion, ratios, table

__all__ = ["MAIN_JOB", "README", "RESULTS", "section", "with_section", "write_readme"]

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MAIN_JOB = RESULTS / "main-job"
METHODS = {"smoa": SMOA, "lora": LORA, "hira": HIRA}
START, END = "<!-- written by python -m benchmarks.report: -->", "<!-- :written -->"

SQUARE = {"tokens": 2048, "out_features": 2048, "rank": 16, "dropout": 0.0}
TOKEN = {"tokens": 1, "num_blocks": 4}
# Words, kind of benchmark, phase, and the parameters that tell the case from others.
LAYERS = (
    (
        "**One layer, time divided by a frozen `nn.Linear`'s**: forward + backward of 2048 tokens, 2048×2048, r=16, "
        "float32, K=4",
        "layer",
        "both",
        SQUARE | {"num_blocks": 4, "dtype": "float32"},
    ),
    ("the same, K=1 (which is HiRA)", "layer", "both", SQUARE | {"num_blocks": 1, "dtype": "float32"}),
    ("the same, bfloat16, K=4", "layer", "both", SQUARE | {"num_blocks": 4, "dtype": "bfloat16"}),
    ("one token, forward, float32, r=8, K=4", "few tokens", "forward", TOKEN | {"dtype": "float32"}),
)


def with_section(text: str, content: str, start: str = START) -> str:
    """A page, such as the README, with new text between `start` and `END`.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(start) != 1 or text.count(END) != 1 or text.index(start) > text.index(END):
        raise ValueError(f"the page must hold {start} and then {END}, once each")
    before, _, rest = text.partition(start)
    return f"{before}{start}\n\n{content.strip()}\n\n{END}{rest.partition(END)[2]}"


def write_readme(readme: Path = README) -> None:
    """Write the table from all runs that are kept."""
    write(readme, with_section(readme.read_text(encoding="utf-8"), section(read_all(RESULTS))))


def section(runs: list[Run]) -> str:
    """One table of the main job and of the layer on CPUs; a table for each GPU that was measured; what they ran on.

    A processor that was not used whole is on the results page alone.
    """
    runs = [run for run in runs if LIMIT not in run.machine["device"]]
    jobs = {name: json.loads((MAIN_JOB / f"{name}.json").read_text(encoding="utf-8")) for name in METHODS}
    # The one that has most of the rows leads, the newest of these.
    on_cpu = sorted((run for run in runs if not run.on_gpu), key=_rows_left_out)
    rows = _job_rows({name: job["summary"] for name, job in jobs.items()})
    if on_cpu:
        rows += [_layer_row(on_cpu[0], *case) for case in LAYERS]
    again = "2048 tokens again, float32, K=4, on another processor"
    rows += [_layer_row(run, f"{again} ({_known(run)})", *LAYERS[0][1:]) for run in on_cpu[1:]]
    parts = [
        table(("Measured on CPU", *METHODS.values()), rows),
        *(ratios(run, run.select("layer"), "both", list(METHODS.values())) for run in runs if run.on_gpu),
        _machines(jobs, runs),
        _injection(on_cpu[0]) if on_cpu else "",
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _job_rows(summaries: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    before, options = summaries["smoa"]["accuracy_before"], summaries["smoa"]["options"]
    parameters = [f"{s['trainable_parameters']:,}" for s in summaries.values()]
    accuracies = [_percent(s["accuracy_after"]) for s in summaries.values()]
    seconds = [f"{s['median_step_seconds']:.2f}" for s in summaries.values()]
    peaks = [f"{s['peak_memory_bytes'] / 2**30:.2f} GiB" for s in summaries.values()]
    job = f"SmolLM2-135M-Instruct on TREC-6, {options['steps']} steps, r={options['r']}, SMoA with K=2"
    return [
        (f"**{job}**: trained parameters", *parameters),
        (f"accuracy on {before['questions']} test questions ({_percent(before)} untrained)", *accuracies),
        ("seconds per step, median", *seconds),
        ("peak memory of the process", *peaks),
    ]


def _known(run: Run) -> str:
    device = str(run.machine["device"])
    return device if "family" in device else f"{device}, its family not recorded"


def _rows_left_out(run: Run) -> int:
    return sum(run.find(kind, **params) is None for _, kind, _, params in LAYERS)


def _layer_row(run: Run, words: str, kind: str, phase: str, params: Mapping[str, Any]) -> tuple[str, ...]:
    result = run.find(kind, **params)
    return words, *(_ratio(result, phase, name) for name in METHODS.values())


def _ratio(result: Result | None, phase: str, name: str) -> str:
    if result is None or name not in result.seconds[phase]:
        return "–"
    comparison = result.comparison(phase)
    return marked(f"{comparison.ratio(name).median:.2f}", comparison.doubt)


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['accuracy']:.1f} % ± {100 * found['standard_error']:.1f}"


def _machines(jobs: Mapping[str, dict[str, Any]], runs: list[Run]) -> str:
    """What the figures were measured on, and links to the full tables."""
    smoa = jobs["smoa"]["summary"]
    rates = ", ".join(f"{METHODS[name]} {job['summary']['learning_rate']:g}" for name, job in jobs.items())
    commits = ", ".join(sorted({job["commit"] for job in jobs.values()}))
    layers = "; ".join(
        f"{run.machine['device']}, {run.machine['threads']} thread, commit {run.commit}, "
        f"[tables, goals met and missed](benchmarks/results/README.md#{anchor(run)})"
        for run in runs
    )
    return (
        "The first four rows are one fine-tuning by each method (`make main-job`; one seed, our own split of the TREC "
        f"questions, {smoa['options']['dtype']}, {jobs['smoa']['processor']}, {smoa['machine']['threads']} threads, "
        f"commit {commits}; the model's weights are those of a 4-bit file, Q4_1, dequantised). Learning rates "
        f"were chosen on a validation split: {rates}. The other rows are "
        f"medians of `make bench` ({layers}); –: not measured."
    )


def _injection(run: Run) -> str:
    """How long adding an adapter to a model takes; "" where it was not measured."""
    model = one_billion(run, "partition")
    times = []
    for result in run.select("adapter"):
        inject = result.comparison("inject")
        times.append(
            f"{marked(f'{inject.time(SMOA).median:.1f} s', inject.doubt)} for "
            f"{result.params['model'].partition(' (')[0]}"
        )
    if model is None or not times:
        return ""
    return (
        "Adding an adapter computes the spectrum of each adapted weight once; loading one computes none. "
        f"Adding one took, on one thread of the {run.machine['device']}, {', '.join(times)} (measured on CPU); "
        f"for a model of 1B parameters it takes about {model / 60:.1f} minutes (extrapolated from one layer of each "
        "shape)."
    )


def anchor(run: Run) -> str:
    """The anchor that a Markdown viewer gives to the run's heading on the results page."""
    return re.sub(r"[^a-z0-9_ -]", "", str(run.machine["device"]).lower()).replace(" ", "-")
