"""Products of stored matrices in torch, with gradients for the levels of their groups and none for their codes.

A matrix [R, K] is held as codes u8 [G, 256] and the numbers at the head of each group, f32 [G, n], with G = R·K/256:
the n levels of a codebook, or scale and zero of an even grid. Its f32 values exist only while a product is computed,
once forward and once backward, so that a layer of many experts fits into memory. Every sum has a fixed order, on a GPU
too.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...formats.fwht import GROUP, rotate
from ...kernels.runtime.host import Backend
from ...kernels.train.levels import level_gradients, spread_levels
from ..encode.gpu_encoder import open_gpu
from ..encode.on_device.factors import borrowed
from .placement import Placement


def unpacked(body: Tensor, bits: int) -> Tensor:
    """Codes u8 [..., n·8/bits] of a stream of `bits` bits each, least significant first, packed as u8 [..., n]."""
    width = math.lcm(bits, 8) // 8
    parts = body.reshape(*body.shape[:-1], -1, width).int()
    words = sum((parts[..., i] << 8 * i for i in range(width)), torch.zeros_like(parts[..., 0]))
    codes = [(words >> bits * i & (1 << bits) - 1).to(torch.uint8) for i in range(width * 8 // bits)]
    return torch.stack(codes, -1).flatten(-2)


@cache
def _kernels() -> Backend:
    """A back end whose kernels run in torch's own stream, in turn with what torch does."""
    return open_gpu("cuda", own_stream=False)


def dequantised(heads: Tensor, codes: Tensor, even: bool) -> Tensor:
    """Values f32 [G, 256] of codes u8 [G, 256]; `heads` f32 [G, n] are levels or, of an even grid, (scale, zero).

    The bits are those of `Format.decode`.
    """
    if heads.is_cuda:
        values = torch.empty(codes.shape, device=codes.device)
        there = _kernels()
        out, given, levels = (borrowed(there, t.contiguous()) for t in (values, codes, heads))
        spread_levels(there, out, given, levels, even)
        return values
    if even:
        return heads[:, 1:] + heads[:, :1] * codes.float()
    groups, count = heads.shape
    first = torch.arange(0, groups * count, count, dtype=torch.int32, device=codes.device)
    places = (codes + first[:, None]).flatten()
    return heads.flatten().index_select(0, places).view_as(codes)


def head_gradient(gradient: Tensor, codes: Tensor, count: int, even: bool) -> Tensor:
    """The gradient f32 [G, n] of a matrix's heads, from that of its values f32 [G, 256]."""
    if gradient.is_cuda:
        sums = torch.empty(len(gradient), count, device=codes.device)
        there = _kernels()
        out, given, chosen = (borrowed(there, t.contiguous()) for t in (sums, gradient, codes))
        level_gradients(there, out, given, chosen, even)
        return sums
    if even:
        return torch.stack([(gradient * codes.float()).sum(-1), gradient.sum(-1)], -1)
    return gradient.new_zeros(len(gradient), count).scatter_add_(1, codes.long(), gradient)


class _Products(torch.autograd.Function):
    """x W^T for x f32 [B, m, K] and B matrices; saves x, heads and codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Tensor, codes: Tensor, even: bool) -> Tensor:
        ctx.save_for_backward(x, heads, codes)
        ctx.even = even
        return torch.bmm(x, _matrices(heads, codes, even, x.shape[2]).mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        x, heads, codes = ctx.saved_tensors
        of_x = of_heads = None
        if ctx.needs_input_grad[0]:
            of_x = torch.bmm(gradient, _matrices(heads, codes, ctx.even, x.shape[2]))
        if ctx.needs_input_grad[1]:
            of_values = torch.bmm(gradient.mT, x).view(-1, GROUP)
            of_heads = head_gradient(of_values, codes.view(-1, GROUP), heads.shape[2], ctx.even)
            of_heads = of_heads.view_as(heads)
        return of_x, of_heads, None, None


def _matrices(heads: Tensor, codes: Tensor, even: bool, width: int) -> Tensor:
    """Values f32 [B, R, K] of heads f32 [B, G, n] and codes u8 [B, G, 256]."""
    values = dequantised(heads.flatten(0, 1), codes.flatten(0, 1), even)
    return values.view(len(heads), -1, width)


class _Taken(torch.autograd.Function):
    """x[rows]. The gradient comes from the rows `back` of its own, or is zero where `used` bool says no."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor, used: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, used)
        return x[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back, used = ctx.saved_tensors
        of_x = gradients[0][back]
        return of_x if used is None else of_x * used[:, None], None, None, None


class _Spread(torch.autograd.Function):
    """The token of each place, for x [tokens, n] with `count` choices each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, choice: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.count = count
        return x[choice // count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        (gradient,) = gradients
        back = gradient[place].view(-1, ctx.count, gradient.shape[1])
        return back.sum(1), None, None, None


def products(x: Tensor, heads: Tensor, codes: Tensor, even: bool) -> Tensor:
    """x W^T f32 [B, m, R] for x f32 [B, m, K] and B matrices as codes u8 [B, G, 256] and heads f32 [B, G, n]."""
    out: Tensor = _Products.apply(x, heads, codes, even)  # type: ignore[no-untyped-call]
    return out


def spread(x: Tensor, placement: Placement, count: int) -> Tensor:
    """Tokens [tokens, n], each with `count` choices, where they are computed: [places, n]."""
    out: Tensor = _Spread.apply(x, placement.place, placement.choice, count)  # type: ignore[no-untyped-call]
    return out


def returned(y: Tensor, placement: Placement) -> Tensor:
    """What was computed [places, n], for each choice in order: [choices, n]."""
    p = placement
    out: Tensor = _Taken.apply(y, p.place, p.choice, p.used)  # type: ignore[no-untyped-call]
    return out


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """x[order] for a permutation i64 [m] of the rows of x [m, ...]."""
    out: Tensor = _Taken.apply(x, order, order.argsort(), None)  # type: ignore[no-untyped-call]
    return out


@cache
def _rotation(device: torch.device) -> Tensor:
    return torch.from_numpy(rotate(np.eye(GROUP, dtype=np.float32))).to(device)


def rotated(x: Tensor) -> Tensor:
    """Each run of 256 along the last axis of x f32 [..., 256·k] rotated as the formats do, up to f32 rounding."""
    return (x.reshape(*x.shape[:-1], -1, GROUP) @ _rotation(x.device)).flatten(-2)
