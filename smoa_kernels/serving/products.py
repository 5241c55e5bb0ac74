"""A layer's computation for the SMoA tokens of a batch, `y += x (W0 ∘ BA)ᵀ`, over a base layer that only multiplies.

If W0 is at hand, our operator computes base and adapter at once, slot by slot: few tokens in one pass over W0, many by
a GEMM. Slots with a token or two each share products with W0's diagonal blocks, if these may be copied. Else rank t of
a token becomes a row of the base layer's own product, whatever its quantisation:

    y += Σ_t B[:, t] ∘ base(A[t] ∘ x)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..backends import Backend, load_backend, resolve_backend
from ..definition.packed import PackedAdapter, scaling_tensor
from ..definition.partition import BlockPartition
from ..definition.sketch import sign_rows, sketch_distance, sketch_of_products

# Most rows of the base product in one call; it bounds their memory.
MOST_ROWS = 2048
# The operator computes a slot with so many tokens in a step, even if other slots have tokens.
MANY_TOKENS = 8

Product = Callable[[Tensor], Tensor]
"""x (T, C) -> x W0ᵀ (T, N), without the bias."""


class Step(NamedTuple):
    """Which tokens of a step have an adapter of ours."""

    groups: Mapping[int, Tensor]  # by slot: the tokens, int64 on the device of the activations
    slots: Tensor  # int64, on that device: the slot of each token, -1 for others


def packed_from_stacked(A: Tensor, B: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor, BlockPartition]:
    """Undo the stacking of a shard: A (r, C), B (N, r) -> packed (ρ, C), (N, ρ), zero in their padding, and the blocks.

    A coordinate belongs to the block of its first factor that is not zero. One whose factors are all zero adds
    nothing, whatever its block.
    """
    sizes = torch.tensor(ranks, device=A.device)
    block = torch.repeat_interleave(torch.arange(len(ranks), device=A.device), sizes)
    first = sizes.cumsum(0) - sizes
    cols, rows = block[(A != 0).byte().argmax(0)], block[(B != 0).byte().argmax(1)]
    within = torch.arange(max(ranks), device=A.device)

    # The factors of each coordinate's block; further ones are zero: other blocks' or, at the end, one more.
    of_cols, of_rows = ((first[side][:, None] + within).clamp_max_(len(block)) for side in (cols, rows))
    partition = BlockPartition.from_labels(rows, cols, len(ranks))
    return F.pad(A, (0, 0, 0, 1)).gather(0, of_cols.T), F.pad(B, (0, 1)).gather(1, of_rows), partition


def read_weight(product: Product, in_features: int, like: Tensor) -> Tensor:
    """W0 (N, C) of a layer that only multiplies: its product with the identity, which is exact."""
    identity = torch.eye(in_features, dtype=like.dtype, device=like.device)
    return torch.cat([product(rows).T for rows in identity.split(MOST_ROWS)], 1)


class DiagonalBlocks:
    """A copy of W0's diagonal blocks, and the factors of the adapters that have these blocks.

    Args:
        weight: W0 (N, C).
        partition: the blocks.
        slots: how many slots there are.
    """

    def __init__(self, weight: Tensor, partition: BlockPartition, slots: int) -> None:
        self.partition = partition
        rows = partition.row_index.split(list(partition.row_sizes))
        cols = partition.col_index.split(list(partition.col_sizes))
        # (K, n) and (K, c), each block padded to the size of the largest.
        self.rows, self.cols = (pad_sequence(side, batch_first=True) for side in (rows, cols))
        (blocks, n), c = self.rows.shape, self.cols.shape[1]

        # (K, c, n), zero where padded. Transposed, because bmm is several times slower over a transposed weight.
        self.weight = weight.new_zeros(blocks, c, n)
        # Where each row of W0 is among the K n.
        self.places = torch.empty_like(partition.row_index)
        for k, (row, col) in enumerate(zip(rows, cols, strict=True)):
            self.weight[k, : len(col), : len(row)] = weight[row][:, col].T
            self.places[row] = torch.arange(k * n, k * n + len(row), device=row.device)
        self.A = weight.new_zeros(blocks, slots, 0, c)  # (K, slots, ρ, c)
        self.B = weight.new_zeros(blocks, slots, 0, n, dtype=torch.float32)

    def add(self, slot: int, adapter: PackedAdapter) -> bool:
        """Take the factors of a slot's adapter. False if it has other blocks."""
        own, p = self.partition, adapter.partition
        # A coordinate whose factors are zero may be in any block.
        rows, cols = own.row_block == p.row_block, own.col_block == p.col_block
        if not ((rows | ~adapter.B.any(1)).all() and (cols | ~adapter.A.any(0)).all()):
            return False
        rank = len(adapter.A)
        more = max(0, rank - self.A.shape[2])
        self.A, self.B = (F.pad(factors, (0, 0, 0, more)) for factors in (self.A, self.B))
        self.A[:, slot], self.B[:, slot] = 0, 0
        self.A[:, slot, :rank] = adapter.A[:, self.cols].transpose(0, 1)
        self.B[:, slot, :rank] = adapter.B[self.rows].transpose(1, 2)
        return True

    def update(self, x: Tensor, slots: Tensor) -> Tensor:
        """`x (W0 ∘ BA)ᵀ` (T, N), float32, with the adapter of each token's slot."""
        A, B = (factors.index_select(1, slots) for factors in (self.A, self.B))
        own = x.index_select(1, self.cols.flatten()).view(len(x), len(A), 1, -1).transpose(0, 1)
        products = torch.bmm((own * A).flatten(1, 2), self.weight).view_as(B)
        return (products * B).sum(2).transpose(0, 1).flatten(1).index_select(1, self.places)


@dataclass(eq=False)
class Slice:
    """Rows `start` to `stop` of a layer's W0: one of the layers that are packed into it, with its adapters.

    Args:
        start: the first row.
        stop: the last row, excluded.
        A: the factors of all slots as the engine stores them, (slots, 1, most ranks, C).
        B: (slots, 1, n, most ranks), n the number of rows.
        base: the product of the whole layer.
    """

    start: int
    stop: int
    A: Tensor
    B: Tensor
    base: Product
    weight: Tensor | None = field(default=None, init=False)  # these rows of W0, if at hand
    # By slot: r_k of each block, the operator's form with its backend, and the copied blocks.
    ranks: dict[int, tuple[int, ...]] = field(default_factory=dict, init=False)
    packed: dict[int, tuple[PackedAdapter, Backend]] = field(default_factory=dict, init=False)
    blocks: dict[int, DiagonalBlocks] = field(default_factory=dict, init=False)

    @property
    def most_ranks(self) -> int:
        """The most ranks of any adapter."""
        return max((sum(ranks) for ranks in self.ranks.values()), default=0)

    def of(self, whole: Tensor, dim: int = 0) -> Tensor:
        """These rows of a tensor that has all rows of W0 along `dim`."""
        return whole.narrow(dim, self.start, self.stop - self.start)

    def hold(self, weight: Tensor | None) -> None:
        """Take these rows of W0 (N, C), or drop them."""
        self.weight = None if weight is None else self.of(weight)
        shape = self.stop - self.start, self.A.shape[-1]
        own = torch.empty(shape, device="meta") if self.weight is None else self.weight
        for slot, (adapter, backend) in self.packed.items():
            self.packed[slot] = replace(adapter, weight=own), backend

    def fill(self, slot: int, ranks: tuple[int, ...]) -> None:
        """Record r_k of a slot's adapter, () if it has none here. One with B = 0, as before training, is none."""
        for held in (self.ranks, self.packed, self.blocks):
            held.pop(slot, None)
        if self.B[slot, 0, :, : sum(ranks)].any():
            self.ranks[slot] = ranks

    def distance(self, sketch: Tensor, products: Tensor) -> float:
        """The distance of these rows of W0 from their sketch, by the layer's `sign_products`."""
        return sketch_distance(sketch, sketch_of_products(self.of(products, 1), sketch))

    def output(self, x: Tensor, bias: Tensor | None, slot: int) -> Tensor:
        """`x (W0 ∘ (1 + BA))ᵀ + b` (T, n) with the adapter of one slot, by our operator. W0 must be at hand."""
        own_bias = None if bias is None else self.of(bias).to(x.dtype)
        if slot in self.ranks:
            adapter, backend = self._adapter(slot)
            return backend.forward(x, own_bias, adapter, "auto", None)
        assert self.weight is not None
        return F.linear(x, self.weight, own_bias)

    def update(self, x: Tensor, slots: Tensor, *, recorded: bool = False) -> Tensor:
        """`x (W0 ∘ BA)ᵀ` (T, n), float32, with the adapter of each token's slot, by products with W0."""
        rank = self.A.shape[2] if recorded else self.most_ranks
        if not rank:
            return x.new_zeros(len(x), self.stop - self.start, dtype=torch.float32)
        A = self.A.index_select(0, slots)[:, 0, :rank]
        B = self.B[:, 0, :, :rank].transpose(1, 2).index_select(0, slots)
        rows = (x[:, None] * A).flatten(0, 1)
        products = self.of(self.base(rows), 1) if self.weight is None else F.linear(rows, self.weight)
        return (products.float().view_as(B) * B).sum(1)

    def update_by_blocks(self, x: Tensor, slots: Tensor) -> Tensor:
        """The same by products with W0's blocks, which are copied at an adapter's first token."""
        ways = [self._way(slot) for slot in slots.tolist()]
        if len(set(ways)) == 1 and ways[0] is not None:
            return ways[0].update(x, slots)
        update = x.new_zeros(len(x), self.stop - self.start, dtype=torch.float32)
        for way in set(ways):
            if way is not None:
                own = torch.tensor([token for token, other in enumerate(ways) if other is way])
                update.index_copy_(0, own, way.update(x.index_select(0, own), slots.index_select(0, own)))
        return update

    def _way(self, slot: int) -> DiagonalBlocks | Slice | None:
        """What computes the update of a slot's adapter: blocks, which adapters share, or this if all of W0 is one."""
        if slot in self.blocks:
            return self.blocks[slot]
        if len(self.ranks.get(slot, ())) < 2:
            return self if slot in self.ranks else None
        adapter, _ = self._adapter(slot)
        same = (blocks for blocks in set(self.blocks.values()) if blocks.add(slot, adapter))
        blocks = next(same, None)
        if blocks is None:
            blocks = DiagonalBlocks(adapter.weight, adapter.partition, len(self.A))
            blocks.add(slot, adapter)
        self.blocks[slot] = blocks
        return blocks

    def _adapter(self, slot: int) -> tuple[PackedAdapter, Backend]:
        """A slot's adapter in the operator's form, and the backend that computes it."""
        if slot not in self.packed:
            assert self.weight is not None
            ranks = self.ranks[slot]
            stacked = self.A[slot, 0, : sum(ranks)], self.B[slot, 0, :, : sum(ranks)]
            A, B, partition = packed_from_stacked(*stacked, ranks)
            sizes, s = torch.tensor(ranks, dtype=torch.int32, device=A.device), scaling_tensor(1.0, A.device)
            adapter = PackedAdapter(self.weight, A, B, partition, sizes, s, ranks)
            backend = resolve_backend("auto", A.device, self.weight.dtype, max(ranks))
            self.packed[slot] = adapter, load_backend(backend)
        return self.packed[slot]


@dataclass
class LayerSlots:
    """A layer's computation with the adapters in the engine's slots.

    Args:
        slices: one for each layer that is packed into this one.
        weight: W0 (N, C) if it is at hand, unquantised.
        keep: if it is not, whether to read W0 at the first token of an adapter and keep it.
    """

    slices: Sequence[Slice]
    weight: Tensor | None
    keep: bool

    def __post_init__(self) -> None:
        # W0 that lies in the engine may change, and copies would take memory that the engine has planned.
        self._copies = self.keep and self.weight is None
        self._hold(self.weight)

    def _hold(self, weight: Tensor | None) -> None:
        self.weight = weight
        for part in self.slices:
            part.hold(weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C) of the layer, or of its shard."""
        return self.slices[-1].stop, self.slices[0].A.shape[-1]

    def fill(self, slot: int, ranks: Sequence[tuple[int, ...]]) -> None:
        """Record a slot's adapter: r_k of each slice, () of one without an adapter of ours.

        vLLM may cut a layer into more slices than an adapter has layers for it; it then takes none of ours.
        """
        for part, own in zip(self.slices, ranks, strict=False):
            part.fill(slot, own)

    def sign_products(self) -> Tensor:
        """W0's products with the random signs of a sketch, (32, N)."""
        return self.slices[0].base(sign_rows(self.shape[1], self.slices[0].A))

    def output(
        self,
        x: Tensor,
        bias: Tensor | None,
        step: Step,
        base: Callable[[], Tensor],
        *,
        recorded: bool = False,
    ) -> Tensor:
        """Compute `y = x W0ᵀ + b + x (W0 ∘ BA)ᵀ` (T, N) with the adapter of each token.

        Args:
            x: (T, C).
            bias: (N,) or None.
            step: the tokens with adapters.
            base: gives y, of which only the rows of the other tokens are kept.
            recorded: use operators and shapes that depend on T only, for a CUDA graph that any step replays.
        """
        if recorded:
            return self._recorded(x, base(), bias, step.slots[: len(x)])
        groups = {slot: own for slot, own in step.groups.items() if any(slot in p.ranks for p in self.slices)}
        if not groups:
            return base()
        tokens = sum(map(len, groups.values()))
        rows = tokens * sum(part.most_ranks for part in self.slices)
        # Without W0 the base product has that many rows. Reading W0 takes C.
        read = self.weight is None and (self.keep or rows > self.shape[1] + tokens)
        if read:
            self._hold(read_weight(self.slices[0].base, self.shape[1], x))
        try:
            return self._mixed(x, bias, Step(groups, step.slots), base)
        finally:
            if read and not self.keep:
                self._hold(None)

    def _mixed(self, x: Tensor, bias: Tensor | None, step: Step, base: Callable[[], Tensor]) -> Tensor:
        tokens, alone = sum(map(len, step.groups.values())), len(step.groups) == 1
        plain, whole = self.weight is not None, tokens == len(x)
        if plain and alone and whole:
            return self._modulated(x, bias, *step.groups)
        y = x.new_empty(len(x), self.shape[0]) if plain and whole else base()
        few = []
        for slot, own in step.groups.items():
            if plain and (alone or len(own) >= MANY_TOKENS):
                y.index_copy_(0, own, self._modulated(x.index_select(0, own), bias, slot))
            else:
                few.append(own)
        most = max(1, MOST_ROWS // max(part.most_ranks for part in self.slices))
        for own in torch.cat(few).split(most) if few else ():
            own_x, slots = (side.index_select(0, own) for side in (x, step.slots))
            own_y = y if plain else y.index_select(0, own)
            y.index_copy_(0, own, self._updated(own_x, own_y, bias, slots))
        return y

    def _recorded(self, x: Tensor, y: Tensor, bias: Tensor | None, slots: Tensor) -> Tensor:
        most = max(1, MOST_ROWS // self.slices[0].A.shape[2])
        parts = zip(*(side.split(most) for side in (x, y, slots.clamp_min(0))), strict=True)
        found = torch.cat([self._updated(x, y, bias, own, recorded=True) for x, y, own in parts])
        return torch.where((slots >= 0)[:, None], found, y)

    def _modulated(self, x: Tensor, bias: Tensor | None, slot: int) -> Tensor:
        return _side_by_side([part.output(x, bias, slot) for part in self.slices])

    def _updated(
        self, x: Tensor, y: Tensor, bias: Tensor | None, slots: Tensor, *, recorded: bool = False
    ) -> Tensor:
        """The output with the adapter of each token's slot, by rows: added to y, or if W0 is at hand to `x W0ᵀ + b`.

        With W0 the sum is rounded once, after the addition, and a bias is added to the rounded sum: added before, it
        would hide a small update. Without W0 y is rounded already, so in half precision a small update is lost.
        """
        if self._copies and not recorded:
            update = _side_by_side([part.update_by_blocks(x, slots) for part in self.slices])
        else:
            update = _side_by_side([part.update(x, slots, recorded=recorded) for part in self.slices])
        if self.weight is None:
            return (y + update).to(y.dtype)
        total = update.to(x.dtype).addmm_(x, self.weight.T)
        return total if bias is None else total.add_(bias)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
