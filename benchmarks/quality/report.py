"""``benchmarks/results/quality.md`` and its figures, from the records."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..machine import EDITED
from ..results import write
from ..tables import table
from . import plots, store, texts
from .analysis import Study
from .methods import ABLATIONS, BY_NAME, LEADING, LEARNING_RATES, ORDERS, SWEEPS
from .study import best_rate
from .tasks import MINILM, SMOLLM2, Task
from .verdicts import (
    HALF,
    LORA,
    LORA_HALF,
    listed,
    not_run,
    percent,
    points,
    title,
    verdicts,
    without_one_task,
)


def generate(records: Path, folder: Path) -> list[Path]:
    """Write the page and its figures from the runs in a file; return their paths.

    Raises:
        ValueError: runs of a task or a method were made in two settings.
    """
    found = store.read(records)
    store.check_one_setting(found)
    study = Study(found)
    files = {f"quality-{name}.svg": text for name, text in plots.figures(study).items()}
    files["quality.md"] = page(study)
    for name, text in files.items():
        write(folder / name, text)
    return [folder / name for name in files]


def page(study: Study) -> str:
    """The page's text."""
    blocks = (
        "# Quality: the paper's claim, tested",
        "Written by `python -m benchmarks.quality report`; nothing here is typed.",
        machine(study),
        protocol(study),
        texts.LIMITS,
        "## What came out",
        verdicts(study),
        texts.DECIDED,
        without_one_task(study),
        "## Accuracy on test",
        "Mean ± standard error over the seeds, percent.",
        accuracies(study),
        "![accuracy by method and task](quality-accuracy.svg)",
        "*Means with 95 % intervals; the line is LoRA's mean.*",
        f"{texts.GAPS}\n\n{holes}" if (holes := not_run(study)) else "",
        "## Against LoRA, seed by seed",
        texts.AGAINST_LORA,
        differences(study, [(name, LORA) for name in study.methods if name != LORA]),
        "At half of LoRA's budget, against a LoRA of that size:",
        differences(study, [(HALF, LORA_HALF)]),
        "## Does the spectrum matter?",
        texts.SPECTRUM,
        differences(study, [(ours, theirs) for theirs, ours in ABLATIONS.items()]),
        orders(study),
        control(study),
        "## Learning rates",
        texts.RATES.format(listed(LEARNING_RATES), fewer(study)),
        chosen(study),
        "![accuracy on validation by learning rate](quality-learning-rate.svg)",
        variations(study, "alpha", texts.ALPHA),
        variations(study, "rank", texts.RANKS),
        variations(study, "modules", texts.MODULES),
        "## Cost, and what the update is like",
        texts.COST,
        *(costs(study, task) for task in study.tasks),
    )
    return "\n\n".join(block.strip() for block in blocks if block.strip()) + "\n"


def machine(study: Study) -> str:
    """What the runs were made with."""
    machines = sorted({f"{r['machine']['device']}, {r['machine']['threads']} thread" for r in study.records})
    versions = study.records[-1]["machine"]["versions"]
    commits = sorted({r["commit"] for r in study.records})
    versioned = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"**Measured on CPU**: {'; '.join(machines)}; {versioned}; commits {', '.join(commits)}.{uncommitted(study)}"


def uncommitted(study: Study) -> str:
    """How many runs cannot be repeated from their commit alone; "" for none."""
    dirty, clean = [], set()
    for run in study.records:
        if run["commit"].endswith(EDITED):
            dirty.append(run)
        else:
            clean.add((run["task"], run["data"]))
    if not dirty:
        return ""
    same = sum((run["task"], run["data"]) in clean for run in dirty)
    return (
        f" {len(dirty)} of {len(study.records)} runs were made while something was not committed ({EDITED} behind "
        f"the commit); {same} of these had, by its digest, the same data as committed runs of their task."
    )


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
    return f"{table(headings, rows)}\n{texts.PROTOCOL.format(max(heads, default=0))}"


def orders(study: Study) -> str:
    """Other orders minus the spectral one, by task and by model."""
    pairs = [pair for pair in ORDERS.items() if pair[0] in study.methods]
    if not pairs:
        return ""
    rows = []
    for ours, theirs in pairs:
        parts = [[task for task in study.tasks if task.model == model] for model in (MINILM, SMOLLM2)]
        means = [study.overall(ours, theirs, tasks) for tasks in parts]
        cells = ["–" if mean is None else points(mean) for mean in means]
        rows.append((f"{title(ours)} − {title(theirs)}", *cells))
    devices = (devices_of(study, names) for names in (ORDERS, set(ORDERS.values())))
    blocks = (
        texts.ORDERS.format(*devices),
        differences(study, pairs),
        texts.HEADS,
        table(("difference", "MiniLM's tasks", "SmolLM2's tasks"), rows),
    )
    return "\n\n".join(block.strip() for block in blocks)


def devices_of(study: Study, methods: Collection[str]) -> str:
    """The processors of these methods' runs on test."""
    runs = [run for task in study.tasks for name in methods for run in study.finals(task.name, name)]
    return "; ".join(sorted({run["machine"]["device"] for run in runs}))


def control(study: Study) -> str:
    """Tasks that test a condition of another one."""
    rows = [
        (*row[:2], f"{task.steps}", *row[4:])
        for task in study.controls
        for name in study.methods
        for row in line(study, task, name, LORA)
    ]
    headings = ("task", "method", "steps", "learning rate (tried)", "accuracy on test", "seeds", "minus LoRA")
    return f"## Controls\n\n{texts.CONTROLS}\n\n{table(headings, rows)}" if rows else ""


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


def fewer(study: Study) -> str:
    """The tasks whose methods shared fewer rates than the whole grid."""
    shared = {task.title: study.shared_rates(task.name) for task in study.tasks}
    return "".join(
        f"; on {title} only {listed(rates)}"
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
            if rate is None or not study.finals(task.name, name):
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
            parameters, seconds, rank, effective, *energies = (
                study.average(name, field, task.name)
                for field in (
                    "parameters",
                    "step_seconds",
                    "rank",
                    "effective_rank",
                    *(f"energy_{n}" for n in LEADING),
                )
            )
            shares = [f"{rank:.0%}", f"{effective:.1%}", *("–" if e != e else f"{e:.0%}" for e in energies)]
            adapted = name != "none"
            rows.append(
                (
                    title(name),
                    f"{parameters:,.0f}",
                    f"{seconds:.3f}",
                    *(shares if adapted else ["–"] * len(shares)),
                )
            )
    first = (f"energy in first {n}" for n in LEADING)
    headings = ("method", "adapter's parameters", "s / step", "rank of ΔW", "effective rank", *first)
    return f"**{task.title}**\n\n" + table(headings, rows)


def share(study: Study, name: str) -> str:
    """A method's parameters over LoRA's."""
    for task in study.tasks:
        ours, theirs = (study.average(n, "parameters", task.name) for n in (name, LORA))
        if ours == ours and theirs == theirs:
            return f"{ours / theirs:.2f}"
    return "–"
