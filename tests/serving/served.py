"""A tiny Llama and adapters of it, for the serving tests."""

import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from smoa_kernels.peft import SMoAConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Some packed layers have an adapter for every slice, some for one slice, some for none.
CONFIGS = {
    "smoa2": lambda: SMoAConfig(r=8, num_blocks=2, target_modules=ALL),
    "smoa4": lambda: SMoAConfig(r=8, num_blocks=4, target_modules=ALL, smoa_alpha=16),
    "unequal": lambda: SMoAConfig(
        r=6, num_blocks=3, block_ranks=[4, 0, 2], target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        alpha_pattern={"q_proj": 12}, rank_pattern={"down_proj": 3}, use_rslora=True,
    ),
    "hira": lambda: HiraConfig(r=8, target_modules=ALL),
    "lora": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=ALL),
}  # fmt: skip


def save_model(folder, seed=0, **sizes):
    """A tiny Llama with a vocabulary of 256, and random weights so large that adapters change its tokens."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, **sizes}
    sizes |= {"vocab_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(initializer_range=0.12, **sizes))
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{word}": word for word in range(256)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def save_adapter(base, config, folder, size=0.5):
    """An adapter of `base` with random factors."""
    torch.manual_seed(len(str(folder)))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B") or any(key in name for key in ("hira_B", "lora_B", "lora_embedding_A")):
                parameter.normal_(std=size * (0.1 if "lora" in name else 1))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
