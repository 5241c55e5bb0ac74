# mypy: allow-untyped-defs, allow-untyped-decorators
"""Kernels to break, some of them broken as they are, and the calls of their products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

Tile = tuple[int, int, int]


@triton.jit
def add(x, y, out, n, BLOCK: constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n) + tl.load(y + i, i < n), i < n)


@triton.jit
def add_unmasked(x, y, out, n, BLOCK: constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n) + tl.load(y + i), i < n)


@triton.jit
def overlapping(out, BLOCK: constexpr):
    i = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)
    tl.store(out + i, i + tl.program_id(0))


@triton.jit
def neighbours(x, BLOCK: constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + (i + BLOCK) % (4 * BLOCK)))


@triton.jit
def matmul(a, b, c, M, N, K, sam, sak, sbk, sbn, BM: constexpr, BN: constexpr, BK: constexpr, P: constexpr):
    rm, rn = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    pa, pb = a + rm[:, None] * sam + rk[None, :] * sak, b + rk[:, None] * sbk + rn[None, :] * sbn
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        left = K - k * BK
        acc = tl.dot(
            tl.load(pa, (rm < M)[:, None] & (rk < left)[None, :], 0.0),
            tl.load(pb, (rk < left)[:, None] & (rn < N)[None, :], 0.0),
            acc,
            input_precision=P,
        )
        pa += BK * sak
        pb += BK * sbk
    tl.store(c + rm[:, None] * N + rn[None, :], acc, (rm < M)[:, None] & (rn < N)[None, :])


@triton.jit
def matmul_computed(
    a, b, c, sam, sak, sbk, sbn, scale, N: constexpr, K: constexpr, BM: constexpr, BK: constexpr, P: constexpr
):
    rm, rn, rk = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, N), tl.arange(0, BK)
    pa, pb = a + rm[:, None] * sam + rk[None, :] * sak, b + rk[:, None] * sbk + rn[None, :] * sbn
    acc = tl.zeros((BM, N), tl.float32)
    for _ in range(K // BK):
        left = (tl.load(pa).to(tl.float32) * scale).to(a.dtype.element_ty)
        acc = tl.dot(left, tl.load(pb), acc, input_precision=P)
        pa += BK * sak
        pb += BK * sbk
    tl.store(c + rm[:, None] * N + rn[None, :], acc)


@triton.jit
def reduce_rows(x, out, n, BLOCK: constexpr):
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    v = tl.load(x + i[:, None] * n + j[None, :])
    tl.store(out + i, tl.sum(v, 1))
    tl.store(out + n + j, tl.max(v, 0))


@dataclass
class Product:
    """Operands of `a b` (M, K) and (K, N), and its result; `precision` is "ieee", or "tf32" for TF32 operands."""

    a: Tensor
    b: Tensor
    precision: str = "ieee"

    @classmethod
    def random(cls, dtype: torch.dtype, M: int, N: int, K: int) -> Product:
        return cls(torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype))

    def run(self, tile: Tile = (64, 64, 32), *, warps: int = 4, stages: int = 3) -> Tensor:
        """The product in float32, in a loop with asynchronous copies if it has several stages."""
        (M, K), N = self.a.shape, self.b.shape[1]
        c = torch.empty(M, N)
        grid = triton.cdiv(M, tile[0]), triton.cdiv(N, tile[1])
        sizes = M, N, K, *self.a.stride(), *self.b.stride(), *tile
        matmul[grid](self.a, self.b, c, *sizes, self.precision, num_warps=warps, num_stages=stages)
        return c

    def run_computed(self) -> Tensor:
        """The product of the scaled `a`, which is computed in registers."""
        (M, K), N = self.a.shape, self.b.shape[1]
        c = torch.empty(M, N)
        sizes = *self.a.stride(), *self.b.stride(), 0.7, N, K, 64, 32
        matmul_computed[(M // 64,)](self.a, self.b, c, *sizes, self.precision, num_warps=4, num_stages=3)
        return c
