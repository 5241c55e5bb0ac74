"""Writes the README's table of measurements, between two markers, from the kept runs and those of the main job."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .machine import LIMIT, commit, cpu_name
from .providers import HIRA, LORA, SMOA
from .results import RESULTS, ROOT, Run, write
from .tables import paragraphs, ratios, table

README = ROOT / "README.md"
MAIN_JOB = RESULTS / "main-job"
SERVING = RESULTS / "serving" / "summary.json"  # by `python -m benchmarks.serving --summary`
METHODS = {"smoa": SMOA, "lora": LORA, "hira": HIRA}
START, END = "<!-- written by python -m benchmarks.report: -->", "<!-- :written -->"

# Processors by name, with the README's names for them: their instruction sets. The results page has the full names.
PROCESSORS = {
    "AMD EPYC, family 25, model 1": "AMD (AVX2)",
    "AMD EPYC, family 25, model 17": "AMD (AVX512-BF16)",
    "AMD EPYC, family 26, model 2": "AMD (AVX-512)",
    "Intel(R) Xeon(R) Processor, family 6, model 167": "Intel (AMX)",
    "Intel(R) Xeon(R) Processor, family 6, model 207": "Intel (AVX-512)",
}
# Rows: words, the kind of benchmark, its phase, and the parameters that select the case.
SQUARE = {"tokens": 2048, "out_features": 2048, "num_blocks": 4, "rank": 16, "dropout": 0.0}
ROWS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("one layer, float32, over frozen", "layer", "both", {**SQUARE, "dtype": "float32"}),
    ("one layer, bfloat16, over frozen", "layer", "both", {**SQUARE, "dtype": "bfloat16"}),
    (
        "the recommended setting (K=2, r=8), bfloat16, over frozen",
        "layer",
        "both",
        {**SQUARE, "num_blocks": 2, "rank": 8, "dtype": "bfloat16"},
    ),
    ("a training step, float32, over LoRA's", "step", "step", {"dtype": "float32", "num_blocks": 4}),
)


def with_section(text: str, content: str) -> str:
    """The README with new text between `START` and `END`.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the page must hold {START} and then {END}, once each")
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{content.strip()}\n\n{END}{rest.partition(END)[2]}"


def keep_job(summary: dict[str, Any]) -> None:
    """Keep a summary that `make finetune` wrote, as one of the main job's runs.

    Raises:
        ValueError: the run is not finished, or not at the command's defaults.
    """
    if summary["status"] != "complete":
        raise ValueError(f"{summary['title']}: its status is {summary['status']!r}, not 'complete'")
    options = summary["options"]
    chosen = {name: options[name] for name in ("model", "data", "lr", "alpha", "num_blocks", "distributed")}
    if any(value is not None for value in chosen.values()) or options["eval_split"] != "test":
        raise ValueError(f"{summary['title']}: not run as `make finetune` runs it: {options}")
    kept = {"commit": commit(), "processor": cpu_name(), "summary": summary}
    write(MAIN_JOB / f"{options['method']}.json", json.dumps(kept, ensure_ascii=False, indent=1) + "\n")


def section(runs: list[Run]) -> str:
    """One table of the main job and of the layer, the rows of one CPU together; a table for each GPU; explanations.

    A processor that was used only in part is only on the results page.
    """
    runs = [run for run in runs if LIMIT not in run.machine["device"]]
    jobs = {name: json.loads((MAIN_JOB / f"{name}.json").read_text(encoding="utf-8")) for name in METHODS}
    own = str(jobs["smoa"]["processor"])
    summaries = {name: job["summary"] for name, job in jobs.items()}
    rows = _job_rows(own, summaries)
    rows += [row for run in runs if not run.on_gpu for row in _rows(run)]
    rows += [_serving_row(), _four_bits_row()]
    processors = [row[0].partition(",")[0] for row in rows]  # those of one processor together
    rows.sort(key=lambda row: processors.index(row[0].partition(",")[0]))
    return paragraphs(
        table(("Measured on CPU", "", "SMoA", "LoRA", "HiRA"), rows),
        *(ratios(run, run.select("layer"), "both", list(METHODS.values())) for run in runs if run.on_gpu),
        _explained(summaries["smoa"], runs),
    )


def _job_rows(device: str, summaries: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    where = f"{_processor(device)}, {summaries['smoa']['machine']['threads']} threads"
    cells = {
        "trained parameters": lambda s: f"{s['trainable_parameters']:,}",
        "accuracy, %": lambda s: _percent(s["accuracy_after"]),
        "seconds a step": lambda s: f"{s['median_step_seconds']:.2f}",
        "peak memory, GiB": lambda s: f"{s['peak_memory_bytes'] / 2**30:.2f}",
    }
    return [(where, words, *map(cell, summaries.values())) for words, cell in cells.items()]


def _rows(run: Run) -> list[tuple[str, ...]]:
    """Rows of the cases that the run has, without those that were noisy."""
    where = f"{_processor(run.machine['device'])}, {run.machine['threads']} thread"
    rows = []
    for words, kind, phase, params in ROWS:
        if (result := run.find(kind, **params)) is not None:
            figures = [result.comparison(phase).ratio(method) for method in METHODS.values()]
            if any(figure is not None and figure.doubt for figure in figures):
                continue
            rows.append((where, words, *("–" if figure is None else figure.short() for figure in figures)))
    return rows


def _serving_row() -> tuple[str, ...]:
    served = json.loads(SERVING.read_text(encoding="utf-8"))
    where = f"{_processor(served['device'])}, {served['threads']} thread"
    figures = (f"{served['token_over_merged'][name]:.2f}" for name in METHODS)
    return (where, "a token from vLLM, over merged", *figures)


def _four_bits_row() -> tuple[str, ...]:
    """From the quality study: SMoA's adapter and LoRA's, after merging into a model in four bits."""
    from .quality.analysis import Study
    from .quality.report import FOUR_BITS_IN_README, MERGED, percent
    from .quality.store import read

    study, (task, *methods) = Study(read(RESULTS / "quality.jsonl")), FOUR_BITS_IN_README
    machine = study.finals(task, methods[0])[0]["machine"]
    where = f"{_processor(machine['device'])}, {machine['threads']} thread"
    cells = (percent(study.mean(task, method, MERGED)) for method in methods)
    return (where, "accuracy merged into int4, %", *cells, "–")


def _processor(device: str) -> str:
    return PROCESSORS.get(device, device)


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f}"


def _explained(smoa: Mapping[str, Any], runs: list[Run]) -> str:
    """Explains each row's run and links to the full tables."""
    before, options = smoa["accuracy_before"], smoa["options"]
    pages = ", ".join(
        f"[{_processor(device)}](benchmarks/results/README.md#{anchor(device)})"
        for device in (str(run.machine["device"]) for run in runs)
    )
    return (
        "First four rows (`make main-job`): SmolLM2-135M, five linears a block, TREC-6, "
        f"{options['steps']} steps, r={options['r']}, K=2, {options['dtype']}, one seed; {before['questions']} "
        f"questions, untrained {_percent(before)}; ± is one standard error. Layers (2048 tokens, 2048×2048, r=16) and "
        "steps (512 tokens): spectral, K=4; slower at K=2, faster with contiguous blocks. LoRA and HiRA are PEFT's, "
        "in vLLM's row "
        "[vLLM's and ours](docs/serving.md#what-it-costs). Int4: TREC-50, MiniLM, K=1, "
        "[few seeds](benchmarks/results/quality.md#four-bits). "
        f"All tables: {pages}."
    )


def anchor(device: str) -> str:
    """The anchor that a Markdown viewer gives to a device's heading on the results page."""
    return re.sub(r"[^a-z0-9_ -]", "", device.lower()).replace(" ", "-")
