"""The paper's claim, tested: accuracy of SMoA beside LoRA and HiRA on real models and data, at two budgets.

    python -m benchmarks.quality run --task trec50 --seeds 5     # appends to benchmarks/results/quality.jsonl
    python -m benchmarks.quality report                          # writes benchmarks/results/quality.md

Models and data come with packages, by the examples' own readers.
"""

import os
import sys
from pathlib import Path

# Read when the libraries are imported: everything is on disk already.
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
# The examples are scripts, not a package: their folder goes on the path, as Python puts it there for a script.
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
