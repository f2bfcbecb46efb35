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
from torch.nn import functional as F  # noqa: N812

from ...formats.fwht import GROUP, rotate


def unpacked(body: Tensor, bits: int) -> Tensor:
    """Codes u8 [..., n·8/bits] of a stream of `bits` bits each, least significant first, packed as u8 [..., n]."""
    width = math.lcm(bits, 8) // 8
    parts = body.reshape(*body.shape[:-1], -1, width).int()
    words = sum((parts[..., i] << 8 * i for i in range(width)), torch.zeros_like(parts[..., 0]))
    codes = [(words >> bits * i & (1 << bits) - 1).to(torch.uint8) for i in range(width * 8 // bits)]
    return torch.stack(codes, -1).flatten(-2)


def dequantised(heads: Tensor, codes: Tensor, even: bool) -> Tensor:
    """Values f32 [G, 256] of codes u8 [G, 256]; `heads` f32 [G, n] are levels or, of an even grid, (scale, zero).

    The bits are those of `Format.decode`.
    """
    if even:
        return heads[:, 1:] + heads[:, :1] * codes.float()
    groups, count = heads.shape
    first = torch.arange(0, groups * count, count, dtype=torch.int32, device=codes.device)
    places = (codes + first[:, None]).flatten()
    return heads.flatten().index_select(0, places).view_as(codes)


def head_gradient(gradient: Tensor, codes: Tensor, count: int, even: bool) -> Tensor:
    """The gradient f32 [G, n] of a matrix's heads, from that of its values f32 [G, 256]."""
    if even:
        return torch.stack([(gradient * codes.float()).sum(-1), gradient.sum(-1)], -1)
    if gradient.device.type == "cpu":  # scatter_add_ of matrices has no fixed order on a GPU
        return gradient.new_zeros(len(gradient), count).scatter_add_(1, codes.long(), gradient)
    nothing = gradient.new_zeros(())
    return torch.stack([torch.where(codes == k, gradient, nothing).sum(-1) for k in range(count)], -1)


class _Product(torch.autograd.Function):
    """x W^T for x f32 [m, K]; saves x, heads and codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Tensor, codes: Tensor, even: bool) -> Tensor:
        ctx.save_for_backward(x, heads, codes)
        ctx.even = even
        return F.linear(x, dequantised(heads, codes, even).view(-1, x.shape[1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        x, heads, codes = ctx.saved_tensors
        of_x = of_heads = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ dequantised(heads, codes, ctx.even).view(-1, x.shape[1])
        if ctx.needs_input_grad[1]:
            of_values = (gradient.T @ x).view_as(codes)
            of_heads = head_gradient(of_values, codes, heads.shape[1], ctx.even)
        return of_x, of_heads, None, None


class _Permuted(torch.autograd.Function):
    """Rows of x [m, n] in another order, whose inverse gives the gradient without a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0][inverse], None, None


class _Spread(torch.autograd.Function):
    """Each row of x [m, n] `count` times, the m·count rows in the order `order`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.count = count
        return x[order // count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        (gradient,) = gradients
        back = gradient[inverse].view(-1, ctx.count, gradient.shape[1])
        return back.sum(1), None, None, None


def product(x: Tensor, heads: Tensor, codes: Tensor, even: bool) -> Tensor:
    """x W^T f32 [m, R] for x f32 [m, K] and a matrix as codes u8 [G, 256] and heads f32 [G, n] (see `dequantised`)."""
    out: Tensor = _Product.apply(x, heads, codes, even)  # type: ignore[no-untyped-call]
    return out


def permuted(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order] for a permutation i64 [m] of the rows of x [m, n] and its inverse."""
    out: Tensor = _Permuted.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out


def spread(x: Tensor, order: Tensor, inverse: Tensor, count: int) -> Tensor:
    """The rows of x [m, n], each `count` times in a row, in the order of a permutation i64 [m·count]."""
    out: Tensor = _Spread.apply(x, order, inverse, count)  # type: ignore[no-untyped-call]
    return out


@cache
def _rotation(device: torch.device) -> Tensor:
    return torch.from_numpy(rotate(np.eye(GROUP, dtype=np.float32))).to(device)


def rotated(x: Tensor) -> Tensor:
    """Each run of 256 along the last axis of x f32 [..., 256·k] rotated as the formats do, up to f32 rounding."""
    return (x.reshape(*x.shape[:-1], -1, GROUP) @ _rotation(x.device)).flatten(-2)
