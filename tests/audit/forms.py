"""For each kernel: the forms of its launches, the rules that apply, and the pointers that may be narrow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from smoa_kernels.kernels.spec import GRANULE, Key

# Small lookups: a few bytes per coordinate or block, or one number.
LOOKED_UP = dict.fromkeys(("index_ptr", "row_index_ptr", "col_index_ptr"), "one index per coordinate")
LOOKED_UP |= dict.fromkeys(("offsets_ptr", "row_offsets_ptr", "col_offsets_ptr"), "one offset per block")
LOOKED_UP |= dict.fromkeys(("row_block_ptr", "col_block_ptr", "ranks_ptr"), "labels and ranks")
LOOKED_UP |= dict.fromkeys(("scaling_ptr", "seed_ptr"), "one number")
FACTOR_TILES = dict.fromkeys(("a_ptr", "b_ptr"), "a tile of a factor, as wide as the rank, cached")


@dataclass(frozen=True)
class Audited:
    """One kernel as the audit sees it.

    Attributes:
        role: "matmul", "gather" or "copy"; it decides which rules apply.
        forms: names of the constexpr paths of a launch. "r64" in a name is ρ, else ρ = 16; "fp32 factors" is PEFT's
            default; "transposed" reads along the other side; "granules" are coordinates that the partition keeps
            together.
        narrow: see :func:`narrow_pointers`; besides those of `LOOKED_UP`.
    """

    role: Literal["matmul", "gather", "copy"]
    forms: tuple[str, ...]
    narrow: Mapping[str, str] = field(default_factory=dict)


def narrow_pointers(kernel: str) -> dict[str, str]:
    """Pointers that may be accessed below 128 bits, each with its reason."""
    return {**LOOKED_UP, **AUDITED[kernel].narrow}


_GRANULE_FORMS = (
    "r16 granules contiguous",
    "r16 granules contiguous transposed",
    "r64 fp32 factors granules contiguous",
    "r16 granules",
)
_GATHERED = Audited("gather", ("r16", "r16 transposed", "r64 fp32 factors"))

AUDITED: dict[str, Audited] = {
    "modulated_weight": Audited("copy", ("r16", "r64 fp32 factors"), FACTOR_TILES),
    "modulated_blocks": Audited(
        "copy",
        ("r16", "r64 fp32 factors", "r16 granules"),
        {**FACTOR_TILES, "w_ptr": "gathered by rows and columns of W0"},
    ),
    "permute": Audited(
        "copy",
        tuple(
            f"{way}{mask}" for way in ("gather", "scatter") for mask in ("", " dropout", " dropout granules")
        ),
        {"x_ptr": "gathered by columns"},
    ),
    "fused_linear": Audited(
        "matmul", ("r16", "r16 transposed", "r4", "r4 transposed", "r64 fp32 factors"), FACTOR_TILES
    ),
    "contract": Audited(
        "copy",
        ("r16", "r64 fp32 factors", "r16 granules"),
        {**FACTOR_TILES, "w_ptr": "gathered by rows and columns of W0"},
    ),
    "grouped_linear": Audited(
        "matmul",
        _GRANULE_FORMS,
        {**FACTOR_TILES, "transposed_ptr": "a transposed W0, in registers two steps ahead"},
    ),
    "grouped_linear_gathered": _GATHERED,
    "grouped_grad": Audited(
        "matmul",
        _GRANULE_FORMS,
        {**FACTOR_TILES, "w_ptr": "one tile for a whole sum over pairs, in registers"},
    ),
    "grouped_grad_gathered": _GATHERED,
    "sum_partials": Audited(
        "copy",
        ("no bias", "bias", "r16", "r16 transposed"),
        {"bias_ptr": "one row, read by every token and cached"},
    ),
}
"""By the kernel's name; the most common form comes first."""


def representative(kernel: str, dtype: str, form: str) -> Key:
    """A key whose launch takes `form` and compiles to the same code as real sizes.

    Its sizes are multiples of 16 and more than one tile of each kind.
    """
    named = re.search(r"\br(\d+)\b", form)
    rank, blocks, tokens = int(named[1]) if named else 16, 2, 512
    transposed, granule = "transposed" in form, GRANULE if "granules" in form else 1
    dropout = "dropout" in form
    rows, cols = (2048, 1024) if transposed else (1024, 2048)
    padded = rows // blocks, cols // blocks
    sizes = rank, blocks, rows, cols, tokens, *padded
    return Key(kernel, dtype, *sizes, transposed, granule, dropout=dropout)
