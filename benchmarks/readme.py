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
from .tables import marked, ratios, table

__all__ = ["MAIN_JOB", "README", "RESULTS", "section", "with_section", "write_readme"]

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MAIN_JOB = RESULTS / "main-job"
SERVING = RESULTS / "serving" / "summary.json"  # by `python -m benchmarks.serving`, entered by hand
METHODS = {"smoa": SMOA, "lora": LORA, "hira": HIRA}
START, END = "<!-- written by python -m benchmarks.report: -->", "<!-- :written -->"

# A processor as the README calls it, by what it multiplies with; its numbers stand on the results page.
PROCESSORS = {
    "AMD EPYC, family 25, model 1": "AMD (AVX2)",
    "AMD EPYC, family 26, model 2": "AMD (AVX-512)",
    "Intel(R) Xeon(R) Processor, family 6, model 167": "Intel (AMX)",
}

SQUARE = {"tokens": 2048, "out_features": 2048, "num_blocks": 4, "rank": 16, "dropout": 0.0}
# Words, kind of benchmark, phase, and the parameters that tell the case from others.
LAYERS = (
    ("one layer, float32, over frozen", "layer", "both", SQUARE | {"dtype": "float32"}),
    ("one layer, bfloat16, over frozen", "layer", "both", SQUARE | {"dtype": "bfloat16"}),
    ("a training step, float32, over LoRA's", "step", "step", {"dtype": "float32", "num_blocks": 4}),
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
    """One table of the main job and of the layer, the rows of one CPU together; a table for each GPU; what they are.

    A processor that was not used whole is on the results page alone.
    """
    runs = [run for run in runs if LIMIT not in run.machine["device"]]
    jobs = {name: json.loads((MAIN_JOB / f"{name}.json").read_text(encoding="utf-8")) for name in METHODS}
    own = str(jobs["smoa"]["processor"])
    rows = _job_rows(own, {name: job["summary"] for name, job in jobs.items()})
    on_cpu = sorted((run for run in runs if not run.on_gpu), key=lambda run: run.machine["device"] != own)
    rows += [row for run in on_cpu for row in _layer_rows(run)]
    rows.append(_serving_row())
    parts = [
        table(("Measured on CPU", "", "SMoA", "LoRA", "HiRA"), rows),
        *(ratios(run, run.select("layer"), "both", list(METHODS.values())) for run in runs if run.on_gpu),
        _explained(jobs["smoa"]["summary"], runs),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _job_rows(device: str, summaries: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    smoa = summaries["smoa"]
    where = f"{_processor(device)}, {smoa['machine']['threads']} threads"
    peaks = [f"{s['peak_memory_bytes'] / 2**30:.2f}" for s in summaries.values()]
    rows = [
        (
            "fine-tuning a model: trained parameters",
            *(f"{s['trainable_parameters']:,}" for s in summaries.values()),
        ),
        ("accuracy, %", *(_percent(s["accuracy_after"]) for s in summaries.values())),
        ("seconds a step", *(f"{s['median_step_seconds']:.2f}" for s in summaries.values())),
        ("peak memory of the process, GiB", *peaks),
    ]
    return [(where, words, *cells) for words, *cells in rows]


def _serving_row() -> tuple[str, ...]:
    served = json.loads(SERVING.read_text(encoding="utf-8"))
    where = f"{_processor(served['device'])}, {served['threads']} thread"
    ratios = (f"{served['token_over_merged'][name]:.2f}" for name in METHODS)
    return (where, "a token from vLLM, over merged", *ratios)


def _processor(device: str) -> str:
    return PROCESSORS.get(device, device)


def _layer_rows(run: Run) -> list[tuple[str, ...]]:
    """The cases that the run has."""
    where = f"{_processor(run.machine['device'])}, {run.machine['threads']} thread"
    found = [(words, run.find(kind, **params), phase) for words, kind, phase, params in LAYERS]
    return [
        (where, words, *(_ratio(result, phase, name) for name in METHODS.values()))
        for words, result, phase in found
        if result is not None
    ]


def _ratio(result: Result, phase: str, name: str) -> str:
    if name not in result.seconds[phase]:
        return "–"
    comparison = result.comparison(phase)
    return marked(f"{comparison.ratio(name).median:.2f}", comparison.doubt)


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f}"


def _explained(smoa: Mapping[str, Any], runs: list[Run]) -> str:
    """What was run for each row, and links to the full tables."""
    before, options = smoa["accuracy_before"], smoa["options"]
    pages = ", ".join(
        f"[{_processor(device)}](benchmarks/results/README.md#{anchor(device)})"
        for device in (str(run.machine["device"]) for run in runs)
    )
    return (
        f"The first four rows are `make main-job`: SmolLM2-135M on TREC-6, {options['steps']} steps, r={options['r']}, "
        f"K=2, {options['dtype']}, one seed, learning rates from validation; {before['questions']} test questions, "
        f"untrained {_percent(before)}; ± is one standard error. The others are `make bench`, K=4: 2048 tokens forward "
        "and backward through a frozen `nn.Linear` of 2048×2048 with an adapter, r=16; a step of SmolLM2-135M, "
        "and [serving it](docs/serving.md#what-it-costs). "
        f"Tables: {pages}."
    )


def anchor(device: str) -> str:
    """The anchor that a Markdown viewer gives to a device's heading on the results page."""
    return re.sub(r"[^a-z0-9_ -]", "", device.lower()).replace(" ", "-")
