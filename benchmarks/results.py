"""Runs of the suite: measures their results, reads and writes them.

Their JSON is pytest-benchmark's, or a compact form, which is committed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from smoa_kernels.files import replace_file

from . import protocol
from .machine import EDITED, load
from .protocol import Comparison, Turns

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DIGITS = 5  # of each second that is kept


@dataclass(frozen=True)
class Result:
    """The record of one benchmark.

    Attributes:
        kind: "layer", "few tokens", "memory", "step", "partition", "adapter" or "accelerate".
        title: for a reader.
        params: of the case.
        baseline: the provider whose spread tells whether the machine was steady.
        load: of the machine, before and after.
        seconds: of each round, by phase and provider.
        bytes: by provider and kind of memory.
    """

    kind: str
    title: str
    params: Mapping[str, Any]
    baseline: str = ""
    load: Sequence[float] = ()
    seconds: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def comparison(self, phase: str) -> Comparison:
        """The seconds of one phase."""
        return Comparison(self.baseline, self.seconds[phase])


@dataclass(frozen=True)
class Run:
    """One run of the suite on one machine, or a bring-up.

    Attributes:
        machine, commit, date: where and when.
        results: of each benchmark.
        stages: of a bring-up, by name: status ("done", "failed", "out of time", "interrupted"), seconds and error.
        findings: of a bring-up's stages, beside the results.
    """

    machine: Mapping[str, Any]
    commit: str
    date: str
    results: tuple[Result, ...]
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    findings: Mapping[str, Any] = field(default_factory=dict)

    def with_results(self, *results: Result) -> Run:
        """The run with more results, which replace earlier ones of the same kind and title."""
        names = {(r.kind, r.title) for r in results}
        kept = [r for r in self.results if (r.kind, r.title) not in names]
        return replace(self, results=(*kept, *results))

    def with_finding(self, stage: str, finding: Any) -> Run:
        """The run with a stage's finding, which replaces an earlier one."""
        return replace(self, findings={**self.findings, stage: finding})

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return bool(self.machine["measured_on"] == "GPU")

    @property
    def label(self) -> str:
        """The label of the run's figures: "measured on CPU" or "measured on GPU NAME"."""
        return f"measured on GPU {self.machine['device']}" if self.on_gpu else "measured on CPU"

    @property
    def slug(self) -> str:
        """Name of the run's files: a second run on the same device replaces the first."""
        name = f"{self.machine['measured_on']} {self.machine['device']}".lower()
        return re.sub(r"[^a-z0-9]+", "-", name).strip("-")

    def select(self, kind: str, **params: Any) -> list[Result]:
        """The results of a kind whose parameters have the given values."""
        return [
            result
            for result in self.results
            if result.kind == kind and all(result.params.get(k) == v for k, v in params.items())
        ]

    def find(self, kind: str, **params: Any) -> Result | None:
        """The first of :meth:`select`, or None."""
        return next(iter(self.select(kind, **params)), None)


def measured(
    kind: str,
    title: str,
    params: Mapping[str, Any],
    variants: Mapping[str, protocol.Run],
    *,
    baseline: str,
    budget: float,
    smoke: bool,
    least: int = 7,
    most: int = 40,
    warmup: int = 2,
    verify: Callable[[], None] = lambda: None,
    bytes: Mapping[str, Mapping[str, int]] | None = None,
) -> Result:
    """Time providers in turns by the protocol, in as many rounds as fit into a budget of seconds.

    Args:
        kind, title, params, baseline, bytes: of the result.
        variants: the run of each provider.
        budget: seconds.
        smoke: two rounds.
        least, most: rounds.
        warmup: rounds before them.
        verify: a gate that checks results of the timed calls.
    """
    turns = Turns(variants, baseline)
    before = load()
    one = turns.warm_up(1 if smoke else warmup)
    for _ in range(2 if smoke else max(least, min(most, int(budget / one) if one else least))):
        turns.round()
    verify()
    seconds = {phase: dict(found.seconds) for phase, found in turns.comparisons().items()}
    return Result(kind, title, dict(params), baseline, [before, load()], seconds, bytes or {})


def read(path: Path) -> Run:
    """Read a run.

    Raises:
        ValueError: the file is neither pytest-benchmark's JSON of this suite nor its compact form.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "benchmarks" in data:
            head = data["machine_info"], _commit(data["commit_info"]), data["datetime"][:16].replace("T", " ")
            return Run(*head, tuple(_result(b["extra_info"]) for b in data["benchmarks"] if b["extra_info"]))
        kept = {name: data.get(name, {}) for name in ("stages", "findings")}
        return Run(
            data["machine"], data["commit"], data["date"], tuple(map(_result, data["results"])), **kept
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a run of this benchmark suite: {error!r}") from error


def read_all(folder: Path) -> list[Run]:
    """Every run in a folder, those on CPUs first, the newest of each kind before the others."""
    runs = sorted(
        (read(path) for path in folder.glob("*.json")), key=lambda run: (run.date, run.slug), reverse=True
    )
    return sorted(runs, key=lambda run: run.on_gpu)


def compact(run: Run) -> str:
    """A run as the JSON that is committed, one result a line."""
    lines = []
    for result in run.results:
        named = {"kind": result.kind, "title": result.title, "params": result.params}
        kept = named | {key: value for key, value in vars(result).items() if value}
        lines.append(json.dumps(_rounded(kept), ensure_ascii=False, separators=(",", ":")))
    names = ("machine", "commit", "date", "stages", "findings")
    head = {name: value for name in names if (value := getattr(run, name))}
    fields = json.dumps(head, ensure_ascii=False)[:-1]
    return f'{fields}, "results": [\n' + ",\n".join(lines) + "\n]}\n"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def _result(found: Mapping[str, Any]) -> Result:
    """A result without further fields of older runs."""
    known = {field.name for field in fields(Result)}
    return Result(**{name: value for name, value in found.items() if name in known})


def _commit(info: Mapping[str, Any]) -> str:
    return str(info.get("id", "unknown"))[:10] + (EDITED if info.get("dirty") else "")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
