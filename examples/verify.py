"""Load a saved adapter in this process, which has never seen it, and compare its outputs with recorded ones.

The fine-tuning example starts it as ``verify.py MODEL ADAPTER EXPECTED DTYPE DEVICE THREADS`` and reads the JSON
that it prints.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from adapters import load
from peft import PeftModel
from questions import Batch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import next_token_scores
from transformers import AutoModelForCausalLM

# Largest deviation over largest output. Reloading repeats the same arithmetic; merging rounds weights anew.
TOLERANCE = {torch.float64: (1e-5, 1e-4), torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 1e-1)}


@dataclass(frozen=True)
class Verdict:
    """Relative deviations of the reloaded and of the merged model, and what was allowed."""

    prompts: int
    reloaded: float
    reloaded_tolerance: float
    merged: float
    merged_tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether both are within their tolerance (NaN is not)."""
        return self.reloaded <= self.reloaded_tolerance and self.merged <= self.merged_tolerance


def verify_in_fresh_process(
    model: PeftModel, batch: Batch, base: Path, adapter: Path, leads: bool = True
) -> Verdict | None:
    """Reload ``adapter`` over ``base`` in another process and compare its outputs on ``batch`` to ``model``'s.

    Of several processes that share the model all compute its outputs, and the one that ``leads`` does the rest.

    Raises:
        RuntimeError: if that process fails; its messages have gone to stderr.
    """
    parameter = next(model.parameters())
    scores = _scores(model, batch.input_ids, batch.attention_mask)
    if not leads:
        return None
    recorded = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "scores": scores}
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in recorded.items()}, expected)
        numerics = (
            str(parameter.dtype).removeprefix("torch."),
            str(parameter.device),
            str(torch.get_num_threads()),
        )
        command = [sys.executable, __file__, str(base), str(adapter), str(expected), *numerics]
        # A session of its own, so that Ctrl-C reaches this process alone, which then ends the other.
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    if finished.returncode != 0:
        raise RuntimeError(f"the fresh process that loaded {adapter} ended with {finished.returncode}")
    return Verdict(**json.loads(finished.stdout.splitlines()[-1]))


def verify(base: Path, adapter: Path, expected: Path, dtype: torch.dtype, device: torch.device) -> Verdict:
    """Load the adapter, compare its outputs with the expected ones, merge it, compare again."""
    recorded = load_file(expected, device=str(device))
    model = load(AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device), adapter)
    deviations = []
    for step in (lambda: model, model.merge_and_unload):
        scores = _scores(step(), recorded["input_ids"], recorded["attention_mask"])
        deviations.append(float((scores - recorded["scores"]).abs().max() / recorded["scores"].abs().max()))
    tolerance = TOLERANCE[dtype]
    return Verdict(len(recorded["scores"]), deviations[0], tolerance[0], deviations[1], tolerance[1])


@torch.no_grad()
def _scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return next_token_scores(model.eval(), input_ids, attention_mask).float()


if __name__ == "__main__":
    base, adapter, expected, dtype, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    paths = (Path(base), Path(adapter), Path(expected))
    print(json.dumps(asdict(verify(*paths, getattr(torch, dtype), torch.device(device)))))
