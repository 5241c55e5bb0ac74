"""The goals for the layer on one CPU thread, and whether a run meets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from examples.smollm2 import NAME as SMOLLM2

from .protocol import Quartiles
from .providers import (
    ACCELERATED,
    CONTIGUOUS,
    DEFAULT_ACCELERATED,
    DEFAULT_HIRA,
    FROZEN,
    HIRA,
    LORA,
    PAPER,
    SMOA,
)
from .results import Run


@dataclass(frozen=True)
class Figure:
    """A measured ratio.

    Attributes:
        ratio: median with quartiles.
        doubt: why it is not judged; "" where it is.
        parts: the same ratio in the phases that it is made of, where it is.
    """

    ratio: Quartiles
    doubt: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """At most `limit`, as `measure` finds it in a run."""

    text: str
    limit: float
    measure: Callable[[Run], Figure | None]

    def verdict(self, figure: Figure | None) -> str:
        """Met, or missed by how much; nothing is judged on a noisy machine or by a single round."""
        if figure is None:
            return "not measured"
        if figure.doubt:
            return f"{figure.doubt}, not judged"
        value = figure.ratio.median
        if value <= self.limit:
            return "met"
        missed = f"missed by {value - self.limit:.2f} ({value / self.limit - 1:.0%})"
        parts = ", ".join(f"{phase} {part:.2f}" for phase, part in figure.parts.items())
        return f"{missed}: {parts}" if parts else missed


def _time(kind: str, phase: str, name: str, over: str, **params: Any) -> Callable[[Run], Figure | None]:
    def measure(run: Run) -> Figure | None:
        found = (
            result for result in run.select(kind, **params) if {name, over} <= result.seconds[phase].keys()
        )
        result = next(found, None)
        if result is None:
            return None
        comparison = result.comparison(phase)
        others = [p for p in result.seconds if p != phase] if phase == "both" else []
        parts = {p: result.comparison(p).ratio(name, over).median for p in others}
        return Figure(comparison.ratio(name, over), comparison.doubt, parts)

    return measure


# T=2048, 2048×2048, r=16, float32 without dropout, where a goal does not say otherwise.
_LAYER = {
    "tokens": 2048,
    "out_features": 2048,
    "in_features": 2048,
    "rank": 16,
    "dtype": "float32",
    "dropout": 0.0,
}
_FLOAT32 = {"dtype": "float32", "dropout": 0.0}
_SMALL = {"tokens": 512, "out_features": 1024, "in_features": 1024}
_SMALLER = {"tokens": 128, "out_features": 576, "in_features": 1536, "rank": 8}


def _layer(name: str, over: str, num_blocks: int, **params: Any) -> Callable[[Run], Figure | None]:
    return _time("layer", "both", name, over, **(_LAYER | {"num_blocks": num_blocks} | params))


def _worst(name: str, over: str, dtype: str) -> Callable[[Run], Figure | None]:
    """The largest ratio of all layers of more than one block and of all few tokens."""

    def measure(run: Run) -> Figure | None:
        found = [
            Figure(comparison.ratio(name, over), comparison.doubt)
            for kind, phase in (("layer", "both"), ("few tokens", "forward"))
            for result in run.select(kind, dtype=dtype)
            if name in result.seconds[phase] and result.params["num_blocks"] > 1
            for comparison in [result.comparison(phase)]
        ]
        return max(found, key=lambda figure: figure.ratio.median, default=None)

    return measure


def _seconds(kind: str, phase: str, name: str) -> Callable[[Run], Figure | None]:
    """Seconds, not a ratio, of what is done to SmolLM2-135M."""

    def measure(run: Run) -> Figure | None:
        result = run.find(kind, model=SMOLLM2)
        if result is None or name not in result.seconds[phase]:
            return None
        comparison = result.comparison(phase)
        return Figure(comparison.time(name), comparison.doubt)

    return measure


def _step(name: str, over: str, dtype: str, factors: str | None = None) -> Callable[[Run], Figure | None]:
    """`factors` names their dtype where it is not float32, which is PEFT's default."""
    # Runs of before there were two dtypes say none: float32.
    dtypes = (dtype, None) if dtype == "float32" else (dtype,)
    measures = [
        _time(
            *("step", "step", name, over),
            model=SMOLLM2,
            batch=16,
            length=32,
            num_blocks=4,
            dtype=each,
            factors=factors,
        )
        for each in dtypes
    ]
    return lambda run: next((figure for measure in measures if (figure := measure(run))), None)


def _experts(name: str, over: str, pairs: int) -> Callable[[Run], Figure | None]:
    return _time("experts", "both", name, over, pairs=pairs, hidden=256, dtype="float32")


def _experts_peak(over: str, hidden: int) -> Callable[[Run], Figure | None]:
    """Of the peaks above frozen's; below 0 where less lives than in frozen experts."""

    def measure(run: Run) -> Figure | None:
        result = run.find("experts", pairs=32, hidden=hidden, dtype="float32")
        if result is None:
            return None
        frozen, ours, theirs = (result.bytes[name]["peak"] for name in (FROZEN, CONTIGUOUS, over))
        ratio = (ours - frozen) / (theirs - frozen)
        return Figure(Quartiles(ratio, ratio, ratio))

    return measure


def _bytes(what: str, name: str, over: str, **params: Any) -> Callable[[Run], Figure | None]:
    """Of a training pass of a layer; exact."""

    def measure(run: Run) -> Figure | None:
        result = run.find("memory", **params)
        if result is None or not {name, over} <= result.bytes.keys():
            return None
        ratio = result.bytes[name][what] / result.bytes[over][what]
        return Figure(Quartiles(ratio, ratio, ratio))

    return measure


_BY_DEFAULT, _ALL_BFLOAT16 = ", factors in float32 (PEFT's default)", ", factors in bfloat16"
# The layer's dtype, words for that of the factors, and the two that are compared.
_HIRA = (
    ("float32", "", ACCELERATED, HIRA),
    ("bfloat16", _BY_DEFAULT, DEFAULT_ACCELERATED, DEFAULT_HIRA),
    ("bfloat16", _ALL_BFLOAT16, ACCELERATED, HIRA),
)

GOALS = (
    Goal("forward + backward over frozen, float32, T=2048, 2048², r=16, K=4", 1.20, _layer(SMOA, FROZEN, 4)),
    Goal("the same, K=8", 1.14, _layer(SMOA, FROZEN, 8)),
    Goal("the same, bfloat16 split, K=4", 1.25, _layer(SMOA, FROZEN, 4, dtype="bfloat16")),
    Goal("over PEFT LoRA, float32, T=2048, 2048², K=4, dropout 0", 1.05, _layer(SMOA, LORA, 4)),
    Goal("the same, dropout 0.05 in both", 1.25, _layer(SMOA, LORA, 4, dropout=0.05)),
    Goal(
        "over frozen, float32, T=128, 384×1536, K=2",
        1.45,
        _time("layer", "both", SMOA, FROZEN, tokens=128, out_features=384, in_features=1536, dtype="float32"),
    ),
    Goal("over PEFT HiRA, float32 merged, K=1 in both", 0.65, _layer(SMOA, HIRA, 1)),
    Goal("over the paper's dense way, float32, K=4", 0.45, _layer(SMOA, PAPER, 4)),
    *(
        Goal(
            f"{words}, 2048², r=8, {dtype}, over frozen",
            limit,
            _time("few tokens", "forward", SMOA, FROZEN, tokens=tokens, dtype=dtype),
        )
        for words, tokens, dtype, limit in (
            ("one token (decode)", 1, "float32", 5.0),
            ("one token (decode)", 1, "bfloat16", 1.6),
            ("two tokens", 2, "bfloat16", 2.0),
            ("four tokens", 4, "bfloat16", 2.0),
            ("eight tokens", 8, "bfloat16", 2.0),
        )
    ),
    Goal("saved for backward over PEFT LoRA, dropout 0", 1.00, _bytes("saved", SMOA, LORA, **_FLOAT32)),
    Goal("the same, dropout 0.05", 0.60, _bytes("saved", SMOA, LORA, **(_FLOAT32 | {"dropout": 0.05}))),
    *(
        Goal(
            f"training step of SmolLM2-135M, {dtype}, 16 × 32 tokens, K=4, over PEFT LoRA",
            limit,
            _step(SMOA, LORA, dtype),
        )
        for dtype, limit in (("float32", 1.20), ("bfloat16", 1.10))
    ),
    Goal(
        "partition over `torch.linalg.svd`, 4096×4096, float32",
        0.20,
        _time("partition", "partition", "partition", "SVD", out_features=4096, in_features=4096),
    ),
    Goal(
        "contiguous blocks over frozen, float32 in torch's operators, T=2048, 2048², K=4",
        1.17,
        _layer(f"{CONTIGUOUS}, eager", FROZEN, 4),
    ),
    Goal("contiguous, bfloat16, T=2048, 2048², K=4", 1.32, _layer(CONTIGUOUS, FROZEN, 4, dtype="bfloat16")),
    Goal("the same, K=8", 1.17, _layer(CONTIGUOUS, FROZEN, 8, dtype="bfloat16")),
    Goal(
        "contiguous, bfloat16, T=512, 1024², K=8",
        1.22,
        _layer(CONTIGUOUS, FROZEN, 8, dtype="bfloat16", **_SMALL),
    ),
    Goal(
        "spectral, the same shape, dropout 0.05",
        1.80,
        _layer(SMOA, FROZEN, 8, **(_SMALL | {"dtype": "bfloat16", "dropout": 0.05})),
    ),
    *(
        Goal(
            f"{words}, bfloat16, T=128, 576×1536, K=2",
            limit,
            _layer(name, FROZEN, 2, dtype="bfloat16", **_SMALLER),
        )
        for words, name, limit in (("contiguous", CONTIGUOUS, 1.70), ("spectral", SMOA, 2.00))
    ),
    Goal(
        "contiguous, peak no higher than spectral's (the gathered copies are not alive at the peak any more), "
        "bfloat16, T=2048, 2048²",
        1.00,
        _bytes("peak", CONTIGUOUS, SMOA, tokens=2048, dtype="bfloat16"),
    ),
    Goal(
        "contiguous over spectral, compiled float32, the worst shape of more than one block",
        1.00,
        _worst(CONTIGUOUS, SMOA, "float32"),
    ),
    Goal("experts, 32 pairs each, over PEFT LoRA, spectral", 0.80, _experts(SMOA, LORA, 32)),
    Goal("the same, contiguous", 0.80, _experts(CONTIGUOUS, LORA, 32)),
    Goal("experts, 128 pairs each, over PEFT LoRA, spectral", 1.00, _experts(SMOA, LORA, 128)),
    Goal("the same, 1024 pairs each", 1.00, _experts(SMOA, LORA, 1024)),
    Goal("experts, 16 pairs each, over PEFT LoRA, contiguous", 1.00, _experts(CONTIGUOUS, LORA, 16)),
    Goal("the same, blocks that experts share", 1.00, _experts(f"{SMOA}, shared", LORA, 16)),
    *(
        Goal(
            f"experts' peak above frozen's, over {whose}, 32 pairs each, H={hidden}, I={inner}",
            limit,
            _experts_peak(name, hidden),
        )
        for hidden, inner in ((256, 512), (2048, 768))
        for whose, name, limit in (
            ("PEFT LoRA's", LORA, 0.15),
            ("an ideal grouped LoRA's", "ideal grouped LoRA", 1.10),
        )
    ),
    *(
        Goal(
            f"one token through experts, over frozen, {words}",
            1.50,
            _time("experts, one token", "forward", name, FROZEN, hidden=256),
        )
        for words, name in (("contiguous", CONTIGUOUS), ("spectral", SMOA))
    ),
    Goal("seconds to add contiguous blocks to SmolLM2-135M", 0.30, _seconds("adapter", "inject", CONTIGUOUS)),
    *(
        # HiRA's K is 1 in the cases of any K.
        Goal(
            f"accelerated HiRA over PEFT's, T=2048, 2048², r=16, {dtype}{factors}",
            limit,
            _layer(ours, theirs, 4, dtype=dtype),
        )
        for (dtype, factors, ours, theirs), limit in zip(_HIRA, (0.45, 0.60, 0.60), strict=True)
    ),
    *(
        Goal(
            f"the same, training step of SmolLM2-135M, {dtype}{words}",
            limit,
            _step(ACCELERATED, HIRA, dtype, factors),
        )
        for dtype, words, factors, limit in (
            ("float32", "", None, 0.60),
            ("bfloat16", _BY_DEFAULT, None, 0.65),
            ("bfloat16", _ALL_BFLOAT16, "bfloat16", 0.65),
        )
    ),
    *(
        Goal(
            f"the same, {words}, T=2048, 2048², {dtype}{factors}",
            limit,
            _bytes(what, ours, theirs, tokens=2048, dtype=dtype),
        )
        for dtype, factors, ours, theirs in _HIRA
        for words, what, limit in (("saved for backward", "saved", 0.55), ("peak of a pass", "peak", 0.60))
    ),
    Goal("seconds of `accelerate_hira` on SmolLM2-135M", 0.20, _seconds("accelerate", "call", ACCELERATED)),
)
