"""Train on a 4-bit model, merge into its four bits, and compare with merging LoRA, which has to be quantised again.

    python examples/four_bits.py                    # SmolLM2-135M in NF4, TREC question classification, 10 minutes

SMoA's adapter has one column of A for each group of 64 columns, so its update scales the groups' scales and the merge
is exact. LoRA's sum is on no grid: it is merged into the dequantised weights, which are rounded to NF4 anew.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import smollm2
import torch
import trec
import typer
from adapters import LEARNING_RATE
from options import run_command
from peft import LoraConfig, PeftModel, get_peft_model
from questions import Encoder, Splits, split
from training import StopRequest, answer, score, shuffled_batches, train
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from smoa_kernels.peft import SMoAConfig, merge_to_folder
from smoa_kernels.peft.replaced import keep_packing

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
CPU = torch.device("cpu")
ADAPTERS = {
    "SMoA": SMoAConfig(r=8, num_blocks=1, group_size="base", use_lora_rate=True, target_modules=TARGETS),
    "LoRA": LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS),
}


def base_in(folder: Path, **settings: Any) -> Any:
    """The model in a folder; the folder says how it is quantised, or `settings` do."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **settings)
    for layer in model.modules():
        keep_packing(
            layer
        )  # else bitsandbytes repacks weights in an evaluation, and merging LoRA would misread them
    return model


def trained(name: str, base: Any, encoder: Encoder, splits: Splits, steps: int, batch_size: int) -> PeftModel:
    """The base with an adapter that was trained for some steps, at LoRA's learning rate."""
    torch.manual_seed(0)
    model = get_peft_model(base, ADAPTERS[name])
    batches = shuffled_batches(splits.train, encoder, batch_size, seed=0)
    with StopRequest() as stop:
        train(model, batches, steps=steps, lr=LEARNING_RATE["lora"], device=CPU, stop=stop, say=print, seed=0)
    if stop.signal:
        raise typer.Exit(128 + stop.signal)
    return model.eval()


def run(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("runs/four-bits"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 16,
    eval_questions: Annotated[int, typer.Option(min=1, help="Questions of the test.")] = 500,
) -> None:
    """Train SMoA and LoRA on an NF4 model, merge both into four bits, and count right answers before and after."""
    base, adapter, merged = output / "base", output / "adapter", output / "merged"
    questions = trec.read(trec.locate())
    splits = split(questions)
    asked = splits.test[:eval_questions]
    plain = smollm2.cached_model()
    encoder = Encoder(AutoTokenizer.from_pretrained(plain), {q.answer for q in questions}, sys.maxsize)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base_in(plain, quantization_config=four_bits).save_pretrained(base)

    def accuracy(model: Any) -> str:
        return str(score(answer(model, encoder, asked, batch_size, CPU), asked))

    print(f"The base: {accuracy(base_in(base))}")
    for name in ADAPTERS:
        model = trained(name, base_in(base), encoder, splits, steps, batch_size)
        parameters, before = model.get_nb_trainable_parameters()[0], accuracy(model)
        if name == "SMoA":
            model.save_pretrained(adapter)
            merge_to_folder(base, adapter, merged)
            after = accuracy(base_in(merged))
        else:
            after = accuracy(model.merge_and_unload())
        print(f"{name}: {parameters:,} parameters, {before} beside the base, {after} merged into four bits")
    print(f"The merged SMoA model is {merged}: any engine that runs the base runs it")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
