"""One process's part of a layer under tensor parallelism, and how tensors enter and leave it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .thresholds import ORIGIN

# torch.distributed.tensor takes about a second to import, and only a shard's methods need it.
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

FULLY_SHARDED = "the base weight is sharded by fully_shard: call unshard() on the module first"


class LayerShard:
    """A contiguous part of W0's rows or columns, cut like `torch.chunk` over a one-dimensional mesh.

    If rows are cut, B's rows and the row labels are cut with them; x and A stay whole. If columns are cut, A's columns,
    the column labels and x are cut with them; B stays whole. The gradient of a tensor that every process holds whole is
    the sum of the processes' results.

    Args:
        mesh: one dimension of devices.
        dim: 0 where W0's rows are cut, 1 where its columns are.
        out_features: N, of the whole layer.
        in_features: C, of the whole layer.

    Attributes:
        rows: the rows of W0 that this process holds.
        cols: the columns of W0 that this process holds.
        row_offset: index of the first of these rows.
        column_offset: index of the first of these columns.
        place: of this process's part, for the rounding of W_eff.
    """

    def __init__(self, mesh: DeviceMesh, dim: int, out_features: int, in_features: int) -> None:
        self._mesh, self._dim, self._out_features = mesh, dim, out_features
        size = (out_features, in_features)[dim]
        step = -(-size // mesh.size())
        start = min(step * mesh.get_local_rank(), size)
        part, every = slice(start, min(start + step, size)), slice(None)
        self.rows: slice = part if dim == 0 else every
        self.cols: slice = every if dim == 0 else part
        self.row_offset, self.column_offset = (start, 0) if dim == 0 else (0, start)
        self.place = ORIGIN.part(self.row_offset, self.column_offset)

    @staticmethod
    def local(tensor: Tensor) -> Tensor:
        """This process's part of x or a factor, a DTensor: of some it is the whole."""
        apply: Any = _Local.apply
        return cast(Tensor, apply(tensor))

    def output(self, y: Tensor) -> Tensor:
        """The layer's output, a DTensor: sharded if W0's rows are cut, else partial sums over the processes."""
        from torch.distributed.tensor import DTensor, Partial, Shard

        placement = Shard(-1) if self._dim == 0 else Partial()
        shape = torch.Size((*y.shape[:-1], self._out_features))
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(y, self._mesh, (placement,), run_check=False, shape=shape, stride=stride)

    def weight(self, weight: Tensor) -> Tensor:
        """This process's part of W0, sharing its storage."""
        mine = self.local(weight)
        expected = tuple(
            full if part == slice(None) else part.stop - part.start
            for full, part in zip(weight.shape, (self.rows, self.cols), strict=True)
        )
        if mine.shape not in (expected, expected[::-1]):
            raise RuntimeError(FULLY_SHARDED)
        return mine

    def bias(self, bias: Tensor) -> Tensor:
        """This process's part of the bias; an equal share of it if outputs are summed over processes."""
        return self.local(bias) if self._dim == 0 else self.local(bias) / self._mesh.size()


class _Local(torch.autograd.Function):
    """This process's part of a DTensor. The gradient gets the DTensor's layout; where it is replicated, it is summed.

    `to_local` gives the gradient wrong strides if parts differ in size, and torch 2.11 then gathers it everywhere.
    """

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.layout = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
        local = tensor.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        mesh, placements, shape, stride = ctx.layout
        held = tuple(Partial() if placement.is_replicate() else placement for placement in placements)
        part = DTensor.from_local(gradient, mesh, held, run_check=False, shape=shape, stride=stride)
        return part.redistribute(placements=placements)
