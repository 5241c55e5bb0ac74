"""Gradients of an adapted convolution's factors on a CPU: of W_eff's gradient only the blocks are computed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..definition.packed import PackedAdapter
from .eager import BlockGradient
from .pages import in_large_pages

# Output pixels whose windows are gathered at a time: these copies stay in cache. For 320 channels, 3x3 and 64² pixels
# panels of 256 to 1024 take the same time, and all 4096 at once 1.5 times as long.
PIXEL_PANEL = 512


def factor_gradients(dy: Tensor, x: Tensor, adapter: PackedAdapter, conv: Any) -> tuple[Tensor, Tensor]:
    """(dA, dB) of a convolution with W_eff, as `eager.factor_gradients` with the windows of x (batch, C', …) as tokens.

    dy is (batch, N, …), `conv` one of torch's modules, without groups, its padding zeros given in numbers.
    """
    gradient = BlockGradient(adapter)
    x = F.pad(x, [size for size in reversed(conv.padding) for _ in range(2)]).contiguous()
    # Where in an image the element lies that a column of W0 is multiplied with for the first pixel.
    image, *steps = x.stride()
    places = torch.zeros(1, dtype=torch.int64)
    for size, step, apart in zip((x.shape[1], *conv.kernel_size), steps, (1, *conv.dilation), strict=True):
        places = (places[:, None] + torch.arange(size) * (step * apart)).flatten()  # numpy's steps may be 0
    batch, _, *pixels = dy.shape
    between = [step * stride for step, stride in zip(steps[1:], conv.stride, strict=True)]
    # Every window by its first place; they overlap.
    windows = x.as_strided((int(places[-1]) + 1, batch, *pixels), (1, image, *between))
    p = adapter.partition
    places = places if p.is_contiguous else places[p.col_index]
    line, dy = math.prod(pixels[1:]), dy.movedim(1, 0)
    images, lines = max(1, PIXEL_PANEL // (line * pixels[0])), max(1, PIXEL_PANEL // line)
    panel = min(images, batch) * min(lines, pixels[0]) * line
    memory = in_large_pages(x.new_empty(len(places) * panel))
    for some_dy, some_windows in zip(dy.split(images, 1), windows.split(images, 1), strict=True):
        for left, right in zip(some_dy.split(lines, 2), some_windows.split(lines, 2), strict=True):
            if not p.is_contiguous:
                left = left.index_select(0, p.row_index)
            gathered = memory[: len(places) * right[0].numel()].view(len(places), *right.shape[1:])
            torch.index_select(right, 0, places, out=gathered)
            gradient.add(left.flatten(1).T, gathered.flatten(1).T)
    return gradient.contract()
