"""The tuning loop in Triton's interpreter, under a scripted clock: search, resume, failures, wrong numbers, budget."""

import itertools
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from tuning_cases import (
    CPU,
    FORWARD,
    PERMUTE,
    PERMUTE_CONFIGS,
    SPEED,
    Notebook,
    entry,
    needs_interpreter,
    permute_entry,
    permute_job,
    scripted,
)

from smoa_kernels.audit import run as audit
from smoa_kernels.audit.rules import Record
from smoa_kernels.definition.precision import KERNEL_PRECISIONS
from smoa_kernels.kernels import KERNELS
from smoa_kernels.kernels.architectures import ARCHITECTURES
from smoa_kernels.kernels.spec import Key
from smoa_kernels.kernels.table import Choice
from smoa_kernels.tuning import space, tuner
from smoa_kernels.tuning.gpus import match_gpu
from smoa_kernels.tuning.plan import (
    Layer,
    Target,
    jobs,
    keys,
)
from smoa_kernels.tuning.space import algorithm_job, kernel_job, search_space
from smoa_kernels.tuning.tuner import MOST_CHARACTERS, Run
from smoa_kernels.tuning.workloads import Workload, workload

pytestmark = needs_interpreter

FIRST, SECOND, THIRD = PERMUTE_CONFIGS


def test_the_fastest_wins_every_time_is_kept_and_a_rerun_repeats_nothing() -> None:
    notebook = Notebook()
    (tuned,) = notebook.tune([permute_job()])
    assert tuned.entry is not None
    assert tuned.entry.complete
    assert tuned.entry.best().choice == SECOND  # type: ignore[union-attr]
    assert {t.choice: t.seconds for t in tuned.entry.trials} == SPEED
    assert tuned.entry.default == KERNELS["permute"].default(PERMUTE, "cpu", 1) == FIRST
    assert notebook.entry() == tuned.entry
    notebook.timed.clear()
    (again,) = notebook.tune([permute_job()])
    assert notebook.timed == []
    assert again.entry == tuned.entry


@pytest.mark.slow
def test_every_kernel_and_algorithm_is_checked_and_timed() -> None:
    """The real operands and the real kernels, in the interpreter: each gives the definition's numbers."""
    planned = jobs([Layer(70, 90, 17, "bf16", 5, 2)], Target.of(CPU))
    assert {job.key.kernel for job in planned} == {key.kernel for key in keys(Layer(1, 1, 1, blocks=1))}
    for job in planned:
        job = replace(job, candidates=job.candidates[:2])
        (tuned,) = Notebook().tune([job], timer=scripted(lambda choice: 1.0))
        assert tuned.entry is not None, (job, tuned.problem)
        assert [t.reason for t in tuned.entry.trials] == [None] * len(job.candidates), job.key


def test_a_wider_space_than_last_time_is_searched_and_what_is_stale_measured_again() -> None:
    notebook = Notebook(permute_entry(torch="1.0"), entry(seconds={FIRST: 3.0}))
    notebook.tune([permute_job()])
    assert notebook.timed == [SECOND, THIRD]


def test_a_choice_that_fails_is_recorded_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not compile, it crashes when launched, the timer dies: three times the same to the loop."""

    def load(key: Key, device: torch.device) -> Workload:
        good = workload(key, device)

        def run(choice: Choice) -> list[Tensor]:
            if choice == FIRST:
                raise RuntimeError("\n  out of resource: shared memory\nmore")
            return list(good.run(choice))

        return replace(good, run=run)

    def timer(run: Run) -> float:
        if run.choice == SECOND:
            raise ValueError("x" * 10**6)  # the reason is cut
        return 2.0

    monkeypatch.setattr(tuner, "workload", load)
    (tuned,) = Notebook().tune([permute_job()], timer=timer)
    assert tuned.entry is not None
    assert tuned.entry.complete
    assert {t.choice: t.reason for t in tuned.entry.trials} == {
        FIRST: "RuntimeError: out of resource: shared memory",
        SECOND: f"ValueError: {'x' * MOST_CHARACTERS}",
        THIRD: None,
    }
    assert tuned.entry.best().choice == THIRD  # type: ignore[union-attr]


@pytest.mark.parametrize("spoil", ["scaled", "nan"])
def test_a_choice_with_wrong_numbers_is_never_timed(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(key: Key, device: torch.device) -> Workload:
        good = workload(key, device)

        def run(choice: Choice) -> list[Tensor]:
            factor = {"scaled": 1.01, "nan": float("nan")}[spoil] if choice == SECOND else 1.0
            return [value * factor for value in good.run(choice)]

        return replace(good, run=run)

    notebook = Notebook()
    monkeypatch.setattr(tuner, "workload", load)
    (tuned,) = notebook.tune([permute_job()])
    assert notebook.timed == [FIRST, THIRD]
    assert tuned.entry is not None
    wrong = tuned.entry.trial(SECOND)
    assert wrong is not None
    assert str(wrong.reason).startswith("wrong numbers: relative error")
    assert tuned.entry.best().choice == THIRD  # type: ignore[union-attr]


def test_the_budget_ends_a_run_and_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook()
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def seconds(choice: Choice) -> float:
        clock[0] += 10
        return notebook.seconds(choice)

    other = permute_job(PERMUTE._replace(tokens=16))
    first, second = notebook.tune([permute_job(), other], timer=scripted(seconds), deadline=15.0)
    assert notebook.timed == [FIRST, SECOND]
    assert first.problem == "no time was left for all candidates"
    assert first.entry is not None
    assert not first.entry.complete
    assert (second.entry, second.problem) == (None, "no time was left")


@pytest.mark.parametrize("where", ["operands", "truth"])
def test_what_does_not_fit_in_memory_costs_one_job_and_no_candidate_its_name(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(dtype: torch.dtype) -> list[Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    def load(key: Key, device: torch.device) -> Workload:
        good = workload(key, device)
        if key.tokens == 8:
            return good
        return replace(good, defined=out_of_memory) if where == "truth" else replace(good, defined=1 / 0)

    notebook = Notebook()
    monkeypatch.setattr(tuner, "workload", load)
    large, small = notebook.tune([permute_job(PERMUTE._replace(tokens=16)), permute_job()])
    reason = {"truth": "OutOfMemoryError: out of memory", "operands": "ZeroDivisionError: division by zero"}
    assert large.problem == reason[where]
    assert large.entry is None
    assert small.entry is not None
    assert {key for key, _ in notebook.table.entries} == {PERMUTE}


@pytest.mark.slow
def test_algorithms_come_after_the_kernels_they_are_made_of() -> None:
    kinds = [
        job.key.kernel in ("forward", "input_gradient") for job in jobs([Layer(70, 90, 17)], Target.of(CPU))
    ]
    assert kinds == sorted(kinds)
    assert kinds[-1]
    assert algorithm_job(FORWARD, "split").candidates == ("split", "merged", "fused")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    "kernel", ["modulated_weight", "permute", "block_matmul", "fused_linear", "block_grad"]
)
def test_the_space_is_what_ships_and_one_step_around_it(kernel: str, arch: str) -> None:
    """A step in one number, or in two of which one makes up for the other; what ships comes first, then the former."""
    ships = space._ships(kernel, arch, "bf16")
    found = search_space(kernel, arch, "bf16")
    assert found[: len(ships)] == ships
    assert 10 <= len(found) <= 70
    assert len(set(found)) == len(found)

    steps = KERNELS[kernel].steps

    def moves(config: object, other: object) -> dict[str, int]:
        """Which numbers `config` has changed from `other`, and by how many steps."""
        changed = {
            name: (vars(other)[name], value)
            for name, value in vars(config).items()
            if value != vars(other)[name]
        }
        return {
            name: steps[name].index(there) - steps[name].index(here)
            for name, (here, there) in changed.items()
        }

    def reachable(config: object) -> list[dict[str, int]]:
        """From each configuration that ships, where only numbers change that the search changes."""
        found = []
        for other in ships:
            with suppress(KeyError, ValueError):
                found.append(moves(config, other))
        return found

    distances = [min(sum(map(abs, changed.values())) for changed in reachable(config)) for config in found]
    assert distances == sorted(distances)
    assert set(distances) == {0, 1, 2}
    for config in found[distances.index(2) :]:
        assert any(_makes_up(changed) for changed in reachable(config)), config


def _makes_up(changed: dict[str, int]) -> bool:
    """A tile grows by a step on one side as it shrinks on another, or has fewer stages, or more warps."""
    sides = [by for name, by in changed.items() if name.startswith("block_") and name != "block_r"]
    rest = [
        -by if name == "num_warps" else by
        for name, by in changed.items()
        if name in ("num_warps", "num_stages")
    ]
    both = [*sides, *rest]
    return bool(sides) and len(both) == len(changed) == 2 and sorted(both) == [-1, 1]


def test_two_steps_at_once() -> None:
    """What block_grad's largest tile is tried as besides its neighbours, and what it is not."""
    largest = space._ships("block_grad", "sm_90", "bf16")[0]
    around = set(space._paired(largest, KERNELS["block_grad"].steps))
    longer = {"block_t": 128, "num_stages": 2}
    assert replace(largest, **longer) in around
    assert replace(largest, block_n=64, num_warps=4) in around  # type: ignore[call-arg]
    assert around <= set(search_space("block_grad", "sm_90", "bf16"))
    more = {"block_t": 128, "num_stages": 4}
    assert replace(largest, **more) not in around
    assert replace(largest, block_n=64, split=1) not in around  # type: ignore[call-arg]
    assert not list(space._paired(largest, {}))


def test_what_the_audit_fails_is_pruned_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit in its own processes, replaced by its records: one neighbour spills, the shipped default too."""
    key = Key("block_grad", "bf16", 16, 2, 256, 256, 512, 128, 128)
    ships = space._ships("block_grad", "sm_90", "bf16")
    found = search_space("block_grad", "sm_90", "bf16")

    def compiled(**asked: object) -> list[tuple[int, Record | None]]:
        assert asked["archs"] == ["sm_90"]
        records = [
            Record(
                "block_grad",
                "r16",
                "copy",
                vars(config),
                "sm_90",
                "bf16",
                spilled=8 * (config in (found[-1], ships[0])),
                blocks_per_multiprocessor=1,
            )
            for config in found
        ]
        return [(len(records), None), *((len(records) - 1 - i, record) for i, record in enumerate(records))]

    monkeypatch.setattr(space, "run_audit", compiled)
    told: list[tuple[int, int]] = []
    ruled_out = space.broken(
        [("block_grad", "bf16")], "sm_90", progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (len(found), len(found))
    job = kernel_job(key, "sm_90", 132, ruled_out=ruled_out)
    assert (found[-1], "r16: spills 8 bytes") in job.pruned
    assert found[-1] not in job.candidates
    assert job.candidates[0] == job.default == ships[0]  # what runs anyway is timed anyway


def test_what_is_not_compiled_in_time_is_not_timed_and_what_ships_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found, ships = (
        search_space("block_grad", "sm_90", "bf16"),
        space._ships("block_grad", "sm_90", "bf16"),
    )
    clock, forms = [0.0], KERNELS["block_grad"].forms
    most = len(forms) + 1.0
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def compiled(**asked: object) -> Iterator[tuple[int, Record | None]]:
        yield len(found) * len(forms), None
        for config, form in itertools.product((found[-2], found[-1]), forms):
            clock[0] += 1
            yield (
                1,
                Record(
                    "block_grad", form, "copy", vars(config), "sm_90", "bf16", blocks_per_multiprocessor=1
                ),
            )

    monkeypatch.setattr(space, "run_audit", compiled)
    ruled_out = space.broken([("block_grad", "bf16"), ("block_grad", "fp16")], "sm_90", deadline=most)
    assert clock == [most]  # the next dtype was not begun
    late = {config for (_, dtype, config), reason in ruled_out.items() if dtype == "bf16"}
    assert late == set(found) - set(ships) - {
        found[-2]
    }  # one has all its forms, the last only one of several
    assert set(ruled_out.values()) == {"not compiled before half of the time was up"}
    clock[0] = 0.0
    assert space.broken([("block_grad", "bf16")], "sm_90", deadline=None) == {}


def test_a_tile_that_does_not_divide_the_layout_is_pruned() -> None:
    narrow = Key("block_grad", "bf16", 4, 8, 320, 320, 512, 64, 64)
    job = kernel_job(narrow, "sm_90", 132, ruled_out={})
    assert all(config.block_n <= 64 and config.block_c <= 64 for config in job.candidates)  # type: ignore[union-attr]
    assert {reason for _, reason in job.pruned} == {"does not divide the padded layout"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_audit_compiles_the_whole_space_of_every_kernel(arch: str) -> None:
    """Its workers find the space by name; nothing is compiled here."""
    dtypes = [dtype for dtype in KERNEL_PRECISIONS if not (dtype == "tf32" and arch.startswith("gfx"))]
    found = audit.tasks("smoa_kernels.tuning.space:SEARCH", [arch], None, dtypes)
    assert len(set(found)) == len(found)
    for kernel, dtype in itertools.product(KERNELS, dtypes):
        own = [task for task in found if (task.kernel, task.dtype) == (kernel, dtype)]
        # All forms of one before the next: what is late then costs the last, not all of them.
        assert [task.config for task in own] == sorted(task.config for task in own)
        forms, size = {task.variant for task in own}, len(search_space(kernel, arch, dtype))
        assert len(own) == len(forms) * size > len(forms) * len(space._ships(kernel, arch, dtype))


@pytest.mark.parametrize(
    ("arch", "capability", "stand_in"),
    [
        ("sm_87", (8, 7), "sm_86"),
        ("sm_103", (10, 3), "sm_100"),
        ("sm_121", (12, 1), "sm_120"),
        ("gfx950", None, "gfx942"),
        ("sm_89", (8, 9), "sm_89"),
    ],
)
def test_an_architecture_that_nobody_audited_is_pruned_by_its_nearest(
    arch: str, capability: tuple[int, int] | None, stand_in: str
) -> None:
    assert Target(match_gpu("another", capability, 20), arch, 20).audited == stand_in


def test_the_shipped_space_needs_no_audit() -> None:
    assert kernel_job(PERMUTE, "cpu", 1).candidates == PERMUTE_CONFIGS
