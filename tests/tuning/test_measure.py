"""The tuner in Triton's interpreter with a scripted clock: timing, checks, storage, and failures not retried."""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from places import ran
from torch import Tensor
from tuning_cases import (
    CPU,
    PERMUTE,
    PERMUTE_CONFIGS,
    SPEED,
    entry,
    kept,
    needs_interpreter,
    permute_job,
    put,
    scripted,
    write,
)

from smoa_kernels.kernels import KERNELS
from smoa_kernels.kernels.architectures import identity
from smoa_kernels.kernels.launch import heard_by
from smoa_kernels.kernels.spec import Config, Key
from smoa_kernels.kernels.table import INTERRUPTED, UNFINISHED, Choice, Trial, keep
from smoa_kernels.tuning import measure
from smoa_kernels.tuning.measure import MOST_CHARACTERS, DeviceLostError, Workload, tune, workload
from smoa_kernels.tuning.plan import Job, jobs
from smoa_kernels.tuning.problem import Problem

pytestmark = needs_interpreter

FIRST, SECOND, THIRD = PERMUTE_CONFIGS
SCRIPT = SPEED.__getitem__


def reasons(key: Key = PERMUTE) -> dict[Choice, str | None]:
    return {trial.choice: trial.reason for trial in kept()[key].trials}


def spoiled(monkeypatch: pytest.MonkeyPatch, change: Callable[[Workload, Choice], list[Tensor]]) -> None:
    """Replace every workload's result by that of `change`."""

    def load(job: Job, device: torch.device) -> Workload:
        good = workload(job, device)
        return replace(good, run=lambda choice: (change(good, choice), lambda: None))

    monkeypatch.setattr(measure, "workload", load)


def test_the_fastest_wins_every_time_is_kept_and_a_rerun_repeats_nothing() -> None:
    assert tune([permute_job()], CPU, timer=scripted(SCRIPT)) == {}
    found = kept()[PERMUTE]
    assert found.best().choice == SECOND  # type: ignore[union-attr]
    assert {t.choice: t.seconds for t in found.trials} == SPEED
    timed: list[Choice] = []
    assert tune([permute_job()], CPU, timer=scripted(SCRIPT, timed)) == {}
    assert kept()[PERMUTE] == found
    assert timed == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer", [Problem(17, 70, 90, 2, 5), Problem(33, 48, 40, 2, 4, "fp32", 8, experts=3)]
)
def test_every_kernel_and_algorithm_is_checked_and_timed(layer: Problem) -> None:
    """Real operands and real kernels, in the interpreter: each result matches that of torch's operators."""
    planned = [replace(job, candidates=job.candidates[:2]) for job in jobs([layer], "cpu", 1)]
    assert tune(planned, CPU, timer=scripted(lambda choice: 1.0)) == {}
    found = kept()
    for job in planned:
        assert [t.reason for t in found[job.key].trials] == [None] * len(job.candidates), job.key


def test_stale_and_missing_entries_are_measured() -> None:
    write(entry(triton="1.0"), entry(seconds={FIRST: 3.0}))
    timed: list[Choice] = []
    tune([permute_job()], CPU, timer=scripted(SCRIPT, timed))
    assert timed == [SECOND, THIRD]


def failing(
    monkeypatch: pytest.MonkeyPatch, kernel: str, error: Exception, choice: Config | None = None
) -> None:
    """Let launches of a kernel raise, all or those with a choice's tile; copies back from block order never do."""
    good = KERNELS[kernel].fn
    name, module = good.fn.__name__, sys.modules[good.fn.__module__]

    class Failing:
        arg_names = good.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            def launch(*arguments: object, **options: object) -> object:
                given = dict(zip(self.arg_names, arguments, strict=True))
                tile = given.get("BLOCK_T"), given.get("BLOCK_P")
                if not given.get("SCATTER") and (choice is None or tile == (choice.block_t, choice.block_p)):
                    raise error
                return good[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(module, name, Failing())


def test_a_choice_that_fails_is_recorded_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile error and an error of the timer are handled alike."""

    def timer(choice: Choice, launch: Callable[[], object]) -> float:
        if choice == SECOND:
            raise ValueError("x" * 10**6)  # the stored reason is cut
        return 2.0

    failing(monkeypatch, "permute", RuntimeError("\n  out of resource: shared memory\nmore"), FIRST)
    assert tune([permute_job()], CPU, timer=timer) == {}
    first, second = "RuntimeError: out of resource: shared memory", f"ValueError: {'x' * MOST_CHARACTERS}"
    assert reasons() == {FIRST: first, SECOND: second, THIRD: None}
    assert kept()[PERMUTE].best().choice == THIRD  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kernel", "error", "choice"),
    [
        ("modulated_blocks", RuntimeError("out of resource: shared memory"), None),
        ("permute", torch.OutOfMemoryError("CUDA out of memory"), SECOND),
    ],
)
def test_neither_another_kernels_failure_nor_a_lack_of_memory_is_recorded(
    kernel: str, error: Exception, choice: Config | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidates are told of and tried again. A candidate that runs is timed meanwhile."""
    with monkeypatch.context() as patched:
        failing(patched, kernel, error, choice)
        told = tune([permute_job()], CPU, timer=scripted(SCRIPT))
    assert told == {PERMUTE: f"{type(error).__name__}: {error}"}
    fail = set(PERMUTE_CONFIGS) if choice is None else {choice}
    assert reasons() == {one: INTERRUPTED if one in fail else None for one in PERMUTE_CONFIGS}
    assert tune([permute_job()], CPU, timer=scripted(SCRIPT)) == {}
    assert {t.choice: t.seconds for t in kept()[PERMUTE].trials} == SPEED


def test_only_launches_with_the_key_and_sums_of_their_parts_are_timed() -> None:
    """Of a backward that gathers dY and x, contracts G, and adds the parts of dA and of dB."""
    (job,) = (
        job
        for job in jobs([Problem(150, 140, 90, 2, 5, "fp32")], "cpu", 1, ["contract"])
        if job.operation == "factor_gradients"
    )
    _, again = workload(job, CPU).run(job.candidates[0])
    heard: list[str] = []
    with heard_by(lambda launch, pointers: heard.append(launch.kernel.__name__)):
        again()
    assert heard == ["contract_kernel", *["sum_partials_kernel"] * 2]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_choice_with_wrong_numbers_is_never_timed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(
        monkeypatch,
        lambda good, choice: [v * (factor if choice == SECOND else 1) for v in good.run(choice)[0]],
    )
    timed: list[Choice] = []
    tune([permute_job()], CPU, timer=scripted(SCRIPT, timed))
    assert timed == [FIRST, THIRD]
    assert str(reasons()[SECOND]).startswith("wrong numbers: they differ by")


def test_the_budget_ends_a_run_and_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def seconds(choice: Choice) -> float:
        clock[0] += 10
        return SPEED[choice]

    other = permute_job(16)
    told = tune([permute_job(), other], CPU, timer=scripted(seconds), deadline=15.0)
    assert told == {PERMUTE: "no time was left for all candidates", other.key: "no time was left"}
    assert list(reasons()) == [FIRST, SECOND]
    assert other.key not in kept()


@pytest.mark.parametrize("where", ["operands", "truth"])
def test_a_problem_too_large_for_memory_costs_one_job_and_blames_no_candidate(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory() -> list[Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    def load(job: Job, device: torch.device) -> Workload:
        good = workload(job, device)
        if job.key.tokens == 8:
            return good
        return replace(good, expected=out_of_memory if where == "truth" else 1 / 0)

    monkeypatch.setattr(measure, "workload", load)
    large = permute_job(16)
    told = tune([large, permute_job()], CPU, timer=scripted(SCRIPT))
    reason = {"truth": "OutOfMemoryError: out of memory", "operands": "ZeroDivisionError: division by zero"}
    assert told == {large.key: reason[where]}
    assert set(kept()) == {PERMUTE}


def interrupt(choice: Choice, launch: object = None) -> float:
    raise KeyboardInterrupt


# Write 1 checks that the table is writable; writes 4 and 5 are the second candidate's mark and its time.
@pytest.mark.parametrize(("call", "expected"), [(4, INTERRUPTED), (5, None)])
def test_ctrl_c_while_the_table_is_written(
    call: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def save(*found: object) -> object:
        calls.append(found)
        if len(calls) == call:
            raise KeyboardInterrupt
        return keep(*found)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "keep", save)
    with pytest.raises(KeyboardInterrupt):
        tune([permute_job()], CPU, timer=scripted(SCRIPT))
    assert reasons() == {FIRST: None, SECOND: expected}


def test_ctrl_c_ends_the_run_where_nothing_can_be_written_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(now: object, key: Key | None = None, *trials: Trial) -> object:
        if trials and trials[0].reason != UNFINISHED:
            raise OSError("No space left on device")
        return keep(identity(CPU))

    monkeypatch.setattr(measure, "keep", save)
    with pytest.raises(KeyboardInterrupt):
        tune([permute_job()], CPU, timer=interrupt)


ENDED = """
import os, signal, time
from tuning_cases import CPU, PERMUTE_CONFIGS, permute_job
from smoa_kernels.tuning import measure
def timer(choice, launch):
    launch()
    measure.HANGS_SECONDS = 2.0  # for the second
    if choice == PERMUTE_CONFIGS[1]:
        {ends}
    return 1.0
measure.tune([permute_job()], CPU, timer=timer)
"""


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("time.sleep(60)", 1, "has not ended within 2 s"),
    ],
    ids=["killed", "hung"],
)
def test_a_candidate_that_ends_the_process_or_hangs_is_not_tried_for_ever(
    ends: str, code: int, said: str
) -> None:
    process = ran("-c", ENDED.format(ends=ends))
    assert process.returncode == code, process.stderr
    assert said in process.stderr
    assert reasons() == {FIRST: None, SECOND: UNFINISHED}
    timed: list[Choice] = []
    tune([permute_job()], CPU, timer=scripted(SCRIPT, timed))
    assert timed == [THIRD]
    assert reasons() == {FIRST: None, SECOND: UNFINISHED, THIRD: None}


def test_a_mark_that_another_process_has_replaced_does_not_come_back() -> None:
    """This process read the table while the other one was timing its third candidate."""
    put(entry(seconds={FIRST: 3.0}))
    keep(identity(CPU), PERMUTE, Trial(THIRD, reason=UNFINISHED))

    def timer(choice: Choice, launch: object) -> float:
        keep(identity(CPU), PERMUTE, Trial(THIRD, 2.0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune([permute_job()], CPU, timer=timer)
    assert kept()[PERMUTE].trial(THIRD) == Trial(THIRD, 2.0)


def test_a_lost_gpu_ends_the_run_and_keeps_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Choice] = []

    def synchronize() -> None:
        if len(timed) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(DeviceLostError, match=r"illegal memory access.*run the same command again"):
        tune([permute_job()], CPU, timer=scripted(SCRIPT, timed))
    assert list(reasons()) == [FIRST, SECOND]
