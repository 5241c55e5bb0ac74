"""vLLM with our plugin against PEFT, adapter by adapter (`make test-vllm`)."""

import gc

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from smoa_kernels.serving import vllm as plugin

pytestmark = pytest.mark.slow
NAMES = [None, "smoa2", "smoa4", "unequal", "hira", "lora"]


class Engine:
    """A vLLM in this process, and the requests that it knows."""

    def __init__(self, base, adapters, **options):
        from vllm import LLM

        options = {"max_model_len": 128, "max_num_seqs": 32, "max_lora_rank": 8, "max_loras": 8, **options}
        options |= {
            "dtype": options.get("dtype", "float32"),
            "enforce_eager": True,
            "disable_log_stats": True,
        }
        self.engine = LLM(str(base), enable_lora=True, **options)
        self.ids, self.adapters = {}, adapters

    def request(self, name):
        from vllm.lora.request import LoRARequest

        number = self.ids.setdefault(name, len(self.ids) + 1)
        return None if name is None else LoRARequest(name, number, str(self.adapters[name]))

    def answers(self, prompts, tokens=8):
        """Greedy tokens and their log-probabilities of (adapter, token ids), in one batch."""
        from vllm import SamplingParams

        outputs = self.engine.generate(
            [{"prompt_token_ids": ids} for _, ids in prompts],
            SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True),
            lora_request=[self.request(name) for name, _ in prompts],
            use_tqdm=False,
        )
        found = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            steps = zip(output.outputs[0].logprobs, ids, strict=True)
            found.append((ids, [step[token].logprob for step, token in steps]))
        return found

    def close(self):
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.llm_engine.engine_core.shutdown()
        del self.engine
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture
def engine(base, adapters):
    engines = []

    def start(**options):
        engines.append(Engine(base, adapters, **options))
        return engines[0]

    yield start
    for one in engines:
        one.close()


def some_prompts(names, count=3):
    generator = torch.Generator().manual_seed(1)
    lengths = [5 + 7 * at for at in range(count)]
    return [
        (name, torch.randint(2, 256, (n,), generator=generator).tolist()) for n in lengths for name in names
    ]


def against_peft(base, adapters, prompts, answers):
    """The largest difference of log-probabilities from PEFT's, and how many tokens are not PEFT's best ones."""
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


@pytest.mark.parametrize("keep", ["1", "0"], ids=["kept", "unkept"])
def test_a_mixed_batch_gives_each_request_what_peft_gives(keep, engine, base, adapters, monkeypatch):
    monkeypatch.setenv(plugin.KEEP_VARIABLE, keep)
    prompts = some_prompts(NAMES)
    running = engine()
    answers = running.answers(prompts)
    worst, other = against_peft(base, adapters, prompts, answers)
    assert worst < 1e-4
    assert other == 0
    assert (
        len({tuple(tokens) for tokens, _ in running.answers([(name, prompts[0][1]) for name in NAMES])}) == 6
    )
