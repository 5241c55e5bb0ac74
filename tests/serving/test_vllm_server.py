"""`vllm serve` with our plugin over HTTP: adapters are loaded and unloaded while it runs (`make test-vllm`)."""

import json
import shutil
import urllib.error
import urllib.request

import pytest
import serve
from served import CONFIGS, save_adapter, save_model

from smoa_kernels.peft import SMoAConfig

pytestmark = pytest.mark.slow
PROMPT = " ".join(f"w{word}" for word in range(3, 12))


def post(path, **body):
    """The status and the text of a response."""
    request = urllib.request.Request(
        f"{serve.URL}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def completion(model):
    status, text = post("/v1/completions", model=model, prompt=PROMPT, max_tokens=6, temperature=0)
    assert status == 200, text
    return json.loads(text)["choices"][0]["text"]


@pytest.fixture(scope="module")
def server(base, adapters):
    """One slot on the device and two on the host, so that most requests evict an adapter."""
    modules = {"smoa": adapters["smoa4"], "lora": adapters["lora"]}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        environment.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with serve.server(str(base), modules, "--max-lora-rank 8 --max-loras 1 --max-cpu-loras 2"):
            yield


@pytest.fixture(scope="module")
def before(server):
    return {model: completion(model) for model in ("base", "smoa", "lora")}


def test_adapters_are_loaded_and_unloaded_while_it_runs(before, adapters):
    assert len(set(before.values())) == 3
    assert post("/v1/load_lora_adapter", lora_name="hira", lora_path=str(adapters["hira"]))[0] == 200
    first = completion("hira")
    assert first not in before.values()
    assert {model: completion(model) for model in before} == before
    assert completion("hira") == first
    assert post("/v1/unload_lora_adapter", lora_name="hira")[0] == 200
    assert post("/v1/completions", model="hira", prompt=PROMPT)[0] == 404


def truncated(folder, base, adapters):
    shutil.copytree(adapters["smoa2"], folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_weights(folder, base, adapters):
    shutil.copytree(adapters["smoa2"], folder)
    (folder / "adapter_model.safetensors").unlink()


def another_model(folder, base, adapters):
    wider = save_model(folder.parent / "wider", hidden_size=192, num_attention_heads=6)
    save_adapter(wider, CONFIGS["smoa2"](), folder)


def too_many_ranks(folder, base, adapters):
    save_adapter(base, SMoAConfig(r=16, num_blocks=4, target_modules=["q_proj"]), folder)


def the_head(folder, base, adapters):
    save_adapter(base, SMoAConfig(r=4, num_blocks=2, target_modules=["lm_head"]), folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda *_: None, "bad"),
        (without_weights, "there is no adapter_model.safetensors"),
        (truncated, "truncated or corrupt"),
        (another_model, "trained over another model"),
        (too_many_ranks, "rank 16 is greater than max_lora_rank 8"),
        (the_head, "lm_head"),
    ],
    ids=["no folder", "no weights", "truncated", "another model", "too many ranks", "the head"],
)
def test_a_bad_adapter_is_refused_and_the_others_are_served(make, message, before, base, adapters, tmp_path):
    make(tmp_path / "bad", base, adapters)
    status, text = post("/v1/load_lora_adapter", lora_name="bad", lora_path=str(tmp_path / "bad"))
    assert 400 <= status <= 500
    assert message in text
    assert {model: completion(model) for model in before} == before
