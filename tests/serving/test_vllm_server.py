"""`vllm serve` with our plugin over HTTP: adapters are loaded and unloaded while it runs (`make test-vllm`)."""

import shutil
from pathlib import Path
from urllib.error import HTTPError

import pytest
import serve
from served import ALL, save_adapter, save_model

from smoa_kernels.peft import SMoAConfig

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.slow
PROMPT = " ".join(f"w{word}" for word in range(3, 12))


def answers(*models):
    return {model: serve.ask(model, PROMPT) for model in models}


@pytest.fixture(scope="module")
def before(base, adapters):
    """A server's answers. One slot on the device and two on the host, so that most requests evict an adapter."""
    modules = {"smoa": adapters["smoa4"], "lora": adapters["lora"]}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        environment.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with serve.server(str(base), modules, "--max-lora-rank 8 --max-loras 1 --max-cpu-loras 2"):
            yield answers("base", "smoa", "lora")


def test_adapters_are_loaded_and_unloaded_while_it_runs(before, adapters):
    assert len(set(before.values())) == 3
    serve.post("/v1/load_lora_adapter", lora_name="hira", lora_path=str(adapters["hira"]))
    first = answers("hira")["hira"]
    assert first not in before.values()
    assert answers(*before, "hira") == {**before, "hira": first}
    serve.post("/v1/unload_lora_adapter", lora_name="hira")
    with pytest.raises(HTTPError, match="404"):
        answers("hira")


def spoilt(spoil):
    """An adapter whose file of weights is damaged."""

    def make(folder, base, adapters):
        shutil.copytree(adapters["smoa2"], folder)
        spoil(folder / "adapter_model.safetensors")

    return make


def trained(r=8, targets=ALL, **other):
    """An adapter that this server cannot take; `other` says of which model it is."""

    def make(folder, base, adapters):
        over = save_model(folder.parent / "other", **other) if other else base
        save_adapter(over, SMoAConfig(r=r, target_modules=targets, strict_base=True), folder)

    return make


BAD = {
    "no folder": (lambda *_: None, "bad"),
    "no weights": (spoilt(Path.unlink), "there is no adapter_model.safetensors"),
    "truncated": (spoilt(lambda path: path.write_bytes(path.read_bytes()[:-100])), "truncated or corrupt"),
    "another model": (trained(hidden_size=192, num_attention_heads=6), "trained on another model"),
    "another base": (trained(seed=1), "trained on another base weight in 14 layers"),
    "too many ranks": (trained(r=16), "rank 16 is greater than max_lora_rank 8"),
    "the head": (trained(targets=["lm_head"]), "lm_head"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_refused_and_the_others_are_served(name, before, base, adapters, tmp_path):
    make, message = BAD[name]
    make(tmp_path / "bad", base, adapters)
    with pytest.raises(HTTPError) as refused:
        serve.post("/v1/load_lora_adapter", lora_name="bad", lora_path=str(tmp_path / "bad"))
    assert 400 <= refused.value.code <= 500
    assert message in refused.value.read().decode()
    assert answers(*before) == before
