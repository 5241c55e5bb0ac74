"""Predicts what fine-tuning a whole model on many GPUs costs: each GPU's memory, and the bytes it sends in a step.

Full fine-tuning, LoRA and SMoA are counted by the same rules. Nothing here is measured: every number is a prediction.
In the rules T is the number of tokens of one replica in a step, h the hidden size and g the GPUs in a group.

Memory
- The base is bfloat16. Adapters are float32, and so are their gradients and AdamW's two moments: 16 bytes each.
  Full fine-tuning keeps a float32 copy of the weights and two moments beside bfloat16 weights and gradients: 16 bytes.
- SMoA's labels and indices: 9 bytes for each row and column of an adapted layer, whole on every process.
- Each decoder layer is checkpointed: its input is kept, and the activations of one layer at a time are recomputed.
  Query, key and value share an input, gate and up another. Attention keeps no scores (flash attention).
- Logits of all T tokens in bfloat16, and their gradient in float32.
- SMoA's backward workspace is the roofline's for the largest layer; LoRA's is one output of the widest layer.
- FSDP2 holds two decoder layers whole: the one that computes and the next. What is in no decoder layer (embedding and
  head) it holds whole from forward to the end of backward.

Communication is the bytes that a GPU sends in a step, with ring collectives: an all-reduce sends 2·(g-1)/g of a
tensor, an all-gather or a reduce-scatter (g-1)/g.
- DDP: one all-reduce of the trained parameters' gradients.
- FSDP2: decoder layers are gathered in forward and again in backward, before the recomputation; embedding and head are
  gathered once; gradients of trained parameters are reduce-scattered.
- TP: a decoder layer makes 9 all-reduces of T·h: the outputs of "output" and "down" in forward and again in the
  recomputation, and in backward the input gradients of query, key, value, gate and up. The gradients of factors that
  every process holds whole are reduced too. The embedding is whole, the head is cut by its rows, and the loss's small
  reductions are not counted. The remaining dimension is DDP.

Time is that of the kernels of the adapted layers and the head by the roofline, forward counted twice, and of the
communication at the link's published rate. Nothing overlaps, and Python is not waited for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .counts import Problem
from .gpus import GPUS, Gpu
from .models import MODELS, Decoder
from .roofline import backward_workspace_bytes, estimate

__all__ = ["LARGE", "METHODS", "PARALLEL", "WHOLE", "Plan", "Scale", "predict", "tensor_parallel_size"]

Parallel = Literal["ddp", "fsdp", "tp"]
Method = Literal["full", "lora", "smoa"]

PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp", "tp")
METHODS: tuple[Method, ...] = ("full", "lora", "smoa")

NODE = 8  # GPUs that share the fast links; tensor parallelism stays within them
NODE_BYTES_PER_SECOND = 450e9  # NVLink 4, one direction
NETWORK_BYTES_PER_SECOND = 50e9  # 400 Gb/s for each GPU

_HALF, _SINGLE = 2, 4
_TRAINED = (
    12  # bytes of a parameter in full fine-tuning beyond weight and gradient: float32 copy, two moments
)
_LABELS = 9  # a uint8 label and an int64 index


LARGE = tuple(name for name, gpu in GPUS.items() if gpu.memory_gb >= 80)
"""The GPUs that are linked in such numbers."""

WHOLE: Mapping[str, Decoder] = {name: decoder for name, decoder in MODELS.items() if decoder.layers}
"""The models of which all is known."""


@dataclass(frozen=True)
class Scale:
    """A model, a batch and an adapter on a number of GPUs.

    Attributes:
        model: one of `WHOLE`.
        gpus: how many.
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
        memory: bytes, by what they are for.
        traffic: bytes that a GPU sends in a step, by what they are for.
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
    """The number of GPUs that tensor parallelism cuts a layer over: at most a node, one for each key and value head."""
    return min(NODE, scale.gpus, scale.decoder.kv_heads)


@dataclass(frozen=True)
class _Linear:
    out_features: int
    in_features: int
    cuts_rows: bool  # by tensor parallelism; else its columns

    def part(self, size: int) -> tuple[int, int]:
        """(N, C) of one process's part."""
        if self.cuts_rows:
            return math.ceil(self.out_features / size), self.in_features
        return self.out_features, math.ceil(self.in_features / size)


def _linears(decoder: Decoder) -> list[_Linear]:
    dim = decoder.head_dim or decoder.hidden // decoder.heads
    query, key = decoder.heads * dim, decoder.kv_heads * dim
    rows = [query, key, key, decoder.intermediate, decoder.intermediate]
    return [
        *(_Linear(out, decoder.hidden, cuts_rows=True) for out in rows),
        _Linear(decoder.hidden, query, cuts_rows=False),
        _Linear(decoder.hidden, decoder.intermediate, cuts_rows=False),
    ]


def predict(scale: Scale, method: Method, gpu: Gpu) -> Plan:
    """Predict memory, traffic and time of one GPU, by the rules at the top of this file.

    Under "tp", `scale.gpus` is a multiple of :func:`tensor_parallel_size`.
    """
    decoder, linears = scale.decoder, _linears(scale.decoder)
    cut = tensor_parallel_size(scale) if scale.parallel == "tp" else 1
    shards = scale.gpus if scale.parallel == "fsdp" else 1

    embedding = decoder.vocabulary * decoder.hidden
    head = 0 if decoder.tied else embedding
    root = _HALF * (embedding + head)  # bytes that FSDP2 gathers once and keeps through backward
    norms = (2 * decoder.layers + 1) * decoder.hidden
    block = sum(math.prod(linear.part(cut)) for linear in linears)
    base = decoder.layers * block + embedding + math.ceil(head / cut) + norms  # of one process under TP
    width = {"full": 0, "lora": scale.rank, "smoa": math.ceil(scale.rank / scale.num_blocks)}[method]
    factors = decoder.layers * width * sum(sum(linear.part(cut)) for linear in linears)
    whole_factors = decoder.layers * width * sum(n.out_features + n.in_features for n in linears)
    whole_base = (
        decoder.layers * sum(n.out_features * n.in_features for n in linears) + embedding + head + norms
    )
    full = method == "full"

    weights = (_HALF * base + _SINGLE * factors) / shards
    gradients = (_HALF * base if full else _SINGLE * factors) / shards
    states = (_TRAINED * base if full else (_TRAINED - _SINGLE) * factors) / shards
    memory = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": states,
        "labels": _labels(linears, decoder.layers, cut) if method == "smoa" else 0,
        "gathered": root + 2 * (_HALF * block + _SINGLE * factors / decoder.layers) if shards > 1 else 0,
        "activations": _activations(scale, cut),
        "logits": scale.tokens * decoder.vocabulary / cut * (_HALF + _SINGLE),
        "workspace": _workspace(scale, method, linears, cut),
    }

    trained = _HALF * base if full else _SINGLE * factors
    gathered = 2 * (_HALF * base + _SINGLE * factors) - root
    traffic, seconds = _traffic(scale, cut, trained, gathered, width)
    padding = (
        math.ceil(scale.rank / scale.num_blocks) * scale.num_blocks / scale.rank if method == "smoa" else 1
    )
    trained_parameters = whole_base if full else round(whole_factors / padding)
    return Plan(
        method, trained_parameters, memory, traffic, _compute(scale, method, linears, cut, gpu), seconds
    )


def _traffic(
    scale: Scale, cut: int, trained: float, gathered: float, width: int
) -> tuple[dict[str, float], float]:
    """Bytes that a GPU sends in a step, by what they are for, and the seconds that they take.

    Args:
        scale: the case.
        cut: GPUs that a layer is cut over.
        trained: bytes of gradients that one process has.
        gathered: bytes that FSDP2 gathers.
        width: rows of the factors that each process holds whole.
    """
    decoder, linears = scale.decoder, _linears(scale.decoder)
    outside: dict[str, float] = {}
    if scale.parallel == "fsdp":
        share = (scale.gpus - 1) / scale.gpus
        outside = {"gather": share * gathered, "reduce gradients": share * trained}
    else:
        replicas = scale.gpus // cut
        outside["reduce gradients"] = 2 * (replicas - 1) / replicas * trained
    inside: dict[str, float] = {}
    if cut > 1:
        ring = 2 * (cut - 1) / cut
        sides = sum(n.in_features if n.cuts_rows else n.out_features for n in linears)
        inside["reduce activations"] = ring * decoder.layers * 9 * scale.tokens * decoder.hidden * _HALF
        inside["reduce whole factors"] = ring * _SINGLE * decoder.layers * width * sides
    link = NODE_BYTES_PER_SECOND if scale.gpus <= NODE else NETWORK_BYTES_PER_SECOND
    seconds = sum(inside.values()) / NODE_BYTES_PER_SECOND + sum(outside.values()) / link
    return outside | inside, seconds


def _labels(linears: list[_Linear], layers: int, cut: int) -> float:
    return float(layers * _LABELS * sum(sum(linear.part(cut)) for linear in linears))


def _activations(scale: Scale, cut: int) -> float:
    """Inputs of all decoder layers, and what one of them keeps: norms and inputs (4 h), queries, attention's output,
    keys, values, gate, up and the product of these two."""
    d = scale.decoder
    dim = d.head_dim or d.hidden // d.heads
    inner = (2 * d.heads * dim + 2 * d.kv_heads * dim + 3 * d.intermediate) / cut
    return scale.tokens * _HALF * (scale.decoder.layers * d.hidden + 4 * d.hidden + inner)


def _problems(scale: Scale, linears: list[_Linear], cut: int) -> list[Problem]:
    return [Problem(scale.tokens, *linear.part(cut), scale.num_blocks, scale.rank) for linear in linears]


def _workspace(scale: Scale, method: Method, linears: list[_Linear], cut: int) -> float:
    problems = _problems(scale, linears, cut)
    if method == "smoa":
        return max(backward_workspace_bytes(problem) for problem in problems)
    if method == "lora":
        return scale.tokens * _HALF * max(problem.out_features for problem in problems)
    return 0.0


def _compute(scale: Scale, method: Method, linears: list[_Linear], cut: int, gpu: Gpu) -> float:
    seconds = 0.0
    way = {"full": "frozen", "lora": "lora", "smoa": "split"}[method]
    for problem in _problems(scale, linears, cut):
        found = estimate(problem, gpu, way)
        seconds += 2 * found.device_seconds("forward") + found.device_seconds("backward")
        if method == "full":  # dW, a product of the same size
            seconds += found.device_seconds("forward")
    head = Problem(scale.tokens, math.ceil(scale.decoder.vocabulary / cut), scale.decoder.hidden, 1, 1)
    found = estimate(head, gpu, "frozen")
    trained_head = found.device_seconds("forward") if method == "full" else 0.0
    return scale.decoder.layers * seconds + found.device_seconds() + trained_head
