"""``benchmarks/results/quality.md`` and its figures, from the records."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from ..results import write
from ..tables import table
from . import plots, store
from .analysis import Study
from .methods import ABLATIONS, BY_NAME, LEARNING_RATES, SWEEPS
from .statistics import Mean
from .study import best_rate
from .tasks import Task

LORA, LORA_HALF, HALF, EQUAL = "LoRA", "LoRA, r=4", "SMoA K=2", "SMoA K=2, r=16"
NAMES = {"none": "no adapter"}


def generate(records: Path, folder: Path) -> list[Path]:
    """Write the page and its figures from the runs in a file; return their paths."""
    study = Study(store.read(records))
    texts = {f"quality-{name}.svg": text for name, text in plots.figures(study).items()}
    texts["quality.md"] = page(study)
    for name, text in texts.items():
        write(folder / name, text)
    return [folder / name for name in texts]


AGAINST_LORA = """Differences in points of accuracy with Student's 95 % interval. The last column is the mean over the
tasks; its interval counts the spread between seeds, so it speaks of these tasks."""
SPECTRUM = """SMoA with its spectral blocks minus SMoA with as large blocks of coordinates drawn at random by the
seed. Blocks are as large, so parameters are as many."""
RATES = """Each method tried the same rates ({}), once each, with a seed that is not
among those on test, and where the best was at an end of them, further ones while it was{}. The best one; in brackets
the rates around it that lose at most two points, "edge" where the best is the least or the greatest that was tried; its
accuracy on validation:"""
LIMITS = """What limits it: runs are short and adapt the upper layers only, the rate is chosen by one run each on
validation, and intervals count seeds, not the draw of the test questions, which all methods share. Float32 throughout:
bfloat16 was no faster at these sizes."""
CONTROLS = """Whether a condition of the study decides its result. They have no part in the averages above."""
ALPHA = """## Alpha

The update is multiplied by alpha / r, 1 in all runs above. With another alpha the best learning rate is another one.

![accuracy on validation by learning rate and alpha](quality-alpha.svg)"""
RANKS = """## Another rank at the same learning rate

SMoA K=2 at r=4 and r=32 with the learning rate that was best at r=8, and three rules for alpha that agree at r=8: as
large as r (the scaling stays 1), growing as √r (it falls with √r: `use_rslora`), constant (it falls with r)."""
MODULES = """## Modules

Which linear layers of the adapted blocks carry an adapter. The base has all that the study adapts (MiniLM: query, key,
value, attention's output and both of the MLP; SmolLM2: q, k, v, up, down). "As large" has the base's number of
parameters, by a larger r. The search began with three rates around the base's best and went on while the best was at an
end."""
COST = """Means over the runs on test. Rank and effective rank (the exponential of the entropy of the singular
values' shares) are of ΔW, over the most that is possible, mean over the adapted layers. Seconds are CPU time on a
machine that other programs used besides: good for an order of magnitude."""
PROTOCOL = """Every method adapts the same linear layers in float32, with AdamW, scaling 1 (alpha = r) and no dropout.
Seeds change the initial values, the order of the questions and the random blocks. The layers under the adapted ones are
frozen and computed once per question, which changes no result. MiniLM's new head has one learning rate ({:g}) beside
every adapter. Minutes of CPU are those of all runs of the table below, one thread each: `make quality` shares a task's
methods between as many processes as there are processors: on two it takes about half of that. K=4 with r=32 is a sweep
of its own (`--sweep larger`), done on TREC-50. `data.py`, `choice.py` and `siqa.py` in `benchmarks/quality/` say where
the questions come from."""


def page(study: Study) -> str:
    """The page's text."""
    blocks = (
        "# Quality: the paper's claim, tested",
        "Written by `python -m benchmarks.quality report`; nothing here is typed.",
        machine(study),
        protocol(study),
        LIMITS,
        "## What came out",
        verdicts(study),
        "## Accuracy on test",
        "Mean ± standard error over the seeds, percent.",
        accuracies(study),
        "![accuracy by method and task](quality-accuracy.svg)",
        "*Means with 95 % intervals; the line is LoRA's mean.*",
        "## Against LoRA, seed by seed",
        AGAINST_LORA,
        differences(study, [(name, LORA) for name in study.methods if name != LORA]),
        "At half of LoRA's budget, against a LoRA of that size:",
        differences(study, [(HALF, LORA_HALF)]),
        "## Does the spectrum matter?",
        SPECTRUM,
        differences(study, [(ours, theirs) for theirs, ours in ABLATIONS.items()]),
        control(study),
        "## Learning rates",
        RATES.format(listed(LEARNING_RATES), fewer(study)),
        chosen(study),
        "![accuracy on validation by learning rate](quality-learning-rate.svg)",
        variations(study, "alpha", ALPHA),
        variations(study, "rank", RANKS),
        variations(study, "modules", MODULES),
        "## Cost, and what the update is like",
        COST,
        *(costs(study, task) for task in study.tasks),
    )
    return "\n\n".join(block.strip() for block in blocks if block.strip()) + "\n"


def machine(study: Study) -> str:
    """What the runs were made with."""
    machines = sorted({f"{r['machine']['device']}, {r['machine']['threads']} thread" for r in study.records})
    versions = study.records[-1]["machine"]["versions"]
    commits = sorted({r["commit"] for r in study.records})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"**Measured on CPU: {'; '.join(machines)}; {listed}; commits {', '.join(commits)}.**"


def protocol(study: Study) -> str:
    """What a run is."""
    rows = []
    for task in study.tasks:
        judged = study.select(task=task.name, stage="final")
        rows.append(
            (
                task.title,
                task.model,
                f"{task.layers} of {task.of_layers}",
                f"{task.steps} × {task.batch_size}",
                str(judged[0]["questions"]) if judged else "–",
                str(len({run["seed"] for run in judged})),
                f"{study.minutes(task.name):.0f}",
            )
        )
    headings = (
        "task",
        "model",
        "upper layers adapted",
        "steps × questions",
        "test questions",
        "seeds",
        "minutes of CPU",
    )
    heads = {run["head_lr"] for run in study.records if run["head_lr"]}
    return f"{table(headings, rows)}\n{PROTOCOL.format(max(heads, default=0))}"


def verdicts(study: Study) -> str:
    """The goals, as the figures answer them."""
    lines = []
    held = within(study)
    if held:
        good = [title for title, is_within in held.items() if is_within]
        lines.append(
            f"- **Half of LoRA's parameters** ({HALF}): mean accuracy within one standard error of LoRA's, or above, "
            f"on {len(good)} of {len(held)} tasks{': ' + ', '.join(good) if good else ''}."
        )
    for words, ours, theirs in (
        ("Half of the parameters, on average", HALF, LORA),
        ("Equal parameters, on average", EQUAL, LORA),
        ("Equal parameters at half of the budget, on average", HALF, LORA_HALF),
        *(("Spectral minus random blocks, on average", ours, random) for random, ours in ABLATIONS.items()),
    ):
        difference = study.overall(ours, theirs)
        if difference is not None:
            lines.append(
                f"- **{words}** ({ours} minus {theirs}): {points(difference)} points, {word(difference)}."
            )
    return "\n".join(lines)


def within(study: Study) -> dict[str, bool]:
    """By task: whether SMoA at half of LoRA's parameters is within LoRA's standard error, or above LoRA."""
    found = {}
    for task in study.tasks:
        ours, theirs = study.mean(task.name, HALF), study.mean(task.name, LORA)
        if ours and theirs and theirs.seeds > 1:
            found[task.title] = ours.value >= theirs.value - theirs.standard_error
    return found


def control(study: Study) -> str:
    """Tasks that test a condition of another one."""
    rows = [
        (*row[:2], f"{task.steps}", *row[4:])
        for task in study.controls
        for name in study.methods
        for row in line(study, task, name, LORA)
    ]
    headings = ("task", "method", "steps", "learning rate (tried)", "accuracy on test", "seeds", "minus LoRA")
    return f"## Controls\n\n{CONTROLS}\n\n{table(headings, rows)}" if rows else ""


def variations(study: Study, sweep: str, words: str) -> str:
    """A sweep: each method beside the one that it is a variation of, task by task."""
    rows: list[tuple[str, ...]] = []
    for base in dict.fromkeys(method.base for method in SWEEPS[sweep]):
        names = [method.name for method in SWEEPS[sweep] if method.base == base]
        for task in study.tasks:
            found = [row for name in names for row in line(study, task, name, base)]
            if found:
                rows += [*line(study, task, base, base), *found]
        for name in names:
            overall = study.over_tasks_run(name, base)
            if overall:
                rows.append((f"mean of {overall[1]}", name, "", "", "", "", "", points(overall[0])))
    headings = (
        "task",
        "method",
        "r",
        "parameters",
        "learning rate",
        "accuracy on test",
        "seeds",
        "minus its base",
    )
    return f"{words}\n\n{table(headings, rows)}" if rows else ""


def line(study: Study, task: Task, name: str, base: str) -> list[tuple[str, ...]]:
    """A method's row in a task, none where it has no run on test."""
    mean, rate = study.mean(task.name, name), best_rate(study.records, task.name, name)
    if mean is None or rate is None:
        return []
    rates = list(study.tried(task.name, name))
    difference = None if name == base else study.difference(task.name, name, base)
    return [
        (
            task.title,
            name,
            f"{study.average(name, 'r', task.name):.0f}",
            f"{study.average(name, 'parameters', task.name):,.0f}",
            f"{rate:g}, that of {base}"
            if BY_NAME[name].rate_of
            else f"{rate:g} ({rates[0]:g} to {rates[-1]:g})",
            percent(mean),
            f"{mean.seeds}",
            "–" if difference is None else points(difference),
        )
    ]


def percent(mean: Mean) -> str:
    """A mean with its standard error."""
    return f"{100 * mean.value:.1f}" + (f" ± {100 * mean.standard_error:.1f}" if mean.seeds > 1 else "")


def word(mean: Mean) -> str:
    """Whether an interval leaves 0 out."""
    if math.isnan(mean.half_width):
        return "one seed, so no interval"
    if mean.low > 0:
        return "above zero"
    return "below zero" if mean.high < 0 else "not told from zero"


def accuracies(study: Study) -> str:
    """One row a method, one column a task."""
    rows = []
    for name in study.methods:
        means = [study.mean(task.name, name) for task in study.tasks]
        cells = ["–" if mean is None else percent(mean) for mean in means]
        known = [m.value for m in means if m is not None]
        average = f"{100 * sum(known) / len(known):.1f}" if len(known) == len(means) else "–"
        rows.append((title(name), share(study, name), *cells, average))
    return table(("method", "parameters over LoRA's", *(t.title for t in study.tasks), "average"), rows)


def differences(study: Study, pairs: list[tuple[str, str]]) -> str:
    """One row a pair, one column a task, and their mean."""
    rows = []
    for ours, theirs in pairs:
        means = [study.difference(task.name, ours, theirs) for task in study.tasks]
        if any(means):
            overall = study.overall(ours, theirs)
            cells = ["–" if mean is None else points(mean) for mean in (*means, overall)]
            rows.append((f"{title(ours)} − {title(theirs)}", *cells))
    return table(("difference", *(task.title for task in study.tasks), "all"), rows)


def listed(rates: Iterable[float]) -> str:
    """Rates in a sentence."""
    return ", ".join(f"{rate:g}" for rate in rates)


def fewer(study: Study) -> str:
    """The tasks whose methods shared fewer rates than the whole grid."""
    shared = {task.title: study.shared_rates(task.name) for task in study.tasks}
    return "".join(
        f" ({title}: {listed(rates)})"
        for title, rates in shared.items()
        if rates and len(rates) < len(LEARNING_RATES)
    )


def chosen(study: Study) -> str:
    """The best learning rate of each method and task; a rate at the edge of what was tried is marked."""
    rows = []
    for name in study.methods:
        cells = []
        for task in study.tasks:
            rate = best_rate(study.records, task.name, name)
            if rate is None:
                cells.append("–")
            else:
                low, high = study.plateau(task.name, name)
                edge = ", edge" if study.at_an_edge(task.name, name) else ""
                best = 100 * study.tried(task.name, name)[rate]
                cells.append(f"{rate:g} ({low:g} to {high:g}{edge}): {best:.1f}")
        rows.append((title(name), *cells))
    return table(("method", *(task.title for task in study.tasks)), rows)


def costs(study: Study, task: Task) -> str:
    """One row a method."""
    rows = []
    for name in study.methods:
        if study.finals(task.name, name):
            at = [
                study.average(name, field, task.name)
                for field in ("parameters", "step_seconds", "rank", "effective_rank")
            ]
            adapted = name != "none"
            rows.append(
                (
                    title(name),
                    f"{at[0]:,.0f}",
                    f"{at[1]:.3f}",
                    f"{at[2]:.0%}" if adapted else "–",
                    f"{at[3]:.1%}" if adapted else "–",
                )
            )
    return f"**{task.title}**\n\n" + table(
        ("method", "adapter's parameters", "s / step", "rank of ΔW", "effective rank"), rows
    )


def title(name: str) -> str:
    """A method's name in a table."""
    method = BY_NAME[name]
    rank = f", r={method.r}" if method.kind != "none" and "r=" not in name else ""
    words = f"SMoA {name}" if method.random else NAMES.get(name, name)
    return f"{words}{rank}"


def share(study: Study, name: str) -> str:
    """A method's parameters over LoRA's."""
    for task in study.tasks:
        ours, theirs = (study.average(n, "parameters", task.name) for n in (name, LORA))
        if ours == ours and theirs == theirs:
            return f"{ours / theirs:.2f}"
    return "–"


def points(mean: Mean) -> str:
    """A difference in points of accuracy with its interval."""
    if math.isnan(mean.half_width):
        return f"{100 * mean.value:+.1f}"
    return f"{100 * mean.value:+.1f} [{100 * mean.low:+.1f}, {100 * mean.high:+.1f}]"
