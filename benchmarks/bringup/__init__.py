"""Bring up a GPU with one command, in stages of at most eight minutes; the first two take nine at most.

operator: 24 problems through the public layer against float64; headline: the comparison with the peers; tests: every
numerical test; tune: a table for this GPU.

    python -m benchmarks.bringup                  # on a GPU; `make gpu`
    python -m benchmarks.bringup --resume         # runs the stages that are not done yet
    python -m benchmarks.bringup --smoke          # tiny, in Triton's interpreter, on any CPU; `make gpu-smoke`
    python -m benchmarks.bringup.ahead            # how long the stages compile; needs no GPU; `make gpu-dry-run`

It needs torch, triton, numpy, pytest, pytest-xdist, pytest-benchmark, hypothesis, peft and transformers, a source
checkout and no network. Each stage is a process of its own with a time limit. A stage that fails, hangs or loses the
GPU does not stop the others, and its results until then are on disk.
"""
