"""The problems that a training step of layers and batches looks up in the table, and the candidates for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from .. import kernels
from ..backends import MOST_TRITON_RANKS
from ..backends.algorithms import choose_algorithm
from ..checks import check_choice, check_count
from ..definition.precision import KERNEL_PRECISIONS, PRECISIONS
from ..kernels.architectures import facts
from ..kernels.spec import ALGORITHM_KEYS, Config, Key, bucket
from ..kernels.table import Choice, answered
from .problem import Problem

# Far above the tokens at which the fused kernel can win, so beyond them its launch parameters do not matter.
MOST_FUSED_TOKENS = 1024


def tunable() -> tuple[str, ...]:
    """Names that can be tuned; algorithms come last, since they are timed with the launch parameters that won."""
    return (*kernels.KERNELS, *ALGORITHM_KEYS)


@dataclass(frozen=True)
class Job:
    """One key with its candidates.

    Attributes:
        key: the problem.
        candidates: the choice that runs without a table, then the others.
        layer: whose step looks the key up.
        operation: one of :func:`passes`, the first that does.
        answers: choices for other keys, without which the operation does not launch the kernel: the algorithm, and
            launch parameters that split a sum.
    """

    key: Key
    candidates: tuple[Choice, ...]
    layer: Problem
    operation: str
    answers: Mapping[Key, Choice]


def jobs(layers: Sequence[Problem], arch: str, multiprocessors: int, names: Sequence[str] = ()) -> list[Job]:
    """One job for each distinct key that a training step looks up, kernels before the algorithms that use them.

    Args:
        layers: the layers to be trained.
        arch: of the GPU, as the compiler spells it.
        multiprocessors: of the GPU.
        names: of :func:`tunable`; none for all.

    Raises:
        ValueError: no layer asks for one of `names`.
    """
    found: dict[Key, Job] = {}
    for layer in layers:
        for job in _asked(replace(layer, tokens=bucket(layer.tokens)), arch, multiprocessors):
            found.setdefault(job.key, job)
    asked = [job for key, job in found.items() if not names or key.kernel in names]
    if absent := set(names) - {job.key.kernel for job in asked}:
        raise ValueError(
            f"no layer asks for {', '.join(sorted(absent))}: grouped kernels are those of layers with experts, the "
            f"gathered ones of blocks without granules, fused_linear is for at most {MOST_FUSED_TOKENS} tokens"
        )
    return sorted(asked, key=lambda job: job.key.kernel in ALGORITHM_KEYS)


def _asked(layer: Problem, arch: str, multiprocessors: int) -> list[Job]:
    """Jobs for the keys that a step looks up: it runs by every algorithm, without data, and launches nothing."""
    from ..kernels.launch import heard_by
    from .passes import passes

    found: list[Job] = []
    for operation, one in passes(layer, torch.device("meta")).items():
        for algorithm in ALGORITHM_KEYS.get(operation, ("",)):
            if algorithm == "fused" and layer.tokens > MOST_FUSED_TOKENS:
                continue
            answers: dict[Key, Choice] = {}

            def answer(
                key: Key,
                operation: str = operation,
                algorithm: str = algorithm,
                answers: dict[Key, Choice] = answers,
            ) -> Choice:
                tried = candidates(key, arch, multiprocessors)
                if key.kernel in ALGORITHM_KEYS:
                    found.append(Job(key, tried, layer, operation, {}))
                    return answers.setdefault(key, algorithm)
                found.append(Job(key, tried, layer, operation, answers))
                # A kernel adds the parts of a sum, so a candidate that splits one asks for more kernels.
                parts = max((one for one in tried if isinstance(one, Config)), key=lambda one: one.split)
                if parts.split > 1:
                    answers[key] = parts
                return parts

            with multiplied_in(layer.precision), answered(answer), heard_by(lambda *_: True):
                one.run()
    return found


@contextmanager
def multiplied_in(precision: str) -> Iterator[None]:
    """Let PyTorch multiply float32 as one of `precision.KERNEL_PRECISIONS` says: in TF32 or in IEEE."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def check_layer(layer: Problem) -> None:
    """Raise a ValueError if the kernels take no such layer."""
    for name in ("out_features", "in_features", "tokens", "rank", "num_blocks", "granule"):
        check_count(name, getattr(layer, name), 1)
    check_count("experts", layer.experts, 0)
    check_choice("precision", layer.precision, KERNEL_PRECISIONS)
    check_choice("factors", layer.factors, ("bf16", "fp16", "fp32"))
    (n, c), blocks = layer.features, layer.num_blocks
    if blocks > min(n, c):
        raise ValueError(f"blocks must be at most {min(n, c)} for a layer of {n}x{c}, got {blocks}")
    if layer.max_rank > MOST_TRITON_RANKS:
        raise ValueError(
            f"rank must be at most {MOST_TRITON_RANKS * blocks} in {blocks} blocks, of which the kernels take "
            f"{MOST_TRITON_RANKS} each, got {layer.rank}"
        )


def candidates(key: Key, arch: str, multiprocessors: int) -> tuple[Choice, ...]:
    """Every algorithm, or a kernel's shipped configurations; first what runs without a table."""
    if key.kernel in ALGORITHM_KEYS:
        default: Choice = choose_algorithm(key.tokens, key.rank, key.dtype, arch)
        return tuple(dict.fromkeys((default, *ALGORITHM_KEYS[key.kernel])))
    kernel = kernels.KERNELS[key.kernel]
    ships = kernel.shipped(facts(arch), PRECISIONS[key.dtype])
    default = kernel.default(key, arch, multiprocessors)
    return tuple(dict.fromkeys((default, *ships)))


# Names for readers, on the command line and on a bring-up's page


def describe(key: Key) -> str:
    """Name a problem for a person."""
    sizes = "x".join(str(size) for size in (key.out_features, key.in_features) if size)
    sizes += "" if "x" in sizes else " columns"
    tokens = f" T≤{key.tokens}" if key.tokens else ""
    rank = f" ρ={key.rank}" if key.rank else ""
    turned = " transposed" * key.transposed + " dropout" * key.dropout
    blocks = f" K={key.blocks}" if key.blocks else ""
    factors = f" {key.factors} factors" if key.factors not in ("", key.dtype) else ""
    return f"{key.kernel} {sizes}{tokens}{rank}{blocks} {key.dtype}{factors}{turned}"


def describe_choice(choice: Choice) -> str:
    """Name launch parameters, or an algorithm."""
    if isinstance(choice, str):
        return choice
    fields = choice.to_json().items()
    return " ".join(f"{name.removeprefix('block_').removeprefix('num_')}={value}" for name, value in fields)
