"""Predicts the cost of fine-tuning a whole model on many GPUs: each GPU's memory, and the bytes it sends in a step.

Full fine-tuning, LoRA and SMoA are counted by the same rules (docs/scaling.md, "How it is counted"). Nothing here is
measured. T is the number of tokens of one replica in a step, h the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .gpus import Gpu
from .models import Decoder
from .roofline import Estimate, Problem, backward_workspace

NODE = 8  # GPUs that share the fast links
NODE_BYTES_PER_SECOND = 450e9  # NVLink 4, one direction
NETWORK_BYTES_PER_SECOND = 50e9  # 400 Gb/s for each GPU

_HALF, _SINGLE = 2, 4  # bytes of a number of the base, and of an adapter
_LABELS = 9  # bytes of a uint8 label and an int64 index; every process holds all of them


@dataclass(frozen=True)
class Plan:
    """The predicted cost of one method on each GPU.

    Attributes:
        trained_parameters: of the whole model.
        memory: bytes, by purpose.
        traffic: bytes that a GPU sends in a step, by purpose.
        compute_seconds: of a step's matrix products.
        traffic_seconds: of a step's collectives.
    """

    trained_parameters: int
    memory: Mapping[str, float]
    traffic: Mapping[str, float]
    compute_seconds: float
    traffic_seconds: float


def predict(
    method: str,
    d: Decoder,
    gpu: Gpu,
    gpus: int,
    *,
    fsdp: bool,
    tokens: int = 8192,
    rank: int = 16,
    num_blocks: int = 4,
) -> Plan:
    """Predict memory, traffic and time of one GPU of many.

    Args:
        method: "full", "lora" or "smoa".
        d: a model whose sizes are all known.
        gpu: of which there are `gpus`.
        fsdp: FSDP2 shards parameters, gradients and states; else every process holds all of them, as in DDP.
        tokens: T.
        rank: r, of LoRA and of SMoA.
        num_blocks: K.
    """
    full, shards = method == "full", gpus if fsdp else 1
    problems = [Problem(tokens, n, c, num_blocks, rank) for n, c in d.linears]
    # Parameters of one process, before FSDP2 shards them. SMoA's rank is that of a block, which may be padded.
    each = {"full": 0.0, "lora": rank, "smoa": rank / num_blocks}[method]
    layer, sides = (sum(sizes) for sizes in zip(*((n * c, n + c) for n, c in d.linears), strict=True))
    factors = _SINGLE * d.layers * math.ceil(each) * sides
    root = _HALF * d.vocabulary * d.hidden * (1 if d.tied else 2)  # embedding and head
    base = root + _HALF * (d.layers * layer + (2 * d.layers + 1) * d.hidden)
    held, trained = base + factors, base if full else factors
    one_output = tokens * _HALF * max(p.out_features for p in problems)
    workspace = {"full": 0, "lora": one_output, "smoa": max(map(backward_workspace, problems))}
    memory = {
        "weights": held / shards,
        "gradients": trained / shards,
        "optimizer": (6 if full else 2) * trained / shards,  # two moments, and a float32 copy of the base
        "labels": d.layers * _LABELS * sides if method == "smoa" else 0,
        # Two whole decoder layers, the current and the next one, and embedding and head until backward ends.
        "gathered layers": root + 2 * (_HALF * layer + factors / d.layers) if shards > 1 else 0,
        "activations": tokens * _HALF * _activations(d),
        "logits": tokens * d.vocabulary * (_HALF + _SINGLE),
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
    seconds += d.layers * sum(_seconds(p, gpu, method) for p in problems)
    parameters = base // _HALF if full else round(d.layers * each * sides)
    return Plan(parameters, memory, traffic, seconds, sum(traffic.values()) / link)


def _activations(d: Decoder) -> int:
    """Of a token: checkpointed inputs of all layers, and what one layer keeps while it is recomputed.

    These are norms and inputs (4 h), queries, attention's output, keys, values, gate, up and the last two's product.
    """
    query, key = d.widths
    return (d.layers + 4) * d.hidden + 2 * query + 2 * key + 3 * d.intermediate


def _seconds(problem: Problem, gpu: Gpu, method: str, *, is_head: bool = False) -> float:
    """Seconds of a layer's kernels, whose forward runs twice; the head's runs once, without an adapter."""
    way = "frozen" if is_head else {"full": "frozen", "lora": "lora", "smoa": "merged"}[method]
    found = Estimate(problem, gpu, way)
    forwards = (1 if is_head else 2) + (method == "full")  # dW: a product of the size of forward's
    return forwards * found.device_seconds("forward") + found.device_seconds("backward")
