"""`FusedSMoALinear`: an `nn.Linear` with an SMoA adapter."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import eager, load_backend, resolve_backend
from .checks import check_kind
from .definition import reference
from .definition.block_rule import BlockRule
from .definition.dropout import Dropout, draw_seed
from .definition.packed import PackedAdapter
from .definition.partition import BlockPartition
from .definition.ranks import alpha_for_lora_rate
from .definition.sketch import sketch_weight
from .functional import adapted_linear
from .layer_checks import Settings, check_fit, check_linear, linear_parameters, over_rows
from .layer_state import AdaptedLinear
from .operators.arguments import check_input


class FusedSMoALinear(AdaptedLinear):
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
        rule = BlockRule(num_blocks, block_order, granule, block_seed, group_size)
        settings = Settings(r, rule, alpha, dropout, block_ranks, algorithm, backend, strict_base)
        rule.check((out_features, in_features))
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._adapt(settings)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
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
        partition: BlockPartition | None = None,
        use_lora_rate: bool = False,
    ) -> FusedSMoALinear:
        """Adapt an existing layer. Its weight and bias are frozen, and shared rather than copied.

        Args:
            linear: an `nn.Linear`, or a `Conv1D` of transformers, whose (in, out) weight is viewed transposed.
            partition: the blocks of the weight, if they are known; where None, they are computed as `block_order`,
                `granule` and `block_seed` say.
            use_lora_rate: multiply alpha by 3 K / rms(W0), so that the learning rate and the alpha of a LoRA run fit
                (docs/choosing.md). The layer's `alpha` is that number.

        The other arguments are the constructor's.

        Raises:
            TypeError, ValueError: an argument is wrong; the message says which. `linear` is as it was before.
        """
        weight, bias = linear_parameters(linear)
        rule = BlockRule(num_blocks, block_order, granule, block_seed, group_size)
        settings = Settings(r, rule, alpha, dropout, block_ranks, algorithm, backend, strict_base)
        rule.check(weight.shape)
        check_kind("use_lora_rate", use_lora_rate, bool)
        if use_lora_rate:
            alpha = float(r if alpha is None else alpha)
            alpha = alpha_for_lora_rate(alpha, num_blocks, sketch_weight(weight), weight.numel())
            settings = replace(settings, alpha=alpha)
        if partition is not None:
            check_fit(partition, tuple(weight.shape), num_blocks)
        elif not weight.is_meta:
            # Before anything of `linear` is changed: a weight may have no spectrum.
            partition = rule.build(weight)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.register_parameter("weight", weight)
        layer.register_parameter("bias", bias)
        layer._adapt(settings, partition)
        layer.train(linear.training)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) -> (..., out_features), in x's dtype.

        Args:
            x: floating point, with any strides and leading dimensions; it may have no tokens, or be nested.

        Raises:
            TypeError, ValueError: as :func:`smoa_kernels.smoa_linear` does.
        """
        if getattr(x, "is_nested", False):
            return over_rows(self.forward, x)
        adapter = self.smoa
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
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
                adapter(weight) if hasattr(self, "_hf_hook") else adapter.packed(weight, keep=True),
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
        packed = PackedAdapter(self.weight, adapter.A, adapter.B, partition, ranks, adapter.scaling)
        p = self.dropout if self.training else 0.0
        return reference.forward(x, self.bias, packed, "auto", Dropout(draw_seed(x.device), p) if p else None)

    def delta_weight(self) -> Tensor:
        """Compute the update ΔW (N, C) in W0's dtype; under tensor parallelism, this process's part of it.

        It is computed by itself, more exactly than the difference of W_eff and W0.

        Raises:
            RuntimeError: the layer is on the meta device, has no blocks yet, or is sharded by `fully_shard`.
        """
        return eager.delta_weight(self._packed())

    @torch.no_grad()
    def merge(self) -> None:
        """Write W_eff into `weight`, so that the layer is as fast as an `nn.Linear`.

        W0 is kept in the CPU's memory for :meth:`unmerge`.

        If this is interrupted, `weight` is W0 again, bit for bit. Merging a merged layer warns and changes nothing.

        Raises:
            RuntimeError: the layer is on the meta device, has no blocks yet, or is sharded by `fully_shard`.
            ValueError: `backend` cannot run here.
        """
        if self.merged:
            warnings.warn("already merged: nothing to do", UserWarning, stacklevel=2)
            return
        self._check_whole()
        backend = resolve_backend(self.backend, self.weight.device, self.weight.dtype, self.smoa.A.shape[0])
        weight = self.weight if self._shard is None else self._shard.weight(self.weight)
        self._stored_base = self.weight.detach().to("cpu", copy=True)
        try:
            load_backend(backend).modulated_weight(self._packed(), out=weight)
        except BaseException:
            self.unmerge()
            raise

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W0, bit for bit. Unmerging a layer that is not merged warns and changes nothing."""
        if self._stored_base is None:
            warnings.warn("not merged: nothing to do", UserWarning, stacklevel=2)
            return
        self.weight.copy_(self._stored_base)
        self._stored_base = None

    def _check_whole(self) -> None:
        self._check_values()
        if self._shard is None and hasattr(self.weight, "full_tensor"):
            raise RuntimeError("weight is sharded by fully_shard: call unshard() on the module first")

    def _packed(self) -> PackedAdapter:
        self._check_whole()
        base, shard = self._base, self._shard
        packed = self.smoa.packed(base if shard is None else shard.weight(base))
        return replace(packed, A=packed.A.detach(), B=packed.B.detach())

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does, with the adapter's settings."""
        return (
            f"{super().extra_repr()}, r={self.r}, num_blocks={self.num_blocks}, block_order={self.block_order!r}, "
            f"granule={self.granule}, group_size={self.group_size}, alpha={self.alpha:g}, "
            f"dropout={self.dropout}, algorithm={self.algorithm!r}, backend={self.backend!r}"
        )
