"""Where a training pass spends its time, by kind of operator: what a layer takes beyond its GEMMs."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from smoa_kernels.backends.native.backend import GRADIENT, LINEAR, UPDATE
from smoa_kernels.backends.native.bf16 import COMPILED_BF16

from .protocol import Run

GEMM, COPY, MASK, REST, BETWEEN = "GEMMs", "gathers", "dropout's mask", "other operators", "between operators"
KINDS = (GEMM, COPY, MASK, REST, BETWEEN)
EIGH = "eigh"  # LAPACK's, of the partition's Gram matrix; no layer has one
_OPERATORS = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mkldnn_linear"), GEMM),
    **dict.fromkeys(("gather", "index_select", "scatter"), COPY),
    **dict.fromkeys(("random", "ge", "bernoulli", "native_dropout"), MASK),
    "_linalg_eigh": EIGH,
}
PASSES = 3


def by_kind(run: Run, passes: int = PASSES) -> dict[str, float]:
    """Seconds of one run by kind of operator, the mean of a few; CPU only, and as slow as profiling makes it.

    "between operators" is what autograd, the dispatcher and Python take; `EIGH` is there only where it ran.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(passes):
            run()
    found = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        namespace, _, name = event.key.partition("::")
        # `addmm_` is a GEMM as `addmm` is: an underscore says where the result goes.
        kind = BETWEEN
        if namespace == "aten":
            kind = _OPERATORS.get(name.rstrip("_"), REST)
        elif event.key in (
            COMPILED_BF16,
            LINEAR,
            UPDATE,
            GRADIENT,
        ):  # what they gather and modulate they do within the GEMM
            kind = GEMM
        found[kind] = found.get(kind, 0.0) + event.self_cpu_time_total / 1e6 / passes
    return found
