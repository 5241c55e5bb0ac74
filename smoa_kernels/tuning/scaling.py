"""Predicts the cost of fine-tuning a whole model on many GPUs: each GPU's memory, and the bytes it sends in a step.

Full fine-tuning, LoRA and SMoA are counted by the same rules (docs/scaling.md, "How it is counted"). Nothing here is
measured. T is the number of tokens of one replica in a step, h the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .gpus import GPUS, Gpu
from .models import MODELS, Decoder
from .roofline import Problem, backward_workspace, estimate

__all__ = [
    "LARGE",
    "METHODS",
    "PARALLEL",
    "WHOLE",
    "Parallel",
    "Plan",
    "Scale",
    "predict",
    "tensor_parallel_size",
]

Parallel = Literal["ddp", "fsdp", "tp"]
Method = Literal["full", "lora", "smoa"]

PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp", "tp")
METHODS: tuple[Method, ...] = ("full", "lora", "smoa")

NODE = 8  # GPUs that share the fast links; tensor parallelism stays within them
NODE_BYTES_PER_SECOND = 450e9  # NVLink 4, one direction
NETWORK_BYTES_PER_SECOND = 50e9  # 400 Gb/s for each GPU

_HALF, _SINGLE = 2, 4  # bytes of a number of the base, and of an adapter
_LABELS = 9  # bytes of a uint8 label and an int64 index; every process holds all of them

LARGE = tuple(name for name, gpu in GPUS.items() if gpu.memory_gb >= 80)
"""GPUs that are used in large numbers."""

WHOLE: Mapping[str, Decoder] = {name: decoder for name, decoder in MODELS.items() if decoder.layers}
"""Models whose sizes are all known."""


@dataclass(frozen=True)
class Scale:
    """A model, a batch and an adapter on a number of GPUs.

    Attributes:
        model: one of `WHOLE`.
        gpus: their number.
        parallel: "ddp", "fsdp" or "tp".
        tokens: of one replica in a step.
        rank: r, of LoRA and of SMoA.
        num_blocks: K.
    """

    model: str
    gpus: int
    parallel: Parallel
    tokens: int = 8192
    rank: int = 16
    num_blocks: int = 4

    @property
    def decoder(self) -> Decoder:
        """Its sizes."""
        return WHOLE[self.model]


@dataclass(frozen=True)
class Plan:
    """The predicted cost of one method on each GPU.

    Attributes:
        method: "full", "lora" or "smoa".
        trained_parameters: of the whole model.
        memory: bytes, by purpose.
        traffic: bytes that a GPU sends in a step, by purpose.
        compute_seconds: of a step's matrix products.
        traffic_seconds: of a step's collectives.
    """

    method: Method
    trained_parameters: int
    memory: Mapping[str, float]
    traffic: Mapping[str, float]
    compute_seconds: float
    traffic_seconds: float

    @property
    def total_memory(self) -> float:
        """Sum of all parts."""
        return sum(self.memory.values())

    @property
    def total_traffic(self) -> float:
        """Sum of all collectives."""
        return sum(self.traffic.values())


def tensor_parallel_size(scale: Scale) -> int:
    """The number of GPUs over which tensor parallelism cuts a layer: at most a node's, and at most one per key head."""
    return min(NODE, scale.gpus, scale.decoder.kv_heads)


def predict(scale: Scale, method: Method, gpu: Gpu) -> Plan:
    """Predict memory, traffic and time of one GPU.

    Under "tp", `scale.gpus` is a multiple of :func:`tensor_parallel_size`.
    """
    d, full = scale.decoder, method == "full"
    cut = tensor_parallel_size(scale) if scale.parallel == "tp" else 1
    shards = scale.gpus if scale.parallel == "fsdp" else 1
    width = {"full": 0, "lora": scale.rank, "smoa": math.ceil(scale.rank / scale.num_blocks)}[method]
    whole, part = _linears(d, 1), _linears(d, cut)

    # Parameters of one process, before FSDP2 shards them.
    layer = sum(n * c for n, c in part)
    factors = d.layers * width * sum(n + c for n, c in part)
    embedding = d.vocabulary * d.hidden
    head, norms = 0 if d.tied else embedding, (2 * d.layers + 1) * d.hidden
    base = d.layers * layer + embedding + math.ceil(head / cut) + norms
    # A trained parameter also has a float32 copy, unless it is one, and two moments.
    trained, states = (
        (_HALF * base, 3 * _SINGLE * base) if full else (_SINGLE * factors, 2 * _SINGLE * factors)
    )
    # FSDP2 holds two whole decoder layers, the current and the next one, and embedding and head until backward ends.
    root, layer_bytes = _HALF * (embedding + head), _HALF * layer + _SINGLE * factors / d.layers
    problems = [Problem(scale.tokens, n, c, scale.num_blocks, scale.rank) for n, c in part]
    memory = {
        "weights": (_HALF * base + _SINGLE * factors) / shards,
        "gradients": trained / shards,
        "optimizer": states / shards,
        "labels": d.layers * _LABELS * sum(n + c for n, c in part) if method == "smoa" else 0,
        "gathered": root + 2 * layer_bytes if shards > 1 else 0,
        "activations": _activations(scale, cut),
        "logits": scale.tokens * d.vocabulary / cut * (_HALF + _SINGLE),
        "workspace": _workspace(method, problems),
    }
    # Decoder layers are gathered in forward and in backward, embedding and head once.
    gathered = 2 * (_HALF * base + _SINGLE * factors) - root
    traffic, seconds = _traffic(scale, cut, trained, gathered, width)
    if full:
        parameters = d.layers * sum(n * c for n, c in whole) + embedding + head + norms
    else:
        r = scale.rank if method == "lora" else scale.rank / scale.num_blocks  # without the padding
        parameters = round(d.layers * r * sum(n + c for n, c in whole))
    return Plan(method, parameters, memory, traffic, _compute(scale, method, problems, cut, gpu), seconds)


def _linears(d: Decoder, cut: int) -> list[tuple[int, int]]:
    """(N, C) of one process's part of a decoder layer's linears: five are cut by rows, the last two by columns."""
    query, key = d.widths
    rows = (query, key, key, d.intermediate, d.intermediate)
    by_rows = [(math.ceil(n / cut), d.hidden) for n in rows]
    return [*by_rows, *((d.hidden, math.ceil(c / cut)) for c in (query, d.intermediate))]


def _traffic(
    scale: Scale, cut: int, trained: float, gathered: float, width: int
) -> tuple[dict[str, float], float]:
    """Bytes that a GPU sends in a step's ring collectives, by purpose, and the seconds that they take.

    Args:
        scale: the case.
        cut: GPUs over which a layer is cut.
        trained: bytes of one process's gradients.
        gathered: bytes that FSDP2 gathers.
        width: rows of the factors that each process holds whole.
    """
    d, inside = scale.decoder, dict[str, float]()
    if scale.parallel == "fsdp":
        share = (scale.gpus - 1) / scale.gpus
        outside = {"gather": share * gathered, "reduce gradients": share * trained}
    else:
        replicas = scale.gpus // cut
        outside = {"reduce gradients": 2 * (replicas - 1) / replicas * trained}
    if cut > 1:
        ring = 2 * (cut - 1) / cut
        # All-reduces of T·h: the outputs of "output" and "down" in forward and again in the recomputation, and in
        # backward the input gradients of query, key, value, gate and up.
        inside["reduce activations"] = ring * d.layers * 9 * scale.tokens * d.hidden * _HALF
        # In each of seven linears every process holds the whole factor on the side of h.
        inside["reduce whole factors"] = ring * _SINGLE * d.layers * width * 7 * d.hidden
    link = NODE_BYTES_PER_SECOND if scale.gpus <= NODE else NETWORK_BYTES_PER_SECOND
    seconds = sum(inside.values()) / NODE_BYTES_PER_SECOND + sum(outside.values()) / link
    return outside | inside, seconds


def _activations(scale: Scale, cut: int) -> float:
    """Checkpointed inputs of all decoder layers, and the activations that one layer keeps while it is recomputed.

    These are norms and inputs (4 h), queries, attention's output, keys, values, gate, up and the last two's product.
    Attention keeps no scores.
    """
    d, (query, key) = scale.decoder, scale.decoder.widths
    inner = (2 * query + 2 * key + 3 * d.intermediate) / cut
    return scale.tokens * _HALF * (d.layers * d.hidden + 4 * d.hidden + inner)


def _workspace(method: Method, problems: list[Problem]) -> float:
    """SMoA: the backward's by the roofline. LoRA: one output of the widest layer."""
    if method == "smoa":
        return max(max(backward_workspace(p).values()) for p in problems)
    return max(p.tokens * p.out_features * _HALF for p in problems) if method == "lora" else 0


def _compute(scale: Scale, method: Method, problems: list[Problem], cut: int, gpu: Gpu) -> float:
    """Seconds of the adapted layers' kernels, whose forward runs twice, and of the head's."""
    way = {"full": "frozen", "lora": "lora", "smoa": "split"}[method]
    dw = method == "full"  # a product of the size of forward's

    def seconds(problem: Problem, way: str, forwards: int) -> float:
        found = estimate(problem, gpu, way)
        return forwards * found.device_seconds("forward") + found.device_seconds("backward")

    head = Problem(scale.tokens, math.ceil(scale.decoder.vocabulary / cut), scale.decoder.hidden, 1, 1)
    layer = sum(seconds(problem, way, 2 + dw) for problem in problems)
    return scale.decoder.layers * layer + seconds(head, "frozen", 1 + dw)
