"""The paper's claim, tested: accuracy of SMoA beside LoRA and HiRA on real models and data, at two budgets.

    python -m benchmarks.quality run --task trec50 --seeds 5     # appends to benchmarks/results/quality.jsonl
    python -m benchmarks.quality report                          # writes benchmarks/results/quality.md

Models and data come with packages, by the examples' own readers.
"""

import os

# Read when the libraries are imported: everything is on disk already.
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
