"""The stages that measure on the GPU. Each saves its results as it goes."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoa_kernels.kernels.architectures import architecture, identity, multiprocessors
from smoa_kernels.kernels.launch import Launch, launch_hook
from smoa_kernels.kernels.table import Choice, keep
from smoa_kernels.tuning.tuner import gpu_timer, jobs, tune

from ..cases import CHECKED_CASES, GATE_TOKENS, ORDERS, headline_cases, operator_cases, tuned_layers
from ..gate import check_layers
from ..memory import footprint
from ..protocol import DEVICE, pass_seconds
from ..providers import (
    CONTIGUOUS,
    FROZEN,
    HIRA,
    LORA,
    PAPER,
    SMOA,
    Case,
    PaperDense,
    Provider,
    frozen,
    hira,
    lora,
    smoa,
)
from ..results import Result, Run, measured

SECONDS_PER_CASE = 1.2
MOST_ROUNDS = 20
LAUNCHER_ROUNDS = 30
GPU_BYTES = 2 * 2**30  # GPU memory of one test process: the context, its kernels and its tensors
SMOKE_TESTS = ("tests/test_reference.py",)
# Left out: many random problems and long trainings take more time than the stage has.
LEFT_OUT = ("tests/test_soak.py", "tests/test_fuzz.py")
NUMERICAL_TESTS = ("-m", "numerical or gpu", *(f"--ignore={file}" for file in LEFT_OUT))


@dataclass(frozen=True)
class Job:
    """The inputs of a stage.

    Attributes:
        run: the bring-up so far.
        save: writes it with more.
        deadline: by `time.monotonic()`.
        smoke: tiny sizes.
    """

    run: Run
    save: Callable[[Run], None]
    deadline: float
    smoke: bool

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


class OutOfTimeError(RuntimeError):
    """A stage stopped before all of its work was done."""


def operator(job: Job) -> None:
    """Compare y, dX, dA and dB of the public layer with its definition in float64, by torch's own operators.

    Raises:
        OutOfTimeError: some problems were not tried.
        RuntimeError: a result is wrong, or could not be computed.
    """
    found: dict[str, str] = {}
    cases = operator_cases(job.smoke)
    for done, (case, order) in enumerate(cases):
        if job.left < 1:
            raise OutOfTimeError(f"{len(cases) - done} of {len(cases)} problems are left")
        _, failed = _right(case, {SMOA: smoa("auto", "triton", order)})
        found[f"{case}, {order}"] = failed.get(SMOA, "right")
        job.save(job.run.with_finding("operator", found))
    launchers = {"direct launches and Triton's": f"{compare_launchers(*cases[1])}, {job.run.label}"}
    job.save(job.run.with_finding("operator", found | launchers))
    if wrong := [f"{name}: {words}" for name, words in found.items() if words != "right"]:
        raise RuntimeError(f"{len(wrong)} of {len(cases)} problems are wrong, the first: {wrong[0]}")


def compare_launchers(case: Case, order: str) -> str:
    """Compare direct launches with Triton's `kernel[grid](...)` on a layer's forward and backward.

    Returns:
        In words, the host's median microseconds of both passes by either.

    Raises:
        RuntimeError: their results differ by a bit.
    """
    layer, x, dy = smoa("split", "triton", order)(case), case.input(), case.output_gradient()

    def rounds() -> tuple[float, list[Tensor]]:
        seconds = []
        for _ in range(LAUNCHER_ROUNDS):
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            y = layer(x)
            gradients = torch.autograd.grad(y, (x, layer.smoa.A, layer.smoa.B), dy)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) * 1e6, [y, *gradients]

    def by_triton(launch: Launch, *arguments: Any) -> bool:
        launch.by_triton(*arguments)
        return True  # and not directly

    ours, found = rounds()
    with launch_hook(by_triton):
        tritons, expected = rounds()
    if not all(map(torch.equal, found, expected)):
        raise RuntimeError("kernels that are launched directly and by Triton give different results")
    return f"the same bits; the host takes {ours:.0f} µs by direct launches, {tritons:.0f} µs by Triton's"


def headline(job: Job) -> None:
    """Measure the time and memory of every provider, the checked cases first.

    If a case failed, wholly or for one provider, the next call compares it again with all providers, because only times
    that were taken in turns may be divided by each other.

    Raises:
        OutOfTimeError: some cases were not compared.
        RuntimeError: a provider failed its gate or crashed.
    """
    run = job.run
    errors: dict[str, dict[str, str]] = dict(run.findings.get("headline", {}))
    cases = headline_cases(job.smoke)
    todo = [case for case in cases if str(case) in errors or not run.find("layer", **case.record())]
    for done, case in enumerate(todo):
        if job.left < 4 * SECONDS_PER_CASE:
            raise OutOfTimeError(f"{len(todo) - done} of {len(cases)} cases are left")
        errors.pop(str(case), None)
        try:
            results, failed = _compare_one(case, job.smoke)
            run = run.with_results(*results)
        except Exception as error:  # for example a case that does not fit in memory: go on with the others
            failed = {"all of them": _first_line(error)}
        if failed:
            errors[str(case)] = failed
        run = run.with_finding("headline", dict(errors))
        job.save(run)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    if failures := [
        f"{name} at {at}: {reason}" for at, failed in errors.items() for name, reason in failed.items()
    ]:
        raise RuntimeError(f"{len(failures)} providers failed, the first: {failures[0]}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def providers(case: Case) -> dict[str, Provider]:
    """The peers, and ours by torch's operators and by the kernels, with either order of blocks."""
    found: dict[str, Provider] = {FROZEN: frozen, LORA: lora, HIRA: hira, PAPER: PaperDense}
    for name, order in zip((SMOA, CONTIGUOUS), ORDERS, strict=True):
        found[f"{name} eager"] = smoa("auto", "eager", order)
        for algorithm in ("auto", "merged", "split"):
            found[name if algorithm == "auto" else f"{name} {algorithm}"] = smoa(algorithm, "triton", order)
    return found


def _compare_one(case: Case, smoke: bool) -> tuple[list[Result], dict[str, str]]:
    """The case's results, and why some providers are not in them."""
    layers, failed = _gated(replace(case, tokens=min(case.tokens, GATE_TOKENS)))
    if case in CHECKED_CASES:
        layers, more = _right(case, {name: _built(layer) for name, layer in layers.items()})
        failed = failed | more
    timed = _timed(case, layers, smoke)  # first, because it leaves nothing in memory
    sizes = {name: footprint(layer, case) for name, layer in layers.items()}
    return [timed, Result("memory", f"memory: {case}", case.record(), bytes=sizes)], failed


def _timed(case: Case, layers: Mapping[str, nn.Module], smoke: bool) -> Result:
    """Time every provider in turns."""
    x, dy = case.input(), case.output_gradient()
    runs = {name: partial(pass_seconds, layer, [x], dy) for name, layer in layers.items()}
    limits: dict[str, Any] = {"budget": SECONDS_PER_CASE, "least": 5, "most": MOST_ROUNDS}
    return measured("layer", f"layer: {case}", case.record(), runs, baseline=FROZEN, smoke=smoke, **limits)


@lru_cache(maxsize=1)
def _gated(case: Case) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers of a case's providers, which take any number of tokens, and why others are left out."""
    return _right(case, providers(case))


def _built(layer: nn.Module) -> Provider:
    return lambda case: layer


def _right(case: Case, built: Mapping[str, Provider]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that compute their definition at a case's size, and why the others do not."""
    right, failed = {}, {}
    for name, build in built.items():
        try:
            layer = build(case)
            check_layers(case, {name: layer})
            right[name] = layer
        except Exception as error:
            failed[name] = _first_line(error)
    return right, failed


class Outcomes:
    """A pytest plugin that saves what became of the tests, at most once a second and at the end."""

    def __init__(self, job: Job) -> None:
        self.job, self.saved = job, 0.0
        self.counts: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test's outcome: that of its call, or that of its fixtures if they failed or skipped it."""
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)  # none where a process died
                words: str = crash.message if crash else report.longreprtext
                self.failed.append(f"{report.nodeid} - {words.splitlines()[0]}")
            if isinstance(report.longrepr, tuple):  # where and why it was skipped
                self.skipped[report.longrepr[2]] += 1
        if time.monotonic() > self.saved + 1:
            self.pytest_sessionfinish()

    def pytest_sessionfinish(self) -> None:
        """Save, also after an interrupt."""
        skipped = [f"[{count}] {reason}" for reason, count in self.skipped.items()]
        found = {"counts": dict(sorted(self.counts.items())), "failed": self.failed, "skipped": skipped}
        self.job.save(self.job.run.with_finding("tests", found))
        self.saved = time.monotonic()


def numerical_tests(job: Job) -> None:
    """Run every numerical test, in parallel processes.

    Raises:
        RuntimeError: some failed, or pytest ended otherwise.
    """
    workers, outcomes = 2, Outcomes(job)
    if DEVICE.type == "cuda":
        workers = max(1, torch.cuda.get_device_properties(0).total_memory // GPU_BYTES)
    parallel = ["-n", "auto", "--maxprocesses", str(workers), "--dist", "worksteal"]
    chosen = SMOKE_TESTS if job.smoke else NUMERICAL_TESTS
    code = pytest.main([*parallel, "-vv", "--tb=short", *chosen], [outcomes])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"{len(outcomes.failed)} tests failed; pytest's exit code is {int(code)}")


def tune_shapes(job: Job) -> None:
    """Tune a small set of shapes.

    Raises:
        OutOfTimeError: some keys were not tuned.
    """
    planned = jobs(tuned_layers(job.smoke), architecture(DEVICE), multiprocessors(DEVICE))
    timer = interpreter_timer if job.smoke else gpu_timer
    if job.smoke:  # the interpreter is slow
        planned = [replace(one, candidates=one.candidates[:2]) for one in planned]
    problems = {str(one.key): "no time was left" for one in planned}
    try:
        for one, entry in tune(planned, DEVICE, timer):
            if isinstance(entry, str):
                problems[str(one.key)] = entry
            else:
                problems.pop(str(one.key))
            if job.left < 5:
                break
    finally:  # also when the GPU is lost
        known, keys = keep(DEVICE, "choices", {}), [str(one.key) for one in planned]
        choices = {key: known[key] for key in keys if key in known}
        table = {identity(DEVICE): {"choices": choices}}
        finding = {"keys": len(choices), "table": table, "problems": problems}
        job.save(job.run.with_finding("tune", finding))
    if problems:
        raise OutOfTimeError(f"{len(problems)} of {len(planned)} keys are not done")


def interpreter_timer(choice: Choice, launch: Callable[[], object]) -> float:
    """Seconds of one launch, in place of a measurement in a rehearsal."""
    start = time.perf_counter()
    launch()
    return time.perf_counter() - start


STAGES: Mapping[str, Callable[[Job], None]] = {
    "operator": operator,
    "headline": headline,
    "tests": numerical_tests,
    "tune": tune_shapes,
}
