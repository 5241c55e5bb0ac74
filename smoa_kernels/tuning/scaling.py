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
]

Parallel = Literal["ddp", "fsdp"]
Method = Literal["full", "lora", "smoa"]

PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp")
METHODS: tuple[Method, ...] = ("full", "lora", "smoa")

NODE = 8  # GPUs that share the fast links
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
        parallel: "ddp" or "fsdp".
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


def predict(scale: Scale, method: Method, gpu: Gpu) -> Plan:
    """Predict memory, traffic and time of one GPU."""
    d, full = scale.decoder, method == "full"
    shards = scale.gpus if scale.parallel == "fsdp" else 1
    width = {"full": 0, "lora": scale.rank, "smoa": math.ceil(scale.rank / scale.num_blocks)}[method]
    (query, key), linears = d.widths, list[tuple[int, int]]()
    linears += [(n, d.hidden) for n in (query, key, key, d.intermediate, d.intermediate)]
    linears += [(d.hidden, c) for c in (query, d.intermediate)]

    # Parameters of one process, before FSDP2 shards them.
    layer, sides = sum(n * c for n, c in linears), sum(n + c for n, c in linears)
    factors = d.layers * width * sides
    embedding = d.vocabulary * d.hidden
    head, norms = 0 if d.tied else embedding, (2 * d.layers + 1) * d.hidden
    base = d.layers * layer + embedding + head + norms
    # A trained parameter also has a float32 copy, unless it is one, and two moments.
    trained, states = (
        (_HALF * base, 3 * _SINGLE * base) if full else (_SINGLE * factors, 2 * _SINGLE * factors)
    )
    # FSDP2 holds two whole decoder layers, the current and the next one, and embedding and head until backward ends.
    root, layer_bytes = _HALF * (embedding + head), _HALF * layer + _SINGLE * factors / d.layers
    problems = [Problem(scale.tokens, n, c, scale.num_blocks, scale.rank) for n, c in linears]
    memory = {
        "weights": (_HALF * base + _SINGLE * factors) / shards,
        "gradients": trained / shards,
        "optimizer": states / shards,
        "labels": d.layers * _LABELS * sides if method == "smoa" else 0,
        "gathered": root + 2 * layer_bytes if shards > 1 else 0,
        "activations": _activations(scale),
        "logits": scale.tokens * d.vocabulary * (_HALF + _SINGLE),
        "workspace": _workspace(method, problems),
    }
    # Decoder layers are gathered in forward and in backward, embedding and head once.
    share = (scale.gpus - 1) / scale.gpus
    if scale.parallel == "fsdp":
        gathered = 2 * (_HALF * base + _SINGLE * factors) - root
        traffic = {"gather": share * gathered, "reduce gradients": share * trained}
    else:
        traffic = {"reduce gradients": 2 * share * trained}
    link = NODE_BYTES_PER_SECOND if scale.gpus <= NODE else NETWORK_BYTES_PER_SECOND
    # Without the padding of blocks.
    rank = {"full": 0, "lora": scale.rank, "smoa": scale.rank / scale.num_blocks}[method]
    parameters = base if full else round(d.layers * rank * sides)
    seconds = sum(traffic.values()) / link
    return Plan(method, parameters, memory, traffic, _compute(scale, method, problems, gpu), seconds)


def _activations(scale: Scale) -> float:
    """Checkpointed inputs of all decoder layers, and the activations that one layer keeps while it is recomputed.

    These are norms and inputs (4 h), queries, attention's output, keys, values, gate, up and the last two's product.
    Attention keeps no scores.
    """
    d, (query, key) = scale.decoder, scale.decoder.widths
    inner = 2 * query + 2 * key + 3 * d.intermediate
    return scale.tokens * _HALF * (d.layers * d.hidden + 4 * d.hidden + inner)


def _workspace(method: Method, problems: list[Problem]) -> float:
    """SMoA: the backward's by the roofline. LoRA: one output of the widest layer."""
    if method == "smoa":
        return max(max(backward_workspace(p).values()) for p in problems)
    return max(p.tokens * p.out_features * _HALF for p in problems) if method == "lora" else 0


def _compute(scale: Scale, method: Method, problems: list[Problem], gpu: Gpu) -> float:
    """Seconds of the adapted layers' kernels, whose forward runs twice, and of the head's."""
    way = {"full": "frozen", "lora": "lora", "smoa": "split"}[method]
    dw = method == "full"  # a product of the size of forward's

    def seconds(problem: Problem, way: str, forwards: int) -> float:
        found = estimate(problem, gpu, way)
        return forwards * found.device_seconds("forward") + found.device_seconds("backward")

    head = Problem(scale.tokens, scale.decoder.vocabulary, scale.decoder.hidden, 1, 1)
    layer = sum(seconds(problem, way, 2 + dw) for problem in problems)
    return scale.decoder.layers * layer + seconds(head, "frozen", 1 + dw)
