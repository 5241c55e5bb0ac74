"""The kernels that the audit compiles: where each stands, what ships, and how to launch it.

Imports Triton and the kernels. Everything else about the audit can be imported without either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cost.grad_tiling import partial_width
from ..definition.dropout import Dropout
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..kernels import block_grad, block_matmul, fused_linear, modulate, permute
from ..kernels.heuristic import DTYPES, Key, shipped
from .compile import Launch, capture
from .rules import Role

__all__ = ["KERNELS", "KernelSpec"]


@dataclass(frozen=True)
class KernelSpec:
    """One kernel as the audit sees it.

    Attributes:
        name: for `--kernel`.
        fn: the `@triton.jit` function.
        role: "matmul" or "copy": which rules apply.
        variants: names of the constexpr paths that a launch can take.
        configurations: shipped launch parameters for an architecture, a dtype and a variant, best first.
        launch: arguments of a representative launch for a configuration, a dtype and a variant.
        narrow: pointers that may be accessed below 128 bits, each with its reason.
    """

    name: str
    fn: Any
    role: Role
    variants: tuple[str, ...]
    configurations: Callable[[str, str, str], tuple[Any, ...]]
    launch: Callable[[Any, str, str], Launch]
    narrow: Mapping[str, str] = field(default_factory=dict)


# Sizes only have to specialise as real ones do: multiples of 16, more than one tile of each kind.
_TOKENS, _ROWS, _COLS, _BLOCKS = 512, 1024, 2048, 2


def _adapter(dtype: str, variant: str) -> PackedAdapter:
    """A representative layer; the variant may name ρ, else 16, and the float32 factors that PEFT keeps."""
    named = re.search(r"\br(\d+)\b", variant)
    rank = int(named[1]) if named else 16
    weight = torch.empty(_ROWS, _COLS, dtype=DTYPES[dtype])
    factors = torch.float32 if "fp32 factors" in variant else DTYPES[dtype]
    return PackedAdapter(
        weight=weight,
        A=torch.empty(rank, _COLS, dtype=factors),
        B=torch.empty(_ROWS, rank, dtype=factors),
        partition=BlockPartition.from_labels(
            torch.arange(_ROWS) % _BLOCKS, torch.arange(_COLS) % _BLOCKS, _BLOCKS
        ),
        ranks=torch.full((_BLOCKS,), rank, dtype=torch.int32),
        scaling=torch.ones(()),
    )


def _blocked(dtype: str, features: int) -> Tensor:
    return torch.empty(_TOKENS, _BLOCKS, features // _BLOCKS, dtype=DTYPES[dtype])


def _tf32(dtype: str) -> bool:
    return dtype == "tf32"


_LABELS = "labels and ranks: a few bytes per coordinate, looked up"
_INDEX = "indices and offsets: one per coordinate or block"
_SCALARS = {"scaling_ptr": "one number", "seed_ptr": "one number", "offsets_ptr": _INDEX, "index_ptr": _INDEX}


def _modulated_weight(config: Any, dtype: str, variant: str) -> Launch:
    adapter = _adapter(dtype, variant)
    return capture(
        modulate.modulated_weight_kernel,
        lambda: modulate.modulated_weight(adapter, allow_tf32=_tf32(dtype), config=config),
    )


def _modulated_blocks(config: Any, dtype: str, variant: str) -> Launch:
    adapter = _adapter(dtype, variant)
    return capture(
        modulate.modulated_blocks_kernel,
        lambda: modulate.modulated_blocks(
            adapter, row_multiple=128, col_multiple=128, allow_tf32=_tf32(dtype), config=config
        ),
    )


def _permute(config: Any, dtype: str, variant: str) -> Launch:
    partition = _adapter(dtype, variant).partition
    x = torch.empty(_TOKENS, _COLS, dtype=DTYPES[dtype])
    index, offsets = partition.col_index, partition.col_offsets
    dropout = Dropout(torch.zeros(1, dtype=torch.int64), 0.1) if "dropout" in variant else None
    blocked = _blocked(dtype, _COLS)

    def launcher() -> object:
        if variant.startswith("scatter"):
            return permute.scatter_columns(blocked, index, offsets, x, dropout=dropout, config=config)
        width = blocked.shape[-1]
        return permute.gather_columns(x, index, offsets, width, dropout=dropout, config=config)

    return capture(permute.permute_kernel, launcher)


def _block_matmul(config: Any, dtype: str, variant: str) -> Launch:
    adapter = _adapter(dtype, variant)
    delta = torch.empty(_BLOCKS, _ROWS // _BLOCKS, _COLS // _BLOCKS, dtype=DTYPES[dtype])
    xg = _blocked(dtype, _COLS)
    if "transposed" in variant:  # dX under dropout: ΔW read along the other side
        adapter, delta, xg = adapter.T, delta.transpose(1, 2), _blocked(dtype, _ROWS)
    modulated = "modulated" in variant
    out = torch.empty(_TOKENS, adapter.weight.shape[0], dtype=DTYPES[dtype])
    return capture(
        block_matmul.block_matmul_kernel,
        lambda: block_matmul.block_matmul(
            xg,
            adapter,
            None if modulated else delta,
            weight_blocks=delta if modulated else None,
            out=out,
            allow_tf32=_tf32(dtype),
            config=config,
        ),
    )


def _fused_linear(config: Any, dtype: str, variant: str) -> Launch:
    adapter = _adapter(dtype, variant)
    if "transposed" in variant:
        adapter = adapter.T
    x = torch.empty(_TOKENS, adapter.weight.shape[1], dtype=DTYPES[dtype])
    return capture(
        fused_linear.fused_linear_kernel,
        lambda: fused_linear.fused_linear(x, None, adapter, allow_tf32=_tf32(dtype), config=config),
    )


def _block_grad(config: Any, dtype: str, variant: str) -> Launch:
    adapter = _adapter(dtype, variant)
    dy, x = _blocked(dtype, _ROWS), _blocked(dtype, _COLS)
    return capture(
        block_grad.block_grad_kernel,
        lambda: block_grad.block_grad(dy, x, adapter, allow_tf32=_tf32(dtype), config=config),
    )


def _sum_parts(config: Any, dtype: str, variant: str) -> Launch:
    parts = torch.empty(4, _TOKENS, _COLS)
    bias = torch.empty(_COLS, dtype=DTYPES[dtype])
    y = torch.empty(_TOKENS, _COLS, dtype=DTYPES[dtype])
    return capture(
        fused_linear.sum_parts_kernel,
        lambda: fused_linear.sum_parts(parts, bias if variant == "bias" else None, y, config=config),
    )


def _sum_partials(config: Any, dtype: str, variant: str) -> Launch:
    adapter = _adapter(dtype, variant)
    of_rows = variant.startswith("dB")
    partition, out = (adapter.partition, adapter.B) if of_rows else (adapter.partition.T, adapter.A.T)
    partial = torch.empty(8, out.shape[0], partial_width(out.shape[1]))
    return capture(
        block_grad.sum_partials_kernel,
        lambda: block_grad.sum_partials(partial, partition, adapter.ranks, out, 2, 128, config=config),
    )


def _shipped(kernel: str) -> Callable[[str, str, str], tuple[Any, ...]]:
    return lambda arch, dtype, variant: shipped(Key(kernel, dtype), arch)


KERNELS: tuple[KernelSpec, ...] = (
    KernelSpec(
        "modulated_weight",
        modulate.modulated_weight_kernel,
        "copy",
        ("r16", "r64 fp32 factors"),
        _shipped("modulated_weight"),
        _modulated_weight,
        narrow={
            **_SCALARS,
            "row_block_ptr": _LABELS,
            "col_block_ptr": _LABELS,
            "ranks_ptr": _LABELS,
            "b_ptr": "factor rows are as wide as the rank, and cached",
            "a_ptr": "read in the layout of tl.dot's right operand, and cached",
        },
    ),
    KernelSpec(
        "modulated_blocks",
        modulate.modulated_blocks_kernel,
        "copy",
        ("r16", "r64 fp32 factors"),
        _shipped("modulated_blocks"),
        _modulated_blocks,
        narrow={
            **_SCALARS,
            "w_ptr": "gathered by rows and columns of W0",
            "row_index_ptr": _INDEX,
            "col_index_ptr": _INDEX,
            "row_offsets_ptr": _INDEX,
            "col_offsets_ptr": _INDEX,
            "ranks_ptr": _LABELS,
            "b_ptr": "gathered by rows",
            "a_ptr": "gathered by columns",
        },
    ),
    KernelSpec(
        "permute",
        permute.permute_kernel,
        "copy",
        ("gather", "gather dropout", "scatter", "scatter dropout"),
        _shipped("permute"),
        _permute,
        narrow={**_SCALARS, "x_ptr": "gathered by columns"},
    ),
    KernelSpec(
        "block_matmul",
        block_matmul.block_matmul_kernel,
        "matmul",
        ("loaded", "loaded transposed", "modulated r16"),
        _shipped("block_matmul"),
        _block_matmul,
        narrow={"a_ptr": "factor tile, as wide as the rank, cached"},
    ),
    KernelSpec(
        "fused_linear",
        fused_linear.fused_linear_kernel,
        "matmul",
        ("r16", "r16 transposed", "r64 fp32 factors"),
        _shipped("fused_linear"),
        _fused_linear,
        narrow={
            **_SCALARS,
            "col_block_ptr": _LABELS,
            "ranks_ptr": _LABELS,
            "a_ptr": "factor tile, as wide as the rank, cached",
            "b_ptr": "factor tile, as wide as the rank, cached",
        },
    ),
    KernelSpec(
        "block_grad",
        block_grad.block_grad_kernel,
        "matmul",
        ("r16", "r64 fp32 factors"),
        _shipped("block_grad"),
        _block_grad,
    ),
    KernelSpec(
        "sum_parts",
        fused_linear.sum_parts_kernel,
        "copy",
        ("no bias", "bias"),
        _shipped("sum_parts"),
        _sum_parts,
        narrow={"bias_ptr": "one row, read by every token and cached"},
    ),
    KernelSpec(
        "sum_partials",
        block_grad.sum_partials_kernel,
        "copy",
        ("dB", "dA"),
        _shipped("sum_partials"),
        _sum_partials,
        narrow={"label_ptr": _LABELS, "ranks_ptr": _LABELS, "other_offsets_ptr": _INDEX},
    ),
)
"""Every kernel with a launch configuration."""
