"""Predicts the cost of fine-tuning a whole model on many GPUs: each GPU's memory, and the bytes it sends in a step.

All methods are counted by the same rules (docs/scaling.md, "How it is counted"), for T tokens of one replica.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from .gpus import Gpu
from .roofline import Estimate, Problem, backward_workspace

NODE = 8  # GPUs that share the fast links
NODE_BYTES_PER_SECOND = 450e9  # NVLink 4, one direction
NETWORK_BYTES_PER_SECOND = 50e9  # 400 Gb/s for each GPU

_HALF, _SINGLE = 2, 4  # bytes of a number of the base, and of an adapter
_LABELS = 9  # bytes of a uint8 label and an int64 index; every process holds all of them


class Model(NamedTuple):
    """The published sizes of a decoder with gated feed-forward and grouped-query attention."""

    hidden: int
    intermediate: int
    key: int  # features of all keys together; those of all queries are hidden
    layers: int
    vocabulary: int
    tied: bool = False  # the head is the embedding

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(N, C) of query, key, value, output, gate, up and down."""
        h, key, inner = self.hidden, self.key, self.intermediate
        return (h, h), (key, h), (key, h), (h, h), (inner, h), (inner, h), (h, inner)


MODELS = {
    "llama-3-8b": Model(4096, 14336, 1024, 32, 128256),
    "llama-3-70b": Model(8192, 28672, 1024, 80, 128256),
    "llama-3-405b": Model(16384, 53248, 1024, 126, 128256),
    "smollm2-135m": Model(576, 1536, 192, 30, 49152, tied=True),
}
METHODS = {"full": "full fine-tuning", "lora": "LoRA", "smoa": "SMoA"}


class Plan(NamedTuple):
    """The predicted cost of one method on each GPU, in a step."""

    trained_parameters: int  # of the whole model
    memory: Mapping[str, float]  # bytes, by purpose
    traffic: Mapping[str, float]  # bytes that a GPU sends, by purpose
    compute_seconds: float  # of matrix products
    traffic_seconds: float  # of collectives


def predict(
    method: str,
    d: Model,
    gpu: Gpu,
    gpus: int,
    *,
    fsdp: bool,
    tokens: int = 8192,
    rank: int = 8,
    num_blocks: int = 2,
) -> Plan:
    """Predict memory, traffic and time of one GPU of many, by one of :data:`METHODS`; without FSDP2 by DDP."""
    full, shards, layers = method == "full", gpus if fsdp else 1, d.layers
    problems = [Problem(tokens, n, c, num_blocks, rank) for n, c in d.linears]
    # Parameters of one process, before FSDP2 shards them. SMoA's rank is that of a block, which may be padded.
    each = {"full": 0.0, "lora": rank, "smoa": rank / num_blocks}[method]
    layer, sides = (sum(sizes) for sizes in zip(*((n * c, n + c) for n, c in d.linears), strict=True))
    factors = _SINGLE * layers * math.ceil(each) * sides
    root = _HALF * d.vocabulary * d.hidden * (1 if d.tied else 2)  # embedding and head
    base = root + _HALF * (layers * layer + (2 * layers + 1) * d.hidden)
    held, trained = base + factors, base if full else factors
    one_output = tokens * _HALF * max(p.out_features for p in problems)
    workspace = {"full": 0, "lora": one_output, "smoa": max(map(backward_workspace, problems))}
    memory = {
        "weights": held / shards,
        "gradients": trained / shards,
        "optimizer": (6 if full else 2) * trained / shards,  # two moments, and a float32 copy of the base
        "block labels": layers * _LABELS * sides if method == "smoa" else 0,
        # Two whole decoder layers, the current and the next one, and embedding and head until backward ends.
        "gathered layers": root + 2 * (_HALF * layer + factors / layers) if shards > 1 else 0,
        "activations": tokens * (_HALF * _activations(d) + (_HALF + _SINGLE) * d.vocabulary),
        "workspace": workspace[method],
    }
    # Decoder layers are gathered in forward and in backward, embedding and head once.
    share = (gpus - 1) / gpus
    traffic = {
        "reduce gradients": share * trained * (1 if fsdp else 2),
        "gather": share * (2 * held - root) if fsdp else 0,
    }
    link = NODE_BYTES_PER_SECOND if gpus <= NODE else NETWORK_BYTES_PER_SECOND
    seconds = _seconds(Problem(tokens, d.vocabulary, d.hidden, 1, 1), gpu, method, is_head=True)
    seconds += layers * sum(_seconds(p, gpu, method) for p in problems)
    parameters = base // _HALF if full else round(layers * each * sides)
    return Plan(parameters, memory, traffic, seconds, sum(traffic.values()) / link)


def _activations(d: Model) -> int:
    """Of a token: checkpointed inputs of all layers, and what one layer keeps while it is recomputed: norms and inputs
    (4 h), queries, attention's output, keys, values, gate, up and the last two's product."""
    return (d.layers + 6) * d.hidden + 2 * d.key + 3 * d.intermediate


def _seconds(problem: Problem, gpu: Gpu, method: str, *, is_head: bool = False) -> float:
    """Seconds of a layer's kernels, whose forward runs twice; the head's runs once, without an adapter."""
    way = "frozen" if is_head else {"full": "frozen", "lora": "lora", "smoa": "merged"}[method]
    found = Estimate(problem, gpu, way)
    forwards = (1 if is_head else 2) + (method == "full")  # dW: a product of the size of forward's
    return forwards * found.seconds("forward") + found.seconds("backward")
