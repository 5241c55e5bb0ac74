"""Faults around a step, with real processes and real small file systems: nothing that was saved is ever lost.

Processes are killed while they save; disks fill up; the cache folder cannot be written to; two processes share it.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from test_distributed_example import losses
from test_finetune_example import RunFolder, animals, smollm2, start, tiny_llama  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent / "tuning"))
from peft import PeftModel, get_peft_model
from torch import nn
from tuning_cases import PERMUTE, permute_entry

from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft.inspection import inspect_adapter

WEIGHTS = "adapter_model.safetensors"
HERE = Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE / "tuning"), str(HERE.parent), str(HERE.parent / "examples")]


def python(program: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """A process of its own, that finds what these tests find."""
    path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
    )


def kill_at(process: "subprocess.Popen[str]", line: str) -> None:
    """SIGKILL as soon as the process says `line`."""
    assert process.stdout is not None
    with process:
        for said in process.stdout:
            if said == f"{line}\n":
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait(timeout=60)
        assert process.returncode == -signal.SIGKILL, process.stderr and process.stderr.read()


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may become larger, as on a disk that is full: writing beyond it is an error of the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system in memory."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"a file system may not be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(params=["file limit", "small disk"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, object]]:
    """A folder, and a context in which nothing of more than a few kilobytes can be written there."""
    if request.param == "file limit":
        yield tmp_path, lambda: file_limit(2000)
        return
    with mounted(tmp_path / "disk", "size=1m"):

        @contextmanager
        def filled() -> Iterator[None]:
            filler = tmp_path / "disk" / "filler"
            with filler.open("wb", buffering=0) as stream, suppress(OSError):
                while True:
                    stream.write(bytes(4096))
            yield
            filler.unlink()

        yield tmp_path / "disk", filled


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Saving an adapter


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 20))


def adapted(r: int, **settings: float) -> PeftModel:
    config = SMoAConfig(r=r, num_blocks=2, target_modules=["0"], init_weights=False, **settings)
    return get_peft_model(base(), config)


SAVING = """
import time, test_lost_work
from pathlib import Path
def half(tensors, filename, metadata=None):
    Path(filename).write_bytes(b"half")
    print("saving", flush=True)
    time.sleep(60)
import peft.peft_model
peft.peft_model.safe_save_file = half
test_lost_work.adapted(8).save_pretrained({folder!r})
"""


def test_kill_while_an_adapter_is_saved(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted(4).save_pretrained(folder)
    before = contents(folder)
    kill_at(python(SAVING.format(folder=str(folder))), "saving")
    assert (
        before.items() <= contents(folder).items()
    )  # and what the killed one had begun, in a folder of its own
    assert all(name in before or name.startswith(".saving-") for name in contents(folder))
    loaded = PeftModel.from_pretrained(base(), folder)
    assert loaded.peft_config["default"].r == 4
    adapted(8).save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base(), folder)
    assert loaded.peft_config["default"].r == 8


MOVING = """
import os, time, test_lost_work
from pathlib import Path
folder, moved, replace = Path({folder!r}), [], os.replace
def slow(source, place):
    if Path(place).parent == folder:
        if len(moved) == {count}:
            print("moving", flush=True)
            time.sleep(60)
        moved.append(place)
    replace(source, place)
os.replace = slow
model = test_lost_work.adapted(4, smoa_alpha=3.0)
model.base_model.model[0].smoa_B["default"].data.mul_(2)
model.save_pretrained({folder!r})
"""


@pytest.mark.parametrize("count", [0, 1, 2])
def test_kill_between_the_files_of_an_adapter(count: int, tmp_path: Path) -> None:
    """Of a configuration and weights that no shape tells apart: refused together, and the rest is found."""
    folder = tmp_path / "adapter"
    adapted(4).save_pretrained(folder)
    before = contents(folder)
    kill_at(python(MOVING.format(folder=str(folder), count=count)), "moving")
    after = {name: data for name, data in contents(folder).items() if not name.startswith(".saving-")}
    assert after.keys() == before.keys()
    new = sorted(name for name in after if after[name] != before[name])
    assert "adapter_config.json" not in new  # which comes last
    (left,) = folder.glob(".saving-*/adapter_config.json")
    if WEIGHTS in new:
        with pytest.raises(ValueError, match=f"{folder}/{WEIGHTS} is not .* whole once {left} is moved here"):
            PeftModel.from_pretrained(base(), folder)
    else:
        assert PeftModel.from_pretrained(base(), folder).peft_config["default"].smoa_alpha is None
        os.replace(left.parent / WEIGHTS, folder / WEIGHTS)
    os.replace(left, folder / "adapter_config.json")
    loaded = PeftModel.from_pretrained(base(), folder)
    assert loaded.peft_config["default"].smoa_alpha == 3.0
    assert loaded.base_model.model[0].scaling["default"] == 3.0 / 4


def test_weights_that_are_not_the_configurations(tmp_path: Path) -> None:
    """Another tool's, or damaged ones that no shape tells apart: they are taken, not without a word."""
    for name in ("one", "two"):
        adapted(4).save_pretrained(tmp_path / name)
    weights, config = tmp_path / "one" / WEIGHTS, tmp_path / "one" / "adapter_config.json"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads(config.read_text())["weights_sha256"] == digest
    data = bytearray(weights.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first factor's first bit
    weights.write_bytes(data)
    for read in (lambda folder: PeftModel.from_pretrained(base(), folder), inspect_adapter):
        with pytest.warns(UserWarning, match=f"{weights} is not the file .*Another tool wrote it"):
            read(tmp_path / "one")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "two")
    loaded.save_pretrained(tmp_path / "one")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads(config.read_text())["weights_sha256"] == digest


def test_no_room_for_an_adapter(full_disk: tuple[Path, object]) -> None:
    place, full = full_disk
    folder = place / "adapter"
    adapted(2).save_pretrained(folder)
    before = contents(folder)
    with (
        full(),
        pytest.raises(OSError, match=r"cannot save to .*adapter, which is as it was: .*|No space|too large"),
    ):  # type: ignore[operator]
        adapted(64).save_pretrained(folder)
    assert contents(folder) == before
    adapted(4).save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base(), folder)
    assert loaded.peft_config["default"].r == 4


# The fine-tuning example


FINETUNING = """
import os, time, test_distributed_example
from pathlib import Path
import torch.distributed.checkpoint as dcp
save = dcp.save
def slow(state, checkpoint_id):
    save(state, checkpoint_id=checkpoint_id)
    if checkpoint_id.name == "step-4.partial":
        next(p for p in checkpoint_id.iterdir() if p.suffix == ".distcp").write_bytes(b"half")
        print("saving", flush=True)
        time.sleep(60)
dcp.save = slow
test_distributed_example.losses(None, Path({model!r}), Path({data!r}), Path({folder!r}))
"""


def test_kill_while_a_checkpoint_is_written(tiny_llama: Path, animals: Path, tmp_path: Path) -> None:  # noqa: F811
    job = (tiny_llama, animals)
    whole = losses(None, *job, tmp_path / "whole")
    program = FINETUNING.format(model=str(tiny_llama), data=str(animals), folder=str(tmp_path / "cut"))
    kill_at(python(program), "saving")
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"step-2", "step-4.partial"}
    assert losses(None, *job, tmp_path / "cut", "resume") == whole  # every bit
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["step-6"]


def test_no_room_for_a_checkpoint(
    full_disk: tuple[Path, object],
    tiny_llama: Path,  # noqa: F811
    animals: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    place, full = full_disk
    job = (tiny_llama, animals)
    whole = losses(None, *job, tmp_path / "whole")
    assert losses(None, *job, place / "cut", dies_after=3) == []
    before = contents(place / "cut")
    with full(), pytest.raises(OSError, match=r"cannot write the checkpoint .*step-4|No space|too large"):  # type: ignore[operator]
        losses(None, *job, place / "cut", "resume")
    assert before.items() <= contents(place / "cut").items()
    assert losses(None, *job, place / "cut", "resume") == whole


DYING = """
import os, signal, sys, checkpoints, finetune
save = checkpoints.Checkpoints.save
def last(*arguments):
    save(*arguments)
    print("saved", flush=True)
    signal.pause()
checkpoints.Checkpoints.save = last
sys.exit(finetune.main())
"""


def test_no_room_for_what_the_command_writes(
    full_disk: tuple[Path, object],
    tiny_llama: Path,  # noqa: F811
    animals: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`finetune.py` ends in one line that names the place, and what was saved before is as it was."""
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(name)  # what counts the lines of child processes has no room for its file either
    place, full = full_disk
    output = place / "run"
    job = ("--model", tiny_llama, "--data", animals, "--output", output, "--steps", 4, "--r", 4)
    often = ("--checkpoint-every", 2)
    kill_at(python(DYING, *job, *often), "saved")
    before = contents(output)
    assert any(name.startswith("checkpoints/step-2/") for name in before)
    for options, words in ((often, "checkpoints/step-4"), ((), "cannot save the adapter in")):
        with full():  # type: ignore[operator]
            process = start(*job, *options, "--resume")
            _, err = process.communicate(timeout=300)
        assert process.returncode == 1, err
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        assert words in line
        assert str(output) in line
        assert "Traceback" not in err
        assert contents(output) == before


CONVERTING = """
import os, sys, time, smollm2
from pathlib import Path
def convert(gguf, folder):
    (folder / "config.json").write_text(sys.argv[0] * 2)
    print("converting", flush=True)
    sys.stdin.readline()
    (folder / "weights").write_text("all")
smollm2.locate = lambda: (Path("model.gguf"), "1.0")
smollm2.convert = convert
print(smollm2.cached_model())
"""


def test_two_processes_convert_one_model(tmp_path: Path) -> None:
    path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "SMOA_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERTING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "converting\n"  # both are at it
    places = {process.communicate("go\n", timeout=60)[0] for process in processes}
    (folder,) = tmp_path.iterdir()
    assert places == {f"{folder}\n"}
    assert (folder / "weights").read_text() == "all"


# The cache folder


@pytest.mark.parametrize("way", ["read-only disk", "a file in its place"])
def test_a_cache_that_cannot_be_written_to(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smoa_kernels.tuning import lookup
    from smoa_kernels.tuning.store import read, update, user_table

    cache = tmp_path / "cache"
    monkeypatch.setenv("SMOA_CACHE", str(cache))
    monkeypatch.setattr(smollm2, "locate", lambda: (tmp_path / "model.gguf", "1.0"))

    def check() -> None:
        lookup.forget()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert read(user_table("cpu")) == {}
        for write in (lambda: update(user_table("cpu"), [permute_entry()]), smollm2.cached_model):
            with pytest.raises(OSError, match=str(cache)):
                write()
        with python("from smoa_kernels.cli import main; main(['info'])", SMOA_CACHE=str(cache)) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "eager" in out

    if way == "a file in its place":
        cache.write_text("mine")
        check()
        assert cache.read_text() == "mine"
        return
    with mounted(cache, "size=64k,ro"):
        check()
        assert list(cache.iterdir()) == []


def test_no_room_for_a_tuning_table(full_disk: tuple[Path, object], monkeypatch: pytest.MonkeyPatch) -> None:
    from smoa_kernels.tuning.store import read, update, user_table

    place, full = full_disk
    monkeypatch.setenv("SMOA_CACHE", str(place))
    table = user_table("cpu")
    update(table, [permute_entry()])
    before = contents(table.parent)
    many = [permute_entry(PERMUTE._replace(tokens=1 << step)) for step in range(10)]
    with full(), pytest.raises(OSError, match=r"No space left|File too large"):  # type: ignore[operator]
        update(table, many)
    assert contents(table.parent) == before
    update(table, many)
    assert len(read(table)) == 10
