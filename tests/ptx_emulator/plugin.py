"""Runs a pytest session's kernels in the emulator; tests/conftest.py loads it where PTX_EMULATOR names an architecture.

Any test can run this way, also those of tests/kernels. A test fails if the emulator's checks find an error. The summary
counts launches, and lists the largest shares of error budgets and every finding with the first test that saw it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from . import ARCH, emulator
from .findings import Finding
from .gpu import pretend
from .library import obstacle

if (REASON := obstacle()) is None:
    pretend(ARCH)

FINDINGS, LAUNCHES, SHARE = "emulator's findings", "emulator's launches", "share of the error budget"
"""Names of a test report's properties. A test records `SHARE` itself: (what, share)."""

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
    worst: dict[str, tuple[float, str]] = {}
    first: dict[tuple[str, str, str], tuple[Finding, str, int]] = {}
    for test, of_test in properties:
        what, share = of_test.get(SHARE, ("", 0.0))
        if what and not share <= worst.get(what, (-1.0, ""))[0]:
            worst[what] = share, test
        for fields in of_test.get(FINDINGS, ()):
            finding = Finding(**fields)
            key = finding.kind, finding.kernel, finding.line
            seen = first.get(key, (finding, test, 0))
            first[key] = (*seen[:2], seen[2] + finding.count)
    for what, (share, test) in worst.items():
        say(f"  {share:6.3f} of the error budget at most: {what} ({test})")
    for finding, test, count in sorted(first.values(), key=lambda seen: (not seen[0].is_error, seen[0].kind)):
        grade = "ERROR" if finding.is_error else "note"
        say(f"  {grade} {finding.kind} ×{count}, {finding.kernel} at {finding.line}, first in {test}")
