"""vLLM with our plugin against PEFT, adapter by adapter (`make test-vllm`)."""

import gc
import inspect
import itertools
import json
import random
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from packed_bases import write_adapter, write_base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from served import ALL, CONFIGS, save_adapter
from transformers import AutoModelForCausalLM

from smoa_kernels.peft import SMoAConfig, merge_to_folder
from smoa_kernels.serving import vllm as plugin
from smoa_kernels.serving.factors import read_served

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.slow
NAMES = [None, "smoa2", "smoa4", "unequal", "hira", "lora"]


def test_the_recorded_signatures_are_the_installed_versions():
    recorded = json.loads(Path(__file__).with_name("signatures.json").read_text())[plugin.VERSIONS[0]]
    found = {path: inspect.signature(getattr(*plugin._find(path))).parameters for path in plugin._METHODS}
    assert {path: " ".join(parameters) for path, parameters in found.items()} == recorded
    assert vllm.__version__.startswith(plugin.VERSIONS[0])


@pytest.fixture
def engine(base):
    """Starts an engine in this process, in place of the last; the test's end stops it."""

    def start(model=base, **options):
        stop()
        sizes = {"max_model_len": 128, "max_num_seqs": 66, "max_lora_rank": 8, "max_loras": 8}
        others = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": True, "enable_lora": True}
        running.append(vllm.LLM(str(model), **sizes | others | options))
        return running[-1]

    def stop():
        while running:
            running.pop().llm_engine.engine_core.shutdown()
            gc.collect()
            vllm.distributed.cleanup_dist_env_and_memory()

    running = []
    yield start
    stop()


def answers(engine, adapters, prompts, tokens=8):
    """Greedy tokens and their log-probabilities for pairs (adapter, token ids), in one batch."""
    requests = {
        name: vllm.lora.request.LoRARequest(name, number, str(path))
        for number, (name, path) in enumerate(adapters.items(), 1)
    }
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for _, ids in prompts],
        vllm.SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True),
        lora_request=[requests.get(name) for name, _ in prompts],
        use_tqdm=False,
    )
    found = []
    for (answer,) in (output.outputs for output in outputs):
        ids = list(answer.token_ids)
        found.append((ids, [step[token].logprob for step, token in zip(answer.logprobs, ids, strict=True)]))
    return found


def some_prompts(names, count=3):
    generator = torch.Generator().manual_seed(1)
    lengths = [5 + 7 * at for at in range(count)]

    def draw(n):
        return torch.randint(2, 256, (n,), generator=generator).tolist()

    return [(name, draw(n)) for n in lengths for name in names]


def against_peft(base, adapters, prompts, answers):
    """The largest difference from PEFT's log-probabilities, and the number of tokens that are not PEFT's best."""
    worst, other = 0.0, 0
    for name in {name for name, _ in prompts}:
        model = AutoModelForCausalLM.from_pretrained(base)
        model = model if name is None else PeftModel.from_pretrained(model, str(adapters[name]))
        for (own, ids), (tokens, scores) in zip(prompts, answers, strict=True):
            if own == name:
                with torch.no_grad():
                    logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
                found = logits.log_softmax(-1)[range(len(tokens)), tokens]
                worst = max(worst, (found - torch.tensor(scores)).abs().max().item())
                other += int((logits.argmax(-1) != torch.tensor(tokens)).sum())
    return worst, other


WAYS = {
    "W0 kept": {},
    "W0 not kept": {},
    "recorded": {},
    "compiled": {},
    "two processes": {"tensor_parallel_size": 2},
}


def compile_a_layer(model):
    """Compile a layer, as vLLM does on a GPU. On a CPU it compiles none if LoRA is enabled."""
    model.model.layers[1].self_attn.qkv_proj.compile(backend="aot_eager", fullgraph=True, dynamic=True)


@pytest.mark.parametrize("way", WAYS)
def test_each_request_of_a_mixed_batch_gets_pefts_output(way, engine, base, adapters, monkeypatch):
    """66 prompts in one batch; also with the operators that a CUDA graph would record, and with torch.compile."""
    monkeypatch.setenv(plugin.KEEP_VARIABLE, "0" if way == "W0 not kept" else "1")
    if way == "recorded":
        monkeypatch.setattr(plugin, "_is_recorded", lambda x: True)
    prompts, running = some_prompts(NAMES, count=11), engine(**WAYS[way])
    if way == "compiled":
        running.apply_model(compile_a_layer)
    worst, other = against_peft(base, adapters, prompts, answers(running, adapters, prompts))
    assert worst < 1e-4
    assert other == 0
    same = answers(running, adapters, [(name, prompts[0][1]) for name in NAMES])
    assert len({tuple(tokens) for tokens, _ in same}) == len(NAMES)


def test_each_request_gets_its_adapter_while_every_slot_is_taken(engine, base, adapters, tmp_path):
    """Two slots for six adapters, in several orders, so that each slot is filled by each method and filled again."""
    words = LoraConfig(r=8, lora_alpha=16, target_modules=[*ALL, "embed_tokens", "lm_head"])
    adapters = {**adapters, "words": save_adapter(base, words, tmp_path / "words")}
    running, prompts = engine(max_loras=2, max_cpu_loras=3), some_prompts([*NAMES, None, "words"], count=2)
    for seed in range(4):
        order = random.Random(seed).sample(prompts, len(prompts))
        worst, other = against_peft(base, adapters, order, answers(running, adapters, order))
        assert worst < 1e-4
        assert other == 0


def test_a_number_may_get_an_adapter_of_another_method(engine, base, adapters):
    """vLLM keeps a step's mapping while the numbers of its adapters stay."""
    running, prompt = engine(max_loras=1), [7]
    for name in ("lora", "smoa4", "lora", "hira"):
        running.llm_engine.remove_lora(1)
        found = answers(running, {name: adapters[name]}, [(name, prompt)])
        worst, _ = against_peft(base, adapters, [(name, prompt)], found)
        assert worst < 1e-4, name


def test_the_policy_that_answers_is_the_one_that_was_trained(engine, base, tmp_path):
    """Train, write, load in place, compare; a folder that vLLM refuses leaves the last policy."""
    torch.manual_seed(0)
    config = SMoAConfig(r=8, num_blocks=2, target_modules=ALL, init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    running, folder, seen = engine(), tmp_path / "policy", []
    [(_, prompt)] = some_prompts([None], count=1)
    for _ in range(4):
        model.save_pretrained(folder)
        request = plugin.reload(running, folder)
        [(tokens, scores)] = answers(running, {request.lora_name: folder}, [("policy", prompt)])
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        trained = logits.log_softmax(-1)[range(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(scores), trained, rtol=0, atol=1e-4)
        seen.append((tokens, scores))
        trained.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(one != other for one, other in itertools.pairwise(seen))
    path = shutil.copytree(folder, tmp_path / "bad") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="truncated or corrupt"):
        plugin.reload(running, tmp_path / "bad")
    assert answers(running, {"policy": folder}, [("policy", prompt)]) == seen[-1:]


def test_a_new_engine_keeps_nothing_of_the_last(engine):
    layers = []
    engine().apply_model(lambda model: layers.extend(map(weakref.ref, model.modules())))
    engine()
    assert all(layer() is None for layer in layers)


@pytest.mark.parametrize(
    "names", [["smoa4"], [None, "smoa4", "hira", "smoa2"]], ids=["one adapter", "several"]
)
def test_bf16_decode_keeps_an_update_of_a_thousandth(names, engine, base, tmp_path):
    """An update of 1/1000 of W0. Adding it to a rounded output would lose half of it (docs/numerics.md)."""
    adapters = {name: save_adapter(base, CONFIGS[name](), tmp_path / name, 0.013) for name in names if name}
    running, seen = engine(dtype="bfloat16"), []

    def watch(model):
        layer = model.model.layers[1].mlp.down_proj
        layer.register_forward_hook(lambda module, given, output: seen.append((*given, output[0])))

    running.apply_model(watch)
    prompts = some_prompts(names, count=12 // len(names))
    answers(running, adapters, prompts, tokens=24)
    path = "model.layers.1.mlp.down_proj"
    weight = load_file(base / "model.safetensors")[f"{path}.weight"].bfloat16().double()
    factors = {name: read_served(folder).layers[path] for name, folder in adapters.items()}
    delta = {name: weight * (found.B.double() @ found.A.double()) for name, found in factors.items()}
    sizes = [float(own.norm() / weight.norm()) for own in delta.values()]
    assert all(5e-4 < size < 2e-3 for size in sizes), sizes
    kept, whole = 0.0, 0.0
    for x, y in seen:
        if len(x) == len(prompts):  # a decode step, in the prompts' order
            for (name, _), row, output in zip(prompts, x.double(), y.double(), strict=True):
                if name is not None:
                    true = row @ delta[name].T
                    kept += float((output - row @ weight.T) @ true)
                    whole += float(true @ true)
    assert 0.95 < kept / whole < 1.05, (kept / whole, len(seen))


def test_lora_and_base_are_unchanged_by_the_plugin(engine, adapters, monkeypatch):
    """The same bits, although our adapters are loaded."""
    running, prompts = engine(), some_prompts([None, "lora"])
    answers(running, adapters, some_prompts(["smoa2"]))
    ours = answers(running, adapters, prompts)
    for path in plugin._METHODS:
        owner, name = plugin._find(path)
        if "apply" in name or "mapping" in name or "logits" in name:
            monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    running.reset_prefix_cache()
    assert answers(running, adapters, prompts) == ours


def test_a_model_merged_into_int4_answers_as_its_adapter_beside_the_base(engine, base, tmp_path):
    """vLLM's own kernel of four bits, which takes bf16, against PEFT in float32."""
    names = "int4", "adapter", "merged", "float32"
    int4, adapter, merged, dequantised = (tmp_path / name for name in names)
    model = AutoModelForCausalLM.from_pretrained(base)
    packed = write_base(int4, "compressed-tensors int4", model=model)
    for name, layer in packed.items():
        model.get_submodule(name).weight.data = layer.weight
    model.save_pretrained(dequantised)
    write_adapter(adapter, packed, scale=0.1)
    merge_to_folder(int4, adapter, merged)
    prompts = some_prompts(["merged"])
    running = engine(merged, dtype="bfloat16", enable_lora=False, skip_tokenizer_init=True)
    found = answers(running, {}, prompts)
    worst, _ = against_peft(dequantised, {"merged": adapter}, prompts, found)
    without, _ = against_peft(dequantised, {}, [(None, ids) for _, ids in prompts], found)
    assert worst < 0.1 * without, (worst, without)


def quantise(base, folder):
    """An int8 model with a scale per channel, as compressed-tensors stores it, and its values in float32."""
    state, dequantised = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        dequantised[name] = state[name] = tensor
        if "_proj" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            state[name] = (tensor / scale).round().to(torch.int8)
            state[name.replace("weight", "weight_scale")] = scale
            dequantised[name] = state[name].float() * scale
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    scheme = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    scheme |= {"quantization_status": "compressed", "config_groups": {"group_0": group}}
    for path, tensors in ((folder / "int8", state), (folder / "float32", dequantised)):
        shutil.copytree(base, path)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    path = folder / "int8" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": scheme}))
    return folder / "int8", folder / "float32"


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(),
    reason="without AMX vLLM's kernel drops the int8 weight, and its own LoRA then fails to load",
)
def test_an_int8_base_differs_from_its_dequantised_values_by_its_own_rounding(
    engine, adapters, base, tmp_path
):
    int8, dequantised = quantise(base, tmp_path)
    running, worst = engine(int8, dtype="bfloat16"), {}  # the type that this kernel requires
    for name in (None, "smoa2", "smoa4", "hira"):
        prompts = some_prompts([name])
        found = answers(running, adapters, prompts, tokens=3)
        worst[name], _ = against_peft(dequantised, adapters, prompts, found)
    assert all(worst[name] < 3 * worst[None] for name in worst), worst
