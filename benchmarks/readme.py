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
# Columns: words, then the kind of benchmark, its phase, and the parameters that select the case. The first case that
# was measured counts; its blocks are named where they are not the heading's.
LAYER = {"tokens": 2048, "out_features": 2048, "dropout": 0.0}
COLUMNS: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "a layer, float32, K=2, × frozen": (("layer", "both", LAYER | {"num_blocks": 2, "dtype": "float32"}),),
    "a layer, bfloat16, K=2, × frozen": (
        ("layer", "both", LAYER | {"num_blocks": 2, "rank": 8, "dtype": "bfloat16"}),
        ("layer", "both", LAYER | {"num_blocks": 4, "rank": 16, "dtype": "bfloat16"}),
    ),
    "a step, float32, K=2, × LoRA's": tuple(
        ("step", "step", {"dtype": "float32", "num_blocks": blocks}) for blocks in (2, 4)
    ),
    "a step, bfloat16, K=2, × LoRA's": tuple(
        ("step", "step", {"dtype": "bfloat16", "num_blocks": blocks}) for blocks in (2, 4)
    ),
}


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
    """A table of the main job, one of layers and steps by processor, one for each GPU; explanations.

    A processor that was used only in part is only on the results page.
    """
    runs = [run for run in runs if LIMIT not in run.machine["device"]]
    jobs = {name: json.loads((MAIN_JOB / f"{name}.json").read_text(encoding="utf-8")) for name in METHODS}
    summaries = {name: job["summary"] for name, job in jobs.items()}
    own, threads = _processor(str(jobs["smoa"]["processor"])), summaries["smoa"]["machine"]["threads"]
    return paragraphs(
        table((f"`make main-job`, {own}, {threads} threads", "SMoA", "LoRA", "HiRA"), _job_rows(summaries)),
        table(
            ("SMoA / LoRA / HiRA, one thread", *COLUMNS),
            [row(run, "benchmarks/results/README.md") for run in runs if not run.on_gpu],
        ),
        *(ratios(run, run.select("layer"), "both", list(METHODS.values())) for run in runs if run.on_gpu),
        "\n".join(
            (
                f"- **First table.** {_explained(summaries['smoa'])}",
                "- **Second table.** A layer computes 2048 tokens through 2048×2048 at r=16 (bfloat16 at K=2: r=8), a "
                "step takes 512 tokens at r=8. LoRA and HiRA are PEFT's. "
                "[Why some figures are below 1](docs/cpu.md#how-fast-it-is).",
                f"- **Beside them.** {_served()} {_merged_into_four_bits()} "
                "[All tables](benchmarks/results/README.md).",
            )
        ),
    )


def _job_rows(summaries: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    cells = {
        "trained parameters": lambda s: f"{s['trainable_parameters']:,}",
        "accuracy, %": lambda s: _percent(s["accuracy_after"]),
        "seconds a step": lambda s: f"{s['median_step_seconds']:.2f}",
        "peak memory, GiB": lambda s: f"{s['peak_memory_bytes'] / 2**30:.2f}",
    }
    return [(words, *map(cell, summaries.values())) for words, cell in cells.items()]


def row(run: Run, page: str = "") -> tuple[str, ...]:
    """A device's cells, with a link to its tables on the page; a dash for what was noisy or not measured."""
    device = str(run.machine["device"])
    return (
        f"[{_processor(device)}]({page}#{anchor(device)})",
        *(_cell(run, cases) for cases in COLUMNS.values()),
    )


def _cell(run: Run, cases: tuple[tuple[str, str, dict[str, Any]], ...]) -> str:
    for place, (kind, phase, params) in enumerate(cases):
        for result in run.select(kind, **params):
            figures = [result.comparison(phase).ratio(method) for method in METHODS.values()]
            if "factors" not in result.params and not any(
                figure is None or figure.doubt for figure in figures
            ):
                note = f"K={params['num_blocks']}: " if place else ""
                return note + " / ".join(figure.short() for figure in figures if figure)
    return "–"


def _merged_into_four_bits() -> str:
    """From the quality study: SMoA's adapter and LoRA's, after merging into a model in four bits."""
    from .quality.analysis import Study
    from .quality.report import FOUR_BITS_IN_README, MERGED, percent
    from .quality.store import read

    study, (task, *methods) = Study(read(RESULTS / "quality.jsonl")), FOUR_BITS_IN_README
    smoa, lora = (percent(study.mean(task, method, MERGED)) for method in methods)
    return (
        f"Merged into int4, SMoA scores {smoa} % and LoRA {lora} % "
        "([TREC-50, few seeds](benchmarks/results/quality.md#four-bits))."
    )


def _processor(device: str) -> str:
    return PROCESSORS.get(device, device)


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f}"


def _explained(smoa: Mapping[str, Any]) -> str:
    before, options = smoa["accuracy_before"], smoa["options"]
    return (
        f"SmolLM2-135M learned TREC-6 in {options['steps']} steps (five linear layers of each decoder layer, "
        f"r={options['r']}, K=2, {options['dtype']}, one seed). Accuracy on {before['questions']} questions, ± one "
        f"standard error, was {_percent(before)} before."
    )


def _served() -> str:
    served = json.loads(SERVING.read_text(encoding="utf-8"))
    smoa, lora, hira = (f"{served['token_over_merged'][name]:.2f}" for name in METHODS)
    return (
        f"In vLLM a token of an unmerged adapter takes {smoa} (SMoA), {lora} (LoRA) and {hira} times (HiRA) as long as "
        f"the merged model's ({_processor(served['device'])})."
    )


def anchor(device: str) -> str:
    """The anchor that a Markdown viewer gives to a device's heading on the results page."""
    return re.sub(r"[^a-z0-9_ -]", "", device.lower()).replace(" ", "-")
