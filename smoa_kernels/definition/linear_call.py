"""What forward and backward of one call of `smoa::linear` share, as a bundle and as an operator's arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .dropout import Dropout
from .packed import PackedAdapter
from .partition import BlockPartition

__all__ = ["SCHEMA", "TENSORS", "LinearCall"]


class LinearCall(NamedTuple):
    """What forward and backward of one call share.

    Attributes:
        adapter: W0, the factors, their blocks and ranks, and s.
        dropout: the active one, or None.
        backend: the name of a resolved backend.
    """

    adapter: PackedAdapter
    dropout: Dropout | None
    backend: str

    def flatten(self) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """The tensors and then the settings of `SCHEMA`: an operator takes only tensors and plain types."""
        adapter, dropout = self.adapter, self.dropout
        partition, block_ranks = adapter.partition, adapter.block_ranks
        seed = None if dropout is None else dropout.seed
        tensors = (adapter.weight, adapter.A, adapter.B, adapter.ranks, adapter.scaling, seed)
        settings = (
            None if block_ranks is None else list(block_ranks),
            partition.sizes(),
            0.0 if dropout is None else dropout.p,
            0 if dropout is None else dropout.column_offset,
            None if dropout is None else dropout.width,
            self.backend,
        )
        return (*tensors, *partition.tensors()), settings

    @staticmethod
    def unflatten(
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        ranks: Tensor,
        scaling: Tensor,
        dropout_seed: Tensor | None,
        row_block: Tensor,
        col_block: Tensor,
        row_index: Tensor,
        col_index: Tensor,
        row_offsets: Tensor,
        col_offsets: Tensor,
        block_ranks: list[int] | None,
        block_sizes: list[int],
        dropout_p: float,
        column_offset: int,
        global_in_features: int | None,
        backend: str,
    ) -> LinearCall:
        """Inverse of :meth:`flatten`."""
        blocks = row_block, col_block, row_index, col_index, row_offsets, col_offsets
        partition = BlockPartition.from_tensors(blocks, block_sizes)
        dropout = None
        if dropout_seed is not None:
            dropout = Dropout(dropout_seed, dropout_p, column_offset, global_in_features)
        adapter = PackedAdapter(weight, A, B, partition, ranks, scaling, block_ranks)
        return LinearCall(adapter, dropout, backend)


_SCHEMA_TYPES = {
    "Tensor | None": "Tensor?",
    "list[int]": "int[]",
    "list[int] | None": "int[]?",
    "int | None": "int?",
}
SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES.get(kind, kind)} {name}"
    for name, kind in LinearCall.unflatten.__annotations__.items()
    if name != "return"
)
"""A `LinearCall` as arguments of an operator: those of :meth:`LinearCall.unflatten`."""

TENSORS = sum(
    "Tensor" in kind for name, kind in LinearCall.unflatten.__annotations__.items() if name != "return"
)
"""How many of these arguments, the first ones, are tensors."""
