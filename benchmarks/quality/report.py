"""``benchmarks/results/quality.md`` and its figures, from the records: page.md has the words, this file the figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..machine import EDITED
from ..results import write
from ..tables import paragraphs, table
from . import plots, store
from .analysis import Mean, Study
from .methods import ABLATIONS, BY_NAME, FOUR_BITS, LEADING, LEARNING_RATES, ORDERS, SWEEPS
from .study import best_rate
from .tasks import EXPERTS, MINILM, SMOLLM2, TASKS, Task

TEMPLATE = Path(__file__).with_name("page.md")
LORA, LORA_HALF, HALF = "LoRA", "LoRA, r=4", "SMoA K=2"
EQUALS = ("SMoA K=2, r=16", "SMoA K=4, r=32", "SMoA K=8, r=64")  # as many parameters as LoRA
RANDOM = [(ours, baseline) for baseline, ours in ABLATIONS.items()]
# The study's questions, each with the two methods that answer it.
QUESTIONS = (
    ("Half of the parameters, on average", HALF, LORA),
    ("Half of the parameters, against a LoRA of that size, on average", HALF, LORA_HALF),
    *(
        ("At LoRA's learning rate, without a search", "SMoA K=2, r=8, LoRA's rate", other)
        for other in (LORA, HALF)
    ),
    *(("Goal, equal parameters: above LoRA on average", ours, LORA) for ours in EQUALS),
    *(("Goal, spectral against random blocks", *pair) for pair in RANDOM),
    *(("Another order against the spectral one", *pair) for pair in ORDERS.items()),
)
# At LoRA's best rate: beside LoRA, and beside the same method at its own best of eight rates.
AT_LORAS = [
    (method.name, other)
    for method in SWEEPS["lora-rate"]
    for own in [method.name.removesuffix(", LoRA's rate")]
    for other in dict.fromkeys((method.rate_of or LORA, own if own in BY_NAME else method.base))
    if other in BY_NAME
]
SPIKE = 1.5  # a spike is a loss above this multiple of the mean of the first ten
FOUR_BITS_TASKS = ("trec50", "films", "opinions", "trec6")
MERGED = "merged_accuracy"
FOUR_BITS_IN_README = ("trec50", "SMoA K=1 over int4, LoRA's rate", "LoRA over int4")
ENOUGH = 3  # tasks of five; the goal was set before there was a sixth


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
    """The page's text. Sections without measured figures are left out."""
    by_task = {task.title: [task] for task in study.tasks}
    and_all = {**by_task, "all": study.tasks}
    left_out = {
        f"without {task.title}": [other for other in study.tasks if other is not task] for task in study.tasks
    }
    by_model = {
        f"{name}'s tasks": [task for task in study.tasks if task.model == model]
        for name, model in (("MiniLM", MINILM), ("SmolLM2", SMOLLM2))
    }
    beside_lora = {LORA: [name for name in study.methods if name != LORA]}
    figures = {
        "machines": machines(study),
        "protocol": protocol(study),
        "head_rate": f"{max((r['head_lr'] for r in study.records), default=0):g}",
        "verdicts": verdicts(study),
        "without_one_task": differences(
            study, [pair for _, *pair in QUESTIONS], {"all tasks": study.tasks, **left_out}
        ),
        "accuracies": accuracies(study),
        "against_lora": differences(study, [(name, LORA) for name in study.methods if name != LORA], and_all),
        "against_half": differences(study, [(HALF, LORA_HALF)], and_all),
        "against_random": differences(study, RANDOM, and_all),
        "order_devices": devices(study, ORDERS),
        "spectral_devices": devices(study, set(ORDERS.values())),
        "orders": differences(study, list(ORDERS.items()), and_all),
        "orders_by_model": differences(study, list(ORDERS.items()), by_model),
        "at_loras_rate": differences(study, AT_LORAS, {**and_all, "the first three": study.tasks[:3]}),
        "steady": steady(study),
        "controls": variations(study, [task for task in study.controls if task is not EXPERTS], beside_lora),
        "experts": variations(study, [task for task in study.controls if task is EXPERTS], beside_lora),
        "rates": ", ".join(f"{rate:g}" for rate in LEARNING_RATES),
        "chosen": chosen(study),
        **{name: variations(study, study.tasks, variants(name)) for name in ("alpha", "rank", "modules")},
        "four_bits_done": four_bits_done(study),
        "four_bits_goals": four_bits_goals(study),
        "four_bits": four_bits(study),
        "costs": paragraphs(*(costs(study, task) for task in study.tasks)),
    }
    sections = TEMPLATE.read_text(encoding="utf-8").split("\n## ")
    measured = [
        part for part in sections if any(text for name, text in figures.items() if f"\n{{{name}}}\n" in part)
    ]
    text = "\n## ".join(measured).format_map({name: text.strip() for name, text in figures.items()})
    return paragraphs(*text.split("\n\n"))


# Words


def title(name: str) -> str:
    """A method's name in a table."""
    method = BY_NAME[name]
    if method.kind == "none":
        return "no adapter"
    family = "SMoA " if method.kind == "smoa" and not name.startswith("SMoA") else ""
    return f"{family}{name}" + ("" if "r=" in name else f", r={method.r}")


def percent(mean: Mean | None) -> str:
    """A mean with its standard error."""
    if mean is None:
        return "–"
    return f"{100 * mean.value:.1f}" + (f" ± {100 * mean.standard_error:.1f}" if mean.seeds > 1 else "")


def points(mean: Mean | None) -> str:
    """A difference in points of accuracy with its interval."""
    if mean is None:
        return "–"
    interval = "" if math.isnan(mean.half_width) else f" [{100 * mean.low:+.1f}, {100 * mean.high:+.1f}]"
    return f"{100 * mean.value:+.1f}{interval}"


def word(mean: Mean) -> str:
    """Whether an interval lies above zero, below zero or around it."""
    if math.isnan(mean.half_width):
        return "one seed, so no interval"
    if mean.low <= 0 <= mean.high:
        return "not significantly different from zero"
    return "above zero" if mean.low > 0 else "below zero"


def machines(study: Study) -> str:
    """The machines and versions of the runs, and how many of these cannot be repeated from their commit alone."""
    used = sorted({f"{r['machine']['device']}, {r['machine']['threads']} thread" for r in study.records})
    versions = ", ".join(f"{name} {v}" for name, v in study.records[-1]["machine"]["versions"].items())
    commits = sorted({r["commit"] for r in study.records})
    dirty = [run for run in study.records if run["commit"].endswith(EDITED)]
    clean = {(run["task"], run["data"]) for run in study.records if not run["commit"].endswith(EDITED)}
    same = sum((run["task"], run["data"]) in clean for run in dirty)
    uncommitted = (
        f" {len(dirty)} of {len(study.records)} runs were made with uncommitted changes ({EDITED} behind the commit); "
        f"{same} of them had the same data, by digest, as committed runs of their task."
    )
    said = f"**Measured on CPU**: {'; '.join(used)}; {versions}; commits {', '.join(commits)}."
    return said + (uncommitted if dirty else "")


def devices(study: Study, methods: Iterable[str]) -> str:
    """The processors of these methods' runs on test."""
    runs = [run for name in methods for task in study.tasks for run in study.finals(task.name, name)]
    return "; ".join(sorted({run["machine"]["device"] for run in runs}))


def verdicts(study: Study) -> str:
    """The study's questions, as the figures answer them."""
    half = at_half(study)
    lines = [f"- **Goal, half of LoRA's parameters** ({HALF}): {half}"] if half else []
    for words, ours, baseline in QUESTIONS:
        mean = study.difference(ours, baseline, study.tasks)
        if mean is not None:
            lines.append(f"- **{words}** ({ours} minus {baseline}): {points(mean)} points, {word(mean)}.")
    return "\n".join(lines)


def at_half(study: Study) -> str:
    """On how many tasks SMoA at half of LoRA's parameters is within LoRA's standard error, or above; "" without any."""
    held, learned = {}, []
    for task in study.tasks:
        ours, baseline = study.mean(task.name, HALF), study.mean(task.name, LORA)
        if ours and baseline and baseline.seeds > 1:
            held[task.title] = ours.value >= baseline.value - baseline.standard_error
            gains = [study.difference(name, "none", [task]) for name in study.methods if name != "none"]
            learned += [task.title] * any(gain is not None and gain.low > 0 for gain in gains)
    good = [name for name, is_within in held.items() if is_within]
    return bool(held) * (
        "mean accuracy within one standard error of LoRA's, or above, "
        f"on {len(good)} of {len(held)} tasks{': ' + ', '.join(good) if good else ''}; of the {len(learned)} where "
        f"some method is significantly better than no adapter, on {len(set(good) & set(learned))}. "
        f"The goal was {ENOUGH} of those: {'met' if len(good) >= ENOUGH else 'missed'}."
    )


# Tables


def differences(study: Study, pairs: Sequence[Sequence[str]], columns: Mapping[str, Sequence[Task]]) -> str:
    """One row a pair of methods that were both run, one column a group of tasks: their difference in points."""
    rows = {}
    for ours, baseline in pairs:
        means = [study.difference(ours, baseline, tasks) for tasks in columns.values()]
        if any(means):
            rows[f"{title(ours)} − {title(baseline)}"] = map(points, means)
    return table(("difference", *columns), [(name, *cells) for name, cells in rows.items()])


def protocol(study: Study) -> str:
    """One row per task: the settings of a run, and the cost of all runs."""
    rows = []
    for task in study.tasks:
        runs = [run for run in study.records if run["task"] == task.name]
        judged = [run for run in runs if run["stage"] == "final"]
        minutes = sum(run["seconds"] for run in runs if run["method"] in study.methods) / 60
        rows.append(
            (
                task.title,
                task.model,
                f"{task.layers} of {task.of_layers}",
                f"{task.steps} × {task.batch_size}",
                str(judged[0]["questions"]) if judged else "–",
                str(len({run["seed"] for run in judged})),
                f"{minutes:.0f}",
            )
        )
    run = ("upper layers adapted", "steps × questions", "test questions", "seeds", "minutes of CPU")
    return table(("task", "model", *run), rows)


def accuracies(study: Study) -> str:
    """One row a method, one column a task."""
    rows = []
    for name in study.methods:
        means = [study.mean(task.name, name) for task in study.tasks]
        known = [mean.value for mean in means if mean is not None]
        average = f"{100 * sum(known) / len(known):.1f}" if len(known) == len(means) else "–"
        sizes = (
            study.average(task.name, name, "parameters") / study.average(task.name, LORA, "parameters")
            for task in study.tasks
        )
        size = next((f"{size:.2f}" for size in sizes if not math.isnan(size)), "–")
        rows.append((title(name), size, *map(percent, means), average))
    return table(("method", "parameters (LoRA: 1)", *(t.title for t in study.tasks), "average"), rows)


def chosen(study: Study) -> str:
    """One row a method, one column a task: the learning rate."""
    rows = [(title(n), *(best(study, task.name, n) for task in study.tasks)) for n in study.methods]
    return table(("method", *(task.title for task in study.tasks)), rows)


def best(study: Study, task: str, name: str) -> str:
    """The best learning rate, the plateau around it and its accuracy; a rate at the edge of the grid is marked."""
    tried, rate = study.tried(task, name), best_rate(study.records, task, name)
    if rate is None or not study.finals(task, name):
        return "–"
    low, high = study.plateau(task, name)
    edge = ", edge" if rate in (min(tried), max(tried)) else ""
    return f"{rate:g} ({low:g} to {high:g}{edge}): {100 * tried[rate]:.1f}"


def variants(sweep: str) -> dict[str, list[str]]:
    """A sweep's methods, grouped by the method that they vary."""
    found: dict[str, list[str]] = {}
    for method in SWEEPS[sweep]:
        found.setdefault(method.base, []).append(method.name)
    return found


def variations(study: Study, tasks: Sequence[Task], methods: Mapping[str, Sequence[str]]) -> str:
    """Methods beside the one that they vary, task by task, and then over the tasks they were run on."""
    rows: list[tuple[str, ...]] = []
    for base, names in methods.items():
        for task in tasks:
            found = [row for name in names for row in line(study, task, name, base)]
            rows += [*line(study, task, base, base), *found] if found else []
        for name in names:
            both = [task for task in tasks if study.difference(name, base, [task])]
            if len(both) > 1:
                overall = points(study.difference(name, base, both))
                rows.append((f"mean of {len(both)}", name, *[""] * 5, overall))
    run = ("r", "parameters", "learning rate (tried)", "accuracy on test", "seeds", "minus its base")
    return table(("task", "method", *run), rows)


def line(study: Study, task: Task, name: str, base: str) -> list[tuple[str, ...]]:
    """A method's row in a task, none where it has no run on test."""
    mean, rates = study.mean(task.name, name), list(study.tried(task.name, name))
    if mean is None or not rates:
        return []
    rate = f"{best_rate(study.records, task.name, name):g}"
    r, parameters = (study.average(task.name, name, field) for field in ("r", "parameters"))
    return [
        (
            *(task.title, name, f"{r:.0f}", f"{parameters:,.0f}"),
            f"{rate}, that of {base}" if BY_NAME[name].rate_of else f"{rate} ({rates[0]:g} to {rates[-1]:g})",
            *(percent(mean), f"{mean.seeds}"),
            "–" if name == base else points(study.difference(name, base, [task])),
        )
    ]


def steady(study: Study) -> str:
    """One row a method: how many of its runs spiked after the tenth step."""
    rows = []
    for method in SWEEPS["steady"]:
        short, long = (
            [run for task in tasks for run in study.finals(task.name, method.name)]
            for tasks in (study.tasks, study.controls)
        )
        spiked = (
            sum(run["worst_loss"] > SPIKE * run["loss_start"] for run in runs) for runs in (short, long)
        )
        shares = (f"{count} of {len(runs)}" for count, runs in zip(spiked, (short, long), strict=True))
        accuracy = sum(run["accuracy"] for run in (*short, *long)) / max(1, len(short) + len(long))
        rows += [(method.name, *shares, f"{100 * accuracy:.1f}")] if short or long else []
    return table(("method", "spiked in 60 steps", "in 180", "accuracy of all, %"), rows)


def four_bits_done(study: Study) -> str:
    """One row a format, one column a task: how many of the methods and seeds have been run."""
    rows = []
    for bits, methods in FOUR_BITS.items():
        cells = []
        for task in FOUR_BITS_TASKS:
            seeds = [len(study.finals(task, method.name)) for method in methods]
            run = [count for count in seeds if count]
            some = " to ".join(map(str, sorted({min(run), max(run)}))) if run else ""
            cells.append(f"{len(run)} of {len(seeds)} methods, {some} seeds" if run else "not run")
        rows.append((bits, *cells))
    return table(("base", *(TASKS[task].title for task in FOUR_BITS_TASKS)), rows) if four_bits(study) else ""


def four_bits_goals(study: Study) -> str:
    """SMoA, merged, against LoRA merged and beside the base, over the tasks that were run."""
    lines = []
    for lora, *others in FOUR_BITS.values():
        for ours in (method.name for method in others if method.kind == "smoa"):
            tasks = [t for t in study.tasks if study.difference(ours, lora.name, [t])]
            pairs = (("LoRA merged", MERGED, 1.5), ("LoRA beside the base", "accuracy", -1.0))
            for baseline, field, goal in pairs if tasks else ():
                mean = study.difference(ours, lora.name, tasks, (MERGED, field))
                assert mean is not None  # both were run on these
                verdict = "met" if 100 * mean.value >= goal else "missed"
                if len(tasks) < len(FOUR_BITS_TASKS):
                    verdict = f"one for {len(FOUR_BITS_TASKS)} tasks and stays open"
                where = ", ".join(task.title for task in tasks)
                lines.append(
                    f"- {ours}, merged, minus {baseline}: {points(mean)} points on {where}. The goal of {goal:+.1f} or "
                    f"more is {verdict}."
                )
    return "\n".join(lines)


def four_bits(study: Study) -> str:
    """One row a task and method over a base in four bits: beside it and merged, and differences seed by seed."""
    rows = []
    for (lora, *_), task in ((methods, task) for methods in FOUR_BITS.values() for task in study.tasks):
        for name in (method.name for method in FOUR_BITS[lora.bits]):
            if before := study.mean(task.name, name):
                lost = study.difference(name, name, [task], (MERGED, "accuracy"))
                pairs = [study.difference(name, lora.name, [task], (MERGED, f)) for f in (MERGED, "accuracy")]
                rows.append(
                    (
                        *(task.title, name, f"{study.average(task.name, name, 'parameters'):,.0f}"),
                        *(
                            f"{best_rate(study.records, task.name, name):g}",
                            f"{before.seeds}",
                            percent(before),
                        ),
                        *(percent(study.mean(task.name, name, MERGED)), points(lost)),
                        *("–" if name == lora.name else points(pair) for pair in pairs),
                    )
                )
    against = ("merged − LoRA merged", "merged − LoRA beside")
    run = ("parameters", "learning rate", "seeds", "beside the base", "merged", "merged − beside", *against)
    return table(("task", "method", *run), rows)


def costs(study: Study, task: Task) -> str:
    """One row per method: its size, the time of a step, and statistics of the singular values of ΔW."""
    shares = {
        "rank": ("rank of ΔW", ".0%"),
        "effective_rank": ("effective rank", ".1%"),
        **{f"energy_{n}": (f"energy in first {n}", ".0%") for n in LEADING},
    }
    rows = []
    for name in study.methods:
        if study.finals(task.name, name):
            parameters, seconds = (study.average(task.name, name, f) for f in ("parameters", "step_seconds"))
            cells = [f"{study.average(task.name, name, f):{form}}" for f, (_, form) in shares.items()]
            cells = ["–" if name == "none" or cell == "nan%" else cell for cell in cells]
            rows.append((title(name), f"{parameters:,.0f}", f"{seconds:.3f}", *cells))
    headings = ("method", "adapter's parameters", "s / step", *(words for words, _ in shares.values()))
    return f"**{task.title}**\n\n" + table(headings, rows)
