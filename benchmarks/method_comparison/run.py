"""Run an experiment of PEFT's method comparison with SMoA, or with PEFT's HiRA accelerated. Needs a GPU of 24 GB.

In a clone of huggingface/peft, in the folder method_comparison/MetaMathQA, with HERE this file's folder:

    cp -r HERE/experiments/smoa experiments/
    python HERE/run.py -v experiments/smoa/llama-3.2-3B-rank32
    python HERE/run.py --accelerate -v experiments/hira/llama-3.2-3B-rank32-lr4.5e-3

SMoA's experiment takes the alpha, the learning rate and the modules of `experiments/lora/llama-3.2-3B-rank32`, by
`use_lora_rate`. PEFT's own `run.py` does the rest, and writes its result where it writes those of other methods.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from typing import Any

from smoa_kernels.peft import accelerate_hira  # the import registers SMoA with PEFT


def main(arguments: list[str]) -> None:
    """Run `run.py` of the working folder with the arguments, `--accelerate` apart."""
    sys.path.insert(0, os.getcwd())
    utils: Any = importlib.import_module("utils")  # PEFT's
    build = utils.get_model

    def get_model(**given: Any) -> Any:
        model = build(**given)
        report = accelerate_hira(model)
        if report.left:
            raise SystemExit(f"these layers stay PEFT's own: {report.left}")
        return model

    if "--accelerate" in arguments:
        utils.get_model = get_model
    sys.argv = ["run.py", *(argument for argument in arguments if argument != "--accelerate")]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
