"""A layer's computation for the SMoA tokens of a batch, `y += x (W0 ∘ BA)ᵀ`, over a base layer that only multiplies.

If W0 is at hand, our operator computes base and adapter at once, slot by slot: few tokens in one pass over W0, many by
a GEMM. Slots with a token or two each share products with W0's diagonal blocks, if these may be copied. Else rank t of
a token becomes a row of the base layer's own product, whatever its quantisation:

    y += Σ_t B[:, t] ∘ base(A[t] ∘ x)
"""

from __future__ import annotations

import itertools
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
from ..definition.sketch import sign_rows
from .factors import Labels

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

    @classmethod
    def of(cls, slots: Tensor, memory: Tensor) -> Step:
        """The step of tokens with these slots, which are on the host; `memory`, for as many or more, takes them."""
        memory.fill_(-1)[: len(slots)].copy_(slots)
        ours = (slot for slot in slots.unique().tolist() if slot >= 0)
        return cls({slot: (slots == slot).nonzero().flatten().to(memory.device) for slot in ours}, memory)


def read_weight(product: Product, in_features: int, like: Tensor) -> Tensor:
    """W0 (N, C) of a layer that only multiplies: its product with the identity, which is exact."""
    identity = torch.eye(in_features, dtype=like.dtype, device=like.device)
    return torch.cat([product(rows).T for rows in identity.split(MOST_ROWS)], 1)


def update_of(x: Tensor, slots: Tensor, A: Tensor, B: Tensor, product: Product) -> Tensor:
    """Compute `Σ_t B[t] ∘ product(A[t] ∘ x)` (T, *n), float32: x (T, *c), A (slots, r, *c), B (slots, r, *n)."""
    most = max(1, MOST_ROWS // A.shape[1])
    if len(x) > most:
        chunks = zip(x.split(most), slots.split(most), strict=True)
        return torch.cat([update_of(*chunk, A, B, product) for chunk in chunks])
    own_A, own_B = (factors.index_select(0, slots) for factors in (A, B))
    products = product((x[:, None] * own_A).flatten(0, 1))
    return (products.view_as(own_B) * own_B.float()).sum(1)


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
        n, c = self.rows.shape[1], self.cols.shape[1]

        # (K, c, n), zero where padded. Transposed, because bmm is several times slower over a transposed weight.
        self.weight = weight.new_zeros(len(rows), c, n)
        # Where each row of W0 is among the K n.
        self.places = torch.empty_like(partition.row_index)
        for k, (row, col) in enumerate(zip(rows, cols, strict=True)):
            self.weight[k, : len(col), : len(row)] = weight[row][:, col].T
            self.places[row] = torch.arange(k * n, k * n + len(row), device=row.device)
        self.A = weight.new_zeros(slots, 0, *self.cols.shape)
        self.B = weight.new_zeros(slots, 0, *self.rows.shape, dtype=torch.float32)

    def add(self, slot: int, adapter: PackedAdapter) -> bool:
        """Take the factors of a slot's adapter. False if it has other blocks."""
        if self.partition != adapter.partition:
            return False
        rank = len(adapter.A)
        more = max(0, rank - self.A.shape[1])
        self.A, self.B = (F.pad(factors, (0, 0, 0, 0, 0, more)) for factors in (self.A, self.B))
        self.A[slot], self.B[slot] = 0, 0
        self.A[slot, :rank], self.B[slot, :rank] = adapter.A[:, self.cols], adapter.B.T[:, self.rows]
        return True

    def update(self, x: Tensor, slots: Tensor) -> Tensor:
        """`x (W0 ∘ BA)ᵀ` (T, N), float32, with the adapter of each token's slot."""
        own = x.index_select(1, self.cols.flatten()).view(-1, *self.cols.shape)
        update = update_of(own, slots, self.A, self.B, self._product)
        return update.flatten(1).index_select(1, self.places)

    def _product(self, rows: Tensor) -> Tensor:
        """The product with each block: (rows, K, c) -> (rows, K, n)."""
        return torch.bmm(rows.transpose(0, 1), self.weight).transpose(0, 1)


@dataclass(eq=False)
class Slice:
    """Some rows of a layer's W0: one of the layers that are packed into it, with its adapters.

    Args:
        rows: of W0.
        A: the factors of all slots as the engine stores them, (slots, 1, most ranks, C).
        B: (slots, 1, n, most ranks), n the number of rows.
        base: the product of the whole layer.
    """

    rows: slice
    A: Tensor
    B: Tensor
    base: Product
    weight: Tensor | None = field(default=None, init=False)  # these rows of W0, if at hand
    # By slot: the adapter's labels, the operator's form with its backend, and the copied blocks.
    labels: dict[int, Labels] = field(default_factory=dict, init=False)
    packed: dict[int, tuple[PackedAdapter, Backend]] = field(default_factory=dict, init=False)
    blocks: dict[int, DiagonalBlocks] = field(default_factory=dict, init=False)

    @property
    def most_ranks(self) -> int:
        """The most ranks of any adapter."""
        return max((sum(labels.ranks) for labels in self.labels.values()), default=0)

    def hold(self, weight: Tensor | None) -> None:
        """Take these rows of W0 (N, C), or drop them."""
        self.weight = None if weight is None else weight[self.rows]
        own = torch.empty(0, device="meta") if self.weight is None else self.weight
        for slot, (adapter, backend) in self.packed.items():
            self.packed[slot] = replace(adapter, weight=own), backend

    def fill(self, slot: int, labels: Labels | None) -> None:
        """Record the labels of a slot's adapter; None if it has none here. B = 0, as before training, is none."""
        for held in (self.labels, self.packed, self.blocks):
            held.pop(slot, None)
        if labels is not None and self.B[slot, 0, :, : sum(labels.ranks)].any():
            self.labels[slot] = labels

    def output(self, x: Tensor, bias: Tensor | None, slot: int) -> Tensor:
        """`x (W0 ∘ (1 + BA))ᵀ + b` (T, n) with the adapter of one slot, by our operator. W0 must be at hand."""
        own_bias = None if bias is None else bias[self.rows].to(x.dtype)
        if slot in self.labels:
            adapter, backend = self._adapter(slot)
            return backend.forward(x, own_bias, adapter, "auto", None)
        assert self.weight is not None
        return F.linear(x, self.weight, own_bias)

    def update(self, x: Tensor, slots: Tensor, rank: int | None = None) -> Tensor:
        """`x (W0 ∘ BA)ᵀ` (T, n), float32, with the adapter of each token's slot, by products with W0.

        `rank` ranks of each slot are computed; without it, as many as any adapter has.
        """
        rank = self.most_ranks if rank is None else rank
        if not rank:
            return x.new_zeros(len(x), self.B.shape[2], dtype=torch.float32)
        return update_of(x, slots, self.A[:, 0, :rank], self.B[:, 0, :, :rank].mT, self._product)

    def _product(self, x: Tensor) -> Tensor:
        return self.base(x)[:, self.rows] if self.weight is None else F.linear(x, self.weight)

    def update_by_blocks(self, x: Tensor, slots: Tensor) -> Tensor:
        """The same by products with W0's blocks, which are copied at an adapter's first token."""
        ways: dict[DiagonalBlocks | Slice, list[int]] = {}
        for token, slot in enumerate(slots.tolist()):
            if slot in self.labels:
                ways.setdefault(self._way(slot), []).append(token)
        if [len(tokens) for tokens in ways.values()] == [len(x)]:
            return next(iter(ways)).update(x, slots)
        update = x.new_zeros(len(x), self.B.shape[2], dtype=torch.float32)
        for way, tokens in ways.items():
            own = torch.tensor(tokens)
            update.index_copy_(0, own, way.update(x.index_select(0, own), slots.index_select(0, own)))
        return update

    def _way(self, slot: int) -> DiagonalBlocks | Slice:
        """What computes the update of a slot's adapter: blocks, which adapters share, or this if all of W0 is one."""
        if len(self.labels[slot].ranks) == 1:
            return self
        if slot not in self.blocks:
            adapter, _ = self._adapter(slot)
            blocks = next((blocks for blocks in set(self.blocks.values()) if blocks.add(slot, adapter)), None)
            if blocks is None:
                blocks = DiagonalBlocks(adapter.weight, adapter.partition, len(self.A))
                blocks.add(slot, adapter)
            self.blocks[slot] = blocks
        return self.blocks[slot]

    def _adapter(self, slot: int) -> tuple[PackedAdapter, Backend]:
        """A slot's adapter in the operator's form, and the backend that computes it."""
        if slot not in self.packed:
            assert self.weight is not None
            rows, cols, ranks = self.labels[slot]
            A, B = self.A[slot, 0, : sum(ranks)], self.B[slot, 0, :, : sum(ranks)].T
            # (ρ, K, n) each, of which one block is not zero.
            A, B = (pad_sequence(side.split(list(ranks))).sum(1) for side in (A, B))
            partition = BlockPartition.from_labels(rows[:, 0], cols[0], len(ranks)).to(A.device)
            sizes, s = torch.tensor(ranks, dtype=torch.int32, device=A.device), scaling_tensor(1.0, A.device)
            adapter = PackedAdapter(self.weight, A, B.T.contiguous(), partition, sizes, s, ranks)
            backend = resolve_backend("auto", A.device, self.weight.dtype, max(ranks))
            self.packed[slot] = adapter, load_backend(backend)
        return self.packed[slot]


class LayerSlots:
    """A layer's computation with the adapters in the engine's slots.

    Args:
        A: the factors of all slots of each layer that is packed into this one, (slots, 1, most ranks, C).
        B: (slots, 1, n, most ranks), n the rows of W0 that are the packed layer's.
        product: of this layer.
        weight: W0 (N, C) if it is at hand, unquantised; a weight of another shape is not used.
        keep: if it is not, whether to read W0 at the first token of an adapter and keep it.
    """

    def __init__(
        self, A: Sequence[Tensor], B: Sequence[Tensor], product: Product, weight: Tensor | None, *, keep: bool
    ) -> None:
        ends = list(itertools.accumulate(own.shape[2] for own in B))
        rows = [slice(*ends) for ends in itertools.pairwise([0, *ends])]
        self.slices = [Slice(*own, product) for own in zip(rows, A, B, strict=True)]
        self.shape = ends[-1], A[0].shape[-1]
        self._product, self.keep = product, keep
        at_hand = weight is not None and weight.shape == self.shape
        # W0 that lies in the engine may change, and copies would take memory that the engine has planned.
        self._copies = keep and not at_hand
        self._hold(weight if at_hand else None)

    def _hold(self, weight: Tensor | None) -> None:
        self.weight = weight
        for part in self.slices:
            part.hold(weight)

    def sign_products(self) -> Tensor:
        """W0's products with the random signs of a sketch, (32, N)."""
        return self._product(sign_rows(self.shape[1], self.slices[0].A))

    def recorded(self, x: Tensor, y: Tensor, bias: Tensor | None, slots: Tensor) -> Tensor:
        """The same as `output`, by operators and shapes that depend on T only: a CUDA graph of it serves any step."""
        updates = [part.update(x, slots.clamp_min(0), part.A.shape[2]) for part in self.slices]
        return torch.where((slots >= 0)[:, None], self._sum(x, y, bias, updates), y)

    def output(self, x: Tensor, bias: Tensor | None, step: Step, base: Callable[[], Tensor]) -> Tensor:
        """Compute `y = x W0ᵀ + b + x (W0 ∘ BA)ᵀ` (T, N) with the adapter of each token.

        Args:
            x: (T, C).
            bias: (N,) or None.
            step: the tokens with adapters.
            base: gives y, of which only the rows of the other tokens are kept.
        """
        groups = {
            slot: own for slot, own in step.groups.items() if any(slot in p.labels for p in self.slices)
        }
        if not groups:
            return base()
        tokens = sum(map(len, groups.values()))
        rows = tokens * sum(part.most_ranks for part in self.slices)
        # Without W0 the base product has that many rows. Reading W0 takes C.
        if self.weight is None and (self.keep or rows > self.shape[1] + tokens):
            self._hold(read_weight(self._product, self.shape[1], x))
            try:
                return self.output(x, bias, step, base)
            finally:
                if not self.keep:
                    self._hold(None)
        plain, complete, alone = self.weight is not None, tokens == len(x), len(groups) == 1
        if plain and alone and complete:
            return self._modulated(x, bias, *groups)
        y = x.new_empty(len(x), self.shape[0]) if plain and complete else base()
        few = []
        for slot, own in groups.items():
            if plain and (alone or len(own) >= MANY_TOKENS):
                y.index_copy_(0, own, self._modulated(x.index_select(0, own), bias, slot).to(y.dtype))
            else:
                few.append(own)
        if few:
            own = torch.cat(few)
            own_x, own_y, slots = (side.index_select(0, own) for side in (x, y, step.slots))
            update = Slice.update_by_blocks if self._copies else Slice.update
            updates = [update(part, own_x, slots) for part in self.slices]
            y.index_copy_(0, own, self._sum(own_x, own_y, bias, updates).to(y.dtype))
        return y

    def _modulated(self, x: Tensor, bias: Tensor | None, slot: int) -> Tensor:
        return _side_by_side([part.output(x, bias, slot) for part in self.slices])

    def _sum(self, x: Tensor, y: Tensor, bias: Tensor | None, updates: list[Tensor]) -> Tensor:
        """Add the slices' updates to y, or if W0 is at hand to `x W0ᵀ + b`.

        With W0 the sum is rounded once, after the addition, and a bias is added to the rounded sum: added before, it
        would hide a small update. Without W0 y is rounded already, so in half precision a small update is lost.
        """
        update = _side_by_side(updates)
        if self.weight is None:
            return (y + update).to(y.dtype)
        total = update.to(x.dtype).addmm_(x, self.weight.T)
        return total if bias is None else total.add_(bias)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
