"""The problems that a training step of layers and batches looks up in the table, and the candidates for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import kernels
from ..backends import MOST_TRITON_RANKS
from ..backends.algorithms import admissible, choose_algorithm, padded
from ..checks import check_choice, check_count
from ..definition.precision import KERNEL_PRECISIONS, PRECISIONS
from ..kernels.architectures import facts
from ..kernels.spec import ALGORITHM_KEYS, GRANULE, Key, bucket
from ..kernels.table import Choice, Entry, Trial
from .roofline import Problem, gradient_parts

__all__ = [
    "Job",
    "check_layer",
    "describe",
    "describe_choice",
    "job",
    "jobs",
    "keys",
    "tunable",
    "winner",
]

# Far above the tokens at which the fused kernel can win, so beyond them its launch parameters do not matter.
MOST_FUSED_TOKENS = 1024


def keys(layer: Problem) -> Iterator[Key]:
    """The keys that one training step of a layer looks up, with and without dropout."""
    return _experts_keys(layer) if layer.experts else _layer_keys(layer)


def _layer_keys(layer: Problem) -> Iterator[Key]:
    n, c, t = layer.out_features, layer.in_features, bucket(layer.tokens)
    blocks, parts = layer.num_blocks, gradient_parts(layer)
    rows, cols = (padded(features, blocks) // blocks for features in (n, c))
    common = (layer.precision, layer.max_rank, blocks)
    # Copying kernels distinguish dtypes, not how float32 is multiplied.
    copied = "fp32" if layer.precision == "tf32" else layer.precision
    granule = GRANULE if layer.in_place else 1
    yield Key("modulated_weight", *common, n, c, factors=layer.factors)
    yield Key("modulated_blocks", *common, n, c, 0, rows, cols, granule=granule, factors=layer.factors)
    yield Key("permute", copied, 0, blocks, 0, c, t, 0, cols, granule=granule, dropout=True)
    if granule == 1:
        yield Key("permute", copied, 0, blocks, 0, c, t, 0, cols)
        yield Key("permute", copied, 0, blocks, 0, n, t, 0, rows)
        for tokens in dict.fromkeys(map(bucket, parts)):
            yield Key("permute", copied, 0, blocks, 0, c, tokens, 0, cols)
            yield Key("permute", copied, 0, blocks, 0, n, tokens, 0, rows)
    yield Key("block_matmul", *common, n, c, t, rows, cols, granule=granule)
    yield Key("block_matmul", *common, c, n, t, cols, rows, True, granule=granule)
    if t <= MOST_FUSED_TOKENS:
        yield Key("fused_linear", *common, n, c, t, factors=layer.factors)
        yield Key("fused_linear", *common, c, n, t, transposed=True, factors=layer.factors)
        for features in (n, c):
            yield Key("sum_partials", copied, out_features=features, tokens=t)
    for tokens in dict.fromkeys((t, bucket(parts[0]))):
        yield Key("block_grad", *common, n, c, tokens, rows, cols, granule=granule, factors=layer.factors)
    if granule > 1:  # dropout makes a copy of x, which else is read in place
        yield Key("block_matmul", *common, n, c, t, rows, cols, granule=granule, dropout=True)
        factors = layer.factors
        yield Key("block_grad", *common, n, c, t, rows, cols, granule=granule, factors=factors, dropout=True)
    for features in (n, c):
        yield Key("sum_partials", layer.factors, out_features=layer.max_rank, tokens=bucket(features))
    for stage in ALGORITHM_KEYS:
        yield Key(stage, *common, n, c, t, granule=granule, factors=layer.factors)


def _experts_keys(layer: Problem) -> Iterator[Key]:
    """Keys of experts' kernels, with an expert's average pairs as tokens. Single coordinates take the gathered forms.

    W0 may be stored along either side: models store their experts as (E, N, C) or as (E, C, N).
    """
    n, c, each = layer.out_features, layer.in_features, bucket(-(-layer.tokens // layer.experts))
    granule = GRANULE if layer.in_place else 1
    products = ["grouped_linear"]
    if granule == 1 and layer.num_blocks > 1:
        products.append("grouped_linear_gathered")
    for transposed in (False, True):

        def key(kernel: str, rows: int, cols: int, turned: bool) -> Key:
            common = layer.precision, layer.max_rank, layer.num_blocks, rows, cols, each
            return Key(kernel, *common, transposed=turned, granule=granule, factors=layer.factors)

        for kernel in products:
            yield key(kernel, n, c, transposed)
            yield key(kernel, c, n, not transposed)
        yield key("grouped_grad" if granule > 1 else "grouped_grad_gathered", n, c, transposed)


def tunable() -> tuple[str, ...]:
    """Names that can be tuned; algorithms come last, since they are timed with the launch parameters that won."""
    return (*kernels.KERNELS, *ALGORITHM_KEYS)


@dataclass(frozen=True)
class Job:
    """One key with its candidates.

    Attributes:
        key: the problem.
        candidates: the choice that runs without a table, then the others.
    """

    key: Key
    candidates: tuple[Choice, ...]

    @property
    def default(self) -> Choice:
        """The choice that runs without a table."""
        return self.candidates[0]


def jobs(layers: Sequence[Problem], arch: str, multiprocessors: int, names: Sequence[str] = ()) -> list[Job]:
    """One job for each distinct key of the layers, kernels before the algorithms that use them.

    Args:
        layers: the layers to be trained.
        arch: of the GPU, as the compiler spells it.
        multiprocessors: of the GPU.
        names: of :func:`tunable`; none for all.

    Raises:
        ValueError: no layer asks for one of `names`.
    """
    asked = dict.fromkeys(key for layer in layers for key in keys(layer))
    found = [key for key in asked if not names or key.kernel in names]
    if absent := set(names) - {key.kernel for key in found}:
        raise ValueError(
            f"no layer asks for {', '.join(sorted(absent))}: grouped kernels are those of layers with experts, the "
            f"gathered ones of blocks without granules, fused_linear is for at most {MOST_FUSED_TOKENS} tokens"
        )
    ordered = sorted(found, key=lambda key: key.kernel in ALGORITHM_KEYS)
    return [job(key, arch, multiprocessors) for key in ordered]


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


def job(key: Key, arch: str, multiprocessors: int) -> Job:
    """The candidates of one key: every algorithm, or a kernel's shipped configurations that divide the layout."""
    if key.kernel in ALGORITHM_KEYS:
        default: Choice = choose_algorithm(key.kernel, key.tokens, key.rank, key.dtype, arch)
        return Job(key, tuple(dict.fromkeys((default, *ALGORITHM_KEYS[key.kernel]))))
    kernel = kernels.KERNELS[key.kernel]
    ships = kernel.shipped(facts(arch), PRECISIONS[key.dtype])
    default = kernel.default(key, arch, multiprocessors)
    return Job(key, tuple(dict.fromkeys((default, *(c for c in ships if kernel.fits(c, key))))))


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


def winner(entry: Entry) -> Trial | None:
    """Return the fastest trial that may be chosen: no algorithm that breaks the numbers, however fast."""
    kernel, dtype = entry.key.kernel, entry.key.dtype
    return entry.best(admissible(kernel, dtype) if kernel in ALGORITHM_KEYS else None)
