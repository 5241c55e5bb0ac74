"""`smoa-kernels merge` and `merge_to_folder`: options, refusals, interruptions, files, and peak memory."""

import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from adapted import assert_refused, config, edit_weights, loaded, trained
from packed_bases import write_adapter, write_base, write_gguf
from peft import LoraConfig, get_peft_model
from processes import killed
from tiny_models import tiny_llama

from benchmarks.merged_model import merge
from smoa_kernels.cli import main
from smoa_kernels.peft import merge_to_folder, merged_weights


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda base, adapter: tiny_llama(seed=1).save_pretrained(base), "trained on another base weight"),
        (lambda base, adapter: tiny_llama(intermediate_size=40).save_pretrained(base), "has shape (32, 40)"),
        (lambda base, adapter: edit_weights(adapter, add("score.weight", 2, 32)), "stores no score.weight"),
        (lambda base, adapter: edit_weights(adapter, add("lm_head.weight", 66, 32)), "If tokens were added"),
        (
            lambda base, adapter: edit_weights(adapter, spoilt),
            "down_proj.weight: the merged tensor holds NaN",
        ),
        (lambda base, adapter: (base / "config.json").unlink(), "there is no config.json"),
        (lambda base, adapter: (base / "model.safetensors").unlink(), "there are no safetensors files"),
        (lambda base, adapter: lora(adapter), "an adapter of the method 'LORA'"),
    ],
)
def test_refused_by_name_and_nothing_is_left(prepare, message, folders, tmp_path, capsys):
    prepare(*folders)
    before = sorted(tmp_path.iterdir())

    def command(*given):
        return main(["merge", *map(str, given)])

    assert_refused(capsys, command, message, *folders, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_options_of_the_command(folders, tmp_path):
    def merged(name, *given):
        out = tmp_path / name
        assert main(["merge", *map(str, folders), str(out), *given]) == 0
        return files(out)

    def files(folder):
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}

    merge_to_folder(*folders, tmp_path / "function", dtype=torch.bfloat16)
    found = merged("command", "--dtype", "bfloat16")
    assert found == files(tmp_path / "function")
    assert found != merged("without")


@pytest.fixture
def sharded(folders):
    """The same, with the base in several files."""
    (folders[0] / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folders[0], max_shard_size="10KB")
    return folders


def add(name, *shape):
    return lambda state: state.update({f"base_model.model.{name}": torch.zeros(shape)})


def spoilt(state):
    state["base_model.model.model.layers.1.mlp.down_proj.smoa.B"][0] = torch.nan


def lora(adapter):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("at", "dtype"), [(0, None), (7, None), (21, None), (None, None), (None, torch.bfloat16)]
)
def test_a_merge_that_fails(at, dtype, exists, sharded, tmp_path, monkeypatch):
    """Before the first tensor, in between, after the last, or in a write: no file remains, not even a hidden folder."""
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    before = sorted(tmp_path.rglob("*"))

    def interrupt(done, total):
        assert total == 21
        if at is not None and done >= at:
            raise KeyboardInterrupt

    failure = pytest.raises(KeyboardInterrupt)
    if at is None:
        written = "save_file" if dtype else "shutil.copyfile"
        monkeypatch.setattr(f"smoa_kernels.adapter_folder.merging.{written}", full)
        failure = pytest.raises(OSError, match=f"cannot save to {out}, which is as it was: .*No space left")
    with failure:
        merge_to_folder(*sharded, out, dtype=dtype, progress=interrupt)
    assert sorted(tmp_path.rglob("*")) == before


def merge_until_killed(base, adapter, out):
    kill = lambda done, total: done >= 9 and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    merge_to_folder(base, adapter, out, progress=kill)


@pytest.mark.parametrize("kind", ["plain", "GPTQ", "Q4_0"])
def test_killed(kind, sharded, tmp_path):
    """A killed merge leaves only a hidden folder, which holds no model; the next merge ignores it."""
    base, adapter = sharded
    if kind != "plain":
        base, adapter = tmp_path / "base.gguf", tmp_path / "grouped"
        write_adapter(
            adapter, write_gguf(base) if kind == "Q4_0" else write_base(base := tmp_path / "packed", kind)
        )
    before, out = {*tmp_path.iterdir()}, tmp_path / "out"
    killed(merge_until_killed, base, adapter, out)
    (left,) = {*tmp_path.iterdir()} - before
    assert left.name.startswith(".out.saving-")
    assert list(left.iterdir())
    assert not (left / "config.json").exists()
    report = merge_to_folder(base, adapter, out)
    assert {*report.files} <= {path.name for path in out.iterdir()}


def test_files_that_the_adapter_does_not_change_are_copied(sharded, tmp_path):
    """Byte for byte; but not a file that is cut short, or that lacks what the index says it holds."""
    base, adapter = sharded
    report = merge_to_folder(base, adapter, tmp_path / "out")

    def read(folder, name):
        return (folder / name).read_bytes()

    same = [name for name in report.files if read(base, name) == read(tmp_path / "out", name)]
    assert 0 < len(same) < len(report.files) == len(list(base.glob("*.safetensors")))
    whole = (base / same[0]).read_bytes()
    (base / same[0]).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{same[0]} is truncated or corrupt"):
        merge_to_folder(base, adapter, tmp_path / "other")
    index = base / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace(same[0], f"../{same[0]}"))
    with pytest.raises(ValueError, match="is not an index of safetensors files in its folder"):
        merge_to_folder(base, adapter, tmp_path / "other")
    index.write_text(text)
    (base / same[0]).write_bytes((base / same[1]).read_bytes())
    with pytest.raises(
        ValueError, match=f"{same[0]} lacks .*, which model.safetensors.index.json says it holds"
    ):
        merge_to_folder(base, adapter, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_embedding_that_was_saved_with_its_adapter(tmp_path):
    """PEFT saves and loads its W0, in which rows of new tokens may differ from the base's, where they are drawn."""
    model, tokens = tiny_llama(), torch.arange(64)[None]
    with torch.no_grad():
        model.model.embed_tokens.weight[-1:] *= 1.1
    model = trained(model, config(target_modules=["embed_tokens", "q_proj"]), tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "out")(tokens).logits, model(tokens).logits)


def test_a_folder_that_another_process_fills_meanwhile_is_left_alone(folders, tmp_path):
    (tmp_path / "out").mkdir()

    def fill(done, total):
        (tmp_path / "out" / "theirs").touch()

    with pytest.raises(OSError, match=r"cannot save to .*out, which is as it was: .*not empty"):
        merge_to_folder(*folders, tmp_path / "out", progress=fill)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_files_beside_the_weights(folders, tmp_path, capsys):
    base, adapter = folders
    copied, left = ("tokenizer.json", "chat_template.jinja", "LICENSE"), ("README.md", "pytorch_model.bin")
    for name in (*copied, *left, "adapter_config.json", "adapter_model.safetensors", ".hidden"):
        (base / name).write_text("base")
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("base")
    (base / "consolidated.safetensors").write_text("no model")  # transformers reads only model.safetensors
    assert main(["merge", str(base), str(adapter), str(tmp_path / "one")]) == 0
    assert "21 tensors, 4 of them changed" in capsys.readouterr().out
    assert {path.relative_to(tmp_path / "one").as_posix() for path in (tmp_path / "one").rglob("*.*")} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "chat_template.jinja", "original/params.json"),
    }
    assert (tmp_path / "one" / "LICENSE").exists()
    for name in ("tokenizer_config.json", "chat_template.jinja", "training_args.bin"):
        (adapter / name).write_text("run")
    merge_to_folder(base, adapter, tmp_path / "two")
    two = {path.name: path.read_bytes() for path in (tmp_path / "two").glob("*") if path.is_file()}
    assert two["chat_template.jinja"] == two["tokenizer_config.json"] == b"run"
    assert two["tokenizer.json"] == b"base"
    assert not {"adapter_config.json", "README.md", "training_args.bin"} & set(two)
    modes = {path.stat().st_mode for path in (tmp_path / "two").glob("*.*")}
    assert len(modes) == 1  # safetensors creates files that only their owner can read


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_a_shard_and_a_layer(tmp_path):
    """Measured in a process of its own: far below the model's size, which is eight shards."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 128}
    model = tiny_llama(**sizes).bfloat16()
    layer = 2 * 2048 * 512
    model.save_pretrained(tmp_path / "base", max_shard_size=8 * layer)
    settings = config(target_modules=["up_proj", "down_proj"], block_order="contiguous")
    trained(model, settings, tmp_path / "adapter")
    places = (tmp_path / name for name in ("base", "adapter", "out"))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        grown, _, files = fresh.submit(merge, "merge_to_folder", "", *places).result()
    assert len(files) >= 8
    # Per layer: W0 as stored, W0 and W_eff in float32, W_eff rounded, and the product for the sketch.
    print("peak over a shard:", grown * 1e9 / (8 * layer))
    assert grown * 1e9 < 8 * layer + 10 * layer + 48 * 2**20


def test_the_places_of_a_merge(folders, tmp_path, monkeypatch):
    """A new or empty folder, also behind a link, that can be renamed to; others are refused before the work."""
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (tmp_path / "link").symlink_to(empty)
    merge_to_folder(*folders, tmp_path / "link")
    assert loaded(empty)
    monkeypatch.chdir(other)
    for place in (".", other):
        with pytest.raises(ValueError, match="mount point or the working folder"):
            merge_to_folder(*folders, place)
    assert not list(other.iterdir())
    for place in (folders[0], empty):
        with pytest.raises(ValueError, match="out must be a new or an empty folder"):
            merge_to_folder(*folders, place)
    assert dict(merged_weights(*folders))  # the base is undamaged
