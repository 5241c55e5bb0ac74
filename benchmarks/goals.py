"""The goals for the layer on one CPU thread, and whether a run meets them."""

from __future__ import annotations

from collections.abc import Mapping
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
from .results import Result, Run


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
    """At most `limit`: a provider's time or bytes over another's, in the first result that has both.

    Attributes:
        text: for a person.
        limit: of the ratio.
        kind, what: of benchmark, and a phase that was timed or a size that was counted.
        name, over: the providers; seconds are judged where `over` is "".
        params: of the result.
        above: a provider whose bytes are subtracted from both.
    """

    text: str
    limit: float
    kind: str
    what: str
    name: str
    over: str
    params: Mapping[str, Any]
    above: str = ""

    def measure(self, run: Run) -> Figure | None:
        """The ratio in a run; None where it was not measured."""
        names = {self.name, self.over or self.name}
        for result in run.select(self.kind, **self.params):
            if names <= result.seconds.get(self.what, {}).keys():
                return self._time(result)
            if all(self.what in result.bytes.get(name, {}) for name in names):
                base = result.bytes[self.above][self.what] if self.above else 0
                ours, theirs = (result.bytes[name][self.what] - base for name in (self.name, self.over))
                return Figure(Quartiles(*[ours / theirs] * 3))
        return None

    def _time(self, result: Result) -> Figure:
        comparison = result.comparison(self.what)
        if not self.over:
            return Figure(comparison.time(self.name), comparison.doubt)
        others = [phase for phase in result.seconds if phase != self.what] if self.what == "both" else []
        parts = {phase: result.comparison(phase).ratio(self.name, self.over).median for phase in others}
        return Figure(comparison.ratio(self.name, self.over), comparison.doubt, parts)

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


class WorstGoal(Goal):
    """The same of the largest ratio of all layers of more than one block and of all few tokens."""

    def measure(self, run: Run) -> Figure | None:
        """The largest ratio in a run."""
        found = [
            Figure(comparison.ratio(self.name, self.over), comparison.doubt)
            for kind, phase in (("layer", "both"), ("few tokens", "forward"))
            for result in run.select(kind, **self.params)
            if self.name in result.seconds[phase] and result.params["num_blocks"] > 1
            for comparison in [result.comparison(phase)]
        ]
        return max(found, key=lambda figure: figure.ratio.median, default=None)


# T=2048, 2048×2048, r=16, float32 without dropout, where a goal does not say otherwise.
_SQUARE = {"tokens": 2048, "out_features": 2048, "in_features": 2048, "rank": 16}
_FLOAT32 = {"dtype": "float32", "dropout": 0.0}
_SMALL: dict[str, Any] = {"tokens": 512, "out_features": 1024, "in_features": 1024}
_SMALLER: dict[str, Any] = {"tokens": 128, "out_features": 576, "in_features": 1536, "rank": 8}
_STEP = {"model": SMOLLM2, "batch": 16, "length": 32, "num_blocks": 4}


def _layer(text: str, limit: float, name: str, over: str, num_blocks: int, **params: Any) -> Goal:
    case = _SQUARE | _FLOAT32 | {"num_blocks": num_blocks} | params
    return Goal(text, limit, "layer", "both", name, over, case)


def _step(text: str, limit: float, name: str, over: str, dtype: str, factors: str | None = None) -> Goal:
    """`factors` names their dtype where it is not float32, which is PEFT's default."""
    return Goal(text, limit, "step", "step", name, over, _STEP | {"dtype": dtype, "factors": factors})


def _experts(text: str, limit: float, name: str, pairs: int) -> Goal:
    params = {"pairs": pairs, "hidden": 256, "dtype": "float32"}
    return Goal(text, limit, "experts", "both", name, LORA, params)


_BY_DEFAULT, _ALL_BFLOAT16 = ", factors in float32 (PEFT's default)", ", factors in bfloat16"
# The layer's dtype, words for that of the factors, and the two that are compared.
_HIRA = (
    ("float32", "", ACCELERATED, HIRA),
    ("bfloat16", _BY_DEFAULT, DEFAULT_ACCELERATED, DEFAULT_HIRA),
    ("bfloat16", _ALL_BFLOAT16, ACCELERATED, HIRA),
)

GOALS = (
    _layer("forward + backward over frozen, float32, T=2048, 2048², r=16, K=4", 1.20, SMOA, FROZEN, 4),
    _layer("the same, K=8", 1.14, SMOA, FROZEN, 8),
    _layer("the same, bfloat16 split, K=4", 1.25, SMOA, FROZEN, 4, dtype="bfloat16"),
    _layer("over PEFT LoRA, float32, T=2048, 2048², K=4, dropout 0", 1.05, SMOA, LORA, 4),
    _layer("the same, dropout 0.05 in both", 1.25, SMOA, LORA, 4, dropout=0.05),
    Goal(
        "over frozen, float32, T=128, 384×1536, K=2",
        1.45,
        *("layer", "both", SMOA, FROZEN),
        {"tokens": 128, "out_features": 384, "in_features": 1536, "dtype": "float32"},
    ),
    _layer("over PEFT HiRA, float32 merged, K=1 in both", 0.65, SMOA, HIRA, 1),
    _layer("over the paper's dense way, float32, K=4", 0.45, SMOA, PAPER, 4),
    *(
        Goal(
            f"{words}, 2048², r=8, {dtype}, over frozen",
            limit,
            *("few tokens", "forward", SMOA, FROZEN),
            {"tokens": tokens, "dtype": dtype},
        )
        for words, tokens, dtype, limit in (
            ("one token (decode)", 1, "float32", 5.0),
            ("one token (decode)", 1, "bfloat16", 1.6),
            ("two tokens", 2, "bfloat16", 2.0),
            ("four tokens", 4, "bfloat16", 2.0),
            ("eight tokens", 8, "bfloat16", 2.0),
        )
    ),
    *(
        Goal(words, limit, "memory", "saved", SMOA, LORA, {"dtype": "float32", "dropout": dropout})
        for words, limit, dropout in (
            ("saved for backward over PEFT LoRA, dropout 0", 1.00, 0.0),
            ("the same, dropout 0.05", 0.60, 0.05),
        )
    ),
    *(
        _step(
            f"training step of SmolLM2-135M, {dtype}, 16 × 32 tokens, K=4, over PEFT LoRA",
            *(limit, SMOA, LORA, dtype),
        )
        for dtype, limit in (("float32", 1.20), ("bfloat16", 1.10))
    ),
    Goal(
        "partition over `torch.linalg.svd`, 4096×4096, float32",
        0.20,
        *("partition", "partition", "partition", "SVD"),
        {"out_features": 4096, "in_features": 4096},
    ),
    _layer(
        "contiguous blocks over frozen, float32 in torch's operators, T=2048, 2048², K=4",
        *(1.17, f"{CONTIGUOUS}, eager", FROZEN, 4),
    ),
    _layer("contiguous, bfloat16, T=2048, 2048², K=4", 1.32, CONTIGUOUS, FROZEN, 4, dtype="bfloat16"),
    _layer("the same, K=8", 1.17, CONTIGUOUS, FROZEN, 8, dtype="bfloat16"),
    _layer(
        "contiguous, bfloat16, T=512, 1024², K=8", 1.22, CONTIGUOUS, FROZEN, 8, dtype="bfloat16", **_SMALL
    ),
    _layer(
        "spectral, the same shape, dropout 0.05",
        *(1.80, SMOA, FROZEN, 8),
        **_SMALL,
        dtype="bfloat16",
        dropout=0.05,
    ),
    *(
        _layer(
            f"{words}, bfloat16, T=128, 576×1536, K=2", limit, name, FROZEN, 2, dtype="bfloat16", **_SMALLER
        )
        for words, name, limit in (("contiguous", CONTIGUOUS, 1.70), ("spectral", SMOA, 2.00))
    ),
    Goal(
        "contiguous, peak no higher than spectral's (the gathered copies are not alive at the peak any more), "
        "bfloat16, T=2048, 2048²",
        1.00,
        *("memory", "peak", CONTIGUOUS, SMOA),
        {"tokens": 2048, "dtype": "bfloat16"},
    ),
    WorstGoal(
        "contiguous over spectral, compiled float32, the worst shape of more than one block",
        1.00,
        *("layer", "both", CONTIGUOUS, SMOA),
        {"dtype": "float32"},
    ),
    _experts("experts, 32 pairs each, over PEFT LoRA, spectral", 0.80, SMOA, 32),
    _experts("the same, contiguous", 0.80, CONTIGUOUS, 32),
    _experts("experts, 128 pairs each, over PEFT LoRA, spectral", 1.00, SMOA, 128),
    _experts("the same, 1024 pairs each", 1.00, SMOA, 1024),
    _experts("experts, 16 pairs each, over PEFT LoRA, contiguous", 1.00, CONTIGUOUS, 16),
    _experts("the same, blocks that experts share", 1.00, f"{SMOA}, shared", 16),
    *(
        Goal(
            f"experts' peak above frozen's, over {whose}, 32 pairs each, H={hidden}, I={inner}",
            limit,
            *("experts", "peak", CONTIGUOUS, name),
            {"pairs": 32, "hidden": hidden, "dtype": "float32"},
            above=FROZEN,
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
            *("experts, one token", "forward", name, FROZEN),
            {"hidden": 256},
        )
        for words, name in (("contiguous", CONTIGUOUS), ("spectral", SMOA))
    ),
    Goal(
        "seconds to add contiguous blocks to SmolLM2-135M",
        0.30,
        *("adapter", "inject", CONTIGUOUS, ""),
        {"model": SMOLLM2},
    ),
    *(
        # HiRA's K is 1 in the cases of any K.
        _layer(
            f"accelerated HiRA over PEFT's, T=2048, 2048², r=16, {dtype}{factors}",
            *(limit, ours, theirs, 4),
            dtype=dtype,
        )
        for (dtype, factors, ours, theirs), limit in zip(_HIRA, (0.45, 0.60, 0.60), strict=True)
    ),
    *(
        _step(
            f"the same, training step of SmolLM2-135M, {dtype}{words}",
            *(limit, ACCELERATED, HIRA, dtype, factors),
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
            *("memory", what, ours, theirs),
            {"tokens": 2048, "dtype": dtype},
        )
        for dtype, factors, ours, theirs in _HIRA
        for words, what, limit in (("saved for backward", "saved", 0.55), ("peak of a pass", "peak", 0.60))
    ),
    Goal(
        "seconds of `accelerate_hira` on SmolLM2-135M",
        0.20,
        *("accelerate", "call", ACCELERATED, ""),
        {"model": SMOLLM2},
    ),
)
