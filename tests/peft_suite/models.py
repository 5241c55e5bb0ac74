"""The tiny models that PEFT's tests download from a hub, built from configurations instead."""

import json
from pathlib import Path

import torch
import transformers as t

_SMALL = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPT = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_SMALL, **_TOKENS, "intermediate_size": 64, "num_key_value_heads": 2}
_BERT = {**_SMALL, **_TOKENS, "intermediate_size": 64}
_GEMMA = {**_LLAMA, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
_OPT = {**_SMALL, **_TOKENS, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
_BART = {"vocab_size": 1024, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, **_TOKENS}
_BART |= {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("ffn_dim", 64), ("attention_heads", 4))
}
_T5 = {"vocab_size": 1024, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
_EXPERTS = {**_LLAMA, "head_dim": 8, "num_experts_per_tok": 2}
_PEFT = "peft-internal-testing/tiny-random"

MODELS = {
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        t.GptOssForCausalLM,
        {**_EXPERTS, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        t.Qwen3MoeForCausalLM,
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 48},
    ),
    f"{_PEFT}-OPTForCausalLM": (t.OPTForCausalLM, _OPT),
    f"{_PEFT}-GPT2LMHeadModel": (t.GPT2LMHeadModel, _GPT),
    "hf-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, _GPT),
    f"{_PEFT}-GPTJForCausalLM": (t.GPTJForCausalLM, {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, _LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (t.MistralForCausalLM, _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": (t.Qwen2ForCausalLM, _LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (t.Gemma3ForCausalLM, _GEMMA),
    f"{_PEFT}-BertForSequenceClassification": (t.BertForSequenceClassification, _BERT),
    f"{_PEFT}-RobertaForSequenceClassification": (t.RobertaForSequenceClassification, _BERT),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        t.LlamaForSequenceClassification,
        _LLAMA,
    ),
    f"{_PEFT}-T5ForConditionalGeneration-calibrated": (t.T5ForConditionalGeneration, _T5),
    f"{_PEFT}-BartForConditionalGeneration": (t.BartForConditionalGeneration, _BART),
    f"{_PEFT}-BertModel": (t.BertModel, _BERT),
    f"{_PEFT}-RobertaModel": (t.RobertaModel, _BERT),
    f"{_PEFT}-DebertaModel": (t.DebertaModel, _BERT),
    f"{_PEFT}-DebertaV2Model": (t.DebertaV2Model, _BERT),
}


def make_models(folder: Path) -> None:
    """Save each model as `folder/<its name on the hub>`."""
    for name, (model_class, settings) in MODELS.items():
        path = folder / name
        if not (path / "config.json").exists():
            torch.manual_seed(0)
            model_class(model_class.config_class(**settings)).save_pretrained(path)
    # test_config reads a LoRA configuration through every configuration class.
    path = folder / "peft-internal-testing/tiny-opt-lora-revision"
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
