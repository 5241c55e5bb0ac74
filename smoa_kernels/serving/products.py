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
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..backends import Backend, load_backend, resolve_backend
from ..backends.native import backend as native
from ..definition.packed import PackedAdapter, padding_masks, scaling_tensor
from ..definition.partition import BlockPartition
from ..definition.sketch import sign_rows, sketch_distance, sketch_of_products

# Most rows of the base product in one call; it bounds their memory.
MOST_ROWS = 2048
# The operator computes a slot with so many tokens in a step, even if other slots have tokens.
MANY_TOKENS = 8

Product = Callable[[Tensor], Tensor]
"""x (T, C) -> x W0ᵀ (T, N), without the bias."""


class Group(NamedTuple):
    """The tokens of one slot in a step."""

    slot: int
    tokens: Tensor  # int64, on the device of the activations
    slots: Tensor  # the slot of each token
    size: int

    @classmethod
    def of(cls, slot: int, tokens: Tensor) -> Group:
        """The group of these tokens."""
        return cls(slot, tokens, torch.full_like(tokens, slot), len(tokens))


class Slice(NamedTuple):
    """Rows `start` to `stop` of a layer's W0 and, as the engine stores them, the factors of all slots for these."""

    start: int
    stop: int
    A: Tensor  # (slots, 1, most ranks, C)
    B: Tensor  # (slots, 1, stop - start, most ranks)


def packed_from_stacked(A: Tensor, B: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor, BlockPartition]:
    """Undo the stacking of a shard: A (r, C), B (N, r) -> packed (ρ, C), (N, ρ), and the blocks.

    A coordinate belongs to the block of its first factor that is not zero. One whose factors are all zero adds
    nothing, whatever its block.
    """
    sizes = torch.tensor(ranks, device=A.device)
    block = torch.repeat_interleave(torch.arange(len(ranks), device=A.device), sizes)
    first = sizes.cumsum(0) - sizes
    cols, rows = block[(A != 0).byte().argmax(0)], block[(B != 0).byte().argmax(1)]
    within = torch.arange(max(ranks), device=A.device)

    # The factors of each coordinate's block; further ones are padding.
    of_cols, of_rows = ((first[side][:, None] + within).clamp_max_(len(block) - 1) for side in (cols, rows))
    partition = BlockPartition.from_labels(rows, cols, len(ranks))
    return A.gather(0, of_cols.T), B.gather(1, of_rows), partition


def read_weight(product: Product, in_features: int, like: Tensor) -> Tensor:
    """W0 (N, C) of a layer that only multiplies: its product with the identity, which is exact."""
    identity = torch.eye(in_features, dtype=like.dtype, device=like.device)
    return torch.cat([product(rows).T for rows in identity.split(MOST_ROWS)], 1)


@dataclass(eq=False)
class SharedBlocks:
    """W0's diagonal blocks one after another, and the factors of the adapters that have these blocks.

    Each block is padded to n rows and c columns, those of the largest. The padding of A is zero, that of W0 is not.
    """

    partition: BlockPartition
    weight: Tensor  # (K, c, n), transposed; the only block is W0 (N, C) itself
    cols: Tensor  # int64 (K c,): the column of W0 at each place
    places: Tensor  # int64 (N,): where each row of W0 is among the K n
    # By slot: A (ρ, K c), B (ρ, K, n).
    factors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _last: tuple[Sequence[int], Tensor, Tensor] | None = None

    @classmethod
    def of(cls, weight: Tensor, partition: BlockPartition) -> SharedBlocks:
        """Copy the blocks of W0 (N, C)."""
        rows = _by_block(partition.row_index, partition.row_sizes)
        cols = _by_block(partition.col_index, partition.col_sizes)
        places = torch.empty_like(partition.row_index)
        within = torch.arange(rows.numel(), device=rows.device).view_as(rows)
        for own, size, place in zip(rows, partition.row_sizes, within, strict=True):
            places[own[:size]] = place[:size]
        blocks = weight[rows[:, None], cols[:, :, None]] if partition.num_blocks > 1 else weight
        return cls(partition, blocks, cols.flatten(), places)

    def add(self, slot: int, adapter: PackedAdapter) -> bool:
        """Take the factors of a slot's adapter. False if it has other blocks."""
        own, p = self.partition, adapter.partition
        if own.num_blocks != p.num_blocks:
            return False
        # A coordinate whose factors are zero may be in any block.
        rows, cols = own.row_block == p.row_block, own.col_block == p.col_block
        if not ((rows | ~adapter.B.any(1)).all() and (cols | ~adapter.A.any(0)).all()):
            return False
        A_mask, B_mask = padding_masks(p, adapter.ranks, len(adapter.A))
        A = _by_block((adapter.A * A_mask).T[own.col_index], own.col_sizes).movedim(2, 0)
        B = _by_block((adapter.B * B_mask).float()[own.row_index], own.row_sizes).movedim(2, 0)
        self.factors[slot] = A.flatten(1), B.contiguous()
        return True

    def remove(self, slot: int) -> None:
        """Forget the factors of a slot's adapter, if they are here."""
        if self.factors.pop(slot, None) is not None:
            self._last = None

    def update(self, x: Tensor, slots: Sequence[int]) -> Tensor:
        """`x (W0 ∘ BA)ᵀ` (T, N), float32, with the adapter of each token's slot."""
        step = max(1, MOST_ROWS // max(A.shape[0] for A, _ in self.factors.values()))
        if len(slots) <= step:
            return self._part(x, slots)
        return torch.cat([self._part(x[i : i + step], slots[i : i + step]) for i in range(0, len(x), step)])

    def _part(self, x: Tensor, slots: Sequence[int]) -> Tensor:
        A, B = self._of_tokens(slots)
        rho, blocks, n = B.shape[1:]
        rows = (x.index_select(1, self.cols)[:, None] * A).view(len(x) * rho, blocks, -1).transpose(0, 1)
        # bmm is several times slower over a transposed weight.
        products = torch.bmm(rows, self.weight) if blocks > 1 else F.linear(rows[0], self.weight)
        update = (products.view(blocks, len(x), rho, n) * B.permute(2, 0, 1, 3)).sum(2)
        return update.transpose(0, 1).flatten(1).index_select(1, self.places)

    def _of_tokens(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A (T, ρ, K c) and B (T, ρ, K, n) of each token's adapter."""
        if self._last is not None and self._last[0] == slots:
            return self._last[1:]
        factors = [self.factors[slot] for slot in slots]
        join: Callable[[list[Tensor]], Tensor] = torch.stack
        if len({A.shape[0] for A, _ in factors}) > 1:
            join = partial(pad_sequence, batch_first=True)  # slower
        A, B = (join(side) for side in map(list, zip(*factors, strict=True)))
        # The next token of each sequence has the same adapter. For more tokens it would take memory.
        if len(slots) <= len(self.factors):
            self._last = slots, A, B
        return A, B


def _by_block(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Entries (N, …) in block order -> (K, most, …), each block padded with zeros."""
    return pad_sequence(list(torch.split(tensor, list(sizes))), batch_first=True)


@dataclass
class LayerSlots:
    """The adapters that a layer has in the engine's slots.

    Args:
        product: the base layer's product.
        slices: one for each layer that is packed into this one.
        weight: W0 (N, C) if it is at hand, unquantised.
        keep: if it is not, whether to read W0 at the first token of an adapter and keep it.
    """

    product: Product
    slices: Sequence[Slice]
    weight: Tensor | None
    keep: bool
    ranks: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    packed: dict[tuple[int, int], tuple[PackedAdapter, Backend]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.most = [0] * len(self.slices)  # the most ranks of any adapter, by slice
        self.shared: list[list[SharedBlocks]] = [[] for _ in self.slices]
        # W0 that lies in the engine may change, and copies would take memory that the engine has planned.
        self._copies = self.keep and self.weight is None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C) of the layer, or of its shard."""
        return self.slices[-1].stop, self.slices[0].A.shape[-1]

    def fill(self, slot: int, ranks: Sequence[tuple[int, ...]]) -> None:
        """Record a slot's adapter: r_k of each slice, () of one without an adapter. No ranks at all: a LoRA adapter."""
        self.ranks.pop(slot, None)
        self.packed = {key: adapter for key, adapter in self.packed.items() if key[0] != slot}
        for blocks in itertools.chain.from_iterable(self.shared):
            blocks.remove(slot)
        self.shared = [[blocks for blocks in own if blocks.factors] for own in self.shared]
        if any(ranks):
            self.ranks[slot] = list(ranks)
        totals = [[sum(own) for own in adapter] for adapter in self.ranks.values()]
        self.most = [max(own) for own in zip(*totals, strict=True)] or [0] * len(self.slices)

    def distances(self, sketches: Mapping[int, Tensor]) -> dict[int, float]:
        """The distance of each slice's W0 from its sketch, by products with random signs."""
        if not sketches:
            return {}
        products = self.product(sign_rows(self.shape[1], self.slices[0].A))
        found = {}
        for at, sketch in sketches.items():
            own = products[:, self.slices[at].start : self.slices[at].stop]
            found[at] = sketch_distance(sketch, sketch_of_products(own, sketch))
        return found

    def output(
        self, x: Tensor, bias: Tensor | None, groups: Sequence[Group], base: Callable[[], Tensor]
    ) -> Tensor:
        """Compute `y = x W0ᵀ + b + x (W0 ∘ BA)ᵀ` (T, N) with the adapter of each token.

        Args:
            x: (T, C).
            bias: (N,) or None.
            groups: the tokens of each slot that holds an adapter of ours.
            base: gives y, of which only the rows of the other tokens are kept.
        """
        groups = [group for group in groups if group.slot in self.ranks]
        if not groups:
            return base()
        weight = self._weight_for(groups, x)
        if weight is not None and groups[0].size == len(x):
            return self._modulated(x, bias, weight, groups[0].slot)
        whole = weight is not None and sum(group.size for group in groups) == len(x)
        y = x.new_empty(len(x), self.shape[0]) if whole else base()
        few = []
        for group in groups:
            if weight is not None and (len(groups) == 1 or group.size >= MANY_TOKENS):
                own = x.index_select(0, group.tokens)
                y.index_copy_(0, group.tokens, self._modulated(own, bias, weight, group.slot))
            else:
                few.append(group)
        if few:
            tokens = torch.cat([group.tokens for group in few])
            own = x.index_select(0, tokens)
            if self._copies and weight is not None:
                update = self._by_blocks(own, [group.slot for group in few for _ in range(group.size)])
            else:
                slots = torch.cat([group.slots for group in few])
                update = self._by_rows(own, slots, self.most, weight)
            others = y if weight is not None else y.index_select(0, tokens)
            y.index_copy_(0, tokens, _added(update, own, others, bias, weight))
        return y

    def recorded_output(self, x: Tensor, y: Tensor, bias: Tensor | None, slots: Tensor) -> Tensor:
        """Compute the same by operators and shapes that depend on T only, for a CUDA graph that any step replays.

        Args:
            x: (T, C).
            y: (T, N), the output, which tokens of other adapters keep.
            bias: (N,) or None.
            slots: int64 (T,), on the device: the slot of each of our tokens, -1 for others.
        """
        most = [part.A.shape[2] for part in self.slices]
        update = self._by_rows(x, slots.clamp_min(0), most, self.weight)
        return torch.where((slots >= 0)[:, None], _added(update, x, y, bias, self.weight), y)

    def _weight_for(self, groups: Sequence[Group], x: Tensor) -> Tensor | None:
        """W0 if it is at hand, may be kept, or takes fewer rows of the base product than the adapters; else None."""
        if self.weight is not None:
            return self.weight
        tokens = sum(group.size for group in groups)
        rows = tokens * sum(self.most)
        if not self.keep and rows <= self.shape[1] + tokens:
            return None
        weight = read_weight(self.product, self.shape[1], x)
        self.weight = weight if self.keep else None
        return weight

    def _by_rows(self, x: Tensor, slots: Tensor, most: Sequence[int], weight: Tensor | None) -> Tensor:
        """`Σ_t B[:, t] ∘ ((A[t] ∘ x) W0ᵀ)` (T, N), float32.

        `most` are the ranks of each slice; `slots` (T,) is the slot of each token.
        """
        total = x.new_zeros(len(x), self.shape[0], dtype=torch.float32)
        for (start, stop, all_A, all_B), rank in zip(self.slices, most, strict=True):
            step = max(1, MOST_ROWS // (rank or 1))
            for first in range(0, len(x) if rank else 0, step):
                own = slots[first : first + step]
                A = all_A.index_select(0, own)[:, 0, :rank]
                B = all_B.index_select(0, own)[:, 0, :, :rank].transpose(1, 2)
                rows = (x[first : first + step, None] * A).flatten(0, 1)
                products = (
                    self.product(rows)[:, start:stop]
                    if weight is None
                    else F.linear(rows, weight[start:stop])
                )
                total[first : first + step, start:stop] = (products.float().view_as(B) * B).sum(1)
        return total

    def _by_blocks(self, x: Tensor, slots: Sequence[int]) -> Tensor:
        """The same by products with W0's blocks; `slots` has the slot of each token."""
        updates = []
        for at, part in enumerate(self.slices):
            found = ((slot, self._blocks(slot, at)) for slot in set(slots) if self.ranks[slot][at])
            blocks = {slot: own for slot, own in found if own is not None}
            kinds = set(blocks.values())
            if len(kinds) == 1 and len(blocks) == len(set(slots)):
                updates.append(kinds.pop().update(x, slots))
                continue
            update = x.new_zeros(len(x), part.stop - part.start, dtype=torch.float32)
            for kind in kinds:
                own = [token for token, slot in enumerate(slots) if blocks.get(slot) is kind]
                update[own] = kind.update(x[own], [slots[token] for token in own])
            updates.append(update)
        return updates[0] if len(updates) == 1 else torch.cat(updates, 1)

    def _blocks(self, slot: int, at: int) -> SharedBlocks | None:
        """W0's blocks of a slot's adapter, copied at its first token unless another adapter has the same.

        None if B is zero, as before training: then nothing tells which rows are in which block.
        """
        for blocks in self.shared[at]:
            if slot in blocks.factors:
                return blocks
        assert self.weight is not None
        adapter, _ = self._adapter(slot, at, self.weight)
        if not adapter.B.any():
            return None
        for blocks in self.shared[at]:
            if blocks.add(slot, adapter):
                return blocks
        blocks = SharedBlocks.of(adapter.weight, adapter.partition)
        blocks.add(slot, adapter)
        self.shared[at].append(blocks)
        return blocks

    def _modulated(self, x: Tensor, bias: Tensor | None, weight: Tensor, slot: int) -> Tensor:
        """`x (W0 ∘ (1 + BA))ᵀ + b` (T, N) with the adapter of one slot, by our operator."""
        y = x.new_empty(len(x), self.shape[0])
        for at, part in enumerate(self.slices):
            own, own_bias = y[:, part.start : part.stop], None
            if bias is not None:
                own_bias = bias[part.start : part.stop].to(x.dtype)
            if not self.ranks[slot][at]:
                found = F.linear(x, weight[part.start : part.stop], own_bias)
            else:
                adapter, backend = self._adapter(slot, at, weight)
                if backend is native:
                    found = native.forward(x, own_bias, adapter, "auto", None, out=own)
                else:
                    found = backend.forward(x, own_bias, adapter, "auto", None)
            if len(self.slices) == 1:
                return found
            if found is not own:
                own.copy_(found)
        return y

    def _adapter(self, slot: int, at: int, weight: Tensor) -> tuple[PackedAdapter, Backend]:
        """A slot's adapter in the operator's form, over a slice of W0, and the backend that computes it.

        Between steps it holds W0 only if that is kept anyway.
        """
        kept = weight is self.weight
        if (slot, at) not in self.packed:
            ranks, part = self.ranks[slot][at], self.slices[at]
            rank = sum(ranks)
            A, B, partition = packed_from_stacked(part.A[slot, 0, :rank], part.B[slot, 0, :, :rank], ranks)
            sizes, s = torch.tensor(ranks, dtype=torch.int32, device=A.device), scaling_tensor(1.0, A.device)
            own = weight[part.start : part.stop].to(weight.device if kept else "meta")
            backend = load_backend(resolve_backend("auto", weight.device, weight.dtype, max(ranks)))
            self.packed[slot, at] = PackedAdapter(own, A, B, partition, sizes, s, ranks), backend
        adapter, backend = self.packed[slot, at]
        if not kept:
            adapter = replace(adapter, weight=weight[self.slices[at].start : self.slices[at].stop])
        return adapter, backend


def _added(update: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
    """The update plus the base's output: y, or if W0 is at hand `x W0ᵀ + b`.

    With W0 the sum is rounded once, after the addition, and a bias is added to the rounded sum: added before, it would
    hide a small update. Without W0 y is rounded already, so in half precision a small update is lost.
    """
    if weight is None:
        return (y + update).to(y.dtype)
    total = update.to(x.dtype).addmm_(x, weight.T)
    return total if bias is None else total.add_(bias)
