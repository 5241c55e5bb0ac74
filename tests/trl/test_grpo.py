"""GRPOTrainer with a stand-in for the vLLM server: a plain model that receives weights and generates text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import PLAIN, QUESTIONS, adapter, assert_base_is, base_state, made
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation

from smoa_kernels.definition.thresholds import round_weight

Weights = dict[str, Tensor]


class Server:
    """Replaces `VLLMClient`. Like vLLM with SMoA, it knows nothing of adapters."""

    def __init__(self, base: Path) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.sent: list[Weights] = []

    def init_communicator(self, device: torch.device) -> None:
        pass

    def reset_prefix_cache(self) -> None:
        pass

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(
        self, announced: list[tuple[str, str, list[int]]], tensors: Iterable[tuple[str, Tensor]]
    ) -> None:
        received = {name: tensor.clone() for name, tensor in tensors}
        assert announced == [
            (k, str(v.dtype).removeprefix("torch."), list(v.shape)) for k, v in received.items()
        ]
        missing, unexpected = self.model.load_state_dict(received, strict=False)
        assert not missing
        assert not unexpected
        self.sent.append(received)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], n: int, max_tokens: int, **_: Any) -> dict[str, Any]:
        completions, chances = [], []
        for prompt in prompts:
            sampled = {"do_sample": True, "top_k": 0, "max_new_tokens": max_tokens, "num_return_sequences": n}
            returned = {"output_logits": True, "return_dict_in_generate": True}
            output = self.model.generate(torch.tensor([prompt]), **sampled, **returned)
            logs = torch.stack(output.logits, 1).log_softmax(-1)
            for row, log in zip(output.sequences[:, len(prompt) :], logs, strict=True):
                ended = (row == self.model.config.eos_token_id).nonzero()[:1, 0].tolist()
                tokens = row.tolist()[: ended[0] + 1] if ended else row.tolist()
                completions.append(tokens)
                chances.append([[log[i, token].item()] for i, token in enumerate(tokens)])
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": chances}


def reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    return [float(sum(c.isdigit() for c in completion[0]["content"])) for completion in completions]


@pytest.fixture
def server(base: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(base)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *_: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", lambda **_: made)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_sends_merged_weights_and_leaves_the_base_bit_for_bit(
    base: Path, tmp_path: Path, server: Server, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    server.model.to(dtype)
    trainer = made(
        GRPOTrainer,
        GRPOConfig,
        model,
        tmp_path,
        [{"prompt": [{"role": "user", "content": q}]} for q in QUESTIONS],
        reward_funcs=reward,
        peft_config=adapter(init_weights=False, smoa_alpha=0.5),
        use_vllm=True,
        vllm_mode="server",
        num_generations=3,
        max_completion_length=8,
        beta=0.04,  # needs a reference: the model without the adapter
        learning_rate=5e-2,
    )
    before = base_state(trainer.model)
    expected: list[Weights] = []
    sync = trainer.vllm_generation.sync_weights

    def checked() -> None:
        """Compute the expected weights independently, then check that sending leaves the base unchanged."""
        merged = {}
        for name, module in trainer.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                W_eff = module.get_base_layer().weight + module.get_delta_weight("default")
                merged[name.removeprefix("base_model.model.") + ".weight"] = round_weight(W_eff, dtype)
        expected.append({key: value.clone() for key, value in (original | merged).items()})
        sync()
        assert_base_is(trainer.model, before)
        assert not any(getattr(module, "merged", False) for module in trainer.model.modules())

    trainer.vllm_generation.sync_weights = checked
    trainer.train()
    assert len(server.sent) == PLAIN["max_steps"]
    for sent, wanted in zip(server.sent, expected, strict=True):
        assert sent.keys() == wanted.keys()
        for key, value in sent.items():
            # Sums of float32 in another order; near a threshold of bfloat16 that may move an entry by its last bit.
            rounding = 1e-6 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(value, wanted[key], rtol=rounding, atol=1e-7)
            assert dtype == torch.float32 or (value != wanted[key]).double().mean() < 1e-3
    some = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(server.sent[0][some], server.sent[-1][some])
    assert_base_is(trainer.model, before)
    if dtype == torch.float32:  # server and trainer agree
        key = "sampling/importance_sampling_ratio/mean"
        ratios = [entry[key] for entry in trainer.state.log_history[:-1]]
        assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)
