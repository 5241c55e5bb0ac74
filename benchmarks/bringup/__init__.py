"""One command that brings a GPU up: numerical tests, tuning, the comparison with the peers, and the goals.

    python -m benchmarks.bringup                  # on a GPU, within 8 minutes; `make gpu`
    python -m benchmarks.bringup --resume         # goes on with what is not done
    python -m benchmarks.bringup --smoke          # tiny, in Triton's interpreter, on any CPU

It needs torch, triton, numpy, pytest, pytest-benchmark, peft and transformers importable, a source checkout on
`PYTHONPATH`, and no network. Each stage is a process of its own with a share of the time, so that one that fails, hangs
or loses the GPU's context does not take the others with it, and what it has is on disk.
"""
