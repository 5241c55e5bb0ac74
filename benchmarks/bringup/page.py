"""The Markdown page of a bring-up. Every figure is marked as predicted or measured."""

from __future__ import annotations

import torch

from smoa_kernels.kernels.table import Entry
from smoa_kernels.tuning.gpus import GPUS, Gpu, Rates
from smoa_kernels.tuning.plan import candidates, describe, describe_choice, winner
from smoa_kernels.tuning.roofline import Estimate, Problem, estimate, parts

from .. import tables
from ..providers import FROZEN, HIRA, LORA, SMOA, Case
from ..results import Result
from .state import State

WAYS = {
    FROZEN: "frozen",
    LORA: "lora",
    HIRA: "hira",
    f"{SMOA} merged": "merged",
    f"{SMOA} split": "split",
}
"""Every provider that the roofline knows, and its name there."""


def page(state: State) -> str:
    """The whole page."""
    run = state.run
    gpu = published(run.machine["device"])
    layers = run.select("layer")
    sections = [
        f"# Bring-up on {run.machine['device']}",
        f"{run.label}, commit {run.commit}, {run.date}; "
        + ", ".join(f"{name} {version}" for name, version in run.machine["versions"].items())
        + ".",
        "**A smoke run: tiny sizes in Triton's interpreter. Its times mean nothing.**"
        if run.machine["smoke"]
        else "",
        "## Stages",
        _stages(state),
        "## Forward and backward over the frozen layer",
        _headline(state, gpu) or "Nothing was compared.",
        "## The layer against float64",
        "\n".join(f"- {name}: {words}" for name, words in state.findings.get("operator", {}).items())
        or "Not run.",
        _launchers(state),
        "## Numerical tests",
        _tests(state),
        "## Tuning",
        _tuning(state),
        "## Every provider, over frozen" if layers else "",
        *(tables.ratios(run, layers, phase) for phase in ("both", "forward", "backward") if layers),
        "## Memory of one training pass",
        tables.memory(run) or "Nothing was measured.",
        "## Measured against predicted",
        _predicted(state, gpu),
    ]
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


def published(device: str) -> Gpu:
    """The published GPU of a device's name; an H100 for any other."""
    name = device.lower().replace("rtx ", "rtx")
    return next((gpu for gpu in GPUS.values() if gpu.name in name), GPUS["h100"])


def _stages(state: State) -> str:
    rows = [
        (name, str(found["status"]), f"{found['seconds']:.0f}", str(found.get("error") or ""))
        for name, found in state.stages.items()
    ]
    return tables.table(
        ("stage", "status", "seconds", "what went wrong"), [tuple(map(_cell, row)) for row in rows]
    )


def _headline(state: State, gpu: Gpu) -> str:
    """A row for each case: what was measured, with a mark where the machine was noisy, and the prediction."""
    rows = []
    for result in state.run.select("layer"):
        problem, cells = _problem(result), [tables.case_name(result)]
        frozen = estimate(problem, gpu, "frozen").seconds()
        for name, way in WAYS.items():
            predicted, found = estimate(problem, gpu, way).seconds() / frozen, result.ratio("both", name)
            cells.append(f"{'–' if found is None else found.short()} ({predicted:.2f})")
        rows.append(cells)
    return tables.table((f"{state.run.label} (predicted for {gpu.name})", *WAYS), rows)


def _launchers(state: State) -> str:
    found = state.findings.get("launchers")
    if found is None:
        return ""
    told = f" Ours is not used: {found['obstacle']}." if found["obstacle"] else ""
    return (
        f"The same pass launched our own way and Triton's gives the same bits, and takes the host {found['ours']:.0f} "
        f"and {found['triton']:.0f} µs, {state.run.label}.{told}"
    )


def _tests(state: State) -> str:
    found = state.findings.get("tests")
    if found is None:
        return "Not run."
    lines = [", ".join(f"{number} {outcome}" for outcome, number in found["counts"].items()) or "None ran."]
    lines += [f"- {kind}: `{line}`" for kind in ("failed", "skipped") for line in found[kind]]
    return "\n".join(lines)


def _tuning(state: State) -> str:
    found = state.findings.get("tune")
    if found is None:
        return "Not run."
    entries = [Entry.from_json(entry) for entry in found["table"]["entries"]]
    rows = []
    for entry in entries:
        now = entry.identity
        best = winner(entry)
        default = entry.trial(candidates(entry.key, now.capability, now.multiprocessors)[0])
        if best is None or best.seconds is None:
            continue
        before = None if default is None else default.seconds
        rows.append(
            (
                describe(entry.key),
                "–" if before is None else f"{before * 1e6:.1f}",
                f"{best.seconds * 1e6:.1f}",
                describe_choice(best.choice),
            )
        )
    told = f"{len(found['problems'])} keys are not done.\n\n" if found["problems"] else ""
    headings = ("problem", f"heuristic µs, {state.run.label}", f"fastest µs, {state.run.label}", "fastest")
    note = "The JSON file's `findings.tune.table` is the table itself; send it to us and it ships.\n\n"
    return f"{told}{note}{tables.table(headings, rows)}"


def _predicted(state: State, gpu: Gpu) -> str:
    """Measured seconds over predicted, at the rates that this device reached."""
    found = state.findings.get("rates")
    if found is None:
        return "Not run."
    flops, bandwidth = found["flops_per_second"], found["bytes_per_second"]
    told = f"This device reached {flops / 1e12:.3g} TFLOP/s in a large GEMM and {bandwidth / 1e12:.3g} TB/s in a copy."
    rates = Rates(flops, bandwidth, gpu.rates("bf16").start_seconds)
    rows = [
        (tables.case_name(result), *(_over_predicted(result, name, rates) for name in WAYS))
        for result in state.run.select("layer")
    ]
    headings = ("measured over predicted at these rates, forward + backward", *WAYS)
    return f"{told}\n\n{tables.table(headings, rows)}"


def _over_predicted(result: Result, name: str, rates: Rates) -> str:
    if name not in result.seconds["both"]:
        return "–"
    predicted = Estimate(WAYS[name], parts(_problem(result), WAYS[name]), rates).seconds()
    return f"{result.comparison('both').time(name).median / predicted:.2f}"


def _problem(result: Result) -> Problem:
    return Case(**{**result.params, "dtype": getattr(torch, result.params["dtype"])}).problem()


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
