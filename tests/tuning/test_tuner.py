"""The tuner in the interpreter with a scripted clock: keys, candidates, checks, timing, the table, the command."""

import importlib
import json
import math
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from places import ran

from smoa_kernels import FusedSMoALinear
from smoa_kernels.cli import main
from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.kernels.architectures import ARCHITECTURES, identity, limits
from smoa_kernels.kernels.permute import gather_columns
from smoa_kernels.kernels.registry import KERNELS
from smoa_kernels.kernels.spec import ALGORITHM_KEYS, Config, Key, bucket
from smoa_kernels.kernels.table import Choice, keep, override, read, select, user_table
from smoa_kernels.tuning import tuner
from smoa_kernels.tuning.tuner import COMPILING, ENDED, TIMED, Job, Layer, jobs, tune

CPU = torch.device("cpu")
command = importlib.import_module("smoa_kernels.cli.tune")  # `cli` exports the function under the same name
LAYER = Layer(10, 12, 8, "fp32", 5, 2)


def gathers(layer: Layer, variant: bool, device: torch.device) -> Callable[[Any], list[torch.Tensor]]:
    """A step that only gathers x, because the interpreter is slow."""
    labels = torch.arange(layer.in_features) % layer.blocks
    partition = BlockPartition.from_labels(labels, labels, layer.blocks).to(device)
    x = torch.ones(layer.tokens, layer.in_features, device=device)
    expected = x.new_zeros(layer.tokens, layer.blocks, 64)
    expected[:, :, : layer.in_features // layer.blocks] = 1
    return lambda backend: [gather_columns(x, partition, 64) if backend is tuner.triton else expected]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "training_step", gathers)


def permute_job(tokens: int = 8) -> Job:
    """The only key of `gathers`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuner, "training_step", gathers)
        (job,) = jobs([replace(LAYER, tokens=tokens)], "cpu", 1)
    return job


def clock(timed: list[Choice], seconds: Callable[[Choice], float] = lambda _: 1.0) -> tuner.Timer:
    """A timer that runs the launch and returns scripted seconds."""

    def timer(choice: Choice, launch: Callable[[], object]) -> float:
        launch()
        timed.append(choice)
        return seconds(choice)

    return timer


def search(job: Job, *given: Any) -> Any:
    """The entry that a search finds, and the candidates that were timed."""
    timed: list[Choice] = []
    ((_, entry),) = tune([job], CPU, clock(timed, *given))
    return entry, timed


def kept(job: Job) -> dict[str, Any]:
    return read(user_table("cpu")).part(identity(CPU), "choices")[str(job.key)]


# Keys and candidates


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "cpu", "sm_87"])
def test_a_search_has_20_to_60_candidates_and_the_heuristic_picks_one_that_ships(arch: str) -> None:
    """Also on architectures that nobody audited."""
    for kernel in KERNELS.values():
        for dtype in KERNEL_PRECISIONS:
            for tokens, rank, granule in ((1, 4, 1), (16, 16, 8), (64, 64, 1), (300, 17, 8), (8192, 4, 8)):
                key = Key(kernel.name, dtype, rank, 4, 4096, 14336, tokens, 1024, 3584, granule=granule)
                candidates = kernel.candidates(key, arch)
                assert 20 <= len(candidates) <= 60, key
                ships = kernel.shipped(limits(arch), PRECISIONS[dtype])
                assert candidates[: len(ships)] == ships
                assert {kernel.default(key, arch, processors) in ships for processors in (1, 132)} == {True}
                assert all(0 < kernel.traffic(config, key) < math.inf for config in candidates)
    key = Key("fused_linear", "bf16", 4, 4, 4096, 4096, 1)
    splits = [KERNELS["fused_linear"].default(key, "sm_90", processors).split for processors in (16, 132)]
    assert splits == [1, 4]


@pytest.mark.parametrize(("tokens", "contiguous"), [(19, False), (150, False), (19, True), (150, True)])
def test_every_key_that_a_training_step_asks_for_is_tuned_algorithms_last(
    tokens: int, contiguous: bool
) -> None:
    n, c, order = 144, 96, "contiguous" if contiguous else "spectral"
    layer = FusedSMoALinear(c, n, r=5, num_blocks=2, block_order=order, backend="triton")
    asked: set[Key] = set()
    with override(asked.add):
        for algorithm, dropout in (("auto", 0.0), ("split", 0.0), ("merged", 0.0), ("split", 0.3)):
            layer.algorithm, layer.dropout = algorithm, dropout
            layer(torch.randn(tokens, c, requires_grad=True)).sum().backward()
    planned = [job.key for job in jobs([Layer(n, c, tokens, "fp32", 5, 2, contiguous)], "cpu", 1)]
    assert {"forward", "contract", "sum_partials"} <= {key.kernel for key in asked}
    assert asked <= set(planned)
    kinds = [key.kernel in ALGORITHM_KEYS for key in planned]
    assert kinds == sorted(kinds)
    experts = jobs([Layer(64, 48, 6000, experts=60)], "sm_90", 132)  # for the pairs of an average one
    assert {job.key.tokens for job in experts} == {bucket(6000 // 60)} == {128}
    assert {job.key.transposed for job in experts} == {False, True}


# The search


@pytest.mark.slow
@pytest.mark.parametrize("layer", [Layer(70, 90, 17, "bf16", 5, 2), Layer(48, 40, 33, "fp32", 4, 2, True, 3)])
def test_every_kernel_and_algorithm_is_checked_and_timed(layer: Layer) -> None:
    """Real operands and real kernels, in the interpreter: each result matches that of torch's operators."""
    planned = [replace(job, candidates=job.candidates[:2]) for job in jobs([layer], "cpu", 1)]
    timed: list[Choice] = []
    entries = [entry for _, entry in tune(planned, CPU, clock(timed))]
    assert [entry["refused"] for entry in entries] == [{}] * len(planned)
    assert len(timed) == sum(len(job.candidates) for job in planned)


@pytest.mark.usefixtures("short")
def test_the_fastest_of_eight_wins_and_a_rerun_measures_nothing() -> None:
    job = permute_job()
    fast = job.candidates[5]
    entry, timed = search(job, lambda choice: 1.0 if choice is fast else 2.0)
    assert timed == [*job.candidates[:TIMED]]
    assert entry == {"choice": str(fast), "seconds": 1.0, "default_seconds": 2.0, "refused": {}}
    assert select(KERNELS["permute"], job.key, CPU) == fast
    assert search(job) == (kept(job), []) == (entry, [])
    for wrong in ({"choice": "t=1"}, {"refused": 3}, {"seconds": "fast"}):  # damaged, or of another search
        keep(CPU, "choices", {str(job.key): entry | wrong})
        assert search(job)[0] == entry | {"choice": str(job.candidates[0]), "default_seconds": 1.0}


def test_candidates_that_spill_or_do_not_fit_or_move_more_bytes_are_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = jobs([Layer(4096, 4096, 2048)], "sm_90", 132)
    job = next(job for job in planned if job.key.kernel == "modulated_weight")
    first, spills, large, *fit = job.candidates

    def compiled(self: tuner.Trial, config: Config) -> tuple[Any, int]:
        shared = SimpleNamespace(shared=300_000 if config == large else 0)
        kernel = SimpleNamespace(n_regs=64, n_spills=4 if config == spills else 0, metadata=shared)
        kernel._init_handles = lambda: None
        return kernel, 4096 * 4096 // config.block_n // config.block_c

    monkeypatch.setattr(tuner.Trial, "compiled", compiled)
    monkeypatch.setattr(tuner, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuner, "multiprocessors", lambda device: 132)
    default, *others = tuner.Trial(replace(job, layer=LAYER), CPU).shortlist()
    assert (default, len(others)) == (first, TIMED - 1)
    assert set(others) <= set(fit)
    assert all(config.block_n >= 32 for config in others)  # a narrow tile reads the factors more often


@pytest.mark.usefixtures("short")
def test_a_wrong_candidate_is_refused_by_name_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    job, run = permute_job(), tuner.Trial.run
    wrong = job.candidates[2]

    def spoilt(self, tried, *hook):
        return [y * (1.01 if tried is wrong else 1) for y in run(self, tried, *hook)]

    monkeypatch.setattr(tuner.Trial, "run", spoilt)
    entry, timed = search(job)
    assert wrong not in timed
    ((name, reason),) = entry["refused"].items()
    assert (name, reason[:31]) == (str(wrong), "ArithmeticError: wrong numbers:")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("which", "error", "words"),
    [
        (0, RuntimeError("no C compiler\nmore"), "RuntimeError: no C compiler"),
        (1, torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (2, KeyboardInterrupt(), None),
        (2, RuntimeError("an illegal memory access"), None),
    ],
)
def test_errors_that_blame_no_candidate_keep_what_was_measured(
    which: int, error: BaseException, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the search, and so does a lost GPU; without a compiler or memory it goes on with the next key."""
    done, job, other = permute_job(16), permute_job(), permute_job(32)
    is_lost = "illegal" in str(error)

    def fail(choice: Choice) -> float:
        if choice == job.candidates[which] and kept(done)["choice"]:
            monkeypatch.setattr(tuner, "is_lost", lambda: is_lost)
            raise error
        return 1.0

    entries = tune([done, job], CPU, clock([], fail))
    assert next(entries)[1] == kept(done)
    if words is None:
        with pytest.raises(type(error)):
            next(entries)
    else:
        assert next(entries)[1] == words
    noted = {str(job.candidates[which]): ENDED} if is_lost else {}
    assert kept(job) == {"choice": None, "refused": noted}
    monkeypatch.setattr(tuner, "is_lost", lambda: False)  # another process
    assert [entry["refused"] for _, entry in tune([done, job, other], CPU, clock([]))] == [{}, noted, {}]


ENDS = """
import os, signal, time
from tuning.test_tuner import CPU, clock, gathers, permute_job
from smoa_kernels.tuning import tuner
tuner.training_step = gathers
job = permute_job()
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def killed(choice):
    return kill() if choice is job.candidates[1] else 1.0
def hangs(choice):
    tuner.HANGS_SECONDS = 1
    return time.sleep(60) if choice is job.candidates[1] else 1.0
def compiling(choice):
    raise AssertionError("no candidate is timed")
if {case} is compiling:
    tuner.compile_ahead = kill
list(tuner.tune([job], CPU, clock([], {case})))
"""


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("case", "code"), [("killed", -signal.SIGKILL), ("hangs", 1), ("compiling", -signal.SIGKILL)]
)
def test_what_ends_the_process_is_named_and_skipped(case: str, code: int) -> None:
    """After a compiler ended the process, only what runs without a table is timed."""
    process = ran("-c", ENDS.format(case=case))
    assert process.returncode == code, process.stderr
    job = permute_job()
    default, second, *others = job.candidates[:TIMED]
    name = COMPILING if case == "compiling" else str(second)
    assert kept(job) == {"choice": None, "refused": {name: ENDED}}
    entry, timed = search(job)
    assert entry["refused"] == {name: ENDED}
    assert timed == [default, *(() if case == "compiling" else others)]


def test_only_launches_with_the_key_and_sums_of_their_parts_are_timed() -> None:
    planned = jobs([Layer(14, 9, 1100, "fp32", 5, 2)], "cpu", 1)
    job = next(job for job in planned if job.key.kernel == "contract")
    launched: list[str] = []

    def timer(choice: Choice, launch: Callable[[], object]) -> float:
        with tuner.launch_hook(lambda launch, *_: launched.append(launch.kernel.__name__)):
            launch()
        return 1.0

    list(tune([replace(job, candidates=job.candidates[:1])], CPU, timer))
    assert launched == ["contract_kernel", *["sum_partials_kernel"] * 2]


def test_a_cuda_graph_is_timed_by_triton_which_flushes_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, launched = SimpleNamespace(replay=lambda: None), list[int]()
    timed = Mock(return_value=2.0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(tuner, "do_bench", timed)
    assert tuner.gpu_timer("fused", lambda: launched.append(1)) == 2e-3
    timed.assert_called_once_with(graph.replay, return_mode="median")
    assert launched == [1, 1]  # compiled, and captured


# The command

SMALL = ["tune", "--shape", "10x12", "--tokens", "8", "--dtype", "fp32", "--rank", "5", "--blocks", "2"]


@pytest.fixture
def gpu(short: None, monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """The interpreter in place of a GPU, with two candidates of each key."""
    timed: list[Choice] = []
    planned = [replace(permute_job(), candidates=permute_job().candidates[:2])]
    monkeypatch.setattr(command, "device_here", lambda: CPU)
    monkeypatch.setattr(tuner, "gpu_timer", clock(timed))
    monkeypatch.setattr(tuner, "jobs", lambda *_: planned)
    return timed


def test_the_command_prints_each_winner_and_a_rerun_knows_it(
    gpu: list[Choice], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("SMOA_CACHE", os.devnull)  # a table that cannot be written
        assert (main(SMALL), gpu) == (2, [])
    assert "Not a directory" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(tuner.Trial, "seconds", Mock(side_effect=KeyboardInterrupt))
        assert main(SMALL) == 130
    assert f"Kept in {user_table('cpu')}" in capsys.readouterr().out
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    assert "permute fp32 blocks=2 in_features=12 tokens=8 padded_in=64: t=" in out
    assert len(gpu) == 2
    assert main(SMALL) == 0
    assert (len(gpu), capsys.readouterr().out) == (2, out)


def test_without_a_gpu_a_dry_run_lists_a_models_keys(tmp_path: Path, cache: Path, capsys: Any) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 100, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert main(["tune", "--model", str(tmp_path)]) == 2
    assert "no CUDA or ROCm GPU here to tune; --dry-run lists" in capsys.readouterr().err
    assert main(["tune", "--model", str(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for n, c in ((64, 64), (32, 64), (160, 64), (64, 160)):
        assert f"forward bf16 rank=4 blocks=2 out_features={n} in_features={c} tokens=2048" in out
    assert "0 kernels compiled." in out
    assert not cache.exists()
