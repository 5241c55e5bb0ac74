"""The file of a bring-up: a run of the benchmark suite (`benchmarks.report` reads it), with its stages and findings."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..machine import commit, describe
from ..results import Result, Run

ROOT = Path(__file__).resolve().parents[2]


def fresh(smoke: bool) -> Run:
    """A bring-up of this machine and commit that has found nothing yet."""
    return Run(describe(smoke), commit(), time.strftime("%Y-%m-%d"), ())


def path_of(out: Path, run: Run) -> Path:
    """The JSON file of a machine's bring-up; the page and the log are beside it."""
    return out / f"bringup-{run.slug}.json"


def with_results(run: Run, *results: Result) -> Run:
    """The run with more results, which replace earlier ones of the same kind and title."""
    names = {(r.kind, r.title) for r in results}
    kept = [r for r in run.results if (r.kind, r.title) not in names]
    return replace(run, results=(*kept, *results))


def with_finding(run: Run, stage: str, finding: Any) -> Run:
    """The run with a stage's finding, which replaces an earlier one."""
    return replace(run, findings={**run.findings, stage: finding})


def with_stage(run: Run, stage: str, **status: Any) -> Run:
    """The run with a stage's status."""
    return replace(run, stages={**run.stages, stage: status})
