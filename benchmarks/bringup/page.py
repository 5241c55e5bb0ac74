"""The Markdown page of a bring-up. Every figure is marked as predicted or measured."""

from __future__ import annotations

import torch

from smoa_kernels.definition.precision import precision_of

from .. import tables
from ..predict.gpus import GPUS, Gpu
from ..predict.roofline import Estimate, Problem
from ..providers import FROZEN, HIRA, LORA, SMOA
from ..results import Run

WAYS = {
    FROZEN: "frozen",
    LORA: "lora",
    HIRA: "hira",
    f"{SMOA} merged": "merged",
    f"{SMOA} split": "split",
}
"""Every provider that the roofline knows, and its name there."""


def page(run: Run) -> str:
    """The whole page."""
    gpu = published(run.machine["device"])
    layers = run.select("layer")
    return tables.paragraphs(
        f"# Bring-up on {run.machine['device']}",
        f"{run.label}, commit {run.commit}, {run.date}; "
        + ", ".join(f"{name} {version}" for name, version in run.machine["versions"].items())
        + ".",
        "**A smoke run: tiny sizes in Triton's interpreter. Its times mean nothing.**"
        if run.machine["smoke"]
        else "",
        "## Stages",
        _stages(run),
        "## Forward and backward over the frozen layer",
        _headline(run, gpu) or "Nothing was compared.",
        "## The layer against float64",
        "\n".join(f"- {name}: {words}" for name, words in run.findings.get("operator", {}).items())
        or "Not run.",
        "## Numerical tests",
        _tests(run),
        "## Tuning",
        _tuning(run),
        "## Every provider, over frozen" if layers else "",
        *(tables.ratios(run, layers, phase) for phase in ("both", "forward", "backward") if layers),
        "## Memory of one training pass",
        tables.counted(run, run.select("memory")) or "Nothing was measured.",
    )


def published(device: str) -> Gpu:
    """The published GPU of a device's name; an H100 for any other."""
    name = device.lower().replace("rtx ", "rtx")
    return next((gpu for gpu in GPUS.values() if gpu.name in name), GPUS["h100"])


def _stages(run: Run) -> str:
    rows = [
        (name, found["status"], f"{found['seconds']:.0f}", found["error"].replace("|", "/"))
        for name, found in run.stages.items()
    ]
    return tables.table(("stage", "status", "seconds", "what went wrong"), rows)


def _headline(run: Run, gpu: Gpu) -> str:
    """A row for each case: the measurement, marked if the machine was noisy, and the prediction."""
    rows = []
    for result in run.select("layer"):
        dtype = precision_of(getattr(torch, result.params["dtype"]), ieee=True).name
        problem = Problem(**{name: result.params[name] for name in Problem._fields[:5]}, precision=dtype)
        both, cells = result.comparison("both"), [tables.case_name(result)]
        frozen = Estimate(problem, gpu, "frozen").seconds()
        for name, way in WAYS.items():
            predicted, found = Estimate(problem, gpu, way).seconds() / frozen, both.ratio(name)
            cells.append(f"{'–' if found is None else found.short()} ({predicted:.2f})")
        rows.append(cells)
    return tables.table((f"{run.label} (predicted for {gpu.name})", *WAYS), rows)


def _tests(run: Run) -> str:
    found = run.findings.get("tests")
    if found is None:
        return "Not run."
    lines = [", ".join(f"{number} {outcome}" for outcome, number in found["counts"].items()) or "None ran."]
    lines += [f"- {kind}: `{line}`" for kind in ("failed", "skipped") for line in found[kind]]
    return "\n".join(lines)


def _tuning(run: Run) -> str:
    found = run.findings.get("tune")
    if found is None:
        return "Not run."
    return (
        f"{found['keys']} keys are tuned, {len(found['problems'])} are not done. The JSON file's "
        "`findings.tune.table` is the table itself; send it to us and it ships."
    )
