"""Memory of a training pass: bytes that live at once in the forward and backward of one layer, predicted.

Ours and PEFT's are counted by the same rules: x, dY, weights and factors are there before and are not counted; a
result lives until the last operator that reads it has ended, and an operator's inputs and results live together.
Tensors as wide as the rank are counted too. What a BLAS library takes for itself is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..checks import check_choice, check_kind
from .grad_tiling import gradient_parts, partial_bytes
from .problem import Problem

__all__ = ["backward_workspace", "backward_workspace_bytes", "peak_bytes"]


def backward_workspace(problem: Problem) -> Mapping[str, int]:
    """Bytes that each stage of the backward holds beyond its inputs and results.

    "factor gradients": gathered dY and x of one part of the tokens (`grad_tiling.gradient_parts`), and all partials.
    They are freed before "input gradient", which holds W_eff; under dropout it holds the ΔW blocks, dY gathered anew,
    and dX's share by block instead.

    Args:
        problem: the layer and the batch.

    Raises:
        TypeError: no problem.

    Example:
        >>> stages = backward_workspace(Problem(8192, 14336, 4096, num_blocks=4, rank=16))
        >>> {stage: size >> 20 for stage, size in stages.items()}
        {'factor gradients': 151, 'input gradient': 112}
    """
    check_kind("problem", problem, Problem)
    p, size = problem, problem.dtype.itemsize
    rows, cols = p.padded(p.out_features), p.padded(p.in_features)
    at_once = max(gradient_parts(p))
    dy = at_once * rows * size * p.gathers(p.out_features)
    x = at_once * cols * size * (p.gathers(p.in_features) or p.dropout > 0)
    dx = p.weight_elements * size
    if p.dropout:  # one part: dY is gathered as a whole both times
        dx = rows * cols // p.num_blocks * size + dy + p.tokens * cols * size
    return MappingProxyType({"factor gradients": dy + x + partial_bytes(p), "input gradient": dx})


def backward_workspace_bytes(problem: Problem) -> int:
    """Peak bytes that a backward holds beyond its inputs and results: the larger of its two stages.

    Args:
        problem: the layer and the batch.

    Raises:
        TypeError: no problem.

    Example:
        >>> backward_workspace_bytes(Problem(8192, 14336, 4096, num_blocks=4, rank=16)) >> 20  # 144 are gathered copies
        151
    """
    return max(backward_workspace(problem).values())


def peak_bytes(problem: Problem, algorithm: str) -> int:
    """Most bytes that live at once in one forward and backward without dropout, y and all gradients included.

    Args:
        problem: the layer and the batch, dropout 0.
        algorithm: "frozen", "lora", "merged" or "split".

    Raises:
        TypeError: no problem.
        ValueError: another algorithm, or active dropout.

    Example:
        >>> problem = Problem(8192, 4096, 4096, num_blocks=4, rank=16)
        >>> round(peak_bytes(problem, "split") / peak_bytes(problem, "lora"), 2)
        0.83
    """
    check_kind("problem", problem, Problem)
    check_choice("algorithm", algorithm, _MOMENTS)
    if problem.dropout:
        raise ValueError(f"dropout must be 0, got {problem.dropout}")
    return max(_MOMENTS[algorithm](problem))


def _sizes(p: Problem) -> tuple[int, int, int]:
    """Bytes of x, y and W0."""
    size = p.dtype.itemsize
    return p.tokens * p.in_features * size, p.tokens * p.out_features * size, p.weight_elements * size


def _frozen(p: Problem) -> tuple[int, ...]:
    x, y, _ = _sizes(p)
    return (y + x,)


def _lora(p: Problem) -> tuple[int, ...]:
    """PEFT: the base's output, the scaled update and their sum; then y, both parts of dX, dA and dB."""
    x, y, _ = _sizes(p)
    size = p.dtype.itemsize
    return 3 * y + p.tokens * p.rank * size, y + 2 * x + p.rank * (p.in_features + p.out_features) * size


def _merged(p: Problem) -> tuple[int, ...]:
    _, y, w = _sizes(p)
    return w + y, *_our_backward(p)


def _split(p: Problem) -> tuple[int, ...]:
    """y beside the gathered x and the blocks of ΔW."""
    _, y, _ = _sizes(p)
    size, rows, cols = p.dtype.itemsize, p.padded(p.out_features), p.padded(p.in_features)
    gathered = p.tokens * cols * size * p.gathers(p.in_features)
    return y + gathered + rows * cols // p.num_blocks * size, *_our_backward(p)


def _our_backward(p: Problem) -> tuple[int, ...]:
    """y, dA and dB beside each stage's workspace, and dX in the second."""
    x, y, _ = _sizes(p)
    found = backward_workspace(p)
    kept = y + p.max_rank * (p.out_features + p.in_features) * p.dtype.itemsize
    return kept + found["factor gradients"], kept + found["input gradient"] + x


_MOMENTS = {"frozen": _frozen, "lora": _lora, "merged": _merged, "split": _split}
