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
    "AMD EPYC, family 25, model 1": "AMD Zen 3 (AVX2)",
    "AMD EPYC, family 25, model 17": "AMD Zen 4 (AVX512-BF16)",
    "AMD EPYC, family 26, model 2": "AMD Zen 5 (AVX512-BF16)",
    "Intel(R) Xeon(R) Processor, family 6, model 167": "Intel (AMX)",
    "Intel(R) Xeon(R) Processor, family 6, model 207": "Intel (AVX-512)",
}
# Rows: K, with a layer's r, so that a block has rank 4. Columns: words, then kind of benchmark, phase and dtype.
SETTINGS = ((2, 8), (4, 16))
COLUMNS: dict[str, tuple[str, str, str]] = {
    "a layer, float32, × frozen": ("layer", "both", "float32"),
    "a layer, bfloat16, × frozen": ("layer", "both", "bfloat16"),
    "a step, float32, × LoRA's": ("step", "step", "float32"),
    "a step, bfloat16, × LoRA's": ("step", "step", "bfloat16"),
}
LAYER = {"tokens": 2048, "out_features": 2048, "dropout": 0.0}


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

    A processor that was used only in part, or at K=4 alone, is only on the results page.
    """
    runs = [run for run in runs if LIMIT not in run.machine["device"]]
    jobs = {name: json.loads((MAIN_JOB / f"{name}.json").read_text(encoding="utf-8")) for name in METHODS}
    summaries = {name: job["summary"] for name, job in jobs.items()}
    own, threads = _processor(str(jobs["smoa"]["processor"])), summaries["smoa"]["machine"]["threads"]
    return paragraphs(
        table((f"`make main-job`, {own}, {threads} threads", "SMoA", "LoRA", "HiRA"), _job_rows(summaries)),
        table(
            ("SMoA / LoRA / HiRA", *COLUMNS),
            [
                cells
                for run in runs
                if not run.on_gpu and run.select("step", num_blocks=2)
                for cells in rows(run, "benchmarks/results/README.md")
            ],
        ),
        *(ratios(run, run.select("layer"), "both", list(METHODS.values())) for run in runs if run.on_gpu),
        "\n".join(
            (
                f"- **First table.** {_explained(summaries['smoa'])}",
                "- **Second table.** A layer computes 2048 tokens through 2048×2048, at r=8 (K=2) or r=16 (K=4); "
                "a step of SmolLM2-135M takes 512 tokens at r=8. The methods take turns on one thread. "
                "[More processors, K=4 alone](benchmarks/results/README.md).",
                f"- **Serving and four bits.** {_served()} {_merged_into_four_bits()}",
            )
        ),
    )


def _job_rows(summaries: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    cells = {
        "trained parameters": lambda s: f"{s['trainable_parameters']:,}",
        "accuracy, %": lambda s: _percent(s["accuracy_after"]),
        "seconds a step": lambda s: f"{s['median_step_seconds']:.2f}",
        "peak memory of the process, GiB": lambda s: f"{s['peak_memory_bytes'] / 2**30:.2f}",
    }
    return [(words, *map(cell, summaries.values())) for words, cell in cells.items()]


def rows(run: Run, page: str = "") -> list[tuple[str, ...]]:
    """A device's cells for each K of which a step was measured, with a link to its tables on the page.

    A dash stands for what was noisy or not measured.
    """
    device = str(run.machine["device"])
    return [
        (
            f"[{_processor(device)}]({page}#{anchor(device)}), K={blocks}",
            *(_cell(run, *column, blocks, rank) for column in COLUMNS.values()),
        )
        for blocks, rank in SETTINGS
        if run.select("step", num_blocks=blocks)
    ]


def _cell(run: Run, kind: str, phase: str, dtype: str, blocks: int, rank: int) -> str:
    case = LAYER | {"rank": rank} if kind == "layer" else {}
    for result in run.select(kind, num_blocks=blocks, dtype=dtype, **case):
        figures = [result.comparison(phase).ratio(method) for method in METHODS.values()]
        if "factors" not in result.params and not any(figure is None or figure.doubt for figure in figures):
            return " / ".join(figure.short() for figure in figures if figure)
    return "–"


def _merged_into_four_bits() -> str:
    """From the quality study: SMoA's adapter and LoRA's, after merging into a model in four bits."""
    from .quality.analysis import Study
    from .quality.report import FOUR_BITS_IN_README, MERGED, percent
    from .quality.store import read

    study, (task, *methods) = Study(read(RESULTS / "quality.jsonl")), FOUR_BITS_IN_README
    before, after = (
        [percent(study.mean(task, method, field)) for method in methods] for field in ("accuracy", MERGED)
    )
    return (
        f"Beside an int4 base SMoA scored {before[0]} % and LoRA {before[1]} %, merged into it {after[0]} % and "
        f"{after[1]} % ([TREC-50, five seeds](benchmarks/results/quality.md#four-bits))."
    )


def _processor(device: str) -> str:
    return PROCESSORS.get(device, device)


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f}"


def _explained(smoa: Mapping[str, Any]) -> str:
    before, options = smoa["accuracy_before"], smoa["options"]
    return (
        f"SmolLM2-135M learned TREC-6 in {options['steps']} steps (five linear layers of each decoder layer, "
        f"r={options['r']}, K=2, {options['dtype']}, one seed). Accuracy is of {before['questions']} questions, ± one "
        f"standard error; before training it was {_percent(before)}. The methods ran one after another."
    )


def _served() -> str:
    served = json.loads(SERVING.read_text(encoding="utf-8"))
    smoa, lora, hira = (f"{served['token_over_merged'][name]:.2f}" for name in METHODS)
    return (
        f"In vLLM a token of an unmerged adapter takes {smoa} (SMoA, K=4), {lora} (LoRA) and {hira} times (HiRA) the "
        f"merged model's time ({_processor(served['device'])})."
    )


def anchor(device: str) -> str:
    """The anchor that a Markdown viewer gives to a device's heading on the results page."""
    return re.sub(r"[^a-z0-9_ -]", "", device.lower()).replace(" ", "-")
