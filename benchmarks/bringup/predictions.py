"""Predicts peak memory, which the roofline does not.

The rules are the same for SMoA and PEFT. x, dY, weights and factors exist before and are not counted. A result lives
until the last operator that reads it has ended, and an operator's inputs and results live together. A BLAS library's
own memory is not counted.
"""

from __future__ import annotations

from smoa_kernels.tuning.roofline import Problem, backward_workspace

__all__ = ["peak_bytes"]


def peak_bytes(problem: Problem, algorithm: str) -> int:
    """Most bytes that live at once in one forward and backward, y and all gradients included.

    Args:
        problem: the layer and the batch, without dropout.
        algorithm: "frozen", "lora", "merged" or "split".
    """
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
