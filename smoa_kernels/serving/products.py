"""What a layer computes for the SMoA tokens of a batch, `y += x (W0 ∘ BA)ᵀ`, over a base layer that only multiplies.

Where W0 is at hand, our operator computes base and adapter at once, slot by slot: few tokens while it reads W0 once,
many by a GEMM. Else, and where many slots have a token or two each, rank t of a token is a row of the base layer's
own product, whatever its quantisation:

    y += Σ_t B[:, t] ∘ base(A[t] ∘ x)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import load_backend, resolve_backend
from ..definition.packed import PackedAdapter, scaling_tensor
from ..definition.partition import BlockPartition
from ..definition.sketch import sign_rows, sketch_distance, sketch_of_products

__all__ = ["Group", "LayerSlots", "Slice", "packed_from_stacked", "read_weight"]

# Rows of the base product in one call: what bounds the memory for rows.
MOST_ROWS = 2048
# A slot with as many tokens in a step is computed by the operator, also where other slots have tokens.
MANY_TOKENS = 8

Product = Callable[[Tensor], Tensor]
"""x (T, C) -> x W0ᵀ (T, N), without the bias."""


class Group(NamedTuple):
    """The tokens of one slot in a step."""

    slot: int
    tokens: Tensor  # int64, on the device of the activations


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

    # Which factors a coordinate's block has; what lies past them is padding.
    of_cols, of_rows = ((first[side][:, None] + within).clamp_max_(len(block) - 1) for side in (cols, rows))
    partition = BlockPartition.from_labels(rows, cols, len(ranks))
    return A.gather(0, of_cols.T), B.gather(1, of_rows), partition


def read_weight(product: Product, shape: tuple[int, int], like: Tensor) -> Tensor:
    """W0 (N, C) of a layer that only multiplies: its product with the identity, which is exact."""
    weight = like.new_empty(shape)
    identity = torch.eye(shape[1], dtype=like.dtype, device=like.device)
    for rows in identity.split(MOST_ROWS):
        start = int(rows[0].argmax())
        weight[:, start : start + len(rows)] = product(rows).T
    return weight


@dataclass
class LayerSlots:
    """The adapters that a layer has in the engine's slots.

    Args:
        product: the base layer's product.
        slices: of a packed layer, one for each layer in it.
        weight: W0 (N, C) where it is at hand, unquantised.
        keep: whether to read W0 and keep it, at the first token of an adapter, where it is not.
    """

    product: Product
    slices: Sequence[Slice]
    weight: Tensor | None
    keep: bool
    ranks: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    packed: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C) of the layer, or of its shard."""
        return self.slices[-1].stop, self.slices[0].A.shape[-1]

    def fill(self, slot: int, ranks: Sequence[tuple[int, ...]]) -> None:
        """Note what is in a slot now: r_k of each slice, () of one that the adapter leaves alone; nothing is LoRA's."""
        self.ranks.pop(slot, None)
        self.packed = {key: factors for key, factors in self.packed.items() if key[0] != slot}
        if any(ranks):
            self.ranks[slot] = list(ranks)

    def distances(self, sketches: Mapping[int, Tensor]) -> dict[int, float]:
        """How far W0 of each slice is from the one of its sketch, seen by its products with random signs."""
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
            base: gives y for the other tokens, whose rows alone are kept.
        """
        groups = [group for group in groups if group.slot in self.ranks]
        if not groups:
            return base()
        weight = self._weight_for(groups, x)
        bias = None if bias is None else bias.to(x.dtype)
        if weight is not None and len(groups[0].tokens) == len(x):
            return self._modulated(x, bias, weight, groups[0].slot)
        whole = weight is not None and sum(len(group.tokens) for group in groups) == len(x)
        y = x.new_empty(len(x), self.shape[0]) if whole else base()
        few = []
        for group in groups:
            if weight is not None and (len(groups) == 1 or len(group.tokens) >= MANY_TOKENS):
                y[group.tokens] = self._modulated(x[group.tokens], bias, weight, group.slot)
            else:
                few.append(group)
        if few:
            tokens = torch.cat([group.tokens for group in few])
            update = self._rows(x[tokens], few, weight)
            if weight is None:
                y[tokens] = (y[tokens] + update).to(y.dtype)
            else:
                # The adapter's output enters before the base product rounds: half precision would round it away later.
                update = update.to(x.dtype).addmm_(x[tokens], weight.T)
                y[tokens] = update if bias is None else update.add_(bias)
        return y

    def _weight_for(self, groups: Sequence[Group], x: Tensor) -> Tensor | None:
        """W0, where it is at hand, may be kept, or takes fewer rows of the base product than the adapters would."""
        if self.weight is not None:
            return self.weight
        tokens = sum(len(group.tokens) for group in groups)
        rows = tokens * sum(self._rank(groups, at) for at in range(len(self.slices)))
        if not self.keep and rows <= self.shape[1] + tokens:
            return None
        weight = read_weight(self.product, self.shape, x)
        self.weight = weight if self.keep else None
        return weight

    def _rank(self, groups: Sequence[Group], at: int) -> int:
        return max(sum(self.ranks[group.slot][at]) for group in groups)

    def _rows(self, x: Tensor, groups: Sequence[Group], weight: Tensor | None) -> Tensor:
        """`Σ_t B[:, t] ∘ ((A[t] ∘ x) W0ᵀ)` (T, N) in float32 for the tokens of these slots, one group after another."""
        slots = torch.cat([torch.full_like(group.tokens, group.slot) for group in groups])
        update = x.new_zeros(len(x), self.shape[0], dtype=torch.float32)
        for at, (start, stop, all_A, all_B) in enumerate(self.slices):
            rank = self._rank(groups, at)
            for chunk in torch.arange(len(x) if rank else 0, device=x.device).split(
                max(1, MOST_ROWS // max(1, rank))
            ):
                A, B = all_A[slots[chunk], 0, :rank], all_B[slots[chunk], 0, :, :rank]
                rows = (x[chunk, None] * A).flatten(0, 1)
                if weight is None:
                    products = self.product(rows)[:, start:stop]
                else:
                    products = F.linear(rows, weight[start:stop])
                products = products.float().view(len(chunk), rank, -1)
                update[chunk, start:stop] = (products * B.transpose(1, 2)).sum(1)
        return update

    def _modulated(self, x: Tensor, bias: Tensor | None, weight: Tensor, slot: int) -> Tensor:
        """`x (W0 ∘ (1 + BA))ᵀ + b` (T, N) with the adapter of one slot, by our operator."""
        outputs = []
        for at, part in enumerate(self.slices):
            own_bias = None if bias is None else bias[part.start : part.stop]
            own_weight = weight[part.start : part.stop]
            if not self.ranks[slot][at]:
                outputs.append(F.linear(x, own_weight, own_bias))
                continue
            adapter = PackedAdapter(own_weight, *self._packed(slot, at))
            backend = load_backend(resolve_backend("auto", x.device, x.dtype, adapter.A.shape[0]))
            outputs.append(backend.forward(x, own_bias, adapter, "auto", None))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _packed(self, slot: int, at: int) -> tuple[Any, ...]:
        """A slot's adapter as the operator takes it, but for W0, which one step may have and the next not."""
        if (slot, at) not in self.packed:
            ranks, part = self.ranks[slot][at], self.slices[at]
            rank = sum(ranks)
            A, B, partition = packed_from_stacked(part.A[slot, 0, :rank], part.B[slot, 0, :, :rank], ranks)
            sizes = torch.tensor(ranks, dtype=torch.int32, device=A.device)
            self.packed[slot, at] = A, B, partition, sizes, scaling_tensor(1.0, A.device), ranks
        return self.packed[slot, at]
