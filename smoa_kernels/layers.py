"""`FusedSMoALinear`: an `nn.Linear` with an SMoA adapter; and the like of convolutions and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Adapter
from .definition import reference
from .definition.dropout import Dropout, draw_seed
from .definition.labels import of_columns
from .definition.packed import PackedAdapter
from .definition.partition import BlockPartition
from .functional import adapted_linear, dense_update, embedded_rows, modulated_convolution
from .layer_checks import LayerSettings, check_embedding, check_linear, matrix_shape, over_rows
from .layer_state import AdaptedWeight, as_matrix
from .operators.arguments import check_input
from .operators.dispatch import parameter


class FusedSMoALinear(AdaptedWeight, nn.Linear):
    """A linear layer with an SMoA adapter: `y = x W0ᵀ + b + dropout(x) ΔWᵀ`.

    This is SMoA (arXiv 2605.21147), equations (2) and (3) of docs/definition.md. W0 (N, C) = (out_features,
    in_features) and b are frozen. The rows and columns of W0 are cut into K blocks, and `ΔW = s · mask ∘ (B A) ∘ W0`
    with a mask that is 1 inside the blocks and a scale s = alpha / r. r is the sum of the blocks' ranks, ρ the largest
    of them. The factors A (ρ, C) and B (N, ρ) train. The adapter is the submodule `smoa`, an
    :class:`smoa_kernels.adapter.Adapter`.

    The state dict also holds s, the block labels, the ranks and a sketch of W0. Loading it therefore computes no
    spectrum, and warns if the adapter was trained on another base weight. The state dict of a plain `nn.Linear` has
    no labels: loading it computes new blocks, and warns.

    Args:
        in_features: C, the number of inputs.
        out_features: N, the number of outputs.
        bias: whether the base layer has a bias.
        r: the rank budget, shared by all blocks; at least 1.
        num_blocks: K, the number of blocks, from 1 (which is HiRA) to min(N, C).
        alpha: the scale is s = alpha / r. If alpha is None, it is r, and the scale is 1.
        dropout: probability that an element of the adapter's input is dropped in training.
        block_ranks: the rank r_k of each block, K numbers that sum to r. If None, r is shared evenly.
        block_order: how rows and columns are sorted before they are cut into blocks: "spectral", the paper's order;
            "contiguous", W0's own; or "random". The last two need no spectrum.
        granule: how many adjacent rows or columns stay together; 1 is the paper's.
        block_seed: seed of the order if `block_order` is "random".
        group_size: adjacent columns of W0 that share a column of A, so that the update scales each group of a
            quantised W0 by one number (docs/four_bits.md); 1 is the paper's.
        algorithm: how the layer is computed; see :func:`smoa_kernels.smoa_linear`.
        backend: what computes it; see :func:`smoa_kernels.smoa_linear`.
        strict_base: raise an error, instead of a warning, for an adapter that was trained on another base weight.
        device: device of all tensors.
        dtype: dtype of weight, bias and factors.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which, what was given and what is allowed.

    Example:
        >>> layer = FusedSMoALinear.from_linear(nn.Linear(8, 6), r=4, num_blocks=2)
        >>> layer(torch.randn(3, 8)).shape
        torch.Size([3, 6])
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['smoa.A', 'smoa.B']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        num_blocks: int = 2,
        alpha: float | None = None,
        dropout: float = 0.0,
        block_ranks: Sequence[int] | None = None,
        block_order: str = "spectral",
        granule: int = 1,
        block_seed: int = 0,
        group_size: int = 1,
        algorithm: str = "auto",
        backend: str = "auto",
        strict_base: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_linear(in_features, out_features, bias, device, dtype)
        settings = LayerSettings(
            r, num_blocks, block_ranks, block_order, granule, block_seed, group_size, algorithm, backend, strict_base,
            alpha, dropout,
        )  # fmt: skip
        settings.rule.check((out_features, in_features))
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._adapt(settings)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        partition: BlockPartition | None = None,
        use_lora_rate: bool = False,
        **settings: Any,
    ) -> FusedSMoALinear:
        """Adapt an existing layer. Its weight and bias are frozen, and shared rather than copied.

        Args:
            linear: an `nn.Linear`, or a `Conv1D` of transformers, whose (in, out) weight is viewed transposed.
            partition: the blocks of the weight, if they are known; where None, they are computed as `block_order`,
                `granule` and `block_seed` say.
            use_lora_rate: multiply alpha by 3 K / rms(W0), so that the learning rate and the alpha of a LoRA run fit
                (docs/choosing.md). The layer's `alpha` is that number.
            settings: the constructor's arguments from `r` to `strict_base`.

        Raises:
            TypeError, ValueError: an argument is wrong; the message says which. `linear` is as it was before.
        """
        given = {"partition": partition, "use_lora_rate": use_lora_rate, **settings}
        return cast(FusedSMoALinear, cls._over("linear", linear, **given))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) -> (..., out_features), in x's dtype.

        Args:
            x: floating point, with any strides and leading dimensions; it may have no tokens, or be nested.

        Raises:
            TypeError, ValueError: as :func:`smoa_kernels.smoa_linear` does.
        """
        if getattr(x, "is_nested", False):
            return over_rows(self.forward, x)
        adapter: Adapter = self._modules["smoa"]  # type: ignore[assignment]
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        shard = adapter.shard
        if shard is not None:
            x, weight = shard.local(x), shard.weight(weight)
            bias = None if bias is None else shard.bias(bias)
        if self._stored_base is not None:
            check_input(x, weight)
            y = F.linear(x, weight, bias)
        elif torch._C._are_functorch_transforms_active() and not adapter.is_current():
            return self._by_formula(x)
        else:
            y = adapted_linear(
                x,
                bias,
                # accelerate's hooks load W0, and A and B, for each call of their modules.
                adapter(weight) if "_hf_hook" in self.__dict__ else adapter.packed(weight, keep=True),
                dropout_p=self.dropout if self.training else 0.0,
                column_offset=0 if shard is None else shard.column_offset,
                algorithm=self.algorithm,
                backend=self.backend,
            )
        return y if shard is None else shard.output(y)

    def _by_formula(self, x: Tensor) -> Tensor:
        """The layer with the labels that a transform put into its buffers, in plain operators, which torch batches."""
        # Blocks of the same sizes; `torch.func.vmap` may batch their labels.
        adapter, own = self.smoa, self.smoa._partition
        labels = adapter.row_block, adapter.col_block
        index = [side.argsort(stable=True) for side in labels]
        tensors = [*labels, *index, own.row_offsets, own.col_offsets]
        partition = BlockPartition.from_tensors(tensors, own.sizes())
        ranks = torch.tensor(adapter.block_ranks, dtype=torch.int32, device=x.device)
        A = of_columns(adapter.A, adapter.group_size, own.shape[1])
        packed = PackedAdapter(self.weight, A, adapter.B, partition, ranks, adapter.scaling)
        p = self.dropout if self.training else 0.0
        return reference.forward(x, self.bias, packed, "auto", Dropout(draw_seed(x.device), p) if p else None)


# Layers that are not linear. They compute what the plain layer does, with W_eff in place of W0.
_OPTIONS = {field.name for field in fields(LayerSettings)}


class _Modulated(AdaptedWeight):
    """A layer over a class of torch's, the base after these; its constructor's arguments come first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = LayerSettings(**{key: kwargs.pop(key) for key in _OPTIONS & kwargs.keys()})
        super().__init__(*args, **kwargs)
        check_embedding(type(self).__name__, self)
        settings.rule.check(matrix_shape(self))
        self._adapt(settings)


class _Convolution(_Modulated):
    @classmethod
    def from_conv(cls, conv: nn.Module, **settings: Any) -> Any:
        """Adapt a `conv` of the plain class, with the settings of :meth:`smoa_kernels.FusedSMoALinear.from_linear`.

        Its weight and bias are frozen, and shared rather than copied. A TypeError or ValueError leaves it as it was.
        """
        return cls._over("conv", conv, **settings)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the convolution of x, of the shapes that the plain layer takes."""
        conv: Any = self
        if self.merged:
            return cast(Tensor, conv._conv_forward(x, self.weight, self.bias))
        p, adapter = self.dropout if self.training else 0.0, self.smoa.packed(as_matrix(self.weight))
        if p:
            delta = self._like_weight(dense_update(adapter)).to(x.dtype)
            y = conv._conv_forward(x, self.weight, self.bias)
            return cast(Tensor, y + conv._conv_forward(F.dropout(x, p), delta, None))
        return modulated_convolution(x, self, adapter, self.backend)


class FusedSMoAConv1d(_Convolution, nn.Conv1d):
    """`nn.Conv1d` with an SMoA adapter; see :class:`smoa_kernels.FusedSMoAConv2d`.

    Example:
        >>> layer = FusedSMoAConv1d.from_conv(nn.Conv1d(4, 6, 3), r=4)
        >>> layer(torch.randn(2, 4, 8)).shape
        torch.Size([2, 6, 6])
    """


class FusedSMoAConv2d(_Convolution, nn.Conv2d):
    """`nn.Conv2d` with an SMoA adapter: its convolution with W_eff = W0 + ΔW; ΔW sees dropout(x).

    This is SMoA (arXiv 2605.21147), equation (2) of docs/definition.md, for W0 (N, C', k, k) as the matrix (N, C) with
    C = C'·k·k: N output channels, and C' input channels of a group. W0 and the bias are frozen; the factors A (ρ, C)
    and B (N, ρ) of the submodule `smoa` train.

    The first arguments are those of `nn.Conv2d`; the others, from `r` to `strict_base`, and the state dict are as for
    :class:`smoa_kernels.FusedSMoALinear`; `algorithm` does not count.

    Example:
        >>> layer = FusedSMoAConv2d.from_conv(nn.Conv2d(4, 6, 3, padding=1), r=4, num_blocks=2)
        >>> layer(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 6, 8, 8])
        >>> layer.delta_weight().shape
        torch.Size([6, 4, 3, 3])
    """


class FusedSMoAConv3d(_Convolution, nn.Conv3d):
    """`nn.Conv3d` with an SMoA adapter; see :class:`smoa_kernels.FusedSMoAConv2d`.

    Example:
        >>> layer = FusedSMoAConv3d.from_conv(nn.Conv3d(4, 6, 3), r=4)
        >>> layer(torch.randn(2, 4, 8, 8, 8)).shape
        torch.Size([2, 6, 6, 6, 6])
    """


class FusedSMoAEmbedding(_Modulated, nn.Embedding):
    """`nn.Embedding` with an SMoA adapter: rows of W_eff = W0 + ΔW; only those that x names are computed.

    This is SMoA (arXiv 2605.21147), equation (2) of docs/definition.md. W0 (N, C) holds C numbers for each of N entries
    and is frozen; the factors A (ρ, C) and B (N, ρ) of the submodule `smoa` train. `padding_idx`, `scale_grad_by_freq`
    and `sparse` count for B as they do for a trained weight.

    The first arguments are those of `nn.Embedding`; the others, from `r` to `strict_base`, and the state dict are as
    for :class:`smoa_kernels.FusedSMoALinear`. Indices have no elements to drop: `dropout` does not count, nor
    `algorithm` and `backend`.

    Example:
        >>> layer = FusedSMoAEmbedding.from_embedding(nn.Embedding(10, 8), r=4, num_blocks=2)
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 8])
    """

    @classmethod
    def from_embedding(cls, embedding: nn.Module, **settings: Any) -> FusedSMoAEmbedding:
        """Adapt an `nn.Embedding`, with the settings of :meth:`smoa_kernels.FusedSMoALinear.from_linear`.

        Its weight is frozen, and shared rather than copied. A TypeError or ValueError leaves it as it was.
        """
        return cast(FusedSMoAEmbedding, cls._over("embedding", embedding, **settings))

    def forward(self, x: Tensor) -> Tensor:
        """Look up rows of W_eff: indices (...) -> (..., C), in W0's dtype."""
        rows = super().forward(x)
        if self.merged:
            return rows
        return embedded_rows(x, self, rows, self.smoa.packed(rows.reshape(-1, rows.shape[-1])))
