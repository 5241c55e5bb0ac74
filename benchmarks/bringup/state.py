"""The JSON file of a bring-up: a run of the benchmark suite, with each stage's status and findings.

`benchmarks.report` reads it like any run: the comparisons are under "results", as the suite's own are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..machine import EDITED, commit, describe
from ..results import Result, Run, compact, write

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class State:
    """A bring-up so far.

    Attributes:
        run: machine, commit, date, and the comparisons.
        stages: name to status ("done", "failed", "out of time", "interrupted"), seconds and error.
        findings: results beside comparisons, by stage.
    """

    run: Run
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    findings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The commit without its mark for uncommitted edits, since the page itself may be one."""
        return str(self.run.commit).removesuffix(EDITED)

    @classmethod
    def fresh(cls, smoke: bool) -> State:
        """An empty state for this machine and commit."""
        return cls(Run(describe(smoke), commit(), time.strftime("%Y-%m-%d"), ()))

    @classmethod
    def read(cls, path: Path) -> State:
        """Read a file that :meth:`write` wrote.

        Raises:
            ValueError: the file is no bring-up.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            results = tuple(Result(**result) for result in data["results"])
            return cls(
                Run(data["machine"], data["commit"], data["date"], results), data["stages"], data["findings"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a bring-up: {error!r}") from error

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        data = json.loads(compact(self.run)) | {"stages": self.stages, "findings": self.findings}
        write(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")

    def with_results(self, *results: Result) -> State:
        """The state with more comparisons, which replace earlier ones of the same kind and title."""
        names = {(r.kind, r.title) for r in results}
        kept = [r for r in self.run.results if (r.kind, r.title) not in names]
        return replace(self, run=replace(self.run, results=(*kept, *results)))

    def with_finding(self, stage: str, finding: Any) -> State:
        """The state with a stage's finding, which replaces an earlier one."""
        return replace(self, findings={**self.findings, stage: finding})

    def with_stage(self, stage: str, **status: Any) -> State:
        """The state with a stage's status."""
        return replace(self, stages={**self.stages, stage: status})


def path_of(out: Path, run: Run) -> Path:
    """The JSON file of a machine's bring-up; the page and the log are beside it."""
    return out / f"bringup-{run.slug}.json"
