"""Runs a pytest session's kernels in the emulator; tests/conftest.py loads it where PTX_EMULATOR names an architecture.

Any test can run this way, also those of tests/kernels. A test fails if the emulator's checks find an error. The summary
counts launches, and lists every finding with the first test that saw it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.fake_gpu import pretend_cpu
from benchmarks.predict.gpus import GPUS

from . import ARCH, emulator
from .findings import ALLOWED, Finding
from .library import unsupported_reason

if (REASON := unsupported_reason()) is None:
    emulator.activate(ARCH)
    pretend_cpu(f"sm_{ARCH}", next(g.multiprocessors for g in GPUS.values() if g.arch == f"sm_{ARCH}"))

FINDINGS, LAUNCHES = "emulator's findings", "emulator's launches"
"""Names of a test report's properties."""

_reports: list[pytest.TestReport] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REASON is not None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    emulator.launches.clear()
    try:
        return (yield)
    finally:
        launches = emulator.launches[:]
        emulator.launches.clear()
        found = [finding for launch in launches for finding in launch.findings]
        seconds = sum(launch.seconds for launch in launches)
        item.user_properties.append((LAUNCHES, [len(launches), seconds]))
        item.user_properties.append((FINDINGS, [asdict(finding) for finding in found]))
        errors = [finding for finding in found if finding.is_error]
        if errors:
            pytest.fail("\n".join(map(str, errors[:8])), pytrace=False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        _reports.append(report)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    properties: list[tuple[str, dict[str, Any]]] = [(r.nodeid, dict(r.user_properties)) for r in _reports]
    counts = [of_test.get(LAUNCHES, (0, 0.0)) for _, of_test in properties]
    total, seconds = sum(n for n, _ in counts), sum(s for _, s in counts)
    say = terminalreporter.write_line
    say(f"emulated, sm_{ARCH}: {total} launches in {len(_reports)} tests, {seconds:.0f} s in the machine")
    first: dict[tuple[str, str, str], tuple[Finding, str, int]] = {}
    for test, of_test in properties:
        for fields in of_test.get(FINDINGS, ()):
            finding = Finding(**fields)
            key = finding.kind, finding.kernel, finding.line
            seen = first.get(key, (finding, test, 0))
            first[key] = (*seen[:2], seen[2] + finding.count)
    for finding, test, count in sorted(first.values(), key=lambda seen: (not seen[0].is_error, seen[0].kind)):
        grade = "ERROR" if finding.is_error else "allowed" if finding.kind in ALLOWED else "note"
        say(f"  {grade} {finding.kind} ×{count}, {finding.kernel} at {finding.line}, first in {test}")
    for kind in sorted({kind for kind, *_ in first} & ALLOWED.keys()):
        say(f"  {kind} is allowed: {ALLOWED[kind]}")
