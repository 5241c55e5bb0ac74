"""The Triton kernels' dropout mask, drawn by torch's operators, so that eager can replace one kernel of a pass.

Philox-4x32-10 (Salmon et al. 2011), as `kernels.common.dropout_draws` calls it: the key is the seed, the counter the
global column and the number of a group of tokens; each of the four words serves two tokens, the low half first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..definition.dropout import Dropout

_TOKENS_PER_DRAW = 8
_WORD = 2**32 - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


class KernelsDropout(Dropout):
    """An active dropout with the kernels' mask, on any device.

    Example:
        >>> mask = KernelsDropout(torch.tensor(7), p=0.5).multiplier(torch.ones(64, 64))
        >>> sorted(set(mask.flatten().tolist()))
        [0.0, 2.0]
    """

    def stream(self, columns: int) -> Callable[[Tensor], Tensor]:
        """Return a function that fills a tensor (tokens, columns) with the multiplier of the tokens that come next."""
        done = 0

        def fill(out: Tensor) -> Tensor:
            nonlocal done
            first, done = done, done + out.shape[0]
            groups = torch.arange(first // _TOKENS_PER_DRAW, -(-done // _TOKENS_PER_DRAW), device=out.device)
            columns_here = torch.arange(self.column_offset, self.column_offset + columns, device=out.device)
            words = _philox(self.seed.reshape(()), columns_here, groups[:, None])
            levels = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], 1).flatten(
                0, 1
            )
            start = first % _TOKENS_PER_DRAW
            return torch.ge(levels[start : start + out.shape[0]], self.threshold, out=out).mul_(self.scale)

        return fill


def _philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, ...]:
    """Four words of 32 bits for each counter (c0, c1, 0, 0), int64; the counters broadcast."""
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # These products are 64 bits without a sign, but `>>` repeats the sign bit.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (b >> 32 & _WORD) ^ c1 ^ keys[0], (a >> 32 & _WORD) ^ c3 ^ keys[1]
        c1, c3 = b & _WORD, a & _WORD
        keys = [key + step & _WORD for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return c0, c1, c2, c3
