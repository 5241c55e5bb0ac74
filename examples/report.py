"""What a run shows while it works and when it is done."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from questions import Question
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from training import TrainingRecord

SHOWN_EXAMPLES = 3
LINE_EVERY = 10  # steps, where there is no terminal to redraw a bar on


@contextmanager
def evaluation_progress(console: Console, title: str, questions: int) -> Iterator[Callable[[int], None]]:
    """Show a bar that the yielded function advances by a number of questions."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=questions)
        yield lambda done: progress.advance(task, done)


@contextmanager
def training_progress(console: Console, steps: int) -> Iterator[Callable[[TrainingRecord], None]]:
    """Show a bar with the loss and the tokens per second of the last step."""
    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
    with Progress(
        *columns,
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=steps, now="")

        def show(record: TrainingRecord) -> None:
            now = f"loss {record.loss[-1]:.3f}  {record.tokens[-1] / record.seconds[-1]:,.0f} tokens/s"
            progress.update(task, advance=1, now=now)
            if not console.is_terminal and (record.steps % LINE_EVERY == 0 or record.steps in (1, steps)):
                console.print(f"step {record.steps} of {steps}  {now}")

        yield show


def examples_table(questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> Table:
    """Return the first questions with the model's answers before and after."""
    table = Table("prompt", "right answer", "before", "after", title="The first held-out questions")
    for question, *given in list(zip(questions, before, after, strict=True))[:SHOWN_EXAMPLES]:
        marked = [f"[{'green' if word == question.answer else 'red'}]{escape(word)}[/]" for word in given]
        table.add_row(escape(question.prompt), escape(question.answer), *marked)
    return table
